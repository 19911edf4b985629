"""A data set packed for speed: smaller JPEG files in a few ArrayRecord files.

A folder holds
  pack.json                      counts, class names, how it was made
  <part>-00000.array_record ...  image files, `per_shard` each, in the order of
                                 the data set that was packed
  <part>_labels.npy              int32 [N]
pack.json is written last: without it, the pack is not complete.
"""
import concurrent.futures
import io
import json
import os
import shutil
import zlib

import numpy as np
from PIL import Image

from input_pipeline import ops_numpy
from input_pipeline import records
from input_pipeline import sources

_INDEX = 'pack.json'
_FORMAT = 1
_SAMPLE = 64  # images by which the size of a pack is estimated
_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError,
                KeyError, TypeError, ArithmeticError, MemoryError)


class Pack(sources.Source):
  """One part of a pack; equal, by index, to the part that was packed."""
  encoded = True
  in_memory = False

  def __init__(self, files, per_shard, labels, class_names):
    super().__init__(labels, class_names)
    self._files, self._per_shard = files, per_shard
    self._records = records.ArrayRecords(files)

  def read(self, indices):
    return [self._records.read(*divmod(int(i), self._per_shard))
            for i in indices]

  def describe(self, index):
    shard, record = divmod(int(index), self._per_shard)
    return f'{self._files[shard]} record {record}'

  def check(self, path):
    """Raises ValueError unless the files hold as many images as labels."""
    found = sum(self._records.counts)
    if found != self.num_examples:
      raise ValueError(
          f'{path} holds {found} images and {self.num_examples} labels.\n'
          'Delete it and pack the data again.')


