"""Host preprocessing as one line: 'decode|inception_crop(224)|flip_lr'.

`op_line` holds the language; this module the ops' geometry and their random
draws, in plain Python. An op, for an image of known size and known random
numbers, is a `View`: a box, a size to resize it to, a flip. `ops_numpy` and
`ops_tf` carry out the same views, so both cut the same box.
"""
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from input_pipeline import op_line
from input_pipeline import order

# How to resize; TF: `tf.image.resize`'s rule, truncated to uint8.
METHODS = {
    'bilinear': 'TF, no antialiasing',
    'area': 'TF, means over the source pixels below each result',
    'bilinear_antialias': "Pillow's BILINEAR, as torchvision has it",
    'bicubic_antialias': "Pillow's BICUBIC, as torchvision has it",
}
# libjpeg decodes at 1 / these of the size, by smaller inverse transforms.
_SCALES = (8, 4, 2)


class View(NamedTuple):
  """What an op does to one image, after the op's zero padding, in order."""
  top: int
  left: int
  height: int
  width: int
  out_height: int  # differs from `height` only in ops with a resize method
  out_width: int
  flip: int  # 0 or 1: left to right
  scale: int = 1  # of `decode`: a JPEG is decoded at 1 / scale of its size


def _keep(height, width, flip=0):
  return View(0, 0, height, width, height, width, flip)


