"""The `tf.data` engine, for image files on disk.

Python chooses the rows and reads each file and its header; decoding and the
ops run in TensorFlow's threads, in parallel and in order. What is in flight is
bounded: by the number of threads, and two batches.
"""
import numpy as np
import tensorflow as tf

from input_pipeline import ops as ops_
from input_pipeline import ops_numpy
from input_pipeline import ops_tf
from input_pipeline import pipeline


def images(source, ops, shape, data_seed, rows, start, count):
  """As `pipeline._images`."""
  stream = _dataset(source, ops, shape, data_seed, rows, start, count)
  stream = stream.as_numpy_iterator()
  for step in pipeline.steps(start, count):
    epoch, index = rows(step)
    if not len(index):
      yield index, np.zeros((0, *shape), np.uint8)
      continue
    try:
      image = next(stream)
    except tf.errors.OpError as e:
      # The graph knows no paths. Batches come in order, so it is one of these.
      draws = ops_.draw(ops, data_seed, epoch, index)
      for i, d in zip(index, draws, strict=True):
        try:
          _load(source, ops, shape, i, d)
        except (tf.errors.OpError, *pipeline.READ_ERRORS) as cause:
          # If Pillow fails, too, its words are plainer.
          pipeline.decode_example(source, i, ops, d, shape[-1])
          raise pipeline.unreadable(
              source, i, getattr(cause, 'message', cause)) from cause
      raise RuntimeError(
          'The input pipeline failed, on no image in particular.') from e
    yield index, image


def _dataset(source, ops, shape, data_seed, rows, start, count):
  """A tf.data.Dataset of uint8 [n, *shape], for `count` steps."""

  def choose(step):
    epoch, index = rows(int(step))
    draws = ops_.draw(ops, data_seed, epoch, index)
    # A column to spare: TensorFlow 2.21 crashes on rows of no elements.
    return index, np.pad(draws, ((0, 0), (0, 1)))

  def choose_in_graph(step):
    index, draws = tf.numpy_function(choose, [step], [tf.int64, tf.float64])
    return tf.ensure_shape(index, [None]), tf.ensure_shape(draws, [None, None])

  threads = pipeline.cpu_count()
  options = tf.data.Options()
  options.deterministic = True
  # One pool of our own: training and evaluation do not queue behind each
  # other, and an image is one thread's work.
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  data = tf.data.Dataset.counter(start)
  if count is not None:
    data = data.take(count)
  return (
      data.map(choose_in_graph).unbatch()
      .map(lambda i, d: _load(source, ops, shape, i, d),
           num_parallel_calls=threads, deterministic=True)
      .batch(len(rows(start)[1])).prefetch(2).with_options(options))


def _load(source, ops, shape, index, draws):
  """One image, uint8 `shape`, from its index and its random numbers."""

  def fetch(index, draws):
    content = source.read([index])[0]
    image = ops_numpy.open_image(content)
    width, height = image.size
    views = ops_.views(ops, height, width, draws)
    return (content, np.int32(ops_tf.kind_of(image)),
            np.array([height, width], np.int32), np.array(views, np.int32))

  content, kind, size, views = tf.numpy_function(
      fetch, [index, draws], [tf.string, tf.int32, tf.int32, tf.int32])
  views = tf.ensure_shape(views, [len(ops), len(ops_.View._fields)])
  image = ops_tf.load(
      tf.ensure_shape(content, []), tf.ensure_shape(kind, []),
      tf.ensure_shape(size, [2]), views, ops, shape[-1])
  return tf.ensure_shape(image, shape)
