"""The ops in TensorFlow: the driver for image files on disk.

With `pipeline_tf` and `records.stream` all of the project that imports
TensorFlow; imported when the first image file is about to be read.
"""
import functools
from typing import NamedTuple

import tensorflow as tf

from input_pipeline import jpeg
from input_pipeline import ops_numpy

# TensorFlow would otherwise take the memory of the GPUs that JAX trains on.
tf.config.set_visible_devices([], 'GPU')

# How `decode` reads a file. JPEG and PNG are worth a decoder outside of
# Python's lock; Pillow takes the rest, so one meaning of each format remains.
JPEG, PNG, OTHER = range(3)
KINDS = {'JPEG': JPEG, 'MPO': JPEG, 'PNG': PNG}
# The chroma of a column may depend on its neighbours; decoded with this many
# columns more on each side, a box equals the same box of the whole image.
_MARGIN = 2


class File(NamedTuple):
  """What the header of an image file says.

  Attributes:
    kind: JPEG, PNG or OTHER.
    height, width: pixels.
    is_jpeg: whether it can be decoded at 1/2, 1/4 and 1/8 of its size.
    margin: columns to decode beside a box, for `load`.
  """
  kind: int
  height: int
  width: int
  is_jpeg: bool
  margin: int


def look(content, native=True):
  """Reads a File from the header of an image file.

  Args:
    content: bytes.
    native: False leaves every format to Pillow.

  Raises:
    OSError and others, as `ops_numpy.open_image`.
  """
  header = jpeg.scan(content) if native else None
  if header:
    return File(JPEG, header.height, header.width, True,
                _MARGIN if header.subsampled else 0)
  image = ops_numpy.open_image(content)
  return File(kind_of(image, content) if native else OTHER, *image.size[::-1],
              ops_numpy.is_jpeg(image), _MARGIN)


def kind_of(image, content):
  """Which decoder an image file asks for.

  Args:
    image: what Pillow makes of its header.
    content: its bytes.

  Returns:
    JPEG, PNG, or OTHER: what Pillow decodes to RGB pixels. That is the case,
    too, for CMYK, which TensorFlow rounds differently, and for files without
    an end, of which TensorFlow would read a box above the missing part: what
    is readable must not depend on the crop.
  """
  kind = KINDS.get(image.format, OTHER)
  if kind == JPEG and (
      image.mode not in ('L', 'RGB') or not jpeg.has_end(content)):
    return OTHER
  return OTHER if kind == PNG and b'IEND' not in content[-64:] else kind


def prepare(content, file, scale=1):
  """What `load` takes as content: the file, or of OTHER its RGB pixels.

  Args:
    content: bytes of the file.
    file: from `look`.
    scale: of the decoding; see `ops.View`.

  Raises:
    OSError and others, as `ops_numpy.decode`.
  """
  if file.kind != OTHER:
    return content
  return ops_numpy.pixels(ops_numpy.open_image(content), 3, scale).tobytes()


def _decode_jpeg(content, scale, dct_scale, box=None):
  """uint8 [H / scale, W / scale, 3] of a JPEG, or of a box of those pixels."""

  def decode_at(ratio):
    options = dict(channels=3, ratio=ratio, dct_method='INTEGER_ACCURATE')
    if box is None:
      return tf.io.decode_jpeg(content, **options)
    return tf.image.decode_and_crop_jpeg(content, box, **options)

  if not dct_scale:
    return decode_at(1)
  ratios = (1, 2, 4, 8)
  return tf.switch_case(
      tf.reduce_sum(tf.cast(scale > ratios[:-1], tf.int32)),
      [functools.partial(decode_at, ratio) for ratio in ratios])


def decode(content, kind, view, dct_scale, channels):
  """Decodes an image file or reshapes pixels.

  Args:
    content: string scalar: the file, or with OTHER its RGB pixels.
    kind: int32 scalar, from `look`.
    view: int32 [8], of the op.
    dct_scale: whether the view's scale is to be looked at.
    channels: 1 or 3.

  Returns:
    uint8 [H, W, channels].
  """
  image = tf.switch_case(kind, [
      lambda: _decode_jpeg(content, view[7], dct_scale),
      lambda: tf.io.decode_png(content, channels=3),
      lambda: tf.reshape(tf.io.decode_raw(content, tf.uint8),
                         [view[4], view[5], 3]),
  ])
  return to_channels(image, channels)


def decode_box(content, kind, margin, views, dct_scale, channels):
  """The box of views[1] out of an image that views[0] decodes."""
  top, left, height, width = (views[1, i] for i in range(4))

  def box_of_jpeg():
    before = tf.minimum(left, margin)
    after = tf.minimum(views[0, 5] - left - width, margin)
    image = _decode_jpeg(
        content, views[0, 7], dct_scale,
        [top, left - before, height, before + width + after])
    return to_channels(image[:, before:before + width], channels)

  return tf.cond(
      tf.equal(kind, JPEG), box_of_jpeg,
      lambda: _crop(decode(content, kind, views[0], dct_scale, channels),
                    views[1]))


def to_channels(image, channels):
  """uint8 [H, W, 3] to uint8 [H, W, channels]; see ops_numpy.to_channels."""
  if channels == 3:
    return image
  weights = tf.constant([19595, 38470, 7471])
  grey = tf.reduce_sum(tf.cast(image, tf.int32) * weights, -1, keepdims=True)
  return tf.cast((grey + 32768) // 65536, tf.uint8)


def load(content, kind, margin, views, ops, channels):
  """Decodes an image file and carries out the ops.

  Args:
    content: string scalar, from `prepare`.
    kind: int32 scalar, from `look`.
    margin: int32 scalar, from `look`.
    views: int32 [len(ops), 8], from `ops.views`.
    ops: from `ops.parse`, beginning with decode.
    channels: 1 or 3.

  Returns:
    uint8 [h, w, channels].
  """
  dct_scale = ops[0].dct_scale
  fuse = len(ops) > 1 and ops[1].crops and not ops[1].border
  if fuse:  # what lies outside of the box need not be decoded
    image = decode_box(content, kind, margin, views, dct_scale, channels)
  else:
    image = decode(content, kind, views[0], dct_scale, channels)
  for i, op in enumerate(ops[1:], 1):
    view = views[i]
    if op.border:
      image = tf.pad(image, [[op.border] * 2, [op.border] * 2, [0, 0]])
    if op.crops and not (fuse and i == 1):
      image = _crop(image, view)
    if op.method:
      image = _resize(image, view[4:6], op.method)
    if op.flips:
      image = tf.cond(
          tf.cast(view[6], tf.bool), lambda i=image: tf.reverse(i, [1]),
          lambda i=image: i)
  return image


def _resize(image, size, method):
  """uint8 [H, W, C] to uint8 [*size, C], by one of `ops.METHODS`."""
  if method.endswith('_antialias'):
    # tf.image.resize(antialias=True) takes three times as long, and rounds
    # once where Pillow rounds twice.
    resized = tf.numpy_function(
        ops_numpy.RESIZES[method], [image, size[0], size[1]], tf.uint8)
    return tf.ensure_shape(resized, [None, None, image.shape[-1]])
  # On floats TensorFlow's kernel is faster; results are within [0, 255].
  image = tf.cast(image, tf.float32)
  return tf.cast(tf.image.resize(image, size, method=method), tf.uint8)


def _crop(image, view):
  return image[view[0]:view[0] + view[2], view[1]:view[1] + view[3]]
