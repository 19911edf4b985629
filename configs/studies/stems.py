"""Study 5: stems between the two, at equal flops.

  vit-jax study run configs/studies/stems.py --dir runs/studies

The paper (Table 3 and Figure 7, 4GF): error grows from C over S1 to S4 to P, as
the patchify layer in the stem gets larger, and more with SGD; BatchNorm after a
patchify layer, or LayerNorm in the conv stem, changes little. Arguments:
scale=digits|cifar10|imagenet, data=PATH, seeds=10 (cifar10: 3, imagenet: 1).
"""
from vit_jax import recipes

STEMS = ('conv', 'S1', 'S2', 'S3', 'S4', 'patchify', 'patchify_bn', 'conv_ln')
# S4 patchifies 16 pixels: more than a token of the small models has.
SMALL = tuple(stem for stem in STEMS if stem != 'S4')


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', per_class=0, seeds=0)
  c = recipes.study('stems', args)
  for optimizer in ('adamw', 'sgd'):
    for stem in STEMS if args.scale == 'imagenet' else SMALL:
      c.arms += recipes.study_arm(
          f'{stem} {optimizer}', args, stem=stem, optimizer=optimizer)
  return c
