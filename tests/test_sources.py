"""Sources: what they hold, that hold-outs stay, and what they refuse."""
import io
import json
import os

import numpy as np
from PIL import Image
import pytest

from input_pipeline import folder
from input_pipeline import sources
from tests import runs


def _jpeg(value=0, kind='JPEG'):
  file = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, kind)
  return file.getvalue()


def _tree(root, *paths):
  for i, path in enumerate(paths):
    os.makedirs(root / os.path.dirname(path), exist_ok=True)
    (root / path).write_bytes(_jpeg(i))
  return str(root)


def _columns(n=20, classes=4, part='train', **more):
  rng = np.random.default_rng(0)
  return {f'{part}_images': rng.integers(0, 256, (n, 6, 6), dtype=np.uint8),
          f'{part}_labels': np.arange(n) % classes, **more}


def test_digits():
  splits = sources.digits('', .1, ())
  train, test = splits.train, splits.evals['test']
  assert (train.num_examples, test.num_examples) == (1297, 500)
  assert train.class_names == tuple('0123456789')
  assert train.read([0, 5]).shape == (2, 32, 32, 1)
  assert train.read([0]).dtype == np.uint8
  assert set(test.counts().values()) <= set(range(48, 53))  # stratified
  rows = {train.describe(i) for i in range(1297)}
  rows |= {test.describe(i) for i in range(500)}
  assert len(rows) == 1797
  # The hold-out is part of what results mean: it may never move.
  assert [test.describe(i) for i in range(4)] == [
      'digits #0', 'digits #1', 'digits #4', 'digits #11']


