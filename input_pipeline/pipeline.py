"""Order -> read -> ops -> batch, on the host.

Two engines give the same examples in the same order: numpy with Pillow for
everything in memory, `tf.data` for files on disk. Without TensorFlow the first
one reads files, too.
"""
import concurrent.futures
import dataclasses
import itertools
import os

from absl import logging
import numpy as np

from input_pipeline import messages
from input_pipeline import ops as ops_
from input_pipeline import ops_numpy
from input_pipeline import order
from input_pipeline import sources

_CHANNELS = (1, 3)
# What Pillow raises on broken or hostile files, apart from OSError.
READ_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError,
    TypeError, ArithmeticError, MemoryError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Data:
  """An opened data set with its preprocessing.

  Attributes:
    train: what to train on.
    evals: what to evaluate on, by name ('test', 'val').
    class_names: in the order of the labels.
    train_ops: of input.pp.
    eval_ops: of input.eval_pp.
    image_shape: (H, W, C) of training images.
    eval_shape: (H, W, C) of evaluation images.
  """
  train: sources.Source
  evals: dict[str, sources.Source]
  class_names: tuple[str, ...]
  train_ops: tuple[ops_.Op, ...]
  eval_ops: tuple[ops_.Op, ...]
  image_shape: tuple[int, int, int]
  eval_shape: tuple[int, int, int]


def open_data(config_input, data_seed, splits=None):
  """Opens what a config's `input` section names, and checks all of it.

  Args:
    config_input: mapping with
      source: 'digits', 'arrays' or 'folder'; see `sources` and `folder`.
      path: of the data; '' for digits.
      pp, eval_pp: ops of training and evaluation; see `ops.OPS`.
      channels: 1 or 3.
      epoch: 'exact' or 'floor'; see `order.batch_positions`.
      holdout: fraction in (0, 1) of the training examples to evaluate on
        where the data has no part for it. Which ones never changes.
      classes: '' or a JSON file with the list of class names in order.
    data_seed: int in [0, 2**63), of the order and of the host's draws.
    splits: sources.Splits to use in place of source and path, such as from
      `sources.from_arrays`.

  Returns:
    Data.

  Raises:
    FileNotFoundError: a path that does not exist.
    ValueError: anything else that would fail later; with the remedy.
  """
  # Every key is read whatever the others say, so that a check for keys that
  # nothing reads stays simple.
  name, path, epoch, channels, holdout, classes = (
      config_input[k]
      for k in ('source', 'path', 'epoch', 'channels', 'holdout', 'classes'))
  train_ops = ops_.parse(config_input['pp'], 'pp')
  eval_ops = ops_.parse(config_input['eval_pp'], 'eval_pp')
  order.check_seed(data_seed)
  _check_choice('source', name, tuple(sources.SOURCES))
  _check_choice('epoch', epoch, order.EPOCHS)
  _check_choice('channels', channels, _CHANNELS)
  if not isinstance(holdout, (int, float)) or not 0 < holdout < 1:
    raise ValueError(
        f'input.holdout={holdout!r} is not between 0 and 1.\n'
        'Take the fraction of the examples to evaluate on, such as 0.1.')
  random_ops = [name for name, op in ops_.OPS.items()
                if op.draws and op in map(type, eval_ops)]
  if random_ops:
    raise ValueError(
        f'input.eval_pp contains {", ".join(random_ops)}: random.\n'
        'Evaluation is not: use resize_small and central_crop.')

  class_names = sources.read_classes(path=classes) if classes else ()
  if splits is None:
    splits = sources.SOURCES[name](path, holdout, class_names)
  for split, source in {'train': splits.train, **splits.evals}.items():
    if not source.num_examples:
      raise ValueError(f'{name}: {split} has no examples.\n'
                       'Add some, or remove that part.')
  shapes = [
      {_shape(key, ops, s, channels) for s in part}
      for key, ops, part in (
          ('pp', train_ops, [splits.train]),
          ('eval_pp', eval_ops, splits.evals.values() or [splits.train]))]
  if len(shapes[1]) > 1:
    raise ValueError(
        f'input.eval_pp gives images of shapes {sorted(shapes[1])}.\n'
        'Make them one size with resize or a crop.')
  return Data(splits.train, splits.evals, splits.train.class_names, train_ops,
              eval_ops, shapes[0].pop(), shapes[1].pop())


def image_shape(config_input):
  """The shape of training images, without opening any data.

  Args:
    config_input: as in `open_data`; only pp and channels are read.

  Returns:
    (H, W, C), equal to `Data.image_shape` of the data once it is opened.

  Raises:
    ValueError: the ops are wrong or do not fix a size. They need not do so
      where the source does (digits, arrays of pixels): that takes `open_data`.
  """
  ops, channels = ops_.parse(config_input['pp'], 'pp'), config_input['channels']
  _check_choice('channels', channels, _CHANNELS)
  return (*_size('pp', ops, None, None), channels)


def _check_choice(key, value, choices):
  if value not in choices:
    raise ValueError(f'input.{key}={value!r} is unknown.\n'
                     + messages.choices(value, choices))


def _shape(key, ops, source, channels):
  """(H, W, C) of a source's images after the ops."""
  if source.encoded and not (ops and isinstance(ops[0], ops_.Decode)):
    raise ValueError(
        f"input.{key} does not begin with 'decode', but the source holds image "
        "files.\nPut it first, as in 'decode|resize(224)'.")
  height, width = (None, None) if source.encoded else source.image_shape[:2]
  return (*_size(key, ops, height, width), channels)


