"""A folder of image files as it lies on disk, without a conversion step.

Three layouts:
  DIR/train/<class>/* with DIR/{val,validation,test}/<class>/*, each optional
  DIR/labels.csv      with a header `path,label` or `path,label,split`
  DIR/<class>/*
Where there is no evaluation part, one is held out, the same at every run.

An evaluation part may be flat, as ImageNet's archive is, with a file that says
which class each image has; the first of these that is there (for 'val'):
  DIR/val/labels.csv, DIR/val/val_labels.csv, DIR/val_labels.csv
      with a header `path,label` or `filename,wnid`
  DIR/val.txt, DIR/val/val.txt
      with lines `ILSVRC2012_val_00000001.JPEG n01751748`
A label is a class name (a wnid), or its number in the order of the classes.

The listing of more than 10,000 files is cached (see `cache`), under the times
at which the folders changed.

What an image is follows from its content, not from its suffix: a GIF named
.jpg is read as a GIF. To list a million files without opening each, files with
an image's suffix are taken for images until they are read; all others count
as images only if they begin like one.
"""
import collections
import csv
import dataclasses
import os
import time

from absl import logging
import numpy as np

from input_pipeline import cache
from input_pipeline import messages
from input_pipeline import sources

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp')
_MAGIC = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF8')
_PARTS = {'train': 'train', 'val': 'val', 'validation': 'val', 'test': 'test'}
_CACHED_FROM = 10_000  # files; fewer are listed at once
_LAYOUTS = (
    'Expected DIR/train/<class>/* (and DIR/val/<class>/*), or DIR/<class>/*, '
    'or DIR/labels.csv with columns path,label.')


@dataclasses.dataclass(frozen=True)
class Listing:
  """N files and their classes, in 12 bytes a file and the bytes of its name.

  ImageNet's names (n01440764_10026.JPEG) have 20: 14 million files take 450
  MB, labels included; as Python strings they would take 3 GB.

  Attributes:
    prefix: folder that contains them, relative to the root.
    names: sources.Packed, of files, relative to prefix (and class folder).
    classes: tuple of class names.
    which: int32 [N], the class of each file.
    by_class: whether files lie in a folder named after their class.
  """
  prefix: str
  names: sources.Packed
  classes: tuple[str, ...]
  which: np.ndarray
  by_class: bool

  def __len__(self):
    return len(self.which)

  def path(self, i):
    """Of a file, relative to the root."""
    name = os.fsdecode(self.names[i])
    folder = self.classes[self.which[i]] if self.by_class else ''
    return os.path.join(self.prefix, folder, name)


class Files(sources.Source):
  """Image files below one folder."""
  encoded = files = True
  in_memory = False

  def __init__(self, root, listing, class_names):
    """`class_names`: in the order of the labels, all of the listing's."""
    label = {name: i for i, name in enumerate(class_names)}
    labels = np.array([label[name] for name in listing.classes], np.int32)
    super().__init__(labels[listing.which], class_names)
    self._root, self._listing = root, listing

  def describe(self, index):
    return os.path.join(self._root, self._listing.path(int(index)))

  def read(self, indices):
    contents = []
    for i in indices:
      with open(self.describe(i), 'rb') as f:
        contents.append(f.read())
    return contents


