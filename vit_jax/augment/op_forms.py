"""What an op does to a uint8 image on the device: a few forms, in integers.

Integers, because XLA fuses floating-point multiply-adds under jit and so moves
what lies on a tie, in each program in another way. These are the same bits in
every program and on every backend. `image_ops` makes the numbers they take.

A name that ends in `_tf` is the original TensorFlow op's convention, which
AugReg used (tensorflow/tpu, models/official/efficientnet/autoaugment.py); the
others are Pillow's.
"""
from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Coordinates are in 2**-20 pixels, and within +-2048 pixels as int32.
COORD_BITS = 20
MAX_SIDE = 1024
# Factors and fractions of pixels are in 2**-16. What lies within 2**-8 below a
# level counts as that level: a tie, but for the rounding.
FACTOR_BITS = 16
_TIE = 256
NUMBERS = 9  # integers of an op; what they are, its form knows
CENTER = slice(7, 9)  # of a box: drawn for each image
LEVELS = np.arange(256)


class Op(NamedTuple):
  """An op with its strength, or arrays of them with the same leading axes."""
  form: str | jax.Array  # a key of FORMS; int32 once it is in a policy
  table: np.ndarray | jax.Array = LEVELS.astype(np.uint8)  # [256]
  numbers: np.ndarray | jax.Array = np.zeros(NUMBERS, np.int32)


class Form(NamedTuple):
  """How a kind of op is carried out, on one image.

  kind: what `function(image uint8 [H, W, C], op)` returns:
    table  uint8 [C, 256], in which the levels of a channel are looked up
    other  int32, like the image: what it is blended with, by numbers[0]
    image  uint8 [H, W, C], the result; it takes `fill`, too
  """
  kind: str
  function: Callable


def _levels():
  return jnp.arange(256, dtype=jnp.int32)


def blend(other, image, factor):
  """other + factor * (image - other), truncated; int32, also in numpy."""
  mixed = (other << FACTOR_BITS) + factor * (image - other) + _TIE
  return (mixed >> FACTOR_BITS).clip(0, 255)


def _look_up(image, table):
  """Each level of each channel, in table uint8 [C, 256]."""
  channels = image.shape[-1]
  offset = 256 * jnp.arange(channels, dtype=jnp.int32).reshape(1, 1, -1)
  return table.reshape(-1).at[image.astype(jnp.int32) + offset].get(
      mode='promise_in_bounds')


def histogram(image):
  """Counts of the 256 levels of each channel: int32 [C, 256]."""
  channels = image.shape[-1]
  offset = 256 * jnp.arange(channels, dtype=jnp.int32).reshape(1, 1, -1)
  counts = jnp.zeros(256 * channels, jnp.int32).at[
      image.astype(jnp.int32) + offset].add(1, mode='promise_in_bounds')
  return counts.reshape(channels, 256)


def histogram_by_comparison(image):
  """The same, without the scattered additions that accelerators are slow at."""
  pixels = image.reshape(-1, image.shape[-1]).T[:, None, :]
  levels = _levels().astype(jnp.uint8).reshape(1, 256, 1)
  return jnp.sum(pixels == levels, axis=2, dtype=jnp.int32)


def _given(image, op):
  return jnp.broadcast_to(op.table, (image.shape[-1], 256))


def _equalize(image, op):
  del op
  return equalized(histogram(image), image.shape[0] * image.shape[1])


