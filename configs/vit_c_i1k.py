"""ViT_P and ViT_C on ImageNet-1k, 1-72 GF ("Early Convolutions Help ...").

  vit-jax plan --config configs/vit_c_i1k.py:stem=conv,size=4GF

Arguments: stem=conv|patchify|S1..S4|patchify_bn|conv_ln, size=1GF|...|72GF,
epochs=400, path=FOLDER (train/<wnid>/*.JPEG, val/<wnid>/*.JPEG).

The paper's recipe (AdamW, section 6; augmentation, schedule, EMA, batch 2048,
BatchNorm's groups and precise statistics, floor epochs). Its error for
ViT_C-4GF at 400 epochs is 18.6 % (Table 2); nobody has trained that long here.
"""
from vit_jax import recipes

STEMS = ('conv', 'patchify', 'S1', 'S2', 'S3', 'S4', 'patchify_bn', 'conv_ln')


def get_config(args=None):
  args = recipes.parse_args(
      args, stem=STEMS, size=('4GF', '1GF', '16GF', '18GF', '36GF', '72GF'),
      epochs=400.0, path='')
  c = recipes.base()
  c.total_epochs = args.epochs
  c.global_batch_size = 2048

  c.input.source = 'folder'
  c.input.path = args.path
  c.input.epoch = 'floor'
  c.input.pp = 'decode|inception_crop(224, 8, 100)|flip_lr'
  c.input.eval_pp = 'decode|resize_small(256)|central_crop(224)'
  c.input.mean, c.input.std = recipes.IMAGENET_MEAN, recipes.IMAGENET_STD
  c.input.num_train, c.input.num_classes = 1_281_167, 1000
  c.augment = recipes.AUGMENT_PAPER
  c.model.size, c.model.stem = args.size, args.stem
  c.model.batch_norm_group = recipes.BATCH_NORM_GROUP[args.size]
  c.precise_bn.examples = recipes.PRECISE_BN

  c.optimizer = recipes.adamw(*recipes.SIMPLE[args.size])
  c.schedule = recipes.pycls_cosine()
  c.ema = dict(name='pycls', alpha=1e-5, every_steps=32)

  c.evaluators = dict(val=dict(name='classification', split='val'))
  c.eval.every_epochs = 5.0
  c.checkpoint.keep_best = 'val_ema/top1'
  return c
