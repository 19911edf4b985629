"""The `tf.data` engine, for image files on disk.

Python chooses the rows and reads each file and its header; decoding and the
ops run in TensorFlow's threads, in parallel and in order. What is in flight is
bounded: by the number of threads, and two batches.

Whether an image can be read is Pillow's verdict, in both engines: what
TensorFlow's decoders refuse is given to Pillow, and what they might accept by
looking at a part only was given to it before (`ops_tf.kind_of`).
"""
import concurrent.futures

import numpy as np
import tensorflow as tf

from input_pipeline import ops as ops_
from input_pipeline import ops_numpy
from input_pipeline import ops_tf
from input_pipeline import pipeline


def images(job, start, count):
  """As `pipeline._numpy_images`."""
  for_pillow = set()  # examples that TensorFlow's decoders refused
  failures = {}  # of rows that are not in a batch yet, by their number
  stream = _dataset(job, start, count, for_pillow, failures)
  for step in pipeline.steps(start, count):
    if not job.size(step):
      yield pipeline.no_images(job.shape)
      continue
    while True:
      try:
        batch = next(stream)
        break
      except tf.errors.OpError as e:
        _raise_own_errors(job, step)
        refused = _refused(job, step, for_pillow)
        if not refused:
          raise RuntimeError(
              'The input pipeline failed, on no image in particular.') from e
        for_pillow |= refused
        failures = {}
        # Each file costs this once, and few are broken in such a manner.
        stream = _dataset(
            job, step, count and start + count - step, for_pillow, failures)
    *batch, number = batch
    yield *batch, {row: failures.pop(n) for row, n in enumerate(number.tolist())
                   if n in failures}


def _dataset(job, start, count, for_pillow, failures):
  """An iterator of (image, label, ok, number) for `count` steps.

  Rows are numbered; `failures` is given those of `Job.first_readable` of each
  row before the row is in a batch.
  """
  rows = job.rows_from(start)
  size = max(job.size(start), 1)

  def choose(step):
    # `rows` counts for itself, too: this map is sequential.
    epoch, index, records = next(rows)
    number = step * size + np.arange(len(index))
    draws = ops_.draw(job.ops, job.data_seed, epoch, index)
    # A column to spare: TensorFlow 2.21 crashes on rows of no elements.
    draws = np.pad(draws, ((0, 0), (0, 1)))
    records = np.array(records or [b''] * len(index), object)
    return number, epoch, index, draws, records

  def choose_in_graph(step):
    number, epoch, index, draws, records = tf.numpy_function(
        choose, [step], [tf.int64, tf.int64, tf.int64, tf.float64, tf.string])
    return (*(tf.ensure_shape(x, [None]) for x in (number, epoch, index)),
            tf.ensure_shape(draws, [None, None]),
            tf.ensure_shape(records, [None]))

  def fetch(number, *row):
    found, failed = _fetch(job, for_pillow, *row)
    if failed:
      failures[int(number)] = failed
    return found[1:]

  def load(number, *row):
    outputs = tf.numpy_function(
        fetch, (number, *row),
        [tf.bool, tf.int32, tf.string, tf.int32, tf.int32, tf.int32])
    return *_decode(job, *outputs), number

  threads = pipeline.cpu_count()
  options = tf.data.Options()
  options.deterministic = True
  # One pool of our own: training and evaluation do not queue behind each
  # other, and an image is one thread's work.
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  data = tf.data.Dataset.counter(start)
  if count is not None:
    # Once there are no rows, there are none at all later steps.
    data = data.take(sum(job.size(start + s) > 0 for s in range(count)))
  return iter(
      data.map(choose_in_graph).unbatch()
      .map(load, num_parallel_calls=threads, deterministic=True)
      .batch(size).prefetch(2).with_options(options)
      .as_numpy_iterator())


def _fetch(job, for_pillow, epoch, index, draws, record):
  """Reads a row's image, or the one in its place.

  Returns:
    ((index, ok, label, content, kind, size, views), failures): the index that
    was read; content and kind as `ops_tf.decode` takes them. Zeros if nothing
    is ok. Failures as of `Job.first_readable`.
  """

  def load(i, record):
    content, label = job.source.load(i, record)
    image = ops_numpy.open_image(content)
    width, height = image.size
    kind, content = ops_tf.prepare(content, image, i not in for_pillow)
    views = ops_.views(job.ops, height, width, draws)
    return (i, np.bool_(True), np.int32(label), content, np.int32(kind),
            np.array([height, width], np.int32), np.array(views, np.int32))

  record = record if job.source.streamed else None
  found, failures = job.first_readable(epoch, index, record, load)
  return found or (
      index, np.bool_(False), np.int32(0), b'', np.int32(0),
      np.zeros(2, np.int32), np.zeros((len(job.ops), len(ops_.View._fields)),
                                      np.int32)), failures


def _decode(job, ok, label, content, kind, size, views):
  """(image uint8 `shape`, label, ok) of what `_fetch` returned."""
  ok, label, content, kind = (
      tf.ensure_shape(x, []) for x in (ok, label, content, kind))
  size = tf.ensure_shape(size, [2])
  views = tf.ensure_shape(views, [len(job.ops), len(ops_.View._fields)])
  image = tf.cond(
      ok,
      lambda: tf.ensure_shape(
          ops_tf.load(content, kind, size, views, job.ops, job.shape[-1]),
          job.shape),
      lambda: tf.zeros(job.shape, tf.uint8))
  return image, label, ok


def _raise_own_errors(job, step):
  """Raises what `rows_from` raises at a step: the graph knows only its text."""
  next(job.rows_from(step))


def _refused(job, step, for_pillow):
  """The examples of a step that TensorFlow fails to decode."""
  epoch, index, records = next(job.rows_from(step))
  draws = ops_.draw(job.ops, job.data_seed, epoch, index)

  def refused(*row):
    (i, *fetched), _ = _fetch(job, for_pillow, *row)
    try:
      _decode(job, *map(tf.convert_to_tensor, fetched))
    except tf.errors.OpError:
      return int(i)

  with concurrent.futures.ThreadPoolExecutor(pipeline.cpu_count()) as pool:
    return {i for i in pool.map(
        refused, epoch, index, draws, records or [b''] * len(index))
            if i is not None}
