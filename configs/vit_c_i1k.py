"""ViT_P and ViT_C on ImageNet-1k, 1-36 GF ("Early Convolutions Help ...").

  python vit_jax/train.py --config configs/vit_c_i1k.py:data=/data/imagenet \
    --workdir runs/vit_c_4gf

Arguments, after a colon and separated by commas; the first value is the
default:
  data=FOLDER (train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or val/*.JPEG with
       the list of wnids), or tfds:imagenet2012:5.1.0
  stem=conv|patchify, and at 4GF S1|S2|S3|S4|patchify_bn|conv_ln
  size=4GF|1GF|16GF|18GF|36GF (micro: for tests)
  epochs=400|200|100|50
  optimizer=adamw|sgd
  settings=simple|tuned    lr and weight decay of section 6, or of Table 4 left
  aug=auto|rand            AutoAugment, or timm's RandAugment, as DeiT has it
  ema=true, erasing=0.0 (DeiT: 0.25), stochastic_depth=0.0 (DeiT: 0.1),
  repeats=1 (DeiT: 3)      the rows of Table 5
  smoke                    four steps of a small model on made images

Top-1 error in %, Table 2 (settings=simple), and hours on 8 V100 GPUs of 32 GB
for 400 epochs, from its minutes an epoch:

  epochs          100    200    400    hours
  patchify 1GF    33.2   29.7   27.7    17
  conv     1GF    28.6   26.1   24.7    18
  patchify 4GF    23.3   20.8   19.6    25
  conv     4GF    20.9   19.2   18.6    26
  patchify 18GF   19.9   18.4   17.9    77
  conv     18GF   18.4   17.5   17.0    76
  patchify 36GF   19.9   18.8   18.2   125
  conv     36GF   18.3   17.6   16.8   124

epochs=50,settings=tuned at 4GF, AdamW and SGD (Table 3): conv 24.0, 24.7; S1
24.3, 25.1; S2 24.3, 25.3; S3 25.1, 26.2; S4 26.2, 27.9; patchify 27.7, 33.0.
epochs=100,settings=tuned at 4GF (Figure 7): patchify_bn 23.3, conv_ln 21.1.
settings=tuned, Table 5, after 100 and 400 epochs (ema=false but for the first):
                                                       patchify 4GF  18GF
  aug=auto                                               23.2 20.5   19.9 17.9
  aug=auto                                               23.0 20.3   20.4 20.0
  aug=rand                                               23.5 20.3   20.9 19.7
  aug=rand,erasing=0.25                                  23.6 20.4   21.2 19.9
  aug=rand,erasing=0.25,repeats=3                        24.9 20.5   25.1 19.2
  aug=rand,erasing=0.25,repeats=3,stochastic_depth=0.1   25.4 20.7   22.5 18.6

What differs: bfloat16 instead of float16; images in RGB order; the learning
rates of the ablation stems, which the paper tuned but does not print, are those
of conv (patchify_bn: of patchify). 16GF (48 thin blocks, Figure 8) has no error
in the paper.
"""
from vit_jax import recipes

STEMS = ('conv', 'patchify', *recipes.ABLATION_STEMS)
SIZES = ('4GF', '1GF', '16GF', '18GF', '36GF', 'micro')


def get_config(args=None):
  """Returns the config; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, data='', stem=STEMS, size=SIZES, epochs=(400, 200, 100, 50),
      optimizer=('adamw', 'sgd'), settings=('simple', 'tuned'),
      aug=('auto', 'rand'), ema=True, erasing=0.0, stochastic_depth=0.0,
      repeats=1, smoke=False)
  c = recipes.base()
  c.total_epochs = float(args.epochs)
  c.global_batch_size = 2048

  recipes.set_data(c, args.data)
  c.input.epoch = 'floor'
  c.input.repeats = args.repeats
  c.input.pp = 'decode|random_resized_crop(224, 8, 100)|flip_lr'
  c.input.eval_pp = "decode|resize_small(256, 'bilinear')|central_crop(224)"
  c.input.mean, c.input.std = recipes.IMAGENET_MEAN, recipes.IMAGENET_STD
  c.input.num_train, c.input.num_classes = 1_281_167, 1000
  c.augment = recipes.vit_c_augment(args.aug, args.erasing)
  c.model.size, c.model.stem = args.size, args.stem
  c.model.stochastic_depth = args.stochastic_depth
  c.model.batch_norm_group = recipes.BATCH_NORM_GROUP[args.size]
  c.precise_bn.examples = recipes.PRECISE_BN

  lr, wd = recipes.vit_c_rates(
      args.stem, args.size, args.optimizer, args.settings)
  if (args.stem, args.size, args.aug) == ('patchify', '18GF', 'rand'):
    wd = 0.5  # Table 5
  c.optimizer = getattr(recipes, args.optimizer)(lr, wd)
  c.schedule = recipes.pycls_cosine()
  if args.ema:
    c.ema = dict(name='pycls', alpha=1e-5, every_steps=32)

  c.evaluators = dict(val=dict(name='classification', split='val'))
  c.eval.every_epochs = 5.0
  c.checkpoint.keep_best = 'val_ema/top1' if args.ema else 'val/top1'
  return recipes.smoke(c) if args.smoke else c
