"""Study 4: the best setting of each arm of study 3, over paired seeds.

  vit-jax study run configs/studies/peak.py --dir runs/studies

The setting with the lowest error on the validation part in runs/studies/edf,
which has to be there; errors are those of the test part. The paper (Table 2,
400 epochs): ViT_C is better by 3.0, 1.0, 0.9, 1.4 points at 1, 4, 18, 36 GF.
Arguments: scale=digits|cifar10|imagenet, data=PATH, seeds=40 (others: 5).
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', per_class=0, seeds=0)
  c = recipes.study('peak', args)
  count = args.seeds or (40 if args.scale == 'digits' else 5)
  c.points = dict(kind='best', of='edf', count=count)
  for stem in ('conv', 'patchify'):
    for optimizer in ('adamw', 'sgd'):
      c.arms += recipes.study_arm(
          f'{stem} {optimizer}', args, stem=stem, optimizer=optimizer)
  return c