def open_splits(path, holdout, classes):
  """Opens what `write` made.

  Args:
    path: its folder.
    holdout: not used: the parts are what they were when packed.
    classes: class names in order, or () for those of the pack.

  Returns:
    sources.Splits.

  Raises:
    FileNotFoundError: there is no complete pack.
    ValueError: damaged files, or class names that do not fit.
  """
  del holdout
  file = os.path.join(path, _INDEX)
  if not path or not os.path.isfile(file):
    raise FileNotFoundError(
        f"input.path={path!r} holds no {_INDEX}, but input.source='packed'.\n"
        'Run `vit-jax pack` again with the same arguments: it goes on.')
  try:
    with open(file, encoding='utf-8') as f:
      index = json.load(f)
    own, per_shard = index['class_names'], index['per_shard']
    labels = {part: np.load(_labels(path, part), allow_pickle=False)
              for part in index['parts']}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f'The pack {path} is damaged ({e!r}).\n'
                     'Delete it and pack the data again.') from None
  if index['format'] != _FORMAT:
    raise ValueError(f'The pack {path} has the format {index["format"]}.\n'
                     f'This program reads {_FORMAT}: pack the data again.')
  names = tuple(classes or own)
  if not set(own) <= set(names):
    raise ValueError(
        f'input.classes lacks {sorted(set(own) - set(names))[0]!r}, a class of '
        f'{path}.\nGive all its classes.')
  place = np.array([names.index(name) for name in own], np.int32)
  parts = {}
  for part, count in index['parts'].items():
    files = [_shard(path, part, i) for i in range(-(-count // per_shard))]
    parts[part] = Pack(files, per_shard, place[labels[part]], names)
    parts[part].check(path)
  return sources.Splits(parts.pop('train'), parts)


def write(splits, path, short_side, quality=90, per_shard=4096,
          say=lambda text: None):
  """Packs a data set; after an interruption the same call goes on.

  Args:
    splits: sources.Splits of encoded sources that are read by index.
    path: folder; made if missing.
    short_side: pixels. Images whose shorter side is longer are resized to it
      (Pillow, bicubic, antialiased; JPEG decoded at a fraction of its size
      where that is still larger) and written as JPEG. Others keep their bytes,
      and so do files that cannot be read: what is unreadable stays so.
    quality: of the JPEG, 1 to 95.
    per_shard: images in a file.
    say: called with a line of text now and then.

  Raises:
    ValueError: a number out of range, a source without files, another pack in
      the folder, or too little space on the disk.
  """
  for name, value, low, high in (
      ('short_side', short_side, 8, 16384), ('quality', quality, 1, 95),
      ('per_shard', per_shard, 1, 2**20)):
    if not low <= value <= high:
      raise ValueError(f'{name}={value} is not in {low} to {high}.\n'
                       'Give 256, 90 and 4096, for example.')
  parts = {'train': splits.train, **splits.evals}
  for part, source in parts.items():
    if not source.encoded or source.streamed:
      raise ValueError(f'The {part} part is not made of files read by index.\n'
                       'Pack a folder of images.')
  how = dict(format=_FORMAT, short_side=short_side, quality=quality,
             per_shard=per_shard, class_names=list(splits.train.class_names),
             parts={k: s.num_examples for k, s in parts.items()},
             labels={k: zlib.crc32(s.labels) for k, s in parts.items()})
  os.makedirs(path, exist_ok=True)
  _check_same(path, how)
  shrink = lambda content: shrunk(content, short_side, quality)
  _check_space(parts, path, shrink, say)
  for part, source in parts.items():
    shards = -(-source.num_examples // per_shard)
    for shard in range(shards):
      first = shard * per_shard
      rows = range(first, min(first + per_shard, source.num_examples))
      if _write_shard(source, rows, _shard(path, part, shard), shrink):
        say(f'{part}: {rows.stop:,}/{source.num_examples:,} images')
    _replace(_labels(path, part), lambda f, s=source: np.save(f, s.labels))
  _replace(os.path.join(path, _INDEX),
           lambda f: f.write(json.dumps(how, indent=1).encode()))


def shrunk(content, short_side, quality):
  """Bytes of an image file, or of a smaller JPEG; see `write`."""
  try:
    image = ops_numpy.open_image(content)
    scale = short_side / min(image.size)
    if scale >= 1:
      return content
    size = tuple(max(round(n * scale), 1) for n in image.size)
    if image.format == 'JPEG' and image.mode in ('L', 'RGB'):
      image.draft(image.mode, size)
    else:
      image = Image.fromarray(ops_numpy.decode(content, 3))
    image = image.resize(size, Image.Resampling.BICUBIC)
  except _READ_ERRORS:
    return content
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=quality)
  return file.getvalue()


def _shard(path, part, i):
  return os.path.join(path, f'{part}-{i:05d}.array_record')


def _labels(path, part):
  return os.path.join(path, f'{part}_labels.npy')


def _replace(file, fill):
  """Writes a file that is complete or not there."""
  new = file + '.tmp'
  with open(new, 'wb') as f:
    fill(f)
    f.flush()
    os.fsync(f.fileno())
  os.replace(new, file)


def _write_shard(source, rows, file, shrink):
  """Writes one file of images; False if it is there already."""
  if os.path.exists(file):
    if records.ArrayRecords([file]).counts != [len(rows)]:
      raise ValueError(f'{file} does not hold {len(rows)} images.\n'
                       'Delete it and run the same command again.')
    return False
  from array_record.python import array_record_module
  new = file + '.tmp'
  # One record a group, so that one is read without its neighbours; image files
  # do not compress.
  writer = array_record_module.ArrayRecordWriter(
      new, 'group_size:1,uncompressed')
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for begin in range(rows.start, rows.stop, 256):
      part = range(begin, min(begin + 256, rows.stop))
      for content in pool.map(
          lambda i: shrink(source.read([i])[0]), part):
        writer.write(content)
  writer.close()
  with open(new, 'rb') as f:
    os.fsync(f.fileno())
  os.replace(new, file)
  return True


def _check_same(path, how):
  """Raises ValueError if another pack was begun in the folder."""
  note = os.path.join(path, 'begun.json')
  text = json.dumps(how)
  if not os.path.exists(note):
    if os.listdir(path):
      raise ValueError(f'{path} is not empty and holds no pack.\n'
                       'Give a new folder.')
    _replace(note, lambda f: f.write(text.encode()))
  with open(note, encoding='utf-8') as f:
    if f.read() != text:
      raise ValueError(
          f'{path} holds a pack of other data, or with other settings.\n'
          'Give a new folder, or the same arguments as before.')


def _check_space(parts, path, shrink, say):
  """Raises ValueError if the disk is too small for the pack."""
  need = 0
  for part, source in parts.items():
    count = source.num_examples
    rows = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int))
    size = np.mean([len(shrink(source.read([i])[0])) for i in rows])
    need += size * count
    say(f'{part}: {count:,} images of about {size / 1e3:.0f} KB')
  have = sum(e.stat().st_size for e in os.scandir(path))
  free = shutil.disk_usage(path).free
  if need * 1.05 > free + have:
    raise ValueError(
        f'The pack needs about {need / 1e9:.1f} GB, and {path} has '
        f'{(free + have) / 1e9:.1f}.\nGive a folder on a larger disk, or a '
        'smaller short_side.')
