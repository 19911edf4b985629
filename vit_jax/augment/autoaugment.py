"""AutoAugment (arXiv 1805.09501), policy v0, as the ViT_C paper's code has it.

pycls/datasets/augment.py: of 25 pairs of ops one is drawn for each image, and
each op of the pair is carried out with its own probability; Pillow's ops,
bilinear warps, grey 128 outside, at least one bit in Posterize. (The policy is
that of the TPU EfficientNet code, not the one in AutoAugment's paper.)
"""
import dataclasses

import numpy as np

from vit_jax.augment import op_policy
from vit_jax.augment import randaugment

# Pairs of (op, probability, magnitude in [0, 1]).
V0 = (
    (('Equalize', 0.8, 0.1), ('ShearY', 0.8, 0.4)),
    (('Color', 0.4, 0.9), ('Equalize', 0.6, 0.3)),
    (('Color', 0.4, 0.1), ('Rotate', 0.6, 0.8)),
    (('Solarize', 0.8, 0.3), ('Equalize', 0.4, 0.7)),
    (('Solarize', 0.4, 0.2), ('Solarize', 0.6, 0.2)),
    (('Color', 0.2, 0.0), ('Equalize', 0.8, 0.8)),
    (('Equalize', 0.4, 0.8), ('SolarizeAdd', 0.8, 0.3)),
    (('ShearX', 0.2, 0.9), ('Rotate', 0.6, 0.8)),
    (('Color', 0.6, 0.1), ('Equalize', 1.0, 0.2)),
    (('Invert', 0.4, 0.9), ('Rotate', 0.6, 0.0)),
    (('Equalize', 1.0, 0.9), ('ShearY', 0.6, 0.3)),
    (('Color', 0.4, 0.7), ('Equalize', 0.6, 0.0)),
    (('Posterize', 0.4, 0.6), ('AutoContrast', 0.4, 0.7)),
    (('Solarize', 0.6, 0.8), ('Color', 0.6, 0.9)),
    (('Solarize', 0.2, 0.4), ('Rotate', 0.8, 0.9)),
    (('Rotate', 1.0, 0.7), ('TranslateY', 0.8, 0.9)),
    (('ShearX', 0.0, 0.0), ('Solarize', 0.8, 0.4)),
    (('ShearY', 0.8, 0.0), ('Color', 0.6, 0.4)),
    (('Color', 1.0, 0.0), ('Rotate', 0.6, 0.2)),
    (('Equalize', 0.8, 0.4), ('Equalize', 0.0, 0.8)),
    (('Equalize', 1.0, 0.4), ('AutoContrast', 0.6, 0.2)),
    (('ShearY', 0.4, 0.7), ('SolarizeAdd', 0.6, 0.7)),
    (('Posterize', 0.8, 0.2), ('Solarize', 0.6, 1.0)),
    (('Solarize', 0.6, 0.8), ('Equalize', 0.6, 0.1)),
    (('Color', 0.8, 0.6), ('Rotate', 0.4, 0.5)),
)
_GREY = 128


@dataclasses.dataclass(frozen=True)
class AutoAugment:
  """`autoaugment`."""
  stage = 'pixels'

  def policy(self, image_shape, mean):
    """The Policy; see `randaugment.RandAug.policy`."""
    del mean
    height, width, channels = image_shape

    def candidates(name, probability, magnitude):
      ops = randaugment.pillow_ops(magnitude, height, width, 'bilinear')
      return [randaugment.pair(name, *ops[name], probability)]

    choices = [[candidates(*op) for op in ops] for ops in V0]
    return op_policy.create(
        choices, 2, np.full(channels, _GREY, np.uint8), once=True)
