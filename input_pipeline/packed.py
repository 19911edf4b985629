"""A data set packed into few files: smaller JPEGs, in the order of its source.

  DIR/packed.json                 what was asked for, counts, class names
  DIR/<part>_labels.npy           int32 [N]
  DIR/<part>-00000.array_record   one image file a record, `shard_size` a file

Images whose short side is longer than asked for are resized to it (Lanczos)
and encoded again; all others keep their bytes, unreadable ones too. A shard
appears under its name once it is complete, so a killed `write` goes on where it
was; packed.json says 'complete' when all are there.
"""
import concurrent.futures
import hashlib
import io
import json
import os
import shutil

import numpy as np
from PIL import Image

from input_pipeline import messages
from input_pipeline import ops_numpy
from input_pipeline import pipeline
from input_pipeline import records
from input_pipeline import sources
from input_pipeline import tfds_source

_INDEX = 'packed.json'
_SAMPLE = 64  # images whose sizes estimate that of all
_RESERVE = 1.1  # of the disk space that the estimate asks for


class Shards(sources.Source):
  """A part of a packed data set, by index."""
  encoded = True
  in_memory = False

  def __init__(self, paths, shard_size, labels, class_names):
    """Opens the shards; all but the last hold `shard_size` images."""
    super().__init__(labels, class_names)
    self._paths, self._shard_size = paths, shard_size
    self._files = records.ArrayRecords(paths)
    if sum(self._files.counts) != len(labels):
      raise ValueError(
          f'{os.path.dirname(paths[0])} has {sum(self._files.counts)} images '
          f'and {len(labels)} labels of them.\nPack the data set again.')

  def describe(self, index):
    shard, record = divmod(int(index), self._shard_size)
    return f'{self._paths[shard]} record {record}'

  def read(self, indices):
    return [self._files.read(*divmod(int(i), self._shard_size))
            for i in indices]


def open_splits(path, classes):
  """Opens what `write` made.

  Args:
    path: its folder.
    classes: class names in order, or () for those of the data set.

  Returns:
    sources.Splits.

  Raises:
    FileNotFoundError: there is nothing packed.
    ValueError: it is incomplete or damaged.
  """
  file = os.path.join(path, _INDEX)
  if not path or not os.path.isfile(file):
    raise FileNotFoundError(
        f"There is no {file}, but input.source='packed'.\n"
        'Name a folder that `vit-jax pack` made in input.path.')
  index = _read(file)
  if not index.get('complete'):
    raise ValueError(f'{path} is not packed to the end.\n'
                     'Give the same command of `vit-jax pack` again.')
  try:
    names, classes_of = tfds_source.classes_in_order(
        index['classes'], classes, path)
    parts = {}
    for part, count in index['counts'].items():
      labels = np.load(_labels_file(path, part), allow_pickle=False)
      parts[part] = Shards(
          _shard_files(path, part, count, index['shard_size']),
          index['shard_size'], classes_of[labels], names)
    return sources.Splits(parts.pop('train'), parts)
  except (KeyError, TypeError, AttributeError, IndexError, OSError) as e:
    raise ValueError(f'{path} is damaged ({messages.one_line(e)}).\n'
                     'Pack the data set again.') from e


def write(data, path, short_side, quality, shard_size=4096, threads=0,
          say=lambda text: None):
  """Packs all parts of a data set; goes on with what an earlier call began.

  Args:
    data: dataset.Data over encoded images, read by index.
    path: folder to write; made if missing.
    short_side: pixels, of the images that are larger.
    quality: of their JPEG encoding, 1 to 100.
    shard_size: images a file.
    threads: at once; 0: as many as there are CPUs.
    say: called with a line at each shard.

  Returns:
    {part: (images, of those resized, unreadable, bytes)}, of this call.

  Raises:
    ValueError: images that are not files, another data set or other settings
      than those of the folder, too little space on the disk.
  """
  parts = {'train': data.train, **data.evals}
  for part, source in parts.items():
    if not source.encoded or source.streamed:
      raise ValueError(
          f'{part} is {"streamed" if source.streamed else "no image files"}, '
          'which cannot be packed.\nPack a folder, or TFDS data on a disk.')
  index = dict(
      complete=False, short_side=short_side, quality=quality,
      shard_size=shard_size, classes=list(data.class_names),
      counts={part: s.num_examples for part, s in parts.items()},
      source=_fingerprint(parts))
  os.makedirs(path, exist_ok=True)
  _check_same(path, index)
  _write(os.path.join(path, _INDEX), index)
  with concurrent.futures.ThreadPoolExecutor(
      threads or pipeline.cpu_count()) as pool:
    _check_space(path, parts, index, pool)
    done = {part: _write_part(path, part, source, index, pool, say)
            for part, source in parts.items()}
  _write(os.path.join(path, _INDEX), {**index, 'complete': True})
  return done


