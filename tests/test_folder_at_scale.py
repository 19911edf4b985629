"""Folders as ImageNet comes: flat evaluation parts, and very many files."""
import os
import time
import tracemalloc

import numpy as np
import pytest

from input_pipeline import cache
from input_pipeline import folder
from input_pipeline import sources
from tests import runs

WNIDS = ('n01440764', 'n01443537', 'n01484850')


def flat(root, **texts):
  """train/<wnid>/*, and val/ILSVRC2012_val_*.JPEG without folders."""
  for c in WNIDS:
    os.makedirs(root / 'train' / c)
    for i in range(2):
      (root / 'train' / c / f'{c}_{i}.JPEG').touch()
  os.makedirs(root / 'val')
  for i in range(1, 5):
    (root / f'val/ILSVRC2012_val_{i:08}.JPEG').touch()
  for name, text in texts.items():
    path = root / name.replace('__', '/').replace('_DOT_', '.')
    path.write_text(text)
  return str(root)


def rows(form, labels):
  return ''.join(form.format(f'ILSVRC2012_val_{i:08}.JPEG', label) + '\n'
                 for i, label in enumerate(labels, 1))


BY_NAME = [WNIDS[i] for i in (2, 0, 1, 0)]


@pytest.mark.parametrize('name, text', [
    ('val_DOT_txt', rows('{} {}', BY_NAME)),
    ('val_DOT_txt', rows('{}  {}', (2, 0, 1, 0))),
    ('val_DOT_txt', rows('val/{}\t{}', BY_NAME)),
    ('val__val_DOT_txt', rows('{} {}', BY_NAME)),
    ('val__labels_DOT_csv', 'path,label\n' + rows('{},{}', BY_NAME)),
    ('val__val_labels_DOT_csv', 'wnid,filename\n' + rows('{1},{0}', BY_NAME)),
    ('val_labels_DOT_csv', '\ufefffilename,label\n' + rows('{},{}', BY_NAME)),
])
def test_flat_evaluation_part(tmp_path, name, text):
  splits = sources.folder(flat(tmp_path, **{name: text}), .1, ())
  val = splits.evals['val']
  assert val.class_names == WNIDS and val.labels.tolist() == [2, 0, 1, 0]
  assert val.describe(0) == str(
      tmp_path / 'val/ILSVRC2012_val_00000001.JPEG')
  assert splits.train.num_examples == 6


@pytest.mark.parametrize('text, match', [
    (None, 'no file says which class'),
    ('', 'says nothing about 4 of 4'),
    (rows('{} {}', BY_NAME[:3]), 'says nothing about 1 of 4'),
    (rows('{} {}', BY_NAME) + 'x.JPEG n01440764\n', 'entry 5.*no image of'),
    (rows('../train/{} {}', BY_NAME), 'is no image of'),
    (rows('{} {}', BY_NAME) * 2, 'was named before'),
    (rows('{}', BY_NAME), 'no name or no class'),
    (rows('{} {}', [3, 0, 1, 0]), "'3' that train has not"),
    (rows('{} n{}', [3, 0, 1, 0]), 'that train has not'),
])
def test_flat_evaluation_part_refused(tmp_path, text, match):
  texts = {} if text is None else {'val_DOT_txt': text}
  with runs.refused(match):
    sources.folder(flat(tmp_path, **texts), .1, ())


class Entry:
  """What os.scandir would say of a file that does not exist."""

  def __init__(self, name):
    self.name, self.path = name, name

  def is_dir(self):
    return False

  def is_file(self):
    return True


def test_memory_of_many_files(tmp_path, monkeypatch):
  """The law is linear, so that 14 million files need 14 million times this."""
  classes, each = 40, 2500
  for i in range(classes):
    (tmp_path / f'n{i:08}').mkdir()

  class Scan(list):
    __enter__ = lambda self: self
    __exit__ = lambda self, *unused: None

  scandir = os.scandir
  monkeypatch.setattr(folder.os, 'scandir', lambda path: scandir(path) if (
      os.path.basename(path)[0] != 'n') else Scan(
          Entry(f'{os.path.basename(path)}_{i}.JPEG') for i in range(each)))
  monkeypatch.setattr(folder, '_subfolders', lambda top: [
      f'n{i:08}' for i in range(classes)])
  monkeypatch.setattr(folder, '_CACHED_FROM', 10**9)
  n = classes * each
  tracemalloc.start()
  try:
    listing = folder._from_folders(str(tmp_path), '')
    source = folder.Files(str(tmp_path), listing, listing.classes)
    kept, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert len(listing) == source.num_examples == n
  assert kept / n < 60 and 14e6 * kept / n < 1e9, kept / n
  assert peak / n < 90, peak / n
  assert source.describe(2501).endswith('n00000001/n00000001_10.JPEG') or (
      source.describe(2501).endswith('n00000001/n00000001_1.JPEG'))


def test_listing_is_cached_until_a_folder_changes(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(folder, '_CACHED_FROM', 4)
  root = tmp_path / 'data'
  for c in 'ab':
    os.makedirs(root / c)
    for i in range(3):
      (root / c / f'{i}.jpg').touch()

  def paths():
    splits = sources.folder(str(root), .4, ())
    return sorted(s.describe(i) for s in (splits.train, *splits.evals.values())
                  for i in range(s.num_examples))

  before = paths()
  file = cache.path_of('folder', os.path.abspath(str(root)))
  assert not os.path.exists(file)  # changed just now
  for path in (root, root / 'a', root / 'b'):
    os.utime(path, ns=(0, time.time_ns() - 10**10))
  assert paths() == before and os.path.exists(file)
  with monkeypatch.context() as patch:
    patch.setattr(folder, 'looks_like_image', None)
    assert paths() == before
  fingerprint = np.load(file)['fingerprint']
  for content in (b'', b'PK\3\4', os.urandom(500)):
    with open(file, 'wb') as f:
      f.write(content)
    assert paths() == before
  cache.save(file, fingerprint, data=np.zeros(3, np.uint8),
             offsets=np.array([0, 2, 1, 3]), which=np.zeros(3, np.int32))
  assert paths() == before
  (root / 'a' / 'new.jpg').touch()
  assert len(paths()) == len(before) + 1