@dataclasses.dataclass(frozen=True)
class Op:
  """An op without arguments; the fields of subclasses are their arguments.

  Class attributes say which parts of a view matter: `crops`, `flips`,
  `method` (of METHODS, '' resizes nothing); `draws`: random numbers per image.
  """
  crops = flips = False
  method = ''
  draws = 0
  border = 0  # zeros added on each side before the box is cut

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      choices = METHODS if field.type is str else (False, True)
      if field.type in (str, bool):
        if type(value) is not field.type or value not in choices:
          raise TypeError(f'{field.name}={value!r} is none of '
                          + ', '.join(map(str, choices)))
        continue
      if field.type is float:
        ok = isinstance(value, (int, float))
      else:
        ok = isinstance(value, int)
      # Anything above is a slip that would otherwise end as out of memory.
      if not ok or isinstance(value, bool) or not 0 <= value <= 2**14:
        raise TypeError(
            f'{field.name}={value!r} must be '
            f'{"a number" if field.type is float else "an integer"} in '
            '[0, 16384]')
      if 'size' in field.name and value < 1:
        raise TypeError(f'{field.name} must be at least 1')

  def out_size(self, height, width):
    """Size after the op; None stands for a size that varies."""
    return height, width

  def view(self, height, width, draws):
    """The op's View on an image of a size, given `draws` numbers in [0, 1)."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Decode(Op):
  """Image file to uint8 pixels; comes first. Raw pixels pass through.

  EXIF orientation is ignored, by both drivers: the released models were
  trained so.

  With `dct_scale` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where what
  the next op resizes is that many times larger than its result. That is faster,
  and changes the pixels: libjpeg's small inverse transforms average, and the
  box is moved outwards to whole pixels of the smaller image.
  """
  dct_scale: bool = False

  def view(self, height, width, draws):
    return _keep(height, width)


@dataclasses.dataclass(frozen=True)
class Resize(Op):
  """To `height_size` x `width_size`, or a square; `method` of METHODS."""
  height_size: int
  width_size: int = None
  method: str = 'bilinear'

  def __post_init__(self):
    if self.width_size is None:
      object.__setattr__(self, 'width_size', self.height_size)
    super().__post_init__()

  def out_size(self, height, width):
    return self.height_size, self.width_size

  def view(self, height, width, draws):
    return View(0, 0, height, width, *self.out_size(height, width), 0)


@dataclasses.dataclass(frozen=True)
class ResizeSmall(Op):
  """The shorter side to `size`, the other rounded; `method` of METHODS."""
  size: int
  method: str = 'area'

  def out_size(self, height, width):
    if height is None or width is None:
      return None, None
    short = min(height, width)
    return round(height * self.size / short), round(width * self.size / short)

  def view(self, height, width, draws):
    return View(0, 0, height, width, *self.out_size(height, width), 0)


@dataclasses.dataclass(frozen=True)
class CentralCrop(Op):
  """The central square of `size`; the odd pixel stays right and below."""
  size: int
  crops = True

  def out_size(self, height, width):
    return self.size, self.size

  def view(self, height, width, draws):
    _check_fits(self.size, height, width)
    return View((height - self.size) // 2, (width - self.size) // 2,
                *(self.size,) * 4, 0)


@dataclasses.dataclass(frozen=True)
class PadCrop(Op):
  """A random square of `size` after adding `padding` zeros on each side."""
  size: int
  padding: int
  crops = True
  draws = 2

  @property
  def border(self):
    return self.padding

  def out_size(self, height, width):
    return self.size, self.size

  def view(self, height, width, draws):
    height, width = height + 2 * self.padding, width + 2 * self.padding
    _check_fits(self.size, height, width)
    return View(int(draws[0] * (height - self.size + 1)),
                int(draws[1] * (width - self.size + 1)),
                *(self.size,) * 4, 0)


@dataclasses.dataclass(frozen=True)
class _RandomCrop(Op):
  """A random box of `area_min` to `area_max` percent, resized to a square."""
  size: int
  area_min: float
  area_max: float = 100
  method: str = 'bilinear'
  crops = True

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.area_min <= self.area_max <= 100:
      raise TypeError('areas are percentages, 0 < area_min <= area_max <= 100')

  def out_size(self, height, width):
    return self.size, self.size

  def _areas(self, height, width):
    """(smallest, largest) area of the box, in pixels."""
    return (self.area_min / 100 * height * width,
            self.area_max / 100 * height * width)


@dataclasses.dataclass(frozen=True)
class InceptionCrop(_RandomCrop):
  """A random box of `area_min` to `area_max` percent, resized to a square.

  The box follows the law of `tf.image.sample_distorted_bounding_box`: aspect
  uniform in [3/4, 1.33], height uniform among those with an allowed area,
  offset uniform but never the last possible one; up to 100 attempts, then the
  whole image. `method` of METHODS.
  """
  area_min: float = 5
  attempts = 100
  draws = 4 * attempts

  def view(self, height, width, draws):
    low, high = self._areas(height, width)
    for attempt in range(self.attempts):
      aspect, tall, top, left = draws[4 * attempt:4 * attempt + 4].tolist()
      box = _box(height, width, low, high, 0.75 + aspect * (1.33 - 0.75), tall)
      if box:
        h, w = box
        top, left = top * max(height - h, 1), left * max(width - w, 1)
        return View(int(top), int(left), h, w, self.size, self.size, 0)
    return View(0, 0, height, width, self.size, self.size, 0)


def _box(height, width, low, high, aspect, draw):
  """(h, w) with w / h = `aspect` and low <= h * w <= high, or None."""
  tallest = min(round(math.sqrt(high / aspect)), height,
                int((width + 1) / aspect))
  while round(tallest * aspect) > width:
    tallest -= 1
  shortest = min(round(math.sqrt(low / aspect)), tallest)
  h = shortest + int(draw * (tallest - shortest + 1))
  # Rounding may miss the allowed areas by one row.
  if h * round(h * aspect) < low:
    h += 1
  elif h * round(h * aspect) > high:
    h -= 1
  w = round(h * aspect)
  if low <= h * w <= high and 0 < h <= height and 0 < w <= width:
    return h, w
  return None


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(_RandomCrop):
  """A random box of `area_min` to `area_max` percent, resized to a square.

  The box follows the law of torchvision's RandomResizedCrop, whose `scale` is
  these percentages as fractions: area uniform, aspect (width / height)
  log-uniform in [3/4, 4/3], sides rounded, offset uniform; 10 attempts to find
  one inside of the image, then the largest central box of an allowed aspect.
  The paper and DeiT train with it. `method` of METHODS: 'bilinear_antialias'
  is what torchvision does to Pillow's images.
  """
  area_min: float = 8
  attempts = 10
  draws = 4 * attempts

  def view(self, height, width, draws):
    low, high = self._areas(height, width)
    for attempt in range(self.attempts):
      area, aspect, top, left = draws[4 * attempt:4 * attempt + 4].tolist()
      area, aspect = low + area * (high - low), (4 / 3) ** (2 * aspect - 1)
      w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if 0 < w <= width and 0 < h <= height:
        return View(int(top * (height - h + 1)), int(left * (width - w + 1)),
                    h, w, self.size, self.size, 0)
    h = min(height, round(width / (3 / 4)))
    w = min(width, round(height * (4 / 3)))
    return View((height - h) // 2, (width - w) // 2, h, w, self.size,
                self.size, 0)


@dataclasses.dataclass(frozen=True)
class FlipLr(Op):
  """Left to right, with probability one half."""
  flips = True
  draws = 1

  def view(self, height, width, draws):
    return _keep(height, width, int(draws[0] < 0.5))


OPS = {
    'decode': Decode,
    'resize': Resize,
    'resize_small': ResizeSmall,
    'central_crop': CentralCrop,
    'pad_crop': PadCrop,
    'inception_crop': InceptionCrop,
    'random_resized_crop': RandomResizedCrop,
    'flip_lr': FlipLr,
}


def _check_fits(size, height, width):
  if size > min(height, width):
    raise ValueError(
        f'a crop of {size} does not fit into an image of {height} x {width}.\n'
        'Crop less, or resize or pad first.')


def parse(text, key='pp'):
  """Parses 'name|name(arguments)|...' into a tuple of ops.

  Args:
    text: see `op_line.parse`.
    key: the key of the config's `input` section that it comes from.

  Raises:
    ValueError: as `op_line.parse`, or `decode` elsewhere than first.
  """
  ops = op_line.parse(
      text, OPS, f'input.{key}', 'decode|resize(224)|flip_lr')
  if any(isinstance(op, Decode) for op in ops[1:]):
    raise ValueError(f'input.{key}={text!r}: decode does not come first.\n'
                     'Put it at the beginning, once.')
  return ops


def out_size(ops, height, width):
  """(height, width) after all ops; None where it varies with the image."""
  for op in ops:
    if height is not None and width is not None:
      # Crops that cannot fit are found before the first image is read.
      op.view(height, width, np.zeros(op.draws))
    height, width = op.out_size(height, width)
  return height, width


def draw(ops, data_seed, epoch, index, repeat=0):
  """The random numbers of all ops, for a batch.

  Args:
    ops: from `parse`.
    data_seed: int.
    epoch: int64 [n].
    index: int64 [n], example indices.
    repeat: int64 [n], counts an example's repeats in an epoch.

  Returns:
    float64 [n, D] in [0, 1), what the ops draw side by side. An op's numbers
    depend on its place in the line, not on what precedes it.
  """
  columns = [order.uniform(data_seed, epoch, index, place, op.draws, repeat)
             for place, op in enumerate(ops)]
  return np.concatenate([np.zeros((len(index), 0)), *columns], axis=1)


def views(ops, height, width, draws, scalable=False):
  """What each op does to one image: list of View, as long as `ops`.

  Args:
    ops: from `parse`.
    height: of the image.
    width: of the image.
    draws: float64 [D], a row of what `draw` returned.
    scalable: whether it is a JPEG, for `decode(dct_scale=True)`.

  Raises:
    ValueError: a crop is larger than what it is cut from.
  """
  result = []
  for op in ops:
    view = op.view(height, width, draws[:op.draws])
    draws = draws[op.draws:]
    height, width = view.out_height, view.out_width
    result.append(view)
  if scalable and len(ops) > 1 and ops[0].dct_scale:
    result[:2] = _scaled(*result[:2])
  return result


def _scaled(decode, view):
  """Views of decoding at a fraction of the size, and of the op after it."""
  scale = next((s for s in _SCALES if view.height >= s * view.out_height
                and view.width >= s * view.out_width), 1)
  height, width = -(-decode.height // scale), -(-decode.width // scale)
  top, left = view.top // scale, view.left // scale
  bottom = -(-(view.top + view.height) // scale)
  right = -(-(view.left + view.width) // scale)
  return (decode._replace(out_height=height, out_width=width, scale=scale),
          view._replace(top=top, left=left, height=bottom - top,
                        width=right - left))
