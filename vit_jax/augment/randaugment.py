"""RandAugment (arXiv 1909.13719) in three variants.

Each layer draws one op of a list, all with the same magnitude.

augreg  The original TensorFlow ops as AugReg used them (big_vision's
        pp/archive/autoaugment.py, which is tensorflow/tpu's), each op drawn
        always carried out (the code draws a probability and drops it), nearest
        neighbour, grey 128 outside. With their quirks:
          Solarize     the threshold wraps to 8 bits: 0, 256 and 512
                       (magnitudes 0, 10, 20) invert everything
          Posterize    0 bits keep one
          Contrast     blends with the constant pixels / 256 and not with the
                       image's mean (see `image_ops.contrast_tf`; later versions
                       of big_vision have mended that)
          AutoContrast float32 rounding, which loses a level here and there
          Translate, Cutout  in pixels, whatever the image's size
        Solarize and Posterize do less, not more, as the magnitude grows.
fixed   The same list and strengths, mended: Solarize without the wrap (nothing
        from magnitude 10 on), Contrast with the image's mean, translation and
        cutout in pixels of a 224 image and in proportion in others, all else as
        Pillow does it. Not mended: the direction of Solarize and Posterize.
timm    `rand-m9-mstd0.5-inc1`, which DeiT used (timm/data/auto_augment.py):
        15 ops without Cutout, all stronger with the magnitude, each carried out
        with probability 0.5 at a magnitude of its own, normal with standard
        deviation 0.5 and clipped to [0, 10]; the mean colour outside. The
        normal law is 64 equally likely values here. Warps are bilinear (DeiT
        set bicubic, timm alone draws either of the two).
"""
import dataclasses

import numpy as np
from scipy import special

from vit_jax.augment import image_ops
from vit_jax.augment import op_policy

_GREY = 128
_TIMM_DEVIATION, _TIMM_PROBABILITY, _TIMM_LEVELS = 0.5, 0.5, 64


@dataclasses.dataclass(frozen=True)
class RandAug:
  """`randaug(layers, magnitude, variant='augreg')`."""
  layers: int
  magnitude: float
  variant: str = 'augreg'
  stage = 'pixels'

  def __post_init__(self):
    if not isinstance(self.variant, str) or self.variant not in VARIANTS:
      raise TypeError(f'variant={self.variant!r} is none of '
                      + ', '.join(map(repr, VARIANTS)))
    largest = largest_magnitude(self.variant)
    for name, kinds, low, high in (
        ('layers', int, 1, 16), ('magnitude', (int, float), 0, largest)):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, kinds) or not (
          low <= value <= high):
        kind = 'an integer' if kinds is int else 'a number'
        raise TypeError(
            f'{name}={value!r} must be {kind} in [{low}, {high}]')

  def policy(self, image_shape, mean):
    """The Policy.

    Args:
      image_shape: (H, W, C).
      mean: of the data, fractions, one or one a channel.
    """
    height, width, channels = image_shape
    levels = [self.magnitude]
    fill = np.full(channels, _GREY)
    if self.variant == 'timm':
      quantiles = (np.arange(_TIMM_LEVELS) + 0.5) / _TIMM_LEVELS
      levels = self.magnitude + _TIMM_DEVIATION * special.ndtri(quantiles)
      levels = levels.clip(0, largest_magnitude('timm'))
      fill = np.broadcast_to(np.round(255 * np.asarray(mean)), channels)
    by_level = [VARIANTS[self.variant](m / 10, height, width) for m in levels]
    choices = [[[pair[name] for pair in by_level]] for name in by_level[0]]
    return op_policy.create(
        choices, self.layers, fill.clip(0, 255).astype(np.uint8))


def pillow_ops(part, height, width, warp):
  """The ops at a fraction of the largest strength that AutoAugment knows.

  Args:
    part: magnitude / 10.
    height, width: of the images.
    warp: interpolation, see `image_ops`.

  Returns:
    {name: (values, function)}: the values, which are none, one, or two of
    which one is drawn; and a function from a value to an `op_forms.Op`.
  """
  factor = (part * 1.8 + 0.1,)
  return {
      'AutoContrast': ((), image_ops.autocontrast),
      'Equalize': ((), image_ops.equalize),
      'Invert': ((), image_ops.invert),
      'Rotate': (_either(part * 30), lambda v: image_ops.rotate(
          v, height, width, warp)),
      'Posterize': ((max(int(part * 4), 1),), image_ops.posterize),
      'Solarize': ((int(part * 256),), image_ops.solarize),
      'SolarizeAdd': ((int(part * 110),), image_ops.solarize_add),
      'Color': (factor, image_ops.color),
      'Contrast': (factor, image_ops.contrast),
      'Brightness': (factor, image_ops.brightness),
      'Sharpness': (factor, image_ops.sharpness),
      'ShearX': (_either(part * 0.3), lambda v: image_ops.shear_x(v, warp)),
      'ShearY': (_either(part * 0.3), lambda v: image_ops.shear_y(v, warp)),
      **_translations(part * 0.45 * width, part * 0.45 * height, warp),
  }


def pair(name, values, make, probability=1.0):
  """Two Candidates for an entry of `pillow_ops`."""
  found = [op_policy.Candidate(
      f'{name}({v:.3g})', make(v), probability) for v in values] or [
          op_policy.Candidate(name, make(), probability)]
  return found * (2 // len(found))


def _pairs(table, probability=1.0):
  return {name: pair(name, *entry, probability)
          for name, entry in table.items()}


def _augreg(part, height, width):
  warp = 'nearest_tf'
  factor = (part * 1.8 + 0.1,)
  return _pairs({
      **pillow_ops(part, height, width, warp),
      'AutoContrast': ((), lambda: image_ops.autocontrast('autocontrast_tf')),
      'Solarize': ((int(part * 256) % 256,), image_ops.solarize),
      'Color': (factor, lambda v: image_ops.color(v, 'color_tf')),
      'Contrast': (factor, lambda v: image_ops.contrast_tf(v, height, width)),
      'Sharpness': (factor, lambda v: image_ops.sharpness(v, 'sharpness_tf')),
      **_translations(part * 100, part * 100, warp),
      'Cutout': ((int(part * 40),), image_ops.cutout),
  })


def _fixed(part, height, width):
  warp = 'nearest'
  pixels, half_side = part * 100, round(part * 40 * min(height, width) / 224)
  return _pairs({
      **pillow_ops(part, height, width, warp),
      **_translations(pixels * width / 224, pixels * height / 224, warp),
      'Cutout': ((half_side,), image_ops.cutout),
  })


def _timm(part, height, width):
  factor = tuple(max(1 + v, 0.1) for v in _either(part * 0.9))
  return _pairs({
      **pillow_ops(part, height, width, 'bilinear'),
      'Posterize': ((4 - int(part * 4),), image_ops.posterize),
      'Solarize': ((256 - int(part * 256),), image_ops.solarize),
      'Color': (factor, image_ops.color),
      'Contrast': (factor, image_ops.contrast),
      'Brightness': (factor, image_ops.brightness),
      'Sharpness': (factor, image_ops.sharpness),
  }, _TIMM_PROBABILITY)


VARIANTS = {'augreg': _augreg, 'fixed': _fixed, 'timm': _timm}


def largest_magnitude(variant):
  return 10 if variant == 'timm' else 20


def _translations(x, y, warp):
  return {
      'TranslateX': (_either(x), lambda v: image_ops.translate_x(v, warp)),
      'TranslateY': (_either(y), lambda v: image_ops.translate_y(v, warp)),
  }


def _either(value):
  return -value, value
