"""AugReg: "How to train your ViT?" on ImageNet-1k or ImageNet-21k.

  python vit_jax/train.py --workdir runs/b16 \
    --config configs/augreg.py:model=B/16,dataset=i21k,data=tfds:imagenet21k

Arguments, after a colon and separated by commas; the first value is the
default:
  data=FOLDER, or tfds:NAME:VERSION
  dataset=i1k|i21k     loss and head are the same, their bias and the splits not
  model=B/16|R+Ti/16|Ti/16|S/32|S/16|B/32|B/8|R26+S/32|R26+B/32|R50+B/16|L/16|
        R50+L/32
  stem=default|conv    a convolutional stem in place of the model's own
  aug=best|none|light1|light2|medium1|medium2|strong1|strong2
                       names of the paper; file:light0 and so on: names of the
                       released files, in which light1 is the paper's light2
  reg=best|0.0|0.1     dropout and stochastic depth
  wd=best|0.03|0.1     times the learning rate
  epochs=300|30        30: on i21k
  smoke                four steps of a small model on made images

`best` is the best setting of the paper for that model and data set
(recipes.AUGREG_BEST). The run prints its RandAugment layers, magnitude and
mixup. Top-1 accuracy in % after 300 epochs, and for i1k the accuracy on the
part of its training set that is kept apart (minival), for the best setting:

                  Ti/16  S/32  S/16  B/32  B/16  L/16  R+Ti/16 R26+S/32 R50+L/32
  i1k, minival    76     76    82    78    83    79    73      82       79
  i1k, val        69.56  69.19 77.51 71.38 78.73 74.01 67.30   78.20    74.17
  i21k, val       41     43    47    48    51    51    39      48       51

(Figure 4; i1k val: Table 3, column i1k300 at 224 px, one model each chosen
otherwise.) After fine-tuning the i21k models at 384 px: configs/finetune.py.

Hardware: the paper used TPU v3; B/16 on i21k for 300 epochs is about 3.9e9
images of 105 GFLOP.

What differs: stochastic depth as in the paper (big_vision's ViT has none);
moments of Adam in float32; mixup pairs the whole batch, not a device's share.
R26+B/32 and R50+B/16 are no AugReg models and take the settings of B/32, B/16.
"""
from vit_jax import recipes

MODELS = ('B/16', 'R+Ti/16', 'Ti/16', 'S/32', 'S/16', 'B/32', 'B/8', 'R26+S/32',
          'R26+B/32', 'R50+B/16', 'L/16', 'R50+L/32')


def get_config(args=None):
  """Returns the config; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, data='', dataset=('i1k', 'i21k'), model=MODELS,
      stem=('default', 'conv'), aug='best', reg=('best', '0.0', '0.1'),
      wd=('best', '0.03', '0.1'), epochs=(300, 30), smoke=False)
  layers, magnitude, alpha, rate, wd = recipes.augreg_setting(
      args.dataset, args.model, args.epochs, args.aug, args.reg, args.wd)
  c = recipes.base()
  c.total_epochs = float(args.epochs)
  c.global_batch_size = 4096

  recipes.set_data(c, args.data)
  if c.input.source == 'tfds' and args.dataset == 'i1k':
    c.input.train_split = 'train[:99%]'
    c.input.eval_split = 'minival=train[99%:], val=validation'
  elif c.input.source == 'tfds':
    c.input.train_split = 'full[51200:]'
    c.input.eval_split = 'val=full[25600:51200], test=full[:25600]'
  c.input.pp = 'decode|inception_crop(224)|flip_lr'
  c.input.eval_pp = 'decode|resize_small(256)|central_crop(224)'
  c.augment = '|'.join(
      [f'randaug({layers}, {magnitude})'] * (layers > 0)
      + [f'mixup({alpha})'] * (alpha > 0))
  c.model.size = args.model
  if args.stem == 'default':
    c.model.stem = 'resnet' if '+' in args.model else 'patchify'
  else:
    c.model.stem = args.stem
  c.model.gelu = 'tanh'
  c.model.init = 'vision_transformer'
  c.model.head_bias = {'i1k': -6.9, 'i21k': -10.0}[args.dataset]
  c.model.dropout = c.model.stochastic_depth = rate
  c.loss = dict(name='sigmoid_xent', label_smoothing=0.0)

  c.optimizer = recipes.adamw(1e-3, wd, recipes.DECAY_KERNELS)
  c.optimizer.clip_norm = 1.0
  c.schedule = recipes.cosine(warmup_epochs=0.0)
  del c.schedule['warmup_epochs']
  c.schedule.warmup_steps = 10_000

  c.evaluators = dict(val=dict(name='classification', split='val'))
  if c.input.source == 'tfds':
    other = {'i1k': 'minival', 'i21k': 'test'}[args.dataset]
    c.evaluators[other] = dict(name='classification', split=other)
  c.eval.every_epochs = 5.0
  c.checkpoint.keep_best = 'val/top1'
  if c.input.source == 'tfds' and args.dataset == 'i1k':
    c.checkpoint.keep_best = 'minival/top1'
  return recipes.smoke(c) if args.smoke else c
