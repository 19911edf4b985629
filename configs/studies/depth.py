"""Study 6: a deeper model.

  vit-jax study run configs/studies/depth.py --dir runs/studies

The paper (Figure 8, Appendix B, 50 epochs): with 48 thin blocks in place of 12
ViT_C stays better and more stable, and both train without tricks. Arguments:
scale=digits|cifar10|imagenet, data=PATH, trials=12 draws of (lr, weight decay).
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', per_class=0,
      trials=12)
  c = recipes.study('depth', args)
  c.points = dict(kind='random', count=args.trials, seed=0)
  for stem in ('conv', 'patchify'):
    for depth, size in recipes.STUDY_SCALES[args.scale]['depths'].items():
      c.arms += recipes.study_arm(
          f'{stem} {depth} blocks', args, stem=stem, size=size)
  return c
