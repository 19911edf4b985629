"""Fine-tuning: AugReg's recipe, BiT's HyperRule, or ViT_C's from 21k to 1k.

  python vit_jax/train.py --workdir runs/flowers \
    --config configs/finetune.py:checkpoint=B_16.npz,data=FOLDER,res=384

Arguments, after a colon and separated by commas; the first value is the
default:
  checkpoint=FILE (.npz, .safetensors, .pth; `vit-jax zoo` fetches released
       ones), or WORKDIR of a run here, which also says model, input and ops;
       without it, training starts from the initialisation
  data=FOLDER, FILE.npz, tfds:NAME[:VERSION] or digits
  preset=folder|pets|flowers|cifar10|cifar100|resisc45|kitti|vtab|imagenet2012
                       TFDS name, splits, length and rate (recipes.TRANSFER)
  model=B/16|Ti/16|S/16|R26+S/32|Mixer-B/16|BiT-R50x1|4GF|...
  stem=auto|patchify|conv|...    auto: resnet for hybrids, conv for 1GF .. 72GF
  origin=auto|augreg|timm|hf|deit|torchvision|pycls    whose weights: GELU,
                       epsilon and mean and deviation of the input; augreg: also
                       ViT, SAM, big_vision, Mixer and BiT. auto: pycls for 1GF
                       .. 72GF, else augreg
  rule=augreg|bit|vit_c_i21k
  res=0                pixels; 0: 224; with rule=bit the HyperRule's; of a run
                       its own
  crop=auto|inception|resmall    resmall: big_vision's
  tune=all|head        head: a linear probe
  freeze=-1            the first so many blocks and all before; 0: the stem only
  layer_decay=1.0      of the rate from one layer to the one below (0.75)
  batch_norm=train|frozen    of conv stems
  lr=0.0, steps=0, batch=0   0: the rule's
  n=0                  training images, for rule=bit without a preset
  classes=cat+dog or 0-4 (numbers): only those; per_class=0: so many training
                       images of each (0: all)
  seed=0
  smoke                four steps of a small model on made images

augreg: SGD, momentum 0.9, no weight decay, gradients clipped at 1, batch 512,
cosine after a linear warm-up, no dropout ("How to train your ViT?", Table 4).
Steps (warm-up) and rates of its grid, the default first, chosen on `val`:

  imagenet2012     20000 (500)                0.03  0.01
  cifar10          10000 (500), 2500 (200)    0.003 0.001 0.01  0.03
  cifar100         10000 (500), 2500 (200)    0.01  0.001 0.003 0.03
  pets, flowers    500 (100), 2500 (200)      0.003 0.001 0.01  0.03
  resisc45         2500 (200), 10000 (500)    0.01  0.001 0.003 0.03
  kitti            500 (100), 2500 (200)      0.01  0.001 0.003 0.03
  vtab             2500 (200), 500 (100)      0.01  0.001 0.003 0.03
  folder           500 (100), 2500 (200)      0.003 0.001 0.01  0.03

Top-1 accuracy on imagenet2012 of the released i21k models, paper's Table 3:

         Ti/16 S/32  S/16  B/32  B/16  L/16  R+Ti/16 R26+S/32 R50+L/32
  224    73.75 73.47 80.46 79.13 83.96 83.98 69.69   80.81    82.74
  384    78.22 79.58 83.73 83.59 85.49 85.59 75.40   83.85    85.99

big_vision has for B/32 at 384, mean of 5: cifar10 98.55, cifar100 91.35
(crop=resmall), pets 93.78, flowers 99.43. None of this has been run here.

bit: SGD 0.003 at batch 512, no decay; steps, staircase and mixup by the number
of training images, crop by their size (BiT, section 3.3).
vit_c_i21k: 20 epochs without weight decay ("Early Convolutions ...", Appendix
E). It does not print the rate, for which 1e-4, 3e-5 and 3e-4 are ours, nor the
rest, which is as in configs/vit_c_i1k.py: AdamW, batch 2048, augmentation.
Error on ImageNet-1k: 18.8 % (conv, 4GF), 15.1 (18GF), 14.2 (36GF).

What differs: momentum in float32 (AugReg: bfloat16); BiT's mixup pairs with the
neighbour, and its flips are random (its TensorFlow code always flips). TFDS has
no single class for kitti, and vtab is 19 data sets: give data.
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the config; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, checkpoint='', data='', preset=tuple(recipes.TRANSFER),
      model='auto', stem='auto', origin=('auto', *recipes.ORIGINS),
      rule=tuple(RULES), res=0, crop=('auto', 'inception', 'resmall'),
      tune=('all', 'head'), freeze=-1, layer_decay=1.0,
      batch_norm=('train', 'frozen'), lr=0.0, steps=0, batch=0, n=0,
      classes='', per_class=0, seed=0, smoke=False)
  row = recipes.TRANSFER[args.preset]
  c = recipes.base()
  c.seed = args.seed
  set_data(c, args, row)
  set_model(c, args)
  recipes.freeze(c, args.tune, args.freeze)

  c.loss.label_smoothing = 0.0
  crop, res = RULES[args.rule](c, args, row)
  c.optimizer.layer_decay = args.layer_decay
  if not c.init_from.run or args.res or args.crop != 'auto':
    res = 64 if args.smoke else args.res or res
    recipes.crop(c, crop if args.crop == 'auto' else args.crop, res)
  for section in (c.eval, c.checkpoint):
    del section['every_epochs']
    section.every_percent = 10.0
  if args.smoke:
    recipes.smoke(c)
    if args.freeze > 0:
      c.model.scan = False  # as their names are
  return c


def set_data(c, args, row):
  """Points at the data, and evaluates on its parts."""
  if not args.data and row.path:
    recipes.set_data(c, f'tfds:{row.path}')
  elif not args.data and args.preset != 'folder' and not args.smoke:
    raise ValueError(f'TFDS has no {args.preset} of one image and one class.\n'
                     'Give data=FOLDER or data=tfds:NAME.')
  else:
    recipes.set_data(c, args.data)
  parts = ['val' if c.input.source == 'folder' else 'test']
  if c.input.source == 'tfds':
    c.input.train_split, c.input.eval_split = row.train_split, row.eval_split
    parts = [p.partition('=')[0].strip() for p in row.eval_split.split(',')]
  c.evaluators = {
      part: dict(name='classification', split=part) for part in parts}
  c.checkpoint.keep_best = f'{parts[0]}/top1'
  c.input.only_classes = recipes.class_names(args.classes)
  c.input.per_class = args.per_class


def set_model(c, args):
  """Says which model it is, and where its weights come from."""
  if recipes.is_run(args.checkpoint):
    recipes.model_of_run(c, args.checkpoint)
    for name, found in (('model', c.model.size),
                        ('stem', c.model.get('stem', 'auto')),
                        ('origin', 'auto')):
      if args[name] not in ('auto', found):
        raise ValueError(
            f'{args.checkpoint} is a run here, with {name}={found}, not '
            f'{args[name]}.\nLeave {name} out.')
    c.init_from.run = args.checkpoint
  else:
    size = 'B/16' if args.model == 'auto' else args.model
    if size.startswith('Mixer'):
      c.model = recipes.mixer(size)
    elif size.startswith('BiT'):
      c.model = recipes.bit(size)
    else:
      c.model.size, c.model.stem = size, 'patchify'
      if '+' in size or size.endswith('GF'):
        c.model.stem = 'resnet' if '+' in size else 'conv'
    if args.stem != 'auto':
      if 'stem' not in c.model:
        raise ValueError(f'A model of size {size!r} has no stem={args.stem}.\n'
                         'Leave stem out.')
      c.model.stem = args.stem
    origin = args.origin
    if origin == 'auto':
      origin = 'pycls' if size.endswith('GF') else 'augreg'
    gelu, norm_eps, c.input.mean, c.input.std = recipes.ORIGINS[origin]
    if 'gelu' in c.model:
      c.model.gelu, c.model.norm_eps = gelu, norm_eps
    c.init_from.checkpoint = args.checkpoint
  if args.checkpoint:
    c.init_from.reset = ('head/.*',)
  if 'batch_norm' in c.model:
    c.model.batch_norm = args.batch_norm


def length(c, steps, warmup, batch):
  """Sets the length of the run and of its warm-up."""
  del c['total_epochs']
  c.total_steps, c.schedule.warmup_steps = steps, warmup
  c.global_batch_size = batch


# Rules: each sets the length, the optimizer and the augmentation, and returns
# how images are cropped: (a key of recipes.CROPS, pixels).


def augreg(c, args, row):
  """AugReg, Table 4."""
  c.optimizer = recipes.sgd(
      args.lr or row.rates[0], 0.0, recipes.DECAY_KERNELS)
  c.optimizer.update(nesterov=False, clip_norm=1.0)
  c.schedule = recipes.cosine(warmup_epochs=0.0)
  del c.schedule['warmup_epochs']
  steps = args.steps or row.lengths[0][0]
  warmup = dict(row.lengths).get(steps, min(steps // 5, 500))
  length(c, steps, warmup, args.batch or 512)
  return 'inception', 224


def bit(c, args, row):
  """BiT's HyperRule; ValueError without the number of images."""
  classes = len(c.input.only_classes) or row.num_classes
  n = args.n or args.per_class * classes or row.num_train
  if not n:
    raise ValueError("rule=bit goes by the number of training images.\n"
                     'Give n=NUMBER, or a preset.')
  steps, warmup, drops, alpha = recipes.bit_hyperrule(n)
  c.optimizer = recipes.sgd(args.lr or 0.003, 0.0, recipes.DECAY_KERNELS)
  c.optimizer.nesterov = False
  c.schedule = recipes.staircase(warmup, drops)
  c.augment = f'mixup({alpha})' if alpha else ''
  length(c, args.steps or steps, warmup, args.batch or 512)
  return 'square', recipes.bit_crop(row.side, row.side)[1]


def vit_c_i21k(c, args, row):
  """The ViT_C paper, Appendix E."""
  c.total_epochs = 20.0
  c.global_batch_size = args.batch or 2048
  if args.steps:
    del c['total_epochs']
    c.total_steps = args.steps
  c.input.epoch = 'floor'
  c.augment = recipes.vit_c_augment()
  c.loss.label_smoothing = 0.1
  c.optimizer = recipes.adamw(args.lr or 1e-4, 0.0)
  c.schedule = recipes.pycls_cosine()
  c.ema = dict(name='pycls', alpha=1e-5, every_steps=32)
  c.checkpoint.keep_best = c.checkpoint.keep_best.replace('/', '_ema/')
  if 'batch_norm_group' in c.model:
    c.model.batch_norm_group = recipes.BATCH_NORM_GROUP.get(c.model.size, 0)
    c.precise_bn.examples = recipes.PRECISE_BN
  return 'resized', 224


RULES = {'augreg': augreg, 'bit': bit, 'vit_c_i21k': vit_c_i21k}
