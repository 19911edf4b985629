"""The ops of RandAugment and AutoAugment at a known strength, as data.

Each is an `op_forms.Op`: a form, a table of 256 levels and a few integers, all
computed here in numpy, on the host, so that the device works in integers.

What follows Pillow and what the original TensorFlow ops: see `op_forms`.
"""
import math

import numpy as np

from vit_jax.augment import op_forms

LEVELS = op_forms.LEVELS
# Ties of coordinates go to the next pixel. In a large image the rounding of a
# matrix moves them by less than this.
_TIE = 2**op_forms.COORD_BITS // 4096


def identity():
  return op_forms.Op('identity')


def invert():
  return _op('table', 255 - LEVELS)


def posterize(bits):
  """Keeps the upper `bits` of 8."""
  return _op('table', LEVELS >> (8 - bits) << (8 - bits))


def solarize(threshold):
  """Inverts levels from `threshold` on."""
  return _op('table', np.where(threshold > LEVELS, LEVELS, 255 - LEVELS))


def solarize_add(addition):
  """Adds to levels below 128."""
  return _op('table', np.where(
      LEVELS < 128, np.minimum(LEVELS + addition, 255), LEVELS))


def brightness(factor):
  """Blends with black: a lone product, which float32 rounds alike anywhere."""
  return _op('table', np.clip(np.float32(factor) * np.float32(LEVELS), 0, 255))


def contrast(factor):
  """Blends with the mean of the image's grey."""
  return _op('contrast', numbers=[_fixed(factor)])


def contrast_tf(factor, height, width):
  """Blends with a constant.

  The mean was meant, but the original divides the sum of a histogram by 256:
  the number of pixels / 256, which is 196 at 224 pixels.
  """
  mean = min(height * width // 256, 255)
  return _op('table', op_forms.blend(mean, LEVELS, _fixed(factor)))


def color(factor, form='color'):
  """Blends with grey; form: color or color_tf."""
  return _op(form, numbers=[_fixed(factor)])


def sharpness(factor, form='sharpness'):
  """Blends with the 3x3 mean of triple centre; form: sharpness(_tf)."""
  return _op(form, numbers=[_fixed(factor)])


def equalize():
  return op_forms.Op('equalize')


def autocontrast(form='autocontrast'):
  """Stretches each channel to [0, 255]; form: autocontrast(_tf)."""
  return op_forms.Op(form)


def cutout(half_side):
  """Grey in a square of 2 * half_side, clipped, around a drawn pixel."""
  return _op('cutout', numbers=[half_side])


def shear_x(factor, interpolation):
  return _warp([1, factor, 0, 0, 1, 0], interpolation)


def shear_y(factor, interpolation):
  return _warp([1, 0, 0, factor, 1, 0], interpolation)


def translate_x(pixels, interpolation):
  return _warp([1, 0, pixels, 0, 1, 0], interpolation)


def translate_y(pixels, interpolation):
  return _warp([1, 0, 0, 0, 1, pixels], interpolation)


def rotate(degrees, height, width, interpolation):
  """About the centre."""
  # The first pixel is at 0, or its centre at 0.5.
  first = int(interpolation == 'nearest_tf')
  x, y = width - first, height - first
  angle = math.radians(degrees)
  # Pillow rounds them, so that right angles are exact.
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  return _warp([cos, -sin, (x - (cos * x - sin * y)) / 2,
                sin, cos, (y - (sin * x + cos * y)) / 2], interpolation)


def _op(form, table=LEVELS, numbers=()):
  padded = np.zeros(op_forms.NUMBERS, np.int32)
  padded[:len(numbers)] = numbers
  return op_forms.Op(form, np.asarray(table).astype(np.uint8), padded)


def _fixed(factor):
  return round(factor * 2**op_forms.FACTOR_BITS)


def _warp(matrix, interpolation):
  """An op that takes the pixel at (x, y) from matrix @ (x, y, 1).

  Args:
    matrix: six numbers, the rows for x and y.
    interpolation: nearest_tf (the coordinates of pixels are whole), nearest or
      bilinear (they are those of their centres, x + 0.5).
  """
  bits, low = op_forms.COORD_BITS, 0
  if interpolation == 'nearest_tf':
    rounded = [_coordinate(v, bits) for v in matrix]
    # Half a pixel away from zero: -0.5 is outside, the other ties go up.
    for i in (2, 5):
      rounded[i] += 2**bits // 2 + _TIE
    low = 2 * _TIE
  else:
    a, b, c, d, e, f = matrix
    centred = [a, b, c + (a + b) / 2, d, e, f + (d + e) / 2]
    # Pillow's nearest has 16 bits, its bilinear is in float64.
    coarse = bits - 16 if interpolation == 'nearest' else 0
    rounded = [_coordinate(v, bits - coarse) << coarse for v in centred]
  form = interpolation.removesuffix('_tf')
  return _op(form, numbers=[*rounded, low])


def _coordinate(value, bits):
  return math.floor(value * 2**bits + 0.5)
