"""Study 3: how much depends on the learning rate and the weight decay.

  vit-jax study run configs/studies/edf.py --dir runs/studies

The same random (lr, weight decay) for each of ViT_P and ViT_C with AdamW and
SGD: the distribution of errors, above the best. The paper (Figures 4 and 5, 64
draws, 50 epochs): the curves of ViT_C are steeper; with SGD 60 % of the runs of
ViT_C-18GF are within 4 points of the best, of ViT_P-18GF fewer than 20 %.
Arguments: scale=digits|cifar10|imagenet, data=PATH, trials=64.
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', per_class=0,
      trials=64)
  c = recipes.study('edf', args)
  c.points = dict(kind='random', count=args.trials, seed=0)
  for stem in ('conv', 'patchify'):
    for optimizer in ('adamw', 'sgd'):
      c.arms += recipes.study_arm(
          f'{stem} {optimizer}', args, stem=stem, optimizer=optimizer)
  return c
