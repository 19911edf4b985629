"""Plain tf.data pipelines, to hold the speed of our own against.

They read the same files in an order and with crops of TensorFlow's own, and
are nothing that training uses:
  decode       each image as a whole
  crop         the part of a random crop only: the least that has to be done
  randaugment  what a TensorFlow pipeline such as big_vision's does on the
               host: crop, resize, flip, RandAugment with its 16 ops
The ops and their arguments are those of the AugReg paper's code (big_vision,
pp/archive/autoaugment.py), which came from the original RandAugment.
"""
import math

import tensorflow as tf

from input_pipeline import ops_tf
from input_pipeline import pipeline

del ops_tf  # for what it does on import: TensorFlow leaves the GPUs alone
_FILL = 128
_SMOOTH = [[1., 1., 1.], [1., 5., 1.], [1., 1., 1.]]


def batches(paths, probe, batch_size, size=224):
  """An endless iterator over batches of a probe.

  Args:
    paths: of JPEG files.
    probe: of PROBES.
    batch_size: images each.
    size: pixels a side, of what results.

  Returns:
    Iterator of uint8 [batch_size, size, size, 3]; of probes that end with
    decoding int32 [batch_size], how many bytes that gave.
  """
  files, count = tf.constant(paths), len(paths)

  def read(i):
    seed = tf.stack([0, tf.cast(i // count, tf.int32)])
    return tf.io.read_file(files[
        tf.random.experimental.index_shuffle(i % count, seed, count - 1)])

  options = tf.data.Options()
  options.threading.private_threadpool_size = pipeline.cpu_count()
  options.threading.max_intra_op_parallelism = 1
  return (tf.data.Dataset.counter()
          .map(lambda i: PROBES[probe](read(i), size),
               num_parallel_calls=pipeline.cpu_count(), deterministic=True)
          .batch(batch_size).prefetch(2).with_options(options)
          .as_numpy_iterator())


def _decode(content, size):
  del size
  return tf.size(tf.io.decode_jpeg(
      content, channels=3, dct_method='INTEGER_ACCURATE'))


def _crop(content, size):
  del size
  return tf.size(_cropped(content))


def _cropped(content):
  begin, extent, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(content), tf.zeros([0, 0, 4]),
      area_range=(.05, 1), aspect_ratio_range=(.75, 1.33),
      min_object_covered=0, use_image_if_no_bounding_boxes=True)
  return tf.image.decode_and_crop_jpeg(
      content, tf.concat([begin[:2], extent[:2]], 0), channels=3,
      dct_method='INTEGER_ACCURATE')


def _randaugment(content, size, layers=2, magnitude=10):
  image = tf.image.resize(_cropped(content), [size, size])
  image = tf.image.random_flip_left_right(tf.cast(image, tf.uint8))
  ops = _ops(magnitude)
  for _ in range(layers):
    image = tf.switch_case(
        tf.random.uniform([], maxval=len(ops), dtype=tf.int32),
        [lambda op=op, image=image: op(image) for op in ops])
  return tf.ensure_shape(image, [size, size, 3])


PROBES = {'decode': _decode, 'crop': _crop, 'randaugment': _randaugment}


def _ops(m):
  """The 16 ops at magnitude m: functions of uint8 [H, W, 3]."""
  factor, angle = 0.18 * m + 0.1, math.radians(3 * m)
  threshold = int(25.6 * m) % 256  # it wraps around in uint8, as there
  bits = min(8 - int(0.4 * m), 7)
  return [
      _autocontrast, _equalize, lambda x: 255 - x,
      lambda x: _rotate(x, _signed(angle)),
      lambda x: tf.bitwise.left_shift(
          tf.bitwise.right_shift(x, tf.constant(bits, tf.uint8)),
          tf.constant(bits, tf.uint8)),
      lambda x: tf.where(tf.cast(x, tf.int32) < threshold, x, 255 - x),
      lambda x: _blend(tf.image.grayscale_to_rgb(
          tf.image.rgb_to_grayscale(x)), x, factor),
      lambda x: _blend(tf.fill(tf.shape(x), tf.constant(196, tf.uint8)), x,
                       factor),
      lambda x: _blend(tf.zeros_like(x), x, factor),
      lambda x: _blend(_smooth(x), x, factor),
      lambda x: _warp(x, [1., _signed(.03 * m), 0., 0., 1., 0., 0., 0.]),
      lambda x: _warp(x, [1., 0., 0., _signed(.03 * m), 1., 0., 0., 0.]),
      lambda x: _warp(x, [1., 0., _signed(10. * m), 0., 1., 0., 0., 0.]),
      lambda x: _warp(x, [1., 0., 0., 0., 1., _signed(10. * m), 0., 0.]),
      lambda x: _cutout(x, int(4 * m)),
      lambda x: tf.where(x < 128, tf.cast(tf.minimum(
          tf.cast(x, tf.int32) + int(11 * m), 255), tf.uint8), x),
  ]


def _signed(value):
  return tf.where(tf.random.uniform([]) < .5, value, -value)


def _blend(first, second, factor):
  first = tf.cast(first, tf.float32)
  mixed = first + factor * (tf.cast(second, tf.float32) - first)
  return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)


def _autocontrast(image):
  floats = tf.cast(image, tf.float32)
  low, high = (f(floats, [0, 1]) for f in (tf.reduce_min, tf.reduce_max))
  scaled = (floats - low) * (255 / tf.maximum(high - low, 1))
  return tf.cast(tf.where(high > low, scaled, floats), tf.uint8)


def _equalize(image):
  def one(channel):
    histogram = tf.histogram_fixed_width(
        tf.cast(channel, tf.int32), [0, 255], 256)
    last = histogram[tf.reduce_max(tf.where(histogram > 0))]
    step = (tf.reduce_sum(histogram) - last) // 255
    table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(
        step, 1)
    table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
    return tf.cond(step > 0, lambda: tf.gather(
        table, tf.cast(channel, tf.int32)), lambda: channel)

  return tf.stack([one(image[..., i]) for i in range(3)], -1)


def _smooth(image):
  kernel = tf.tile(tf.reshape(tf.constant(_SMOOTH) / 13, [3, 3, 1, 1]),
                   [1, 1, 3, 1])
  floats = tf.cast(image, tf.float32)[None]
  return tf.cast(tf.nn.depthwise_conv2d(
      floats, kernel, [1, 1, 1, 1], 'SAME')[0], tf.uint8)


def _warp(image, transform):
  return tf.raw_ops.ImageProjectiveTransformV3(
      images=image[None], transforms=[transform],
      output_shape=tf.shape(image)[:2], fill_value=float(_FILL),
      interpolation='NEAREST', fill_mode='CONSTANT')[0]


def _rotate(image, angle):
  middle = (tf.cast(tf.shape(image)[:2], tf.float32) - 1) / 2
  cos, sin = tf.cos(angle), tf.sin(angle)
  x = middle[1] - cos * middle[1] + sin * middle[0]
  y = middle[0] - sin * middle[1] - cos * middle[0]
  return _warp(image, [cos, -sin, x, sin, cos, y, 0., 0.])


def _cutout(image, half):
  height, width = tf.unstack(tf.shape(image)[:2])
  y = tf.abs(tf.range(height) - tf.random.uniform([], 0, height, tf.int32))
  x = tf.abs(tf.range(width) - tf.random.uniform([], 0, width, tf.int32))
  inside = tf.logical_and(y[:, None] < half, x[None] < half)
  return tf.where(inside[..., None], tf.constant(_FILL, tf.uint8), image)