def _size(key, ops, height, width):
  """(H, W) after the ops; None stands for a size that varies."""
  try:
    size = ops_.out_size(ops, height, width)
  except ValueError as e:
    raise ValueError(f'input.{key}: {e}') from None
  if None in size:
    raise ValueError(
        f'input.{key} does not bring images to one size.\n'
        "End it with 'resize(H, W)' or with a crop, such as "
        "'decode|resize_small(256)|central_crop(224)'.")
  return size


def train_batches(data, *, global_batch_size, data_seed, start_step=0,
                  epoch='exact', process_index=0, process_count=1):
  """Endless batches of one process, from any step on at once.

  Args:
    data: from `open_data`.
    global_batch_size: B, over all processes.
    data_seed: int in [0, 2**63).
    start_step: first step; its batch equals that of an unbroken stream.
    epoch: 'exact' or 'floor'; see `order.batch_positions`.
    process_index: which rows of each global batch: b from process_index * b.
    process_count: divides B; b = B / process_count.

  Returns:
    Iterator of {'image': uint8 [b, H, W, C], 'label': int32 [b]}.

  Raises:
    ValueError: sizes that do not fit (at the call), an image that cannot be
      read (by the iterator), with its path.
  """
  order.check_seed(data_seed)

  def rows(step):
    return order.batch_examples(
        data_seed, step, num_examples=data.train.num_examples,
        global_batch_size=global_batch_size, epoch=epoch,
        process_index=process_index, process_count=process_count)

  rows(start_step)
  images = _images(data.train, data.train_ops, data.image_shape, data_seed,
                   rows, start_step, None)
  return ({'image': image, 'label': data.train.labels[index]}
          for index, image in images)


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
    Iterator of ceil(N / B) batches, the same number on every process:
    {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': bool [b]}. Rows
    with mask False pad the last batch; they hold zeros.

  Raises:
    ValueError: an unknown split, one without examples, or a batch size that
      does not divide (at the call); an image that cannot be read.
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

  def rows(batch):
    first = batch * global_batch_size + process_index * size
    index = np.arange(first, min(first + size, source.num_examples))
    return np.zeros_like(index), index

  def pad(x):
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

  images = _images(source, data.eval_ops, data.eval_shape, 0, rows, 0,
                   -(-source.num_examples // global_batch_size))
  return ({'image': pad(image), 'label': pad(source.labels[index]),
           'mask': pad(np.ones(len(index), bool))}
          for index, image in images)


def _images(source, ops, shape, data_seed, rows, start, count):
  """Yields (index int64 [n], uint8 [n, *shape]) for `rows` of each step.

  Args:
    source: what to read.
    ops: what to apply.
    shape: (H, W, C) that results.
    data_seed: int.
    rows: function of a step: (epoch, index), each int64 [n]. n is the same at
      all steps but the last; once it is 0 it stays so.
    start: the first step.
    count: how many steps; None is endless.
  """
  stream = _numpy_images
  if not source.in_memory:
    try:
      # Here, so that everything else runs without TensorFlow.
      from input_pipeline import pipeline_tf
      stream = pipeline_tf.images
    except ImportError as e:
      logging.info('Decoding with Pillow, because TensorFlow is not here (%s).',
                   e)
  return stream(source, ops, shape, data_seed, rows, start, count)


def steps(start, count):
  """`count` steps from `start` on; None is endless."""
  return itertools.count(start) if count is None else range(
      start, start + count)


def cpu_count():
  """CPUs that this process may use; `os.cpu_count` counts the others, too."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _numpy_images(source, ops, shape, data_seed, rows, start, count):
  """The engine without TensorFlow; threads where there is decoding to do."""

  def load(index, draws):
    return decode_example(source, index, ops, draws, shape[-1])

  with concurrent.futures.ThreadPoolExecutor(cpu_count()) as pool:
    for step in steps(start, count):
      epoch, index = rows(step)
      draws = ops_.draw(ops, data_seed, epoch, index)
      if not len(index):
        images = []
      elif source.encoded:
        images = pool.map(load, index, draws)
      else:
        pixels = ops_numpy.to_channels(source.read(index), shape[-1])
        images = [
            ops_numpy.apply(p, ops, ops_.views(ops, *p.shape[:2], d))
            for p, d in zip(pixels, draws, strict=True)]
      images = list(images)
      yield index, np.stack(images) if images else np.zeros((0, *shape), 'u1')


def decode_example(source, index, ops, draws, channels):
  """Reads one example of an encoded source through Pillow.

  Returns:
    uint8 [h, w, channels].

  Raises:
    ValueError: it cannot be read, with its path.
  """
  try:
    image = ops_numpy.decode(source.read([index])[0], channels)
    return ops_numpy.apply(
        image, ops, ops_.views(ops, *image.shape[:2], draws))
  except READ_ERRORS as e:
    raise unreadable(source, index, e) from e


def unreadable(source, index, error):
  """The ValueError for an example that cannot be read."""
  return ValueError(
      f'{source.describe(index)} cannot be read: {messages.one_line(error)}.\n'
      'Repair or remove the image; if it is too small, resize before the crop.'
  )


def class_counts(data):
  """{split: {class name: number of examples}}, training first."""
  return {name: source.counts()
          for name, source in {'train': data.train, **data.evals}.items()}
