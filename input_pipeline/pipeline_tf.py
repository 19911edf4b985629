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
from input_pipeline import ops_tf
from input_pipeline import pipeline

# Files that Python reads in one call from the graph, for a call costs what
# reading one does; fewer would leave threads without work in small batches.
_CHUNK = 8


def images(job, start, count):
  """As `pipeline._numpy_images`."""
  for_pillow = set()  # examples that TensorFlow's decoders refused
  failures = {}  # of rows that are not in a batch yet, by their number
  size = max(job.size(start), 1)
  stream = _dataset(job, start, count, size, for_pillow, failures)
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
        stream = _dataset(job, step, count and start + count - step, size,
                          for_pillow, failures)
    first = step * size
    yield *batch, {row: failures.pop(first + row)
                   for row in range(size) if first + row in failures}


def _dataset(job, start, count, size, for_pillow, failures):
  """An iterator of (image, label, ok) for `count` steps of `size` rows.

  Row i of a step has the number step * size + i; `failures` is given those of
  `Job.first_readable` of each row, by number, before the row is in a batch.
  """
  rows = job.rows_from(start)
  waiting = {}  # {number of its first row: rows of a chunk}

  def choose(step):
    # `rows` counts for itself, too: this map is sequential.
    chosen = next(rows)
    columns = (chosen.epoch, chosen.index, job.draws(chosen),
               chosen.records or [None] * len(chosen.index))
    at = np.arange(0, len(chosen.index), _CHUNK)
    for i in at.tolist():
      waiting[int(step) * size + i] = [c[i:i + _CHUNK] for c in columns]
    return step * size + at

  def fetch(first):
    first = int(first)
    contents, numbers = [], []
    for number, row in enumerate(
        zip(*waiting.pop(first), strict=True), first):
      (_, content, *rest), failed = _fetch(job, for_pillow, *row)
      if failed:
        failures[number] = failed
      contents.append(content)
      numbers.append(np.concatenate(rest))
    return np.array(contents, object), np.stack(numbers)

  def in_graph(function, types, shapes):
    return lambda x: tuple(
        tf.ensure_shape(y, shape) for y, shape in zip(
            tf.numpy_function(function, [x], types), shapes, strict=True))

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
      data.map(in_graph(choose, [tf.int64], [[None]])).unbatch()
      .map(in_graph(fetch, [tf.string, tf.int32], [[None], [None, None]]),
           num_parallel_calls=threads, deterministic=True).unbatch()
      .map(lambda *fetched: _decode(job, *fetched),
           num_parallel_calls=threads, deterministic=True)
      .batch(size).prefetch(2).with_options(options).as_numpy_iterator())


def _fetch(job, for_pillow, epoch, index, draws, record):
  """Reads a row's image, or the one in its place.

  Returns:
    ((index, content, header, views), failures): the index that was read;
    content as `ops_tf.load` takes it; int32 [4]: whether there is an image, its
    label, kind and margin; int32 [8 * len(ops)], `ops.views`. Zeros if there is
    none. Failures as of `Job.first_readable`.
  """

  def load(i, record):
    content, label = job.source.load(i, record)
    file = ops_tf.look(content, i not in for_pillow)
    views = ops_.views(job.ops, file.height, file.width, draws, file.is_jpeg)
    content = ops_tf.prepare(content, file, views[0].scale)
    return (i, content, np.array([1, label, file.kind, file.margin], np.int32),
            np.array(views, np.int32).reshape(-1))

  found, failures = job.first_readable(epoch, index, record, load)
  return found or (
      index, b'', np.zeros(4, np.int32),
      np.zeros(len(job.ops) * len(ops_.View._fields), np.int32)), failures


def _decode(job, content, numbers):
  """(image uint8 `shape`, label, ok) of what `_fetch` returned."""
  ok, label, kind, margin = (numbers[i] for i in range(4))
  views = tf.reshape(numbers[4:], [len(job.ops), len(ops_.View._fields)])
  image = tf.cond(
      ok > 0,
      lambda: tf.ensure_shape(
          ops_tf.load(content, kind, margin, views, job.ops, job.shape[-1]),
          job.shape),
      lambda: tf.zeros(job.shape, tf.uint8))
  return image, label, ok > 0


def _raise_own_errors(job, step):
  """Raises what `rows_from` raises at a step: the graph knows only its text."""
  next(job.rows_from(step))


def _refused(job, step, for_pillow):
  """The examples of a step that TensorFlow fails to decode."""
  rows = next(job.rows_from(step))

  def refused(*row):
    (i, content, *numbers), _ = _fetch(job, for_pillow, *row)
    try:
      _decode(job, tf.constant(content), tf.constant(np.concatenate(numbers)))
    except tf.errors.OpError:
      return int(i)

  with concurrent.futures.ThreadPoolExecutor(pipeline.cpu_count()) as pool:
    return {i for i in pool.map(
        refused, rows.epoch, rows.index, job.draws(rows),
        rows.records or [None] * len(rows.index)) if i is not None}