def test_hold_out_moves_no_example_when_others_come():
  def held(names):
    source = sources.Source(np.zeros(len(names), int), ('a', 'b'))
    return {names[i] for i in sources.hold_out(
        source, names, len(names) // 5)[1]._rows}
  names = [f'n{i}' for i in range(200)]
  before, after = held(names), held([f'new{i}' for i in range(10)] + names)
  assert len(before) == 40 and len(before & after) >= 36


def test_hold_out_keeps_every_class_in_training():
  labels = np.array([0] * 50 + [1] * 2 + [2])
  source = sources.Source(labels, ('a', 'b', 'c'))
  train, held = sources.hold_out(source, map(str, range(53)), 40)
  assert min(train.counts().values()) >= 1 and held.counts()['c'] == 0


def test_hold_out_of_nothing_is_refused():
  with runs.refused('leaves none'):
    sources.from_arrays(_columns(4), holdout=.1)


def test_arrays_raw_and_encoded(tmp_path):
  path = str(tmp_path / 'raw.npz')
  np.savez(path, class_names=np.array(list('abcd')), **_columns(),
           **_columns(7, part='test'))
  splits = sources.arrays(path, .1, ())
  assert splits.evals['test'].num_examples == 7
  assert splits.train.class_names == tuple('abcd')
  files = [_jpeg(i) for i in range(6)]
  splits = sources.from_arrays({
      'train_jpeg': np.frombuffer(b''.join(files), np.uint8),
      'train_offsets': np.cumsum([0, *map(len, files)]),
      'train_labels': np.arange(6) % 2}, holdout=.4)
  train, val = splits.train, splits.evals['val']
  assert (train.num_examples, val.num_examples) == (4, 2)
  assert {*train.read(range(4)), *val.read(range(2))} == set(files)


@pytest.mark.parametrize('change, match', [
    (dict(train_labels=None), "no 'train_labels'"),
    (dict(train_images=None), "no 'train_jpeg'"),
    (dict(train_images=np.zeros((20, 6, 6))), 'is float64'),
    (dict(train_images=np.zeros((20, 6, 6, 2), np.uint8)), 'C 1 or 3'),
    (dict(train_images=np.zeros((19, 6, 6), np.uint8)), '19 train images but'),
    (dict(train_labels=np.arange(20.)), 'is float64'),
    (dict(train_labels=np.arange(20) - 1), 'spans -1 to 18'),
    (dict(train_labels=np.zeros(20, int)), 'two classes'),
    (dict(class_names=np.array('a')), '1 distinct class name'),
    (dict(train_images=None, train_jpeg=np.zeros(9), train_offsets=[0, 9]),
     "'train_jpeg' is float64"),
    (dict(class_names=np.array(['a', 'b'])), '2 distinct class names'),
    (dict(class_names=np.array(list('abcc'))), 'distinct class names'),
    (dict(test_images=np.zeros((2, 6, 6), np.uint8)), "no 'test_labels'"),
])
def test_arrays_refuse(change, match):
  columns = {k: v for k, v in {**_columns(), **change}.items()
             if v is not None}
  with runs.refused(match):
    sources.from_arrays(columns)


def test_offsets_are_checked():
  for ends in ([0, 5, 3, 9], [0, 3, 5, 8], [1, 3, 5, 9]):
    with runs.refused("'train_offsets' do not"):
      sources.from_arrays({
          'train_jpeg': np.zeros(9, np.uint8), 'train_offsets': np.array(ends),
          'train_labels': np.arange(3)})


def test_files_that_are_no_npz(tmp_path):
  path = tmp_path / 'x.npz'
  with runs.refused(r'x\.npz', FileNotFoundError):
    sources.arrays(str(path), .1, ())
  np.savez(path, **_columns(200))
  whole = path.read_bytes()
  broken = bytearray(whole)
  broken[200:260] = bytes(60)
  for content in (b'', b'text', whole[:len(whole) // 2], bytes(broken)):
    path.write_bytes(content)
    with runs.refused(r'x\.npz cannot be read') as e:
      sources.arrays(str(path), .1, ())
    assert 'pickle' not in str(e.value)
  np.savez(path, train_images=np.array([{}]), train_labels=np.zeros(1, int))
  with runs.refused(r"key 'train_images' of .*x\.npz"):
    sources.arrays(str(path), .1, ())


def test_folder_with_parts(tmp_path):
  root = _tree(tmp_path, 'train/b/1.jpg', 'train/b/.hidden.jpg',
               'train/a/2.jpg', 'train/a/no_suffix', 'validation/a/3.jpg',
               'validation/b/4.jpg', 'test/a/5.jpg', 'test/b/6.jpg')
  (tmp_path / 'train/a/notes.txt').write_text('not an image')
  splits = sources.folder(root, .1, ())
  assert splits.train.class_names == ('a', 'b')
  assert splits.train.counts() == {'a': 2, 'b': 1}
  assert set(splits.evals) == {'val', 'test'}
  assert splits.train.describe(0) == os.path.join(root, 'train/a/2.jpg')
  assert splits.train.read([0]) == [(tmp_path / 'train/a/2.jpg').read_bytes()]


def test_folder_without_parts_holds_out_the_same(tmp_path):
  root = _tree(tmp_path, *(f'{c}/{i}.jpg' for c in 'ab' for i in range(10)))
  first, second = (sources.folder(root, .2, ()) for _ in range(2))
  assert first.train.counts() == {'a': 8, 'b': 8}
  val = [[s.evals['val'].describe(i) for i in range(4)]
         for s in (first, second)]
  assert val[0] == val[1]


def test_integer_names_warn(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(folder.logging, 'warning', lambda *a: warnings.append(a))
  names = ['2', '10', '1']
  root = _tree(tmp_path, *(f'{c}/{i}.jpg' for c in names for i in range(3)))
  assert sources.folder(root, .4, ()).train.class_names == ('1', '10', '2')
  assert any('integers' in w[0] for w in warnings)
  listed = sources.folder(root, .4, ('1', '2', '10')).train
  assert listed.class_names == ('1', '2', '10')
  assert len(warnings) == 1


def test_folder_of_two_layouts(tmp_path):
  root = _tree(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg')
  (tmp_path / 'labels.csv').write_text('path,label\n')
  with runs.refused('two layouts'):
    sources.folder(root, .1, ())


@pytest.mark.parametrize('paths, match', [
    ([], 'no folder with images'),
    (['a/1.jpg'], 'single class'),
    (['1.jpg'], 'no folder with images'),
    (['val/a/1.jpg', 'val/b/1.jpg'], 'no images to train on'),
    (['train/a/1.jpg', 'train/b/1.jpg', 'val/a/1.jpg'], "'b' that val has not"),
    (['train/a/1.jpg', 'train/b/1.jpg', 'val/a/1.jpg', 'val/b/2.jpg',
      'val/c/1.jpg'], "'c' that train has not"),
    (['train/a/1.jpg', 'train/b/x/1.jpg'], "class 'b' would be empty"),
    (['train/a/1.jpg', 'val/a/1.jpg', 'validation/a/1.jpg'], 'Keep one'),
])
def test_folder_refuses(tmp_path, paths, match):
  with runs.refused(match):
    sources.folder(_tree(tmp_path, *paths), .1, ())


def test_csv(tmp_path):
  root = _tree(tmp_path, *(f'images/{i}.jpg' for i in range(4)))
  (tmp_path / 'labels.csv').write_text(
      '\ufeffpath,label,split\nimages/0.jpg,dog,train\nimages/1.jpg,cat,train\n'
      'images/2.jpg,cat,val\nimages/3.jpg,dog,val\n', encoding='utf-8')
  splits = sources.folder(root, .1, ())
  assert splits.train.class_names == ('cat', 'dog')
  assert splits.train.labels.tolist() == [1, 0]
  assert splits.evals['val'].labels.tolist() == [0, 1]


@pytest.mark.parametrize('text, match', [
    ('file,class\n0.jpg,a\n', 'header'),
    ('', 'header'),
    ('path,label\n0.jpg,\udcff\n', 'UTF-8'),
    ('path,\udcff\n', 'UTF-8'),
    ('path,label\n../secret.jpg,a\n', 'leads out'),
    ('path,label\nx/../../secret.jpg,a\n', 'leads out'),
    ('path,label\n/etc/passwd,a\n', 'leads out'),
    ('path,label\nlink.jpg,a\n', 'leads out'),
    ('path,label\n9.jpg,a\n', 'line 2: there is no file'),
    ('path,label\n0.jpg,\n', 'line 2 has no path or no label'),
    ('path,label\n0.jpg,a\n0.jpg,b\n', 'named before, in line 2'),
    ('path,label,split\n0.jpg,a,trian\n', "Did you mean 'train'"),
])
def test_csv_refuses(tmp_path, text, match):
  (tmp_path / 'secret.jpg').write_bytes(_jpeg())
  root = _tree(tmp_path / 'root', '0.jpg')
  os.symlink(tmp_path / 'secret.jpg', tmp_path / 'root/link.jpg')
  (tmp_path / 'root/labels.csv').write_text(
      text, encoding='utf-8', errors='surrogateescape')
  with runs.refused(match):
    sources.folder(root, .1, ())


def test_class_list(tmp_path):
  path = tmp_path / 'classes.json'
  with runs.refused(r'input\.classes', FileNotFoundError):
    sources.read_classes(str(path))
  for text in ('[', '{}', '["a"]', '["a", "a"]', '["a", 1]', '[' * 100_000):
    path.write_text(text)
    with runs.refused(r'classes\.json'):
      sources.read_classes(str(path))
  with runs.refused('not JSON'):
    sources.read_classes(str(tmp_path))
  path.write_text(json.dumps(['z', 'a', 'unused']))
  root = _tree(tmp_path / 'd', *(f'{c}/{i}' for c in 'az' for i in range(4)))
  splits = sources.folder(root, .3, sources.read_classes(str(path)))
  assert splits.train.counts() == {'z': 3, 'a': 3, 'unused': 0}
