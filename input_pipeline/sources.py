"""Data sets as random access: N labelled examples, readable by index.

A source is either encoded (image files, still to be decoded) or raw (uint8
pixels). `SOURCES` says which exist; each function returns the training source
and the evaluation sources, checked, with one list of class names.
"""
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib

from absl import logging
import numpy as np
from PIL import Image

from input_pipeline import jpeg
from input_pipeline import messages
from input_pipeline import order


class Source:
  """Labelled images, by index.

  Attributes:
    labels: int32 [N], in [0, len(class_names)).
    class_names: in the order of the labels.
    encoded: whether `read` gives image files (bytes) or pixels.
    in_memory: whether reading touches no disk.
    image_shape: (H, W, C) of raw pixels; None where encoded.
    streamed: read in an order of its own, not by index; see `tfds_source`.
    files: whether `describe` is the path of a file that is the image.
  """
  encoded = files = False
  in_memory = True
  streamed = False
  image_shape = None

  def __init__(self, labels, class_names):
    self.labels = np.asarray(labels, np.int32)
    self.class_names = tuple(class_names)

  @property
  def num_examples(self):
    return len(self.labels)

  @functools.cached_property
  def headers(self):
    """jpeg.Headers, of its files that were looked at."""
    return jpeg.Headers(self.num_examples)

  def counts(self):
    """{class name: number of examples}, in class order."""
    counts = np.bincount(self.labels, minlength=len(self.class_names))
    return dict(zip(self.class_names, counts.tolist(), strict=True))

  def read(self, indices):
    """Encoded: list of bytes. Raw: uint8 [n, H, W, C]."""
    raise NotImplementedError

  def load(self, index, record=None):
    """(bytes of the image file, int label) of one example.

    Args:
      index: of the example.
      record: what a streamed source yielded for it.
    """
    del record
    return self.read([index])[0], int(self.labels[index])

  def describe(self, index):
    """What to call an example in an error message: a path, or a number."""
    raise NotImplementedError


class Pixels(Source):
  """uint8 images in memory, [N, H, W, C]."""

  def __init__(self, images, labels, class_names, name):
    super().__init__(labels, class_names)
    self._images, self._name = images, name
    self.image_shape = images.shape[1:]

  def read(self, indices):
    return self._images[np.asarray(indices)]

  def describe(self, index):
    return f'{self._name} #{index}'


class Packed:
  """N byte strings end to end: little more memory than their contents."""

  def __init__(self, data, offsets):
    """uint8 [total] and int64 [N + 1]; string i is offsets[i]:offsets[i+1]."""
    self._data, self._offsets = data, offsets

  @classmethod
  def of(cls, strings):
    ends = np.cumsum([0, *map(len, strings)], dtype=np.int64)
    return cls(np.frombuffer(b''.join(strings), np.uint8), ends)

  def __getitem__(self, i):
    return self._data[self._offsets[i]:self._offsets[i + 1]].tobytes()


class Encoded(Source):
  """Image files in memory."""
  encoded = True

  def __init__(self, files, labels, class_names, name):
    super().__init__(labels, class_names)
    self._files, self._name = files, name

  def read(self, indices):
    return [self._files[int(i)] for i in indices]

  def describe(self, index):
    return f'{self._name} #{index}'


class Subset(Source):
  """Some examples of another source, in the order of `rows`."""

  def __init__(self, source, rows):
    super().__init__(source.labels[rows], source.class_names)
    self._source, self._rows = source, np.asarray(rows)
    self.encoded, self.in_memory = source.encoded, source.in_memory
    self.image_shape, self.files = source.image_shape, source.files

  def read(self, indices):
    return self._source.read(self._rows[np.asarray(indices)])

  def describe(self, index):
    return self._source.describe(self._rows[index])


