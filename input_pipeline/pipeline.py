"""Order -> read -> ops -> batch, on the host.

Two engines give the same examples in the same order: numpy with Pillow for
everything in memory, `tf.data` for files on disk. Without TensorFlow the first
one reads files, too.
"""
from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import struct
from typing import NamedTuple

from absl import logging
import numpy as np
from PIL import Image

from input_pipeline import bad_images
from input_pipeline import messages
from input_pipeline import ops as ops_
from input_pipeline import ops_numpy
from input_pipeline import order
from input_pipeline import sources

# What Pillow raises on broken or hostile files, apart from OSError.
READ_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError,
    TypeError, ArithmeticError, MemoryError, NotImplementedError,
    struct.error, Image.DecompressionBombError)
# Draws for the place of an unreadable image. With one image in ten unreadable
# all of them fail once in 1e16.
_SUBSTITUTES = 16
# Examples whose order is computed at once: small batches pay for each call.
_ORDERED = 1024


class Rows(NamedTuple):
  """The examples of a batch: int64 [n] each, and what a stream holds of them.

  Attributes:
    epoch, index, repeat: as of `order.batch_examples`.
    records: list of n where the source is streamed, else None.
  """
  epoch: np.ndarray
  index: np.ndarray
  repeat: np.ndarray
  records: list | None