def open_splits(path, holdout, classes):
  """Lists a folder of images.

  Args:
    path: the folder.
    holdout: fraction in (0, 1) to hold out where there is no evaluation part.
    classes: class names in order, or () for the names found, sorted.

  Returns:
    sources.Splits with evals 'val' and/or 'test'.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: no images, one class only, parts with different classes, a CSV
      row that does not name a file inside the folder.
  """
  if not path or not os.path.isdir(path):
    raise FileNotFoundError(
        f"input.path={path!r} is no folder, but input.source='folder'.\n"
        + _LAYOUTS)
  has_csv = os.path.isfile(os.path.join(path, 'labels.csv'))
  found = {n for n in _subfolders(path) if n in _PARTS}
  if has_csv and found:
    raise ValueError(
        f'{path} holds labels.csv and {sorted(found)}: two layouts.\n'
        'Remove or rename one.')
  if has_csv:
    parts = _from_csv(path)
  elif found:
    if len({_PARTS[n] for n in found}) < len(found):
      raise ValueError(
          f"{path} holds both 'val' and 'validation'.\nKeep one.")
    parts = {}
    for n in sorted(found, key=lambda n: _PARTS[n] != 'train'):
      known = tuple(classes) or (
          parts['train'].classes if 'train' in parts else ())
      parts[_PARTS[n]] = _from_flat(path, n, known) if (
          'train' in parts and not _subfolders(os.path.join(path, n))
      ) else _from_folders(path, n)
  else:
    parts = {'train': _from_folders(path, '')}
  if not parts.get('train'):
    raise ValueError(
        f'{path} has {sorted(parts)} but no images to train on.\n' + _LAYOUTS)

  names = _class_names(path, parts, classes)
  splits = {part: Files(path, listing, names)
            for part, listing in parts.items()}
  train = splits.pop('train')
  if splits:
    return sources.Splits(train, splits)
  listing = parts['train']
  return sources.hold_out_fraction(
      train, map(listing.path, range(len(listing))), holdout)


def _class_names(path, parts, classes):
  """The checked list of classes of `parts`, {part: Listing}."""
  names = tuple(classes) or tuple(sorted(parts['train'].classes))
  for part, listing in parts.items():
    here = set(listing.classes)
    if here - set(names):
      raise ValueError(
          f'{path}: {part} has classes {_some(here - set(names))} that '
          + ('input.classes does not list.' if classes else 'train has not.')
          + '\nTheir labels would be wrong: rename or remove them.')
    missing = set(names) - here
    if missing and classes:
      logging.warning('%s: no %s images of %s.', path, part, _some(missing))
    elif missing:
      raise ValueError(
          f'{path}: train has classes {_some(missing)} that {part} has not.\n'
          'If that is meant, list all classes in order in a JSON file and '
          'name it in input.classes.')
  if len(names) < 2:
    raise ValueError(
        f'{path} holds a single class, {names[0]!r}; there is nothing to '
        'tell apart.\n' + _LAYOUTS)
  if not classes and all(n.isdigit() for n in names):
    logging.warning(
        "%s: all class names are integers, sorted as text ('10' before '2'). "
        'To number them otherwise, list them in order in input.classes.', path)
  return names


def _from_folders(root, part):
  """The Listing of root/part/<class>/*, sorted."""
  top = os.path.join(root, part)
  classes = tuple(_subfolders(top))
  fingerprint = np.array([
      os.stat(p).st_mtime_ns
      for p in (top, *(os.path.join(top, c) for c in classes))], np.int64)
  file = cache.path_of('folder', os.path.abspath(top))  # no final slash
  found = _cached(file, fingerprint, part, classes)
  if found:
    return found

  blobs, sizes, which, ignored, nested = [], [], [], [], []
  for number, name in enumerate(classes):
    files = []
    with os.scandir(os.path.join(top, name)) as entries:
      for entry in sorted(entries, key=lambda e: e.name):
        if entry.is_dir():
          nested.append(entry.path)
        elif looks_like_image(entry):
          files.append(os.fsencode(entry.name))
        else:
          ignored.append(entry.path)
    if not files:
      raise ValueError(
          f'{os.path.join(top, name)} holds no images, so class {name!r} would '
          'be empty.\nRemove the folder, or put its images directly into it.')
    # Packed class by class: all names as Python objects would not fit.
    blobs.append(b''.join(files))
    sizes.append(np.array(list(map(len, files)), np.int32))
    which.append(np.full(len(files), number, np.int32))
  if ignored:
    logging.info('%s: ignored %d files that are hidden or no images, such as '
                 '%s.', top, len(ignored), ignored[0])
  if nested:
    logging.warning('%s: ignored %d folders inside of class folders, such as '
                    '%s.', top, len(nested), nested[0])
  if not classes:
    raise ValueError(f'{top} holds no folder with images.\n' + _LAYOUTS)
  which = np.concatenate(which)
  offsets = np.zeros(len(which) + 1, np.int64)
  np.cumsum(np.concatenate(sizes), out=offsets[1:])
  data = np.frombuffer(b''.join(blobs), np.uint8)
  # A folder that changed just now may change again within its clock's tick.
  settled = time.time_ns() - fingerprint.max() > 2e9
  if len(which) >= _CACHED_FROM and settled:
    cache.save(file, fingerprint, data=data, offsets=offsets, which=which)
  return Listing(part, sources.Packed(data, offsets), classes, which, True)


