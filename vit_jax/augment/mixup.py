"""mixup (arXiv 1710.09412) and CutMix (1905.04899), one draw for a batch.

The partner of an example is the one before it in the global batch, whose order
is random already; of each device, only one image travels. (The published codes
permute at random, or roll within a device.) The mixing weights come from a
table of equally likely values, so that they are the same bits on every backend.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

_QUANTILES = 4096  # equally likely values in place of a beta law
# What the random bits are for.
_SHARE, _ROW, _COLUMN, _WHICH = range(4)


@dataclasses.dataclass(frozen=True)
class Mixup:
  """`mixup(alpha)`, as AugReg did it (big_vision's utils.get_mixup).

  a ~ Beta(alpha, alpha), the larger of a and 1 - a for the image itself.
  """
  alpha: float
  stage = 'mix'

  def __post_init__(self):
    _check_alpha('alpha', self.alpha)

  def draw(self, key, height, width):
    """Draws for a batch.

    Args:
      key: of the batch.
      height, width: of the images.

    Returns:
      (float32 [H, W] or [1, 1], the weight of the image itself at each pixel;
      float32 [], that of its label).
    """
    del height, width
    a = beta(self.alpha)
    share = _pick(np.maximum(a, 1 - a), _bits(key))
    return share.reshape(1, 1), share


@dataclasses.dataclass(frozen=True)
class CutMix:
  """`cutmix(alpha)`, as the ViT_C paper's code did it (pycls/core/net.py).

  A box of sqrt(1 - a) times the sides, a ~ Beta(alpha, alpha), about a uniform
  centre and clipped, shows the partner. Its share of the area is the label's.
  """
  alpha: float
  stage = 'mix'

  def __post_init__(self):
    _check_alpha('alpha', self.alpha)

  def draw(self, key, height, width):
    """See `Mixup.draw`."""
    bits = _bits(key)
    side = np.sqrt(1 - beta(self.alpha))
    inside = jnp.ones((height, width), bool)
    for axis, (size, column) in enumerate(((height, _ROW), (width, _COLUMN))):
      half = _pick((size * side).astype(np.int32) // 2, bits)
      center = (bits[column] % jnp.uint32(size)).astype(jnp.int32)
      at = jax.lax.broadcasted_iota(jnp.int32, (height, width), axis)
      inside &= (at >= center - half) & (at < center + half)
    share = 1 - jnp.sum(inside, dtype=jnp.int32) / np.float32(height * width)
    return jnp.where(inside, 0, 1).astype(jnp.float32), share


@dataclasses.dataclass(frozen=True)
class MixupCutMix:
  """`mixup_cutmix(mixup_alpha, cutmix_alpha)`: one of the two in each batch.

  With equal chances, always applied; mixup without taking the larger share, as
  the ViT_C paper's code did it (pycls/core/net.py).
  """
  mixup_alpha: float
  cutmix_alpha: float
  stage = 'mix'

  def __post_init__(self):
    _check_alpha('mixup_alpha', self.mixup_alpha)
    _check_alpha('cutmix_alpha', self.cutmix_alpha)

  def draw(self, key, height, width):
    """See `Mixup.draw`."""
    weight, share = CutMix(self.cutmix_alpha).draw(key, height, width)
    bits = _bits(key)
    mixup = _pick(beta(self.mixup_alpha), bits)
    is_mixup = bits[_WHICH] % 2 == 0
    return (jnp.where(is_mixup, mixup, weight),
            jnp.where(is_mixup, mixup, share))


def mix(images, labels, weight, share):
  """Mixes a batch with itself, rolled by one.

  Args:
    images: float32 [B, H, W, C].
    labels: float32 [B, classes].
    weight, share: see `Mixup.draw`.

  Returns:
    images and labels, alike.
  """
  blend = lambda x, part: part * x + (1 - part) * jnp.roll(x, 1, axis=0)
  return blend(images, weight[None, ..., None]), blend(labels, share)


def beta(alpha):
  """Equally likely values of Beta(alpha, alpha): float32, ascending."""
  middle = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
  return special.betaincinv(alpha, alpha, middle).astype(np.float32)


def _bits(key):
  return jax.random.bits(key, (4,), jnp.uint32)


def _pick(table, bits):
  return jnp.asarray(table)[bits[_SHARE] % jnp.uint32(len(table))]


def _check_alpha(name, value):
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
      0 < value <= 100):
    raise TypeError(f'{name}={value!r} must be a number above 0, at most 100')