def _write_part(path, part, source, index, pool, say):
  """Writes the shards that are not there; returns what `write` does."""
  labels = _labels_file(path, part)
  with open(labels + '.tmp', 'wb') as f:
    np.save(f, source.labels)
  os.replace(labels + '.tmp', labels)
  files = _shard_files(
      path, part, source.num_examples, index['shard_size'])
  total = np.zeros(4, np.int64)
  for number, file in enumerate(files):
    if os.path.exists(file):
      continue
    first = number * index['shard_size']
    rows = range(first, min(first + index['shard_size'], source.num_examples))
    packed = pool.map(
        lambda i: pack(_content(source, i), index['short_side'],
                       index['quality']), rows)
    total += _write_shard(file, packed)
    say(f'{part}: {number + 1:,} of {len(files):,} files, '
        f'{total[3] / max(total[0], 1) / 1e3:.1f} kB an image')
  return tuple(total.tolist())


def _write_shard(file, packed):
  """Writes a file as a whole or not; returns int64 [4] as `write` does."""
  from array_record.python import array_record_module
  total = np.zeros(4, np.int64)
  # A group of its own for each record: they are read one by one.
  writer = array_record_module.ArrayRecordWriter(
      file + '.tmp', 'group_size:1,uncompressed')
  for content, resized, unreadable in packed:
    writer.write(content)
    total += (1, resized, unreadable, len(content))
  writer.close()
  with open(file + '.tmp', 'rb') as f:
    os.fsync(f.fileno())
  os.replace(file + '.tmp', file)
  return total


def pack(content, short_side, quality):
  """Makes an image file smaller.

  Args:
    content: its bytes; b'' stands for what could not be read.
    short_side: pixels; images that are not larger stay as they are.
    quality: of the JPEG that results.

  Returns:
    (bytes, whether they are new, whether the image is unreadable: then they
    are the old ones).
  """
  try:
    image = ops_numpy.open_image(content)
    scale = short_side / min(image.size)
    if scale >= 1:
      return content, False, False
    grey = image.mode.startswith(('L', 'I', '1'))
    pixels = ops_numpy.pixels(image, 1 if grey else 3)
    size = tuple(max(round(side * scale), short_side) for side in image.size)
    resized = Image.fromarray(pixels.squeeze(-1) if grey else pixels).resize(
        size, Image.Resampling.LANCZOS)
  except pipeline.READ_ERRORS:
    return content, False, True
  file = io.BytesIO()
  resized.save(file, 'JPEG', quality=quality)
  return file.getvalue(), True, False


def _content(source, index):
  try:
    return source.read([index])[0]
  except OSError:
    return b''


def _labels_file(path, part):
  return os.path.join(path, f'{part}_labels.npy')


def _shard_files(path, part, count, shard_size):
  return [os.path.join(path, f'{part}-{i:05}.array_record')
          for i in range(-(-count // shard_size))]


def _fingerprint(parts):
  """A hash of which images there are, with their labels."""
  digest = hashlib.blake2b(digest_size=16)
  for part, source in parts.items():
    digest.update(part.encode() + source.labels.tobytes())
    for i in range(source.num_examples):
      digest.update(os.fsencode(source.describe(i)) + b'\0')
  return digest.hexdigest()


def _check_same(path, index):
  """Raises ValueError if a folder holds something else than `index` says."""
  file = os.path.join(path, _INDEX)
  if not os.path.isfile(file):
    if os.listdir(path):
      raise ValueError(f'{path} is not empty, and nothing was packed there.\n'
                       'Name an empty or a new folder.')
    return
  old = _read(file)
  differ = [k for k, v in index.items() if k != 'complete' and old.get(k) != v]
  if differ:
    raise ValueError(
        f'{path} was packed with another {", ".join(differ)}.\n'
        'Use the same data and settings, or a new folder.')


def _check_space(path, parts, index, pool):
  """Raises ValueError if the disk will not hold what is still to be packed."""
  needed = 0
  for part, source in parts.items():
    files = _shard_files(path, part, source.num_examples, index['shard_size'])
    left = sum(not os.path.exists(f) for f in files) / len(files)
    sample = np.linspace(0, source.num_examples - 1, _SAMPLE).astype(int)
    sizes = [len(content) for content, *_ in pool.map(
        lambda i, s=source: pack(_content(s, i), index['short_side'],
                                 index['quality']), sorted({*sample}))]
    needed += np.mean(sizes) * source.num_examples * left * _RESERVE
  free = shutil.disk_usage(path).free
  if needed > free:
    raise ValueError(
        f'About {needed / 1e9:,.1f} GB are to be written to {path}, and '
        f'{free / 1e9:,.1f} GB are free.\n'
        'Make room, or lower --short-side or --quality.')


def _read(file):
  try:
    with open(file, encoding='utf-8') as f:
      index = json.load(f)
    if isinstance(index, dict):
      return index
  except (ValueError, OSError, RecursionError):
    pass
  raise ValueError(f'{file} is damaged.\nPack the data set again.')


def _write(file, index):
  with open(file + '.tmp', 'w', encoding='utf-8') as f:
    json.dump(index, f, indent=1)
  os.replace(file + '.tmp', file)
