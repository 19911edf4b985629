"""The ops in TensorFlow: the driver for image files on disk.

With `pipeline_tf` and `records.stream` all of the project that imports
TensorFlow; imported when the first image file is about to be read.
"""
import tensorflow as tf

from input_pipeline import ops_numpy

# TensorFlow would otherwise take the memory of the GPUs that JAX trains on.
tf.config.set_visible_devices([], 'GPU')

# How `decode` reads a file. JPEG and PNG are worth a decoder outside of
# Python's lock; Pillow takes the rest, so one meaning of each format remains.
JPEG, PNG, OTHER = range(3)
KINDS = {'JPEG': JPEG, 'MPO': JPEG, 'PNG': PNG}
# The chroma of a column depends on its neighbours; decoded with this many
# columns more on each side, a box equals the same box of the whole image.
_MARGIN = 2


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
  if (kind == JPEG and (image.mode not in ('L', 'RGB')
                        or b'\xff\xd9' not in content[-64:])):
    return OTHER
  return OTHER if kind == PNG and b'IEND' not in content[-64:] else kind


def prepare(content, image, native=True):
  """(kind, content) for `decode`, of an image file; decodes OTHER itself.

  Args:
    content: bytes of the file.
    image: what Pillow makes of its header.
    native: False leaves every format to Pillow.

  Raises:
    OSError and others, as `ops_numpy.decode`.
  """
  kind = kind_of(image, content) if native else OTHER
  if kind == OTHER:
    content = ops_numpy.decode(content, 3).tobytes()
  return kind, content


def decode(content, kind, size, channels):
  """Decodes an image file or reshapes pixels.

  Args:
    content: string scalar: the file, or with OTHER its RGB pixels.
    kind: int32 scalar, from `kind_of`.
    size: int32 [2], height and width.
    channels: 1 or 3.

  Returns:
    uint8 [H, W, channels].
  """
  image = tf.switch_case(kind, [
      lambda: tf.io.decode_jpeg(
          content, channels=3, dct_method='INTEGER_ACCURATE'),
      lambda: tf.io.decode_png(content, channels=3),
      lambda: tf.reshape(
          tf.io.decode_raw(content, tf.uint8), [size[0], size[1], 3]),
  ])
  return to_channels(image, channels)


def decode_box(content, kind, size, view, channels):
  """The box of a view out of an image of `size` [H, W], as `decode` has it."""
  top, left, height, width = view[0], view[1], view[2], view[3]

  def jpeg():
    before = tf.minimum(left, _MARGIN)
    after = tf.minimum(size[1] - left - width, _MARGIN)
    image = tf.image.decode_and_crop_jpeg(
        content, [top, left - before, height, before + width + after],
        channels=3, dct_method='INTEGER_ACCURATE')
    return to_channels(image[:, before:before + width], channels)

  return tf.cond(
      tf.equal(kind, JPEG), jpeg,
      lambda: _crop(decode(content, kind, size, channels), view))


def to_channels(image, channels):
  """uint8 [H, W, 3] to uint8 [H, W, channels]; see ops_numpy.to_channels."""
  if channels == 3:
    return image
  weights = tf.constant([19595, 38470, 7471])
  grey = tf.reduce_sum(tf.cast(image, tf.int32) * weights, -1, keepdims=True)
  return tf.cast((grey + 32768) // 65536, tf.uint8)


def load(content, kind, size, views, ops, channels):
  """Decodes an image file and carries out the ops.

  Args:
    content: string scalar, see `decode`.
    kind: int32 scalar, from `kind_of`.
    size: int32 [2], height and width of the image.
    views: int32 [len(ops), 7], from `ops.views`.
    ops: from `ops.parse`, beginning with decode.
    channels: 1 or 3.

  Returns:
    uint8 [h, w, channels].
  """
  fuse = len(ops) > 1 and ops[1].crops and not ops[1].border
  if fuse:  # what lies outside of the box need not be decoded
    image = decode_box(content, kind, size, views[1], channels)
  else:
    image = decode(content, kind, size, channels)
  for i, op in enumerate(ops[1:], 1):
    view = views[i]
    if op.border:
      image = tf.pad(image, [[op.border] * 2, [op.border] * 2, [0, 0]])
    if op.crops and not (fuse and i == 1):
      image = _crop(image, view)
    if op.resizes:
      image = tf.image.resize(
          image, view[4:6], method=op.resizes, antialias=False)
      image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
    if op.flips:
      image = tf.cond(
          tf.cast(view[6], tf.bool), lambda i=image: tf.reverse(i, [1]),
          lambda i=image: i)
  return image


def _crop(image, view):
  return image[view[0]:view[0] + view[2], view[1]:view[1] + view[3]]