def choose(splits, only_classes, validation, per_class, data_seed):
  """Splits with a part of the training examples elsewhere, or left out.

  Args:
    splits: Splits.
    only_classes: names of the classes to keep, in training and evaluation, in
      the order of the labels that result; (): all.
    validation: fraction in [0, 1) of the training examples that becomes the
      part 'validation', by class, always the same ones; 0: none.
    per_class: training examples of each class; 0: all. The K that are drawn
      are among those that a larger K draws, and are the same on any number of
      processes.
    data_seed: int, of the draw.

  Raises:
    ValueError: a streamed source, an unknown or repeated class, fewer than two
      classes, a class with fewer than per_class examples, or a part
      'validation' that the data has already.
  """
  if not (only_classes or validation or per_class):
    return splits
  parts = {'train': splits.train, **splits.evals}
  if any(source.streamed for source in parts.values()):
    key = ('only_classes' if only_classes else
           'validation' if validation else 'per_class')
    raise ValueError(
        f'A streamed source has no input.{key}.\n'
        'Leave it at its default, or copy the data to a local disk.')
  names = splits.train.class_names
  chosen = tuple(only_classes) or names
  for name in chosen:
    if name not in names:
      raise ValueError(f'input.only_classes: the data has no class {name!r}.\n'
                       + messages.choices(name, names))
  if len(set(chosen)) < max(len(chosen), 2):
    raise ValueError(
        f'input.only_classes={chosen!r} are not two or more distinct classes.\n'
        'Name each class once, and two at the least.')
  if only_classes:
    parts = {part: _of_classes(source, chosen)
             for part, source in parts.items()}
  if validation:
    if 'validation' in parts:
      raise ValueError(
          'The data has a part validation, and input.validation makes one.\n'
          'Leave input.validation at 0.')
    train = parts['train']
    parts['train'], parts['validation'] = hold_out(
        train, [f'validation/{i}' for i in range(train.num_examples)],
        round(validation * train.num_examples))
  if per_class:
    parts['train'] = _few(parts['train'], per_class, data_seed)
  return Splits(parts.pop('train'), parts)


def _of_classes(source, names):
  """The examples of some classes, labelled in the order of their names."""
  new = np.full(len(source.class_names), -1, np.int32)
  new[[source.class_names.index(name) for name in names]] = range(len(names))
  labels = new[source.labels]
  subset = Subset(source, np.flatnonzero(labels >= 0))
  subset.labels, subset.class_names = labels[labels >= 0], names
  return subset


def _few(source, count, data_seed):
  """`count` examples of each class, those with the smallest draws."""
  for name, found in source.counts().items():
    if found < count:
      raise ValueError(
          f'Class {name!r} has {found} training examples and '
          f'input.per_class={count}.\nLower it, or leave the class out with '
          'input.only_classes.')
  draws = order.subset_draws(data_seed, np.arange(source.num_examples))
  by_class = np.lexsort((draws, source.labels))
  sizes = np.bincount(source.labels)
  starts = np.cumsum(sizes) - sizes
  rows = by_class[(starts[:, None] + np.arange(count)).ravel()]
  return Subset(source, np.sort(rows))


@dataclasses.dataclass(frozen=True)
class Splits:
  """What a data set offers: one source to train on, others to evaluate."""
  train: Source
  evals: dict[str, Source]


def hold_out(source, names, count):
  """Splits off a stratified evaluation part that never moves.

  An example's place is drawn by hashing its name, not by `data_seed`: runs
  with different seeds stay comparable, and adding files moves few others.

  Args:
    source: what to split.
    names: N distinct strings.
    count: examples to hold out. Each class gives its share, rounded so that
      the shares add up, and keeps at least one example for training.

  Returns:
    (train, held out), two sources, each in the order of `source`.
  """
  draws = np.fromiter((
      int.from_bytes(
          hashlib.blake2b(f'hold-out/{n}'.encode(), digest_size=8).digest())
      for n in names), np.uint64)
  per_class = np.bincount(source.labels, minlength=len(source.class_names))
  share = count * per_class / max(source.num_examples, 1)
  take = np.floor(share).astype(np.int64)
  for c in np.argsort(take - share, kind='stable')[:count - take.sum()]:
    take[c] += 1
  take = np.minimum(take, np.maximum(per_class - 1, 0))
  held = np.zeros(source.num_examples, bool)
  # Sorted by class, then by draw: each class's first `take` are held out.
  order = np.lexsort((draws, source.labels))
  starts = np.cumsum(per_class) - per_class
  for start, n in zip(starts, take, strict=True):
    held[order[start:start + n]] = True
  if not held.any():
    raise ValueError(
        f'Holding out {count} of {source.num_examples} examples leaves none '
        'to evaluate.\n'
        'Raise input.holdout, or add examples or an evaluation part.')
  return (Subset(source, np.flatnonzero(~held)),
          Subset(source, np.flatnonzero(held)))


def hold_out_fraction(source, names, fraction):
  """`hold_out` of a fraction of the examples, with a line in the log.

  Splits without an evaluation part if the fraction is 0.
  """
  if not fraction:
    return Splits(source, {})
  train, held = hold_out(source, names, round(fraction * source.num_examples))
  logging.info(
      'No evaluation part: holding out %d of %d examples, by class, as "val".',
      held.num_examples, source.num_examples)
  return Splits(train, {'val': held})