def equalized(counts, total):
  """The table of Equalize: Pillow's rule, which the original copies.

  Args:
    counts: int32 [C, 256], the histogram.
    total: their sum, the number of pixels.

  Returns:
    uint8 [C, 256].
  """
  levels = _levels().reshape(1, 256)
  last = jnp.max(jnp.where(counts > 0, levels, 0), axis=1, keepdims=True)
  step = (total - jnp.take_along_axis(counts, last, axis=1)) // 255
  below = jnp.cumsum(counts, axis=1) - counts
  spread = ((below + step // 2) // jnp.maximum(step, 1)).clip(0, 255)
  return jnp.where(step == 0, levels, spread).astype(jnp.uint8)


def _extremes(image):
  """Lowest and highest level of each channel: int32 [C, 1] each."""
  def over_pixels(reduce):
    # The channels are last: rows first is four times as fast on CPU.
    by_column = reduce(image, axis=0)
    return reduce(by_column, axis=0).astype(jnp.int32).reshape(-1, 1)
  return over_pixels(jnp.min), over_pixels(jnp.max)


def _autocontrast(image, op):
  del op
  low, high = _extremes(image)
  levels = _levels().reshape(1, 256)
  spread = 255 * (levels - low) // jnp.maximum(high - low, 1)
  return jnp.where(high > low, spread.clip(0, 255), levels).astype(jnp.uint8)


def _autocontrast_tf(image, op):
  """trunc(level * s - low * s) with s = 255 / (high - low), as in float32.

  Rounded as float32 does after each of the operations, but in integers:
  s = mantissa * 2**-exponent, and a product has no more than 32 bits.
  """
  del op
  low, high = _extremes(image)
  levels = _levels().reshape(1, 256)
  scale = np.float32(255) / np.maximum(LEVELS, 1).astype(np.float32)
  mantissa, exponent = np.frexp(scale)
  mantissa = jnp.asarray((mantissa * 2**24).astype(np.uint32))[high - low]
  exponent = jnp.asarray((24 - exponent).astype(np.uint32))[high - low]
  product = lambda x: _round_float32(x.astype(jnp.uint32) * mantissa)
  above = jnp.maximum(levels, low)
  spread = _round_float32(product(above) - product(low)) >> exponent
  spread = jnp.minimum(spread, 255).astype(jnp.int32)
  return jnp.where(high > low, spread, levels).astype(jnp.uint8)


def _round_float32(x):
  """uint32 rounded to 24 significant bits, ties to even."""
  drop = jnp.maximum(8 - jax.lax.clz(x).astype(jnp.int32), 0).astype(jnp.uint32)
  one = jnp.uint32(1)
  even = (x >> drop) & one
  half = (one << drop >> one) - jnp.where(drop > 0, one - even, 0)
  return (x + half) >> drop << drop


def _grey(image):
  """ITU-R 601 in 16 bits, as Pillow: int32 [H, W, 1]."""
  if image.shape[-1] == 1:
    return image.astype(jnp.int32)
  r, g, b = jnp.split(image.astype(jnp.int32), 3, axis=-1)
  return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def _grey_tf(image):
  """floor((.2989 r + .587 g + .114 b) * 255.5 / 255), tf.image's rule."""
  if image.shape[-1] == 1:
    return image.astype(jnp.int32)
  r, g, b = jnp.split(image.astype(jnp.int32), 3, axis=-1)
  return (2989 * r + 5870 * g + 1140 * b) * 511 // 5_100_000


def _contrast(image, op):
  pixels = image.shape[0] * image.shape[1]
  mean = (2 * jnp.sum(_grey(image), dtype=jnp.int32) + pixels) // (2 * pixels)
  table = blend(mean, _levels(), op.numbers[0]).astype(jnp.uint8)
  return jnp.broadcast_to(table, (image.shape[-1], 256))


def _color(image, op):
  del op
  return jnp.broadcast_to(_grey(image), image.shape)


def _color_tf(image, op):
  del op
  return jnp.broadcast_to(_grey_tf(image), image.shape)


def _smooth(image):
  """Sums of 3x3 pixels, the centre five times: int32 [H - 2, W - 2, C]."""
  wide = image.astype(jnp.int32)
  h, w = wide.shape[0] - 2, wide.shape[1] - 2
  rows = wide[:h] + wide[1:h + 1] + wide[2:]
  return (rows[:, :w] + rows[:, 1:w + 1] + rows[:, 2:]
          + 4 * wide[1:h + 1, 1:w + 1])


def _sharpness(image, op):
  """The smoothed image, rounded; its border stays."""
  del op
  return image.astype(jnp.int32).at[1:-1, 1:-1].set(
      (2 * _smooth(image) + 13) // 26)


def _sharpness_tf(image, op):
  """Truncated. (A chain of float32 multiply-adds there: one level less in
  0.4 % of the pixels, those whose sum is a multiple of 13.)"""
  del op
  return image.astype(jnp.int32).at[1:-1, 1:-1].set(_smooth(image) // 13)


def _source(image, op):
  """Where each pixel comes from: u, v int32 [H, W], bool [H, W] if inside."""
  height, width, _ = image.shape
  x = jnp.arange(width, dtype=jnp.int32).reshape(1, -1)
  y = jnp.arange(height, dtype=jnp.int32).reshape(-1, 1)
  a, b, c, d, e, f, low, *_ = op.numbers
  u, v = a * x + b * y + c, d * x + e * y + f
  inside = (u >= low) & (v >= low) & (u < width << COORD_BITS) & (
      v < height << COORD_BITS)
  return u, v, inside


def _pixel(image, u, v):
  """The pixels at whole coordinates, clipped to the image: int32 [H, W, C]."""
  height, width, channels = image.shape
  index = v.clip(0, height - 1) * width + u.clip(0, width - 1)
  flat = image.reshape(height * width, channels)
  return flat.at[index].get(mode='promise_in_bounds').astype(jnp.int32)


def _nearest(image, op, fill):
  u, v, inside = _source(image, op)
  return _filled(_pixel(image, u >> COORD_BITS, v >> COORD_BITS), inside, fill)


def _bilinear(image, op, fill):
  """Pillow's: between the centres of pixels, beyond the outermost the same."""
  u, v, inside = _source(image, op)
  half, rounding = 2**COORD_BITS // 2, 8
  u, v = u - half + rounding, v - half + rounding
  x, y = u >> COORD_BITS, v >> COORD_BITS
  fraction = lambda t: ((t & (2**COORD_BITS - 1)) >> 4)[..., None]  # 16 bits
  rows = []
  for row in (y, y + 1):
    left, right = _pixel(image, x, row), _pixel(image, x + 1, row)
    rows.append((left << 16) + (right - left) * fraction(u))
  # The product has 41 bits: its upper and lower 9 apart.
  step, dy = rows[1] - rows[0], fraction(v)
  part = ((step >> 9) * dy + ((step & 511) * dy >> 9)) >> 7
  return _filled((rows[0] + part + _TIE) >> 16, inside, fill)


def _filled(image, inside, fill):
  image = jnp.where(inside[..., None], image, fill.reshape(1, 1, -1))
  return image.astype(jnp.uint8)


def _cutout(image, op, fill):
  y = jnp.arange(image.shape[0], dtype=jnp.int32).reshape(-1, 1)
  x = jnp.arange(image.shape[1], dtype=jnp.int32).reshape(1, -1)
  half = op.numbers[0]
  row, column = op.numbers[CENTER]
  covered = ((y >= row - half) & (y < row + half)
             & (x >= column - half) & (x < column + half))
  return _filled(image, ~covered, fill)


# The one table of what can happen to an image.
FORMS = {
    'identity': Form('image', lambda image, op, fill: image),
    'table': Form('table', _given),
    'equalize': Form('table', _equalize),
    'autocontrast': Form('table', _autocontrast),
    'autocontrast_tf': Form('table', _autocontrast_tf),
    'contrast': Form('table', _contrast),
    'color': Form('other', _color),
    'color_tf': Form('other', _color_tf),
    'sharpness': Form('other', _sharpness),
    'sharpness_tf': Form('other', _sharpness_tf),
    'nearest': Form('image', _nearest),
    'bilinear': Form('image', _bilinear),
    'cutout': Form('image', _cutout),
}


def apply_one(image, op, forms, fill):
  """Carries out an op by a switch: only the drawn form runs.

  Args:
    image: uint8 [H, W, C].
    op: Op; `form` is an index into `forms`.
    forms: keys of FORMS that can occur.
    fill: uint8 [C], of pixels from outside the image.

  Returns:
    uint8 [H, W, C].
  """
  tables = [i for i, f in enumerate(forms) if FORMS[f].kind == 'table']
  rest = [i for i in range(len(forms)) if i not in tables]

  def look_up(image, op):
    # A switch of its own, as otherwise XLA computes the table for each pixel.
    table = jax.lax.switch(
        place(tables), [FORMS[forms[i]].function for i in tables], image, op)
    return _look_up(image, table)

  def run(form, image, op):
    if form.kind == 'image':
      return form.function(image, op, fill)
    return _blended(form.function(image, op), image, op.numbers[0])

  def place(indices):
    """That of op.form among indices; their number where it is not there."""
    places = [indices.index(i) if i in indices else len(indices)
              for i in range(len(forms))]
    return jnp.asarray(places)[op.form]

  branches = [functools.partial(run, FORMS[forms[i]]) for i in rest]
  branches += [look_up] if tables else []
  return jax.lax.switch(place(rest), branches, image, op)


def apply_all(image, op, forms, fill, equalize_table):
  """The same by all forms in turn, of which all but one change nothing.

  For vmap, under which a switch runs every branch: here the tables share one
  look-up and the blends one blend.

  Args:
    image, op, forms, fill: see `apply_one`.
    equalize_table: uint8 [C, 256], for images that are to be equalized.

  Returns:
    uint8 [H, W, C].
  """
  of_kind = lambda kind: [
      (op.form == i, FORMS[f].function) for i, f in enumerate(forms)
      if FORMS[f].kind == kind and f not in ('identity', 'equalize')]

  table = jnp.broadcast_to(
      _levels().astype(jnp.uint8), (image.shape[-1], 256))
  if 'equalize' in forms:
    drawn = op.form == forms.index('equalize')
    table = jnp.where(drawn, equalize_table, table)
  for drawn, function in of_kind('table'):
    table = jnp.where(drawn, function(image, op), table)
  image = _look_up(image, table)

  factor, other = jnp.int32(2**FACTOR_BITS), image.astype(jnp.int32)
  for drawn, function in of_kind('other'):
    factor = jnp.where(drawn, op.numbers[0], factor)
    other = jnp.where(drawn, function(image, op), other)
  image = _blended(other, image, factor)

  for drawn, function in of_kind('image'):
    image = jnp.where(drawn, function(image, op, fill), image)
  return image


def _blended(other, image, factor):
  return blend(other, image.astype(jnp.int32), factor).astype(jnp.uint8)
