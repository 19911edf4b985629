"""ViT_C on the embedded default: scikit-learn's 8x8 digits, at 32x32.

  python vit_jax/train.py --config configs/digits.py --workdir runs/digits

About half a minute on 2 CPU cores. Arguments, after a colon and separated by
commas: stem=conv|patchify|..., optimizer=adamw|sgd, epochs=40, seed=0, lr=0
and wd=-1 (0 and -1: the config's own); classes=0-4 (or 1+7; all of them),
per_class=0 (training images of each; 0: all), checkpoint=WORKDIR (start from
that run, but for the head), smoke: four steps.
"""
from vit_jax import recipes

# Optimizer: its section, lr, weight decay.
OPTIMIZERS = {'adamw': (recipes.adamw, 2e-3, 0.1),
              'sgd': (recipes.sgd, 0.05, 1e-4)}


def get_config(args=None):
  """Returns the config; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, stem='conv', optimizer=tuple(OPTIMIZERS), epochs=40.0, seed=0,
      lr=0.0, wd=-1.0, classes='', per_class=0, checkpoint='',
      smoke=False)
  c = recipes.base()
  c.seed = args.seed
  c.total_epochs = args.epochs
  c.global_batch_size = 64

  c.input.source = 'digits'
  c.input.only_classes = recipes.class_names(args.classes)
  c.input.per_class = args.per_class
  c.input.pp = 'decode|pad_crop(32, 3)'
  c.model.size = 'micro'
  c.model.stem = args.stem
  c.model.pool = 'gap'
  c.loss.label_smoothing = 0.1

  make, lr, wd = OPTIMIZERS[args.optimizer]
  c.optimizer = make(args.lr or lr, wd if args.wd < 0 else args.wd)
  c.schedule = recipes.cosine(warmup_epochs=args.epochs / 10)
  c.ema = dict(name='decay', decay=0.99)

  if args.checkpoint:
    c.init_from.run = args.checkpoint
    c.init_from.reset = ('head/.*',)

  c.log.every_steps = 20
  c.eval = dict(every_percent=12.5, batch_size=512)
  c.checkpoint = dict(every_percent=25.0, keep_last=2, keep_best='test/top1')
  return recipes.smoke(c) if args.smoke else c
