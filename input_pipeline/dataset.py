"""A config's `input` section, opened and checked: sources with their ops."""
import dataclasses

from input_pipeline import bad_images
from input_pipeline import messages
from input_pipeline import ops as ops_
from input_pipeline import order
from input_pipeline import sources

_CHANNELS = (1, 3)
_KEYS = ('source', 'path', 'classes', 'holdout', 'channels', 'epoch', 'pp',
         'repeats', 'eval_pp', 'max_bad_fraction', 'only_classes', 'validation',
         'per_class')


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
    bad: what could not be read so far, see `bad_images.BadImages`.
  """
  train: sources.Source
  evals: dict[str, sources.Source]
  class_names: tuple[str, ...]
  train_ops: tuple[ops_.Op, ...]
  eval_ops: tuple[ops_.Op, ...]
  image_shape: tuple[int, int, int]
  eval_shape: tuple[int, int, int]
  bad: bad_images.BadImages


def open_data(config_input, data_seed, splits=None):
  """Opens what a config's `input` section names, and checks all of it.

  Args:
    config_input: mapping with
      source: 'digits', 'arrays', 'folder' or 'tfds'; see `sources`, `folder`
        and `tfds_source`.
      path: of the data; '' for digits; 'name:version' for tfds.
      pp, eval_pp: ops of training and evaluation; see `ops.OPS`.
      channels: 1 or 3.
      epoch: 'exact' or 'floor'; see `order.batch_positions`.
      repeats: from 1 on; see `order.batch_examples`.
      holdout: fraction in (0, 1) of the training examples to evaluate on
        where the data has no part for it. Which ones never changes.
      classes: '' or a JSON file with the list of class names in order.
      only_classes, validation, per_class: see `sources.choose`.
      max_bad_fraction: in [0, 1), of training images that may be unreadable.
      data_dir, train_split, eval_split, stream, window: of tfds, see
        `tfds_source.open_splits`; their defaults for other sources.
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
  section = {k: config_input[k] for k in _KEYS}
  name, channels = section['source'], section['channels']
  tfds_only = {k: config_input[k] for k in sources.TFDS_ONLY}
  train_ops = ops_.parse(section['pp'], 'pp')
  eval_ops = parse_eval_pp(section['eval_pp'])
  order.check_seed(data_seed)
  _check_values(section)
  _check_tfds_only(name, tfds_only)

  classes = section['classes']
  class_names = sources.read_classes(path=classes) if classes else ()
  if splits is None:
    options = tfds_only if name == 'tfds' else {}
    splits = sources.SOURCES[name](
        section['path'], section['holdout'], class_names, **options)
  splits = sources.choose(
      splits, section['only_classes'], section['validation'],
      section['per_class'], data_seed)
  if splits.train.streamed:
    order.check_not_repeated(section['repeats'])
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
              eval_ops, shapes[0].pop(), shapes[1].pop(),
              bad_images.BadImages(section['max_bad_fraction']))


def _check_values(section):
  """Raises ValueError for values that no source could obey."""
  for key, choices in (('source', tuple(sources.SOURCES)),
                       ('epoch', order.EPOCHS), ('channels', _CHANNELS)):
    _check_choice(key, section[key], choices)
  order.check_repeats(section['repeats'])
  holdout, max_bad = section['holdout'], section['max_bad_fraction']
  if not isinstance(holdout, (int, float)) or not 0 < holdout < 1:
    raise ValueError(
        f'input.holdout={holdout!r} is not between 0 and 1.\n'
        'Take the fraction of the examples to evaluate on, such as 0.1.')
  if not isinstance(max_bad, (int, float)) or not 0 <= max_bad < 1:
    raise ValueError(
        f'input.max_bad_fraction={max_bad!r} is not in [0, 1).\n'
        'Take the fraction of training images that may be unreadable: 0.001.')
  if not 0 <= section['validation'] < 1:
    raise ValueError(
        f'input.validation={section["validation"]!r} is not in [0, 1).\n'
        'Take the fraction of training images to select on, or 0.')
  if section['per_class'] < 0:
    raise ValueError(
        f'input.per_class={section["per_class"]} is negative.\n'
        'Take the number of training images of each class, or 0 for all.')


def parse_eval_pp(text):
  """`ops.parse` of input.eval_pp, which may not draw random numbers.

  Raises:
    ValueError: see `ops.parse`; or it does.
  """
  eval_ops = ops_.parse(text, 'eval_pp')
  random_ops = [name for name, op in ops_.OPS.items()
                if op.draws and op in map(type, eval_ops)]
  if random_ops:
    raise ValueError(
        f'input.eval_pp contains {", ".join(random_ops)}: random.\n'
        'Evaluation is not: use resize_small and central_crop.')
  return eval_ops


def _check_tfds_only(source, options):
  """Raises ValueError for values of the wrong kind or without effect."""
  for key, value in options.items():
    default = sources.TFDS_ONLY[key]
    if source != 'tfds' and value != default:
      raise ValueError(
          f'input.{key}={value!r} has no effect with input.source={source!r}.\n'
          f"Leave it at {default!r}, or use input.source='tfds'.")
    if type(value) is not type(default) or (key == 'window' and value < 1):
      raise ValueError(
          f'input.{key}={value!r} is no {type(default).__name__} that it could '
          f'be.\nIts default is {default!r}.')


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


def class_counts(data):
  """{split: {class name: number of examples}}, training first."""
  return {name: source.counts()
          for name, source in {'train': data.train, **data.evals}.items()}