def train_batches(data, *, global_batch_size, data_seed, start_step=0,
                  epoch='exact', repeats=1, process_index=0, process_count=1):
  """Endless batches of one process, from any step on at once.

  In place of an image that cannot be read stands another, drawn by
  `order.substitute` from (data_seed, epoch, its index), so that all other rows,
  and resumption, stay as they are. Streamed sources cannot be asked for any
  index: the next readable row of the batch is repeated.

  Args:
    data: from `open_data`.
    global_batch_size: B, over all processes.
    data_seed: int in [0, 2**63).
    start_step: first step; its batch equals that of an unbroken stream.
    epoch: 'exact' or 'floor'; see `order.batch_positions`.
    repeats: how often in a row an example comes; see `order.batch_examples`.
    process_index: which rows of each global batch: b from process_index * b.
    process_count: divides B; b = B / process_count.

  Returns:
    Iterator of {'image': uint8 [b, H, W, C], 'label': int32 [b]}.

  Raises:
    ValueError: sizes that do not fit (at the call); more images that cannot be
      read than input.max_bad_fraction allows (by the iterator), with a path.
  """
  order.check_seed(data_seed)
  source = data.train
  processes = dict(process_index=process_index, process_count=process_count)

  def rows(step, steps):
    return order.batch_examples(
        data_seed, step, num_examples=source.num_examples,
        global_batch_size=global_batch_size, epoch=epoch, repeats=repeats,
        steps=steps, **processes)

  size = len(rows(start_step, 1)[1])
  if source.streamed and epoch != 'exact':
    raise ValueError(
        f'A streamed source has no input.epoch={epoch!r}.\n'
        "Use input.epoch='exact', or copy the data to a local disk.")
  if source.streamed:
    order.check_not_repeated(repeats)
    source.files_of(**processes, data_seed=data_seed)  # raises if too few

  def rows_from(first):
    if not source.streamed:
      ahead = max(_ORDERED // size, 1)
      for step in itertools.count(first, ahead):
        many = rows(step, ahead)
        for i in range(0, ahead * size, size):
          yield Rows(*(x[i:i + size] for x in many), None)
    records = source.shuffled(data_seed, first * size, **processes)
    while True:
      yield _columns(itertools.islice(records, size))

  job = Job(source, bad_images.TRAIN, data.train_ops, data.image_shape,
            data_seed, data.bad, rows_from, lambda step: size)
  return ({'image': image, 'label': label}
          for image, label, ok in job.run(start_step, None))


def eval_batches(data, split, *, global_batch_size, process_index=0,
                 process_count=1):
  """Batches that hold every example exactly once, over all processes.

  Args:
    data: from `open_data`.
    split: a key of `data.evals`.
    global_batch_size: B, over all processes.
    process_index: which rows of each global batch.
    process_count: divides B; b = B / process_count.

  Returns:
    Iterator of ceil(N / B) batches (streamed: of as many as the process with
    the most records fills), the same number on every process:
    {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': bool [b],
    'unreadable': bool [b]}. Rows with mask False hold zeros: they stand for
    images that cannot be read, or pad the last batch. Over all batches and
    processes, mask and unreadable together count N.

  Raises:
    ValueError: an unknown split, one without examples, or a batch size that
      does not divide (at the call).
  """
  if split not in data.evals:
    raise ValueError(f'The data has no part {split!r} to evaluate.\n'
                     + messages.choices(split, data.evals))
  source = data.evals[split]
  if not source.num_examples:
    raise ValueError(f'{split} has no examples to evaluate.\n'
                     'Add some, or evaluate another part.')
  if global_batch_size < 1 or global_batch_size % process_count:
    raise ValueError(
        f'The evaluation batch of {global_batch_size} does not divide over '
        f'{process_count} processes.\n'
        f'Make it a positive multiple of {process_count}.')
  size = global_batch_size // process_count
  if source.streamed:
    files = source.files_of(process_index, process_count)
    mine = source.num_records(files)
    most = max(source.num_records(source.files_of(p, process_count))
               for p in range(process_count))
    count = -(-most // size)
    first = lambda batch: batch * size
  else:
    mine = source.num_examples
    count = -(-mine // global_batch_size)
    first = lambda batch: batch * global_batch_size + process_index * size

  def rows_from(start):
    if source.streamed:
      stream = ((0, *pair) for pair in source.sequence(files, first(start)))
    for batch in range(start, count):
      if source.streamed:
        yield _columns(itertools.islice(stream, size))
      else:
        index = np.arange(first(batch), min(first(batch) + size, mine))
        none = np.zeros_like(index)
        yield Rows(none, index, none, None)

  def pad(x):
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

  job = Job(source, split, data.eval_ops, data.eval_shape, 0, data.bad,
            rows_from, lambda batch: min(max(mine - first(batch), 0), size))
  return ({'image': pad(image), 'label': pad(label), 'mask': pad(ok),
           'unreadable': pad(~ok)}
          for image, label, ok in job.run(0, count))


def _columns(triples):
  """Rows of a stream's (epoch, index, record)."""
  epoch, index, records = zip(*triples, strict=True) if (
      triples := list(triples)) else ((), (), ())
  return Rows(np.array(epoch, np.int64), np.array(index, np.int64),
              np.zeros(len(index), np.int64), list(records))


@dataclasses.dataclass(frozen=True)
class Job:
  """What the engines carry out: rows of steps, to be read and preprocessed.

  Attributes:
    source: what to read.
    part: its name, 'train' or a key of `Data.evals`.
    ops: what to apply.
    shape: (H, W, C) that results.
    data_seed: int.
    bad: bad_images.BadImages.
    rows_from: function of a step: an iterator of Rows of that and the
      following steps.
    size: function of a step: n. The same at all steps but the last; once it is
      0 it stays so.
  """
  source: sources.Source
  part: str
  ops: tuple[ops_.Op, ...]
  shape: tuple[int, int, int]
  data_seed: int
  bad: bad_images.BadImages
  rows_from: Callable
  size: Callable

  def run(self, start, count):
    """Yields (uint8 [n, *shape], label int32 [n], ok bool [n]) of each step.

    Args:
      start: the first step.
      count: how many steps; None is endless.
    """
    engine = _numpy_images
    if not self.source.in_memory:
      try:
        # Here, so that everything else runs without TensorFlow.
        from input_pipeline import pipeline_tf
        engine = pipeline_tf.images
      except ImportError as e:
        logging.info(
            'Decoding with Pillow, because TensorFlow is not here (%s).', e)
    for image, label, ok, failures in engine(self, start, count):
      self._report(ok, failures)
      if self.part == bad_images.TRAIN and not ok.all():
        take = _next_ok(ok)
        image, label, ok = image[take], label[take], ok[take]
      yield image, label, ok

  def draws(self, rows):
    """float64 [n, D], the random numbers of Rows; see `ops.draw`."""
    return ops_.draw(
        self.ops, self.data_seed, rows.epoch, rows.index, rows.repeat)

  @property
  def substitutes(self):
    """Whether another image takes the place of an unreadable one."""
    return self.part == bad_images.TRAIN and not self.source.streamed

  def first_readable(self, epoch, index, record, load):
    """What `load` makes of an example, or of the one in its place.

    Args:
      epoch: int.
      index: int.
      record: of a streamed source, or None.
      load: function of (index, record).

    Returns:
      (found, failures): what `load` returned, or None if the example cannot be
      read and nothing takes its place; and a list of (example, why it cannot
      be read, None if that is known), in the order in which they were tried.
      Rows are read side by side: `run` alone judges the failures, in order.
    """
    failures = []
    for attempt in range(_SUBSTITUTES + 1 if self.substitutes else 1):
      i = int(index) if not attempt else order.substitute(
          self.data_seed, epoch, index, attempt, self.source.num_examples)
      if self.bad.knows(self.part, i):
        failures.append((i, None))
        continue
      try:
        return load(i, record), failures
      except READ_ERRORS as e:
        failures.append((i, messages.one_line(e)))
    return None, failures

  def _report(self, ok, failures):
    """Lists a batch's failures, {row: those of `first_readable`}, by row.

    Raises:
      ValueError: too many images cannot be read, or a row has no substitute.
    """
    for row, tried in sorted(failures.items()):
      for index, reason in tried:
        if reason is not None:
          self.bad.add(self.part, self.source, index, reason)
      if self.substitutes and not ok[row]:
        raise ValueError(
            f'{self.source.describe(tried[0][0])} cannot be read, nor '
            f'{_SUBSTITUTES} others drawn in its place.\n'
            'Lower input.max_bad_fraction, and repair or remove the images.')


def _next_ok(ok):
  """int64 [n]: each row of a batch, or the next good one after it."""
  good = np.flatnonzero(ok)
  if not len(good):
    raise ValueError('A whole batch of streamed images cannot be read.\n'
                     'Prepare the data set again, or use a larger batch.')
  return good[np.searchsorted(good, np.arange(len(ok))) % len(good)]


def steps(start, count):
  """`count` steps from `start` on; None is endless."""
  return itertools.count(start) if count is None else range(
      start, start + count)


def cpu_count():
  """CPUs that this process may use; `os.cpu_count` counts the others, too."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _numpy_images(job, start, count):
  """The engine without TensorFlow; threads where there is decoding to do.

  Yields what `Job.run` does, and {row: failures of `Job.first_readable`}.
  """
  source, ops, shape = job.source, job.ops, job.shape
  rows = job.rows_from(start)

  def load(epoch, index, draws, record):
    return job.first_readable(epoch, index, record, functools.partial(
        decode_example, source, ops, draws, shape[-1]))

  with concurrent.futures.ThreadPoolExecutor(cpu_count()) as pool:
    for step in steps(start, count):
      if not job.size(step):
        yield no_images(shape)
        continue
      chosen = next(rows)
      draws, index = job.draws(chosen), chosen.index
      if source.encoded:
        found, tried = zip(*pool.map(
            load, chosen.epoch, index, draws,
            chosen.records or [None] * len(index)), strict=True)
        none = np.zeros(shape, np.uint8), 0
        images, labels = zip(*(f or none for f in found), strict=True)
        images = np.stack(images)
        ok = np.array([f is not None for f in found])
        failures = {row: t for row, t in enumerate(tried) if t}
      else:
        pixels = ops_numpy.to_channels(source.read(index), shape[-1])
        views = [ops_.views(ops, *pixels.shape[1:3], d) for d in draws]
        images = ops_numpy.apply_batch(pixels, ops, views)
        labels, ok = source.labels[index], np.ones(len(index), bool)
        failures = {}
      yield images, np.array(labels, np.int32), ok, failures


def no_images(shape):
  """What an engine yields for a step without rows."""
  return (np.zeros((0, *shape), np.uint8), np.zeros(0, 'i4'),
          np.zeros(0, bool), {})


def decode_example(source, ops, draws, channels, index, record=None):
  """(uint8 [h, w, channels], label) of an encoded source, through Pillow.

  Raises:
    READ_ERRORS: it cannot be read.
  """
  content, label = source.load(index, record)
  return preprocess(content, ops, channels, draws), label


def preprocess(image, ops, channels, draws=()):
  """What the ops make of one image, without TensorFlow.

  Args:
    image: an image file's bytes, a Pillow image, or uint8 [H, W] or
      [H, W, 1 or 3].
    ops: from `ops.parse`.
    channels: 1 or 3.
    draws: a row of what `ops.draw` returned; for ops that draw nothing, ().

  Returns:
    uint8 [h, w, channels].

  Raises:
    READ_ERRORS: it cannot be read.
  """
  if isinstance(image, np.ndarray):
    pixels = image if image.ndim == 3 else image[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or (
        pixels.shape[-1] not in (1, 3)):
      raise ValueError(f'it is {image.dtype} {image.shape}, not uint8 [H, W] '
                       'or [H, W, 1 or 3].\nConvert it.')
    pixels = ops_numpy.to_channels(pixels, channels)
    views = ops_.views(ops, *pixels.shape[:2], draws)
  else:
    if isinstance(image, bytes):
      image = ops_numpy.open_image(image)
    width, height = image.size
    views = ops_.views(ops, height, width, draws, ops_numpy.is_jpeg(image))
    pixels = ops_numpy.pixels(image, channels, views[0].scale)
  return ops_numpy.apply(pixels, ops, views)
