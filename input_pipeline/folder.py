"""A folder of image files as it lies on disk, without a conversion step.

Three layouts:
  DIR/train/<class>/* with DIR/{val,validation,test}/<class>/*, each optional
  DIR/labels.csv      with a header `path,label` or `path,label,split`
  DIR/<class>/*
Where there is no evaluation part, one is held out, the same at every run.

What an image is follows from its content, not from its suffix: a GIF named
.jpg is read as a GIF. To list a million files without opening each, files with
an image's suffix are taken for images until they are read; all others count
as images only if they begin like one.
"""
import collections
import csv
import os

from absl import logging

from input_pipeline import messages
from input_pipeline import sources

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp')
_MAGIC = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF8')
_PARTS = {'train': 'train', 'val': 'val', 'validation': 'val', 'test': 'test'}
_LAYOUTS = (
    'Expected DIR/train/<class>/* (and DIR/val/<class>/*), or DIR/<class>/*, '
    'or DIR/labels.csv with columns path,label.')


class Files(sources.Source):
  """Image files below one folder."""
  encoded = True
  in_memory = False

  def __init__(self, root, paths, labels, class_names):
    """`paths`: relative to `root`, as many as labels."""
    super().__init__(labels, class_names)
    self._root = root
    self._paths = sources.Packed.of([os.fsencode(p) for p in paths])

  def describe(self, index):
    return os.path.join(self._root, os.fsdecode(self._paths[int(index)]))

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
    parts = {_PARTS[n]: _from_folders(path, n) for n in sorted(found)}
  else:
    parts = {'train': _from_folders(path, '')}
  if not parts.get('train'):
    raise ValueError(
        f'{path} has {sorted(parts)} but no images to train on.\n' + _LAYOUTS)

  names = _class_names(path, parts, classes)
  label = {name: i for i, name in enumerate(names)}
  splits = {
      part: Files(path, [p for p, _ in rows], [label[n] for _, n in rows],
                  names)
      for part, rows in parts.items()}
  train = splits.pop('train')
  if splits:
    return sources.Splits(train, splits)
  return sources.hold_out_fraction(
      train, [p for p, _ in parts['train']], holdout)


def _class_names(path, parts, classes):
  """The checked list of classes of `parts`, {part: [(path, class name)]}."""
  train = {name for _, name in parts['train']}
  names = tuple(classes) or tuple(sorted(train))
  for part, rows in parts.items():
    here = {name for _, name in rows}
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
  """[(path relative to root, class name)] of root/part/<class>/*, sorted."""
  top = os.path.join(root, part)
  rows, ignored, nested = [], [], []
  for name in _subfolders(top):
    before = len(rows)
    with os.scandir(os.path.join(top, name)) as entries:
      for entry in sorted(entries, key=lambda e: e.name):
        if entry.is_dir():
          nested.append(entry.path)
        elif _looks_like_image(entry):
          rows.append((os.path.join(part, name, entry.name), name))
        else:
          ignored.append(entry.path)
    if len(rows) == before:
      raise ValueError(
          f'{os.path.join(top, name)} holds no images, so class {name!r} would '
          'be empty.\nRemove the folder, or put its images directly into it.')
  if ignored:
    logging.info('%s: ignored %d files that are hidden or no images, such as '
                 '%s.', top, len(ignored), ignored[0])
  if nested:
    logging.warning('%s: ignored %d folders inside of class folders, such as '
                    '%s.', top, len(nested), nested[0])
  if not rows:
    raise ValueError(f'{top} holds no folder with images.\n' + _LAYOUTS)
  return rows


def _from_csv(root):
  """{part: [(path relative to root, class name)]}, from root/labels.csv."""
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
  return dict(parts)


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


def _looks_like_image(entry):
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