def read_classes(path):
  """Class names in order, from a JSON file that holds a list of them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it does not hold two or more distinct names.
  """
  try:
    with open(path, encoding='utf-8') as f:
      names = json.load(f)
  except FileNotFoundError:
    raise FileNotFoundError(
        f'input.classes={path!r} does not exist.\n'
        'Name a JSON file with the list of class names, or leave it empty.'
    ) from None
  except (ValueError, OSError, RecursionError) as e:
    raise ValueError(
        f'input.classes={path!r} is not JSON ({messages.one_line(e)}).\n'
        'Write a list of class names, such as ["cat", "dog"].') from None
  if (not isinstance(names, list) or len(names) < 2
      or not all(isinstance(n, str) and n for n in names)
      or len(set(names)) < len(names)):
    raise ValueError(
        f'input.classes={path!r} is no list of two or more distinct names.\n'
        'Write the class names in order, such as ["cat", "dog"].')
  return tuple(names)


def digits(path, holdout, classes):
  """scikit-learn's 1797 handwritten digits, 32 x 32 x 1, 500 for 'test'.

  The 500 are fixed, whatever `holdout` says, so that results compare.
  """
  del holdout
  if path:
    raise ValueError(
        f"input.source='digits' reads no file, but input.path={path!r}.\n"
        "Leave it empty, or choose input.source='arrays' or 'folder'.")
  # Imported here because it costs a second that other sources need not pay.
  from sklearn.datasets import load_digits
  images, labels = load_digits(return_X_y=True)
  images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
  images = np.stack([
      np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BILINEAR))
      for i in images])[..., None]
  names = _names(classes, tuple('0123456789'), 10, 'digits')
  source = Pixels(images, labels, names, 'digits')
  train, test = hold_out(source, map(str, range(len(labels))), 500)
  return Splits(train, {'test': test})