def _cached(file, fingerprint, prefix, classes):
  """The Listing of a cache file, or None."""
  found = cache.load(file, fingerprint, ('data', 'offsets', 'which'))
  if found is None:
    return None
  data, offsets, which = found['data'], found['offsets'], found['which']
  if (data.dtype != np.uint8 or offsets.dtype != np.int64
      or which.dtype != np.int32 or offsets.shape != (len(which) + 1,)
      or offsets[0] or offsets[-1] != len(data) or not len(which)
      or (offsets[1:] < offsets[:-1]).any()
      or not 0 <= which.min() <= which.max() < len(classes)):
    return None
  return Listing(prefix, sources.Packed(data, offsets), classes, which, True)


def _listing(prefix, rows):
  """A Listing of [(path relative to prefix, class name)]."""
  classes = tuple(sorted({name for _, name in rows}))
  place = {name: i for i, name in enumerate(classes)}
  return Listing(
      prefix, sources.Packed.of([os.fsencode(p) for p, _ in rows]), classes,
      np.array([place[n] for _, n in rows], np.int32), False)


def _from_flat(root, part, classes):
  """The Listing of root/part/*, with the labels of a file beside it."""
  top = os.path.join(root, part)
  candidates = [os.path.join(top, 'labels.csv'),
                os.path.join(top, f'{part}_labels.csv'),
                os.path.join(root, f'{part}_labels.csv'),
                os.path.join(root, f'{part}.txt'),
                os.path.join(top, f'{part}.txt')]
  file = next((c for c in candidates if os.path.isfile(c)), None)
  if file is None:
    raise ValueError(
        f'{top} holds no folder with images, and no file says which class each '
        f'image has.\nSort the images into folders named after the classes, '
        f'or write {candidates[3]} with lines "file name, space, class".')
  with os.scandir(top) as entries:
    images = {e.name for e in entries if looks_like_image(e)}
  rows = {}
  for where, path, label in _read_labels(file):
    name = os.path.basename(path)
    if name not in images or path not in (name, f'{part}/{name}'):
      raise ValueError(f'{where}: {path!r} is no image of {top}.\n'
                       'Correct the name, or remove the line.')
    if name in rows:
      raise ValueError(f'{where}: {name!r} was named before.\n'
                       'Remove one of the two lines.')
    if (label not in classes and label.isascii() and label.isdigit()
        and int(label) < len(classes)):
      label = classes[int(label)]
    rows[name] = label
  missing = images - rows.keys()
  if missing or not rows:
    raise ValueError(
        f'{file} says nothing about {len(missing)} of {len(images)} images of '
        f'{top}, such as {_some(missing)}.\nAdd them, or remove the images.')
  return _listing(part, sorted(rows.items()))


