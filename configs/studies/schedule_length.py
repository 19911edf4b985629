"""Study 1: how much error a shorter schedule costs.

  vit-jax study run configs/studies/schedule_length.py --dir runs/studies

ViT_P and ViT_C, AdamW, at each length; the gap to the longest, over seeds. The
paper (Figure 2, Table 2): at 100 of 400 epochs ViT_P-4GF loses 3.7 points and
ViT_C-4GF 2.3. Arguments: scale=digits|cifar10|imagenet, data=PATH,
base=10 epochs (cifar10: 5, imagenet: 50), of which it takes 1, 2, 4, 8 times,
per_class=0 (images; 0: all), seeds=10 (cifar10: 3, imagenet: 1).
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', base=0.0,
      per_class=0, seeds=0)
  c = recipes.study('schedule_length', args)
  for stem in ('conv', 'patchify'):
    for epochs in recipes.study_lengths(args):
      c.arms += recipes.study_arm(
          f'{stem} {epochs:g} epochs', args, stem=stem, epochs=epochs)
  return c