def arrays(path, holdout, classes):
  """One .npz file; its keys are those of `from_arrays`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: truncated, not an .npz file, pickled, or as in `from_arrays`.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(
        f"input.path={path!r} is no file, but input.source='arrays'.\n"
        'Name one .npz file with train_images and train_labels.')
  key = None
  try:
    # allow_pickle=False: a data file must not be able to run code.
    if not zipfile.is_zipfile(path):  # NumPy would advise to unpickle it
      raise ValueError('it is no complete .npz file')
    with np.load(path, allow_pickle=False) as file:
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError('it holds a single array, not named ones')
      columns = {}
      for key in file.files:
        if key in _KEYS:
          columns[key] = file[key]
  except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile,
          zlib.error, NotImplementedError) as e:
    where = f'key {key!r} of {path}' if key else path
    raise ValueError(
        f'{where} cannot be read ({messages.one_line(e)}).\n'
        'The file is damaged or was not written by np.savez: write it again.'
    ) from e
  return from_arrays(columns, holdout=holdout, classes=classes, name=path)


_KEYS = ('class_names', *(
    f'{part}_{column}' for part in ('train', 'test')
    for column in ('images', 'labels', 'jpeg', 'offsets')))


def from_arrays(columns, *, holdout=0.1, classes=(), name='arrays'):
  """Sources over arrays in memory.

  Args:
    columns: {key: array}. Raw: `train_images` uint8 [N, H, W] or [N, H, W, C]
      with C 1 or 3. Encoded: `train_jpeg` uint8 [total], the image files (of
      any format that `decode` reads) end to end, with `train_offsets` int
      [N + 1]. Both: `train_labels` int [N]. The same with `test_`, optional;
      without it a part of the training examples is held out. `class_names`:
      strings, optional.
    holdout: fraction to hold out, in (0, 1).
    classes: class names that replace `class_names`.
    name: what to call the data in messages.

  Returns:
    Splits. Without names, classes are called '0', '1', ....

  Raises:
    ValueError: a missing key, a wrong dtype or shape, a label out of range.
  """
  parts = [p for p in ('train', 'test')
           if p == 'train' or any(k.startswith('test_') for k in columns)]
  labels = {p: _labels(columns, p, name) for p in parts}
  num_classes = 1 + max(int(v.max()) for v in labels.values())
  default = tuple(map(str, np.ravel(
      columns.get('class_names', range(num_classes)))))
  names = _names(classes, default, num_classes, name)
  splits = {}
  for part, y in labels.items():
    where = f'{name} {part}'
    if f'{part}_images' in columns:
      images = _images(columns[f'{part}_images'], f'{part}_images', name)
      splits[part], n = Pixels(images, y, names, where), len(images)
    else:
      files, n = _files(columns, part, name)
      splits[part] = Encoded(files, y, names, where)
    if n != len(y):
      raise ValueError(
          f'{name}: {n} {part} images but {len(y)} {part}_labels.\n'
          'Give each image one label.')
  if 'test' in splits:
    return Splits(splits['train'], {'test': splits['test']})
  rows = range(splits['train'].num_examples)
  return hold_out_fraction(splits['train'], map(str, rows), holdout)


def _column(columns, key, name):
  if key not in columns:
    raise ValueError(
        f'{name} has no {key!r}, only {sorted(columns)}.\n'
        'Raw pixels need train_images and train_labels, image files '
        'train_jpeg, train_offsets and train_labels; the same with test_ is '
        'optional.')
  return np.asarray(columns[key])


def _labels(columns, part, name):
  key = f'{part}_labels'
  labels = _column(columns, key, name)
  if labels.ndim != 1 or labels.dtype.kind not in 'iu' or not labels.size:
    raise ValueError(
        f'{name}: {key!r} is {labels.dtype} {list(labels.shape)}.\n'
        'It must be integers [N], N >= 1: the class of each image.')
  # Above 2**24 it is an identifier, not a class, and would ask for a head of
  # that width.
  if labels.min() < 0 or labels.max() >= 2**24:
    raise ValueError(
        f'{name}: {key!r} spans {labels.min()} to {labels.max()}.\n'
        'Number the classes 0, 1, 2, ...')
  return labels


def _images(images, key, name):
  images = np.asarray(images)
  if images.ndim == 3:
    images = images[..., None]
  if (images.ndim != 4 or images.shape[-1] not in (1, 3)
      or 0 in images.shape or images.dtype != np.uint8):
    raise ValueError(
        f'{name}: {key!r} is {images.dtype} {list(images.shape)}.\n'
        'It must be uint8 [N, H, W] or [N, H, W, C] with C 1 or 3 (floats in '
        '[0, 1]: multiply by 255 and round).')
  return images


def _files(columns, part, name):
  data = _column(columns, f'{part}_jpeg', name)
  ends = _column(columns, f'{part}_offsets', name)
  if data.ndim != 1 or data.dtype != np.uint8:
    raise ValueError(
        f"{name}: '{part}_jpeg' is {data.dtype} {list(data.shape)}.\n"
        'It must be uint8 [total], the image files end to end.')
  if (ends.ndim != 1 or ends.dtype.kind not in 'iu' or len(ends) < 2
      or ends[0] != 0 or ends[-1] != len(data)
      or (ends[1:] < ends[:-1]).any()):
    raise ValueError(
        f"{name}: '{part}_offsets' do not mark the files in '{part}_jpeg'.\n"
        f'They must be integers [N + 1] that grow from 0 to its {len(data)} '
        'bytes.')
  return Packed(data, ends.astype(np.int64)), len(ends) - 1


def _names(classes: Sequence[str], default, num_classes, name):
  """Checked class names: `classes` if given, else `default`."""
  names = tuple(classes) or default
  if len(names) < num_classes or len(names) < 2 or (
      len(set(names)) < len(names)):
    raise ValueError(
        f'{name}: {len(set(names))} distinct class names for labels 0 to '
        f'{num_classes - 1}.\n'
        'Give two classes or more, and a name for each.')
  return names


def folder(path, holdout, classes):
  """Images in folders; see `input_pipeline.folder`."""
  from input_pipeline import folder as folder_
  return folder_.open_splits(path, holdout, classes)


def made(path, holdout, classes):
  """A few images for smoke tests; see `input_pipeline.made`."""
  from input_pipeline import made as made_
  return made_.open_splits(path, holdout, classes)


def packed(path, holdout, classes):
  """What `vit-jax pack` wrote; see `input_pipeline.packed`."""
  from input_pipeline import packed as packed_
  return packed_.open_splits(path, holdout, classes)


# Keys of `input` that only source='tfds' obeys, with the value that they must
# have elsewhere.
TFDS_ONLY = dict(
    data_dir='', train_split='train', eval_split='', stream=False,
    window=16384)


def tfds(path, holdout, classes, **options):
  """Prepared TFDS data; options: TFDS_ONLY's, see `tfds_source.open_splits`."""
  del holdout  # its splits are named
  from input_pipeline import tfds_source
  return tfds_source.open_splits(
      path, classes=classes, **{**TFDS_ONLY, **options})


SOURCES = {'digits': digits, 'arrays': arrays, 'folder': folder, 'tfds': tfds,
           'packed': packed, 'made': made}