def _read_labels(file):
  """Yields (where, path, label) of a CSV file with a header or of lines."""
  try:
    with open(file, encoding='utf-8-sig', newline='') as f:
      if file.endswith('.csv'):
        reader = csv.DictReader(f)
        columns = reader.fieldnames or []
        paths = [c for c in ('path', 'filename') if c in columns]
        labels = [c for c in ('label', 'wnid') if c in columns]
        if not paths or not labels:
          raise ValueError(
              f'{file} has the header {columns}.\n'
              'Begin it with the line path,label or filename,wnid.')
        rows = ((row[paths[0]] or '', (row[labels[0]] or '').strip())
                for row in reader)
      else:
        rows = ((*line.strip().rsplit(None, 1), '', '')[:2]
                for line in f if line.strip())
      for number, (name, label) in enumerate(rows, 1):
        if not name or not label:
          raise ValueError(f'{file}: entry {number} has no name or no class.\n'
                           'Write the file name, a space, the class.')
        yield f'{file}, entry {number}', name, label
  except (csv.Error, UnicodeDecodeError) as e:
    raise ValueError(
        f'{file} is no text in UTF-8 ({messages.one_line(e)}).\n'
        'Save it again as plain text.') from None


def _from_csv(root):
  """{part: Listing}, from root/labels.csv."""
  file = os.path.join(root, 'labels.csv')
  parts, seen = collections.defaultdict(list), {}
  # utf-8-sig: spreadsheets write a byte order mark.
  with open(file, encoding='utf-8-sig', newline='') as f:
    reader = csv.DictReader(f)
    try:
      columns = reader.fieldnames or []
      if not {'path', 'label'} <= set(columns):
        raise ValueError(
            f'{file} has no header line with path and label, but {columns}.\n'
            'Begin it with the line path,label or path,label,split.')
      for row in reader:
        where = f'{file} line {reader.line_num}'
        path, name = row['path'] or '', row['label'] or ''
        if not path or not name:
          raise ValueError(f'{where} has no path or no label.\n'
                           'Fill in both, or remove the line.')
        split = row['split'] or '' if 'split' in columns else 'train'
        if split not in _PARTS:
          raise ValueError(f'{where}: split {split!r} is unknown.\n'
                           + messages.choices(split, _PARTS))
        _check_inside(root, path, where)
        path = os.path.normpath(path)
        if path in seen:
          raise ValueError(
              f'{where}: {path!r} was named before, in line {seen[path]}.\n'
              'Remove one of the two lines.')
        seen[path] = reader.line_num
        parts[_PARTS[split]].append((path, name))
    except (csv.Error, UnicodeDecodeError) as e:
      raise ValueError(
          f'{file} is not a CSV file in UTF-8 ({messages.one_line(e)}).\n'
          'Save it again as comma-separated text in UTF-8.') from None
  return {part: _listing('', rows) for part, rows in parts.items()}


def _check_inside(root, path, where):
  """A list of images from elsewhere must not make us read other files."""
  full = os.path.join(root, path)
  # The links are followed: a link to the outside is outside.
  inside = '\0' not in path and not os.path.isabs(path) and (
      '..' not in path.replace('\\', '/').split('/')) and (
          os.path.realpath(full).startswith(
              os.path.join(os.path.realpath(root), '')))
  if not inside:
    raise ValueError(
        f'{where}: {path!r} leads out of {root}.\n'
        'Use paths relative to it, without .. and links to the outside.')
  if not os.path.isfile(full):
    raise ValueError(f'{where}: there is no file {full}.\n'
                     'Correct the path, or remove the line.')


def _subfolders(path):
  with os.scandir(path) as entries:
    return sorted(
        e.name for e in entries if e.is_dir() and not e.name.startswith('.'))


def looks_like_image(entry):
  """Whether a directory entry is an image file; see the module's top."""
  if entry.name.startswith('.') or not entry.is_file():
    return False
  if entry.name.lower().endswith(_SUFFIXES):
    return True
  with open(entry.path, 'rb') as f:
    head = f.read(12)
  return head.startswith(_MAGIC) or (head[:4] + head[8:] == b'RIFFWEBP')


def _some(names):
  names = sorted(names)
  return ', '.join(map(repr, names[:5])) + (
      f' and {len(names) - 5} more' if len(names) > 5 else '')
