"""Data sets prepared by TensorFlow Datasets.

Only the files are read: nothing is downloaded or prepared here, and neither the
data set's own code nor TensorFlow is imported for random access. The metadata
(dataset_info.json, features.json) and split names such as 'train[:98%]' are
TFDS's business.

ArrayRecord and TFRecord files on a disk are random access, so the same data
gives the same batches in either format. TFRecord elsewhere (gs://...), or with
input.stream, is streamed:
  - each process reads whole files, every `process_count`-th of an order drawn
    for each epoch, so the batches depend on the number of processes;
  - records are shuffled within windows of input.window consecutive ones. A
    window is in memory: 16,384 photographs of 110 kB are 1.8 GB;
  - a resumed run computes which window it is in, skips files by the lengths
    that the metadata has, and the records before in one file.
It equals an unbroken run bit for bit on the same number of processes.
"""
import collections
import os

from absl import logging
import numpy as np

from input_pipeline import cache
from input_pipeline import messages
from input_pipeline import order
from input_pipeline import records
from input_pipeline import sources

_EVALS = ('validation', 'val', 'test')


class Records(sources.Source):
  """A split of a TFDS data set, by index.

  An example's number is its place in the split, file by file.
  """
  encoded = True
  in_memory = False

  def __init__(self, parts, keys, class_names, classes_of, files=None):
    """Takes a split; `open_splits` makes one.

    Args:
      parts: list of (path, records to skip, records to take).
      keys: of the features with image and label.
      class_names: in the order of the labels that result.
      classes_of: int [C], the label for each one in the files.
      files: records.TFRecords or ArrayRecords of the paths; None: streamed.
    """
    self.class_names = tuple(class_names)
    self.streamed = files is None
    self._parts, self._keys, self._files = parts, keys, files
    self._classes_of = classes_of
    self._ends = np.cumsum([take for _, _, take in parts], dtype=np.int64)
    self._labels = None

  @property
  def num_examples(self):
    return int(self._ends[-1])

  @property
  def labels(self):
    """int32 [N]; reads all records the first time, and keeps the result.

    Training and evaluation take each label from the record of its image.

    Raises:
      ValueError: a record that cannot be read.
    """
    if self._labels is None:
      fingerprint = np.array(
          [(*self._stat(path), skip, take) for path, skip, take in self._parts],
          np.int64)
      file = cache.path_of('labels', repr((self._parts, self._keys)))
      found = cache.load(file, fingerprint, ('labels',))
      if found is None:
        stored = []
        for i, data in enumerate(self._all_records()):
          try:
            stored.append(records.parse_example(data, *self._keys)[1])
          except ValueError as e:
            raise ValueError(
                f'{self.describe(i)} cannot be read: {e}.\n'
                'Prepare the data set again.') from None
        found = {'labels': np.array(stored, np.int64)}
        cache.save(file, fingerprint, **found)
      self._labels = self._classes_of[found['labels']].astype(np.int32)
    return self._labels

  def _stat(self, path):
    if self.streamed:
      return 0, 0
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns

  def _all_records(self):
    if self.streamed:
      return (data for _, data in self.sequence(range(len(self._parts))))
    return (self._record(i) for i in range(self.num_examples))

  def _locate(self, index):
    file = int(np.searchsorted(self._ends, index, 'right'))
    _, skip, take = self._parts[file]
    return file, skip + int(index - (self._ends[file] - take))

  def _record(self, index):
    return self._files.read(*self._locate(index))

  def describe(self, index):
    file, record = self._locate(index)
    return f'{self._parts[file][0]} record {record}'

  def read(self, indices):
    return [self.load(i)[0] for i in indices]

  def load(self, index, record=None):
    data = self._record(index) if record is None else record
    image, label = records.parse_example(data, *self._keys)
    if not 0 <= label < len(self._classes_of):
      raise ValueError(f'the label {label} is no class')
    return image, int(self._classes_of[label])

  # --- streamed

  def sequence(self, files, skip=0):
    """Yields (index, record) of some files in that order, from `skip` on."""
    firsts = self._ends - [take for _, _, take in self._parts]
    for file in files:
      path, before, take = self._parts[file]
      if skip >= take:
        skip -= take
        continue
      stream = records.stream([path], before + skip)
      for i in range(skip, take):
        data = next(stream, None)
        if data is None:
          raise ValueError(
              f'{path} ends after {before + i} records, and its '
              f'dataset_info.json has {before + take} or more.\n'
              'Copy or prepare the data set again.')
        yield int(firsts[file]) + i, data
      stream.close()
      skip = 0

  def files_of(self, process_index, process_count, data_seed=None, epoch=0):
    """A process's files: in the order of an epoch, or (None) as they come.

    Raises:
      ValueError: a process would have none to train on. In evaluation it may.
    """
    count = len(self._parts)
    if data_seed is not None and count < process_count:
      raise ValueError(
          f'{count} streamed files do not divide over {process_count} '
          'processes.\nCopy the data set to a local disk, or prepare it with '
          'more shards.')
    files = np.arange(count)
    if data_seed is not None:
      files = order.permuted(
          data_seed, epoch, files, count, stream=order.FILES)
    return files[process_index::process_count].tolist()

  def num_records(self, files):
    """How many records some files hold."""
    return sum(self._parts[f][2] for f in files)

  def shuffled(self, data_seed, first, process_index, process_count):
    """Yields (epoch, index, record) of one process's stream, without end.

    Args:
      data_seed: int in [0, 2**63).
      first: how many records of the stream to leave out; whole files and
        windows before it are not read.
      process_index: of this process.
      process_count: of all.
    """
    epoch = 0
    while True:
      files = self.files_of(process_index, process_count, data_seed, epoch)
      total = self.num_records(files)
      if first >= total:
        first -= total
        epoch += 1
        continue
      for window in range(first // self.window, -(-total // self.window)):
        if window == first // self.window:  # the first of this epoch for us
          stream = self.sequence(files, window * self.window)
          size = min(self.window, total - window * self.window)
          ready = [next(stream) for _ in range(size)]
        left = first % self.window if window == first // self.window else 0
        chosen = order.permuted(
            data_seed, epoch, np.arange(len(ready)), len(ready),
            stream=order.WINDOWS + (process_index << 32) + window)
        # The next window comes in as this one goes out: one is in memory.
        after = min(self.window, total - (window + 1) * self.window)
        following = [next(stream) for _ in range(min(left, after))]
        for k in chosen[:left]:
          ready[k] = None
        for k in chosen[left:]:
          (index, record), ready[k] = ready[k], None
          if len(following) < after:
            following.append(next(stream))
          yield epoch, index, record
        ready = following
      first, epoch = 0, epoch + 1


def open_splits(path, data_dir, train_split, eval_split, stream, window,
                classes):
  """Opens a prepared TFDS data set.

  Args:
    path: 'name', 'name:version' or 'name/config:version'.
    data_dir: where TFDS prepared it, a folder or gs://...; '' is its default.
    train_split: to train on, such as 'train' or 'train[:98%]'.
    eval_split: to evaluate on, '' is validation or test, whichever is there.
      Several are 'val=validation, minival=train[99%:]'; without a name one is
      called 'test' if that is the name of the split and 'val' otherwise.
    stream: whether to stream TFRecord files that lie on a disk, too.
    window: records within which a stream is shuffled.
    classes: class names in order, or () for those of the data set.

  Returns:
    sources.Splits.

  Raises:
    FileNotFoundError: the data set was not prepared there.
    ValueError: splits or features that are not there, damaged files, TFDS is
      not installed.
  """
  builder = _builder(path, data_dir)
  info = builder.info
  keys, names = _features(info.features, path)
  class_names, classes_of = _classes(names, classes, path)
  if not eval_split:
    eval_split = next((s for s in _EVALS if s in info.splits), '')
  if not eval_split:
    raise ValueError(
        f'{path} has only the splits {sorted(info.splits)}, none to evaluate.\n'
        "Set input.train_split='train[:90%]' and input.eval_split="
        "'train[90%:]', for example.")

  def open_split(parts):
    source = _open(parts, info, stream, keys, class_names, classes_of, path)
    source.window = window
    return source

  parts = _parts(info, 'train_split', train_split, path)
  train, evals = open_split(parts), {}
  for name, split in _named(eval_split).items():
    part = _parts(info, 'eval_split', split, path)
    _warn_of_overlap(parts, part)
    evals[name] = open_split(part)
  if train.streamed:
    logging.info(
        '%s is streamed: files in an order drawn for each epoch, records '
        'shuffled within windows of %d. Batches depend on the number of '
        'processes.', path, window)
  elif window != sources.TFDS_ONLY['window']:
    raise ValueError(
        f'input.window={window} has no effect: {path} is read by index, and '
        'shuffled as a whole.\n'
        f'Leave it at {sources.TFDS_ONLY["window"]}, or set input.stream.')
  return sources.Splits(train, evals)


def _named(eval_split):
  """{name: split} of input.eval_split; ValueError for a name given twice."""
  named = {}
  for text in eval_split.split(','):
    name, equals, split = map(str.strip, text.partition('='))
    if not equals:
      name, split = 'test' if name.startswith('test') else 'val', name
    if name in named:
      raise ValueError(
          f'input.eval_split={eval_split!r} has two splits named {name!r}.\n'
          "Name each, as in 'val=validation, minival=train[99%:]'.")
    named[name] = split
  return named


def _builder(path, data_dir):
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise ValueError(
        f"input.source='tfds' needs tensorflow-datasets ({e}).\n"
        "pip install 'tensorflow-datasets>=4.9.8,<5'.") from None
  if not path:
    raise ValueError("input.source='tfds', but input.path is empty.\n"
                     "Name a data set, such as 'imagenet2012:5.1.0'.")
  where = data_dir or 'the default folder of TFDS'
  data_dir = os.path.expanduser(data_dir)
  folder = os.path.join(data_dir, *path.rsplit(':', 1))
  try:
    # The search for a version imports TensorFlow; naming one spares it.
    if data_dir and ':' in path and os.path.isdir(folder):
      return tfds.builder_from_directory(folder)
    return tfds.core.read_only_builder.builder_from_files(
        path, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError:
    raise FileNotFoundError(
        f'There is no prepared data set {path!r} in {where}.\n'
        'Set input.data_dir to the folder above its name, or prepare it with '
        '`tfds build`.') from None
  except Exception as e:  # damaged metadata: protobuf's, json's, TFDS's own
    raise ValueError(
        f'The metadata of {path!r} in {where} cannot be read '
        f'({messages.one_line(e)}).\nPrepare it again, or check the name: '
        'name:version or name/config:version.') from e


def _features(features, path):
  """((image key, label key), class names or their number) of a data set."""
  found = dict(features.items()) if hasattr(features, 'items') else {}
  keys, have = [], {k: type(f).__name__ for k, f in found.items()}
  for key, kind in (('image', 'Image'), ('label', 'ClassLabel')):
    of_kind = [k for k, name in have.items() if name == kind]
    if key in of_kind:
      keys.append(key)
    elif len(of_kind) == 1:
      keys += of_kind
    else:
      raise ValueError(
          f'{path} has no feature {key!r} that is a {kind}, but {have}.\n'
          'Only data sets of one image and one class are trained on.')
  label = found[keys[1]]
  names = label.names
  if not names or len(names) != label.num_classes:
    names = [str(i) for i in range(label.num_classes or 0)]
  return tuple(keys), tuple(names)


def _classes(stored, wanted, path):
  """(class names, int64 [C] that numbers the stored labels by them)."""
  if not wanted:
    wanted = stored
  if len(stored) < 2 or not set(stored) <= set(wanted):
    missing = sorted(set(stored) - set(wanted))
    raise ValueError(
        f'{path} has {len(stored)} classes, and input.classes lacks '
        f'{len(missing)} of them, such as {missing[:1]}.\n'
        'Two classes are needed, and a place for each.')
  place = {name: i for i, name in enumerate(wanted)}
  return tuple(wanted), np.array([place[name] for name in stored], np.int64)


def _parts(info, key, split, path):
  """[(path, skip, take)] of a split."""
  try:
    instructions = info.splits[split].file_instructions
  except Exception as e:  # TFDS raises many kinds for wrong splits
    raise ValueError(
        f'input.{key}={split!r} is no split of {path} '
        f'({messages.one_line(e)}).\n'
        + messages.choices(split, sorted(info.splits))) from None
  parts = []
  for part in instructions:
    take = part.take if part.take >= 0 else part.examples_in_shard - part.skip
    if take:
      parts.append((str(part.filename), int(part.skip), int(take)))
  if not parts:
    raise ValueError(f'input.{key}={split!r} of {path} has no examples.\n'
                     'Take a larger part.')
  return parts


def _open(parts, info, stream, keys, class_names, classes_of, path):
  kind = info.file_format.value
  remote = any('://' in file for file, _, _ in parts)
  if kind not in ('tfrecord', 'array_record') or (
      kind == 'array_record' and (remote or stream)):
    raise ValueError(
        f'{path} is stored as {kind}, which cannot be '
        f'{"streamed" if remote or stream else "read"} here.\n'
        + ('Copy it to a local disk and leave input.stream at False.'
           if kind == 'array_record' else
           'Prepare it as tfrecord or array_record.'))
  if remote or stream:
    return Records(parts, keys, class_names, classes_of)
  files = [file for file, _, _ in parts]
  missing = [f for f in files if not os.path.isfile(f)]
  if missing:
    raise FileNotFoundError(
        f'{len(missing)} of {len(files)} files of {path} are not there, such '
        f'as {missing[0]}.\nCopy or prepare the data set again.')
  make = {'tfrecord': records.TFRecords, 'array_record': records.ArrayRecords}
  opened = make[kind](files)
  for (file, skip, take), count in zip(parts, opened.counts, strict=True):
    if count < skip + take:
      raise ValueError(
          f'{file} holds {count} records, and its dataset_info.json has '
          f'{skip + take} or more.\nCopy or prepare the data set again.')
  return Records(parts, keys, class_names, classes_of, opened)


def _warn_of_overlap(train, evaluation):
  """Logs if examples to evaluate on are trained on."""
  of_file = collections.defaultdict(list)
  for file, skip, take in train:
    of_file[file].append((skip, skip + take))
  count = sum(
      max(0, min(end, skip + take) - max(start, skip))
      for file, skip, take in evaluation for start, end in of_file[file])
  if count:
    logging.warning('input.train_split and input.eval_split have %d examples '
                    'in common: accuracy will be too high.', count)
