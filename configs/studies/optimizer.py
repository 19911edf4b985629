"""Study 2: AdamW against SGD, at each length.

  vit-jax study run configs/studies/optimizer.py --dir runs/studies

The paper (Figure 3; Table 3: 50 epochs, 4GF): with SGD ViT_P loses 5.3 points
and ViT_C 0.7; ViT_P-18GF often diverges. Arguments: scale=digits|cifar10|
imagenet, data=PATH, base=10 epochs (cifar10: 5, imagenet: 50), of which it
takes 1, 2, 4, 8 times, per_class=0 (images; 0: all), seeds=10 (cifar10: 3,
imagenet: 1).
"""
from vit_jax import recipes


def get_config(args=None):
  """Returns the study; `args` is the text of arguments listed above."""
  args = recipes.parse_args(
      args, scale=tuple(recipes.STUDY_SCALES), data='', base=0.0,
      per_class=0, seeds=0)
  c = recipes.study('optimizer', args)
  for stem in ('conv', 'patchify'):
    for epochs in recipes.study_lengths(args):
      for optimizer in ('adamw', 'sgd'):
        c.arms += recipes.study_arm(
            f'{stem} {optimizer} {epochs:g} epochs', args, stem=stem,
            optimizer=optimizer, epochs=epochs)
  return c
