"""From scratch on a few thousand pictures, or on a set like CIFAR-10.

  python vit_jax/train.py --workdir runs/flowers \
    --config configs/from_scratch_small.py:data=FOLDER,res=96,size=Ti/16

Arguments, after a colon and separated by commas; the first value is the
default:
  data=FOLDER (train/<class>/*, val/<class>/*; or <class>/*, of which 10 % are
       held out), FILE.npz, or tfds:cifar10:3.0.2
  res=32               size of the training images
  crop=resized|pad     a random part of at least 35 % resized to res; or res out
                       of the image with 4 pixels of padding (CIFAR)
  stem=conv|patchify, size=mini|micro|Ti/16|S/16    mini, micro: for 32 to 64
                       pixels
  optimizer=adamw|sgd
  epochs=100, batch=128, seed=0
  smoke                four steps of a small model on made images

RandAugment in timm's form: AugReg's own moves by up to 100 pixels and cuts out
80, more than small images have. Below some ten thousand pictures, fine-tuning a
released checkpoint is better than this: configs/finetune.py.
"""
from vit_jax import recipes

# Optimizer: its section, lr, weight decay.
OPTIMIZERS = {'adamw': (recipes.adamw, 1e-3, 0.1),
              'sgd': (recipes.sgd, 0.05, 1e-4)}


def get_config(args=None):
  """Returns the config; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, data='', res=32, crop=('resized', 'pad'),
      stem=('conv', 'patchify'), size=('mini', 'micro', 'Ti/16', 'S/16'),
      optimizer=('adamw', 'sgd'), epochs=100.0, batch=128, seed=0, smoke=False)
  c = recipes.base()
  c.seed = args.seed
  c.total_epochs = args.epochs
  c.global_batch_size = args.batch

  recipes.set_data(c, args.data)
  crop = {'resized': f'random_resized_crop({args.res}, 35, 100)',
          'pad': f'pad_crop({args.res}, 4)'}[args.crop]
  c.input.pp = f'decode|{crop}|flip_lr'
  c.input.eval_pp = f'decode|resize({args.res})'
  if args.crop == 'resized':
    small = round(args.res * 8 / 7)
    c.input.eval_pp = f'decode|resize_small({small})|central_crop({args.res})'
  c.augment = "randaug(2, 9, 'timm')|mixup_cutmix(0.8, 1.0)"
  c.model.size, c.model.stem = args.size, args.stem
  c.model.pool = 'gap'
  c.model.stochastic_depth = 0.1

  make, lr, wd = OPTIMIZERS[args.optimizer]
  c.optimizer = make(lr, wd)
  c.optimizer.clip_norm = 1.0
  c.schedule = recipes.cosine(warmup_epochs=args.epochs / 20)
  c.ema = dict(name='decay', decay=0.998)

  part = 'test' if c.input.source != 'folder' else 'val'
  c.evaluators = {part: dict(name='classification', split=part)}
  c.eval.every_epochs = args.epochs / 10
  c.eval.batch_size = 512
  c.checkpoint.every_epochs = args.epochs / 10
  c.checkpoint.keep_best = f'{part}_ema/top1'
  return recipes.smoke(c) if args.smoke else c
