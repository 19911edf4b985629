"""TFDS data on disk: both formats, resumption, streams, and what is refused."""
import glob
import io
import itertools
import os
import shutil

import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import cache
from input_pipeline import order
from input_pipeline import records
from input_pipeline import sources
from input_pipeline import tfds_source
from tests import runs
from vit_jax import config
from vit_jax import recipes

tfds = pytest.importorskip('tensorflow_datasets')

N, N_EVAL = 50, 13
CLASSES = ('a', 'b', 'c')
INPUT = {**sources.TFDS_ONLY, 'source': 'tfds', 'path': 'mini:1.0.0',
         'pp': 'decode|inception_crop(8)|flip_lr',
         'eval_pp': 'decode|resize(8)', 'epoch': 'exact', 'channels': 3,
         'holdout': .1, 'classes': '', 'max_bad_fraction': .05,
         'repeats': 1, 'only_classes': (), 'validation': 0.0,
         'per_class': 0}


def examples(n, seed):
  rng = np.random.default_rng(seed)
  for i in range(n):
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((16 + i % 5, 16)).save(file, 'JPEG')
    file.seek(0)
    yield {'image': file, 'label': i % 3}


def write(data_dir, file_format, **features):
  """Prepares the data set 'mini' as TFDS does: 4 files to train on, 2 others.

  Not by a builder class: that needs a module on disk beside it.
  """
  folder = os.path.join(data_dir, 'mini', '1.0.0')
  os.makedirs(folder)
  identity = tfds.core.dataset_info.DatasetIdentity(
      name='mini', version=tfds.core.Version('1.0.0'), data_dir=folder,
      module_name='mini')
  features = features or dict(
      image=tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
      label=tfds.features.ClassLabel(names=list(CLASSES)))
  info = tfds.core.DatasetInfo(
      builder=identity, features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(info, 14, file_format=file_format)
  writer.initialize_splits(['train', 'validation'])
  renamed = dict(zip(('image', 'label'), features, strict=True))
  for split, n, seed in (('train', N, 0), ('validation', N_EVAL, 1)):
    for e in examples(n, seed):
      writer.add_examples({split: [{renamed[k]: v for k, v in e.items()}]})
  writer.close_all()
  return str(data_dir)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """{format: data_dir}."""
  return {kind: write(tmp_path_factory.mktemp(kind), kind)
          for kind in ('tfrecord', 'array_record')}


def open_data(data_dir, **changes):
  return input_pipeline.open_data(
      {**INPUT, 'data_dir': data_dir, **changes}, 0)


def take(data, n, start=0, **kwargs):
  return list(itertools.islice(input_pipeline.train_batches(
      data, start_step=start, **{**dict(global_batch_size=8, data_seed=3),
                                 **kwargs}), n))


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def evaluation(data, split='val', processes=1):
  return [b for p in range(processes) for b in input_pipeline.eval_batches(
      data, split, global_batch_size=4, process_index=p,
      process_count=processes)]


def test_defaults_agree_with_recipes():
  section = recipes.base().input
  assert {k: section[k] for k in sources.TFDS_ONLY} == sources.TFDS_ONLY


def test_both_formats_give_the_same_batches(prepared):
  data = {kind: open_data(d) for kind, d in prepared.items()}
  for d in data.values():
    assert d.class_names == CLASSES
    assert (d.train.num_examples, d.evals['val'].num_examples) == (N, N_EVAL)
    assert d.train.counts() == {'a': 17, 'b': 17, 'c': 16}
  whole = [take(d, 9) for d in data.values()]
  for a, b in zip(*whole, strict=True):
    equal(a, b)
  for a, b in zip(*map(evaluation, data.values()), strict=True):
    equal(a, b)
  assert sum(b['mask'].sum() for b in evaluation(data['tfrecord'])) == N_EVAL
  for d in data.values():
    for a, b in zip(whole[0][5:], take(d, 4, start=5), strict=True):
      equal(a, b)
    for count in (2, 4):
      parts = zip(*(take(d, 9, process_index=i, process_count=count)
                    for i in range(count)), strict=True)
      for a, b in zip(whole[0], parts, strict=True):
        equal(a, {k: np.concatenate([p[k] for p in b]) for k in a})


def test_order_and_images_are_those_of_a_folder(prepared, tmp_path):
  """The same images in another source: the same rows, the same pixels."""
  files = [e['image'].getvalue() for e in examples(N, 0)]
  splits = sources.from_arrays(dict(
      train_jpeg=np.frombuffer(b''.join(files), np.uint8),
      train_offsets=np.cumsum([0, *map(len, files)]),
      train_labels=np.arange(N) % 3, test_images=np.zeros((3, 8, 8), np.uint8),
      test_labels=np.arange(3)))
  arrays = input_pipeline.open_data(
      {**INPUT, 'source': 'arrays', 'eval_pp': 'decode|resize(8)'}, 0, splits)
  for a, b in zip(take(open_data(prepared['tfrecord']), 7), take(arrays, 7),
                  strict=True):
    np.testing.assert_array_equal(a['label'], b['label'])
    assert np.abs(a['image'].astype(int) - b['image']).max() <= 1


def test_splits_by_slices(prepared):
  data = open_data(prepared['tfrecord'], train_split='train[:80%]',
                   eval_split='train[80%:]')
  assert data.train.num_examples == 40
  assert data.evals['val'].num_examples == 10
  assert data.evals['val'].describe(0).endswith('00002 record 12')


def test_several_evaluation_splits(prepared):
  data = open_data(prepared['array_record'], train_split='train[:80%]',
                   eval_split='val=validation, minival=train[80%:]')
  assert {k: s.num_examples for k, s in data.evals.items()} == {
      'val': N_EVAL, 'minival': 10}
  with runs.refused("two splits named 'val'"):
    open_data(prepared['array_record'], eval_split='validation,train[80%:]')


def test_overlap_of_splits_is_logged(prepared, caplog):
  open_data(prepared['tfrecord'], train_split='train[:80%]',
            eval_split='train[70%:]')
  assert '5 examples in common' in caplog.text


def test_classes_in_another_order(prepared, tmp_path):
  file = tmp_path / 'classes.json'
  file.write_text('["c", "b", "unused", "a"]')
  data = open_data(prepared['array_record'], classes=str(file))
  assert data.train.counts() == {'c': 16, 'b': 17, 'unused': 0, 'a': 17}
  label = data.train.load(0)[1]
  assert data.class_names[label] == 'a'


def test_index_is_cached_and_a_corrupt_one_made_again(prepared, monkeypatch,
                                                      tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  first = open_data(prepared['tfrecord']).train.read([7])
  cached = glob.glob(f'{cache.folder()}/tfrecord/*')
  assert len(cached) == 2 and all(c.endswith('.npz') for c in cached)
  with monkeypatch.context() as patch:
    patch.setattr(records, '_record_starts', None)
    assert open_data(prepared['tfrecord']).train.read([7]) == first
  for content in (b'', b'PK\3\4 no more', np.random.default_rng(0).bytes(999)):
    for file in cached:
      with open(file, 'wb') as f:
        f.write(content)
    assert open_data(prepared['tfrecord']).train.read([7]) == first
  # Well-formed, but of other files.
  fingerprint = np.load(cached[0])['fingerprint']
  cache.save(cached[0], fingerprint, starts=np.zeros(3), counts=np.array([3]))
  assert open_data(prepared['tfrecord']).train.read([7]) == first


@pytest.mark.parametrize('processes', [1, 2])
def test_stream_resumes_and_sees_everything_once(prepared, processes, caplog):
  caplog.set_level('INFO')
  data = open_data(prepared['tfrecord'], stream=True, window=9)
  assert 'Batches depend on the number of processes' in caplog.text
  seen = []
  for p in range(processes):
    kwargs = dict(process_index=p, process_count=processes)
    stream = data.train.shuffled(3, 0, **kwargs)
    count = data.train.num_records(data.train.files_of(
        data_seed=3, epoch=0, **kwargs))
    mine = [next(stream)[:2] for _ in range(count)]
    assert {e for e, _ in mine} == {0}
    assert next(stream)[0] == 1
    seen += [i for _, i in mine]
    for skip in (10, 26):
      again = data.train.shuffled(3, skip, **kwargs)
      whole = data.train.shuffled(3, 0, **kwargs)
      for a, b in itertools.islice(zip(
          itertools.islice(whole, skip, None), again, strict=False), 12):
        assert a == b
    whole = take(data, 16, **kwargs)
    for start in (12,):
      for a, b in zip(whole[start:], take(data, 16 - start, start, **kwargs),
                      strict=True):
        equal(a, b)
  assert sorted(seen) == list(range(N)) and seen != sorted(seen)
  batches = evaluation(data, processes=processes)
  assert sum(b['mask'].sum() for b in batches) == N_EVAL
  assert len(batches) % processes == 0
  other = take(open_data(prepared['tfrecord'], stream=True, window=20), 1)
  assert (other[0]['label'] != take(data, 1)[0]['label']).any()


def test_without_tensorflow(prepared):
  """What reads the files imports none; decoding is Pillow's then."""
  code = f'''
import sys
from importlib import machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split('.')[0] == 'tensorflow' else find(name, *rest))
import input_pipeline
for data_dir in {list(prepared.values())!r}:
  data = input_pipeline.open_data({{**{INPUT!r}, 'data_dir': data_dir}}, 0)
  batches = input_pipeline.train_batches(data, global_batch_size=8, data_seed=0)
  print(next(batches)['label'].tolist())
'''
  done = runs.subprocess.run(
      [runs.sys.executable, '-c', code], capture_output=True, text=True,
      check=False, cwd=runs.ROOT, timeout=60)
  assert done.returncode == 0, done.stderr
  wanted = take(open_data(prepared['tfrecord']), 1, data_seed=0)[0]['label']
  assert done.stdout == f'{wanted.tolist()}\n' * 2


def test_stream_needs_a_file_for_each_process(prepared):
  data = open_data(prepared['tfrecord'], stream=True)
  with runs.refused('do not divide over 8'):
    take(data, 1, process_count=8)
  with runs.refused("'exact'"):
    take(data, 1, epoch='floor')


@pytest.mark.parametrize('kind, change, error, match', [
    ('tfrecord', dict(path=''), ValueError, 'is empty'),
    ('tfrecord', dict(path='maxi'), FileNotFoundError, "'maxi'"),
    ('tfrecord', dict(path='mini:2.0.0'), FileNotFoundError, 'mini:2.0.0'),
    ('tfrecord', dict(path='mini:'), (ValueError, FileNotFoundError), 'mini:'),
    ('tfrecord', dict(train_split='trian'), ValueError, "Did you mean 'train'"),
    ('tfrecord', dict(train_split='train[:'), ValueError, 'no split'),
    ('tfrecord', dict(eval_split='train[:0%]'), ValueError, 'no '),
    ('tfrecord', dict(window=5), ValueError, 'has no effect'),
    ('tfrecord', dict(window=0), ValueError, 'input.window=0'),
    ('tfrecord', dict(stream='yes'), ValueError, "input.stream='yes'"),
    ('array_record', dict(stream=True), ValueError, 'cannot be streamed'),
])
def test_refused(prepared, kind, change, error, match):
  with runs.refused(match, error):
    open_data(prepared[kind], **change)


@pytest.mark.parametrize('key, value', [
    ('data_dir', 'x'), ('train_split', 'test'), ('eval_split', 'test'),
    ('stream', True), ('window', 5)])
def test_keys_of_tfds_are_refused_elsewhere(key, value):
  with runs.refused(f'input.{key}=.* has no effect'):
    input_pipeline.open_data(
        {**INPUT, 'source': 'digits', 'path': '', key: value}, 0)


@pytest.mark.parametrize('damage, error, match', [
    ('missing file', FileNotFoundError, '1 of 4 files'),
    ('truncated file', ValueError, 'does not end within it'),
    ('fewer records', ValueError, 'dataset_info.json has'),
    ('metadata', ValueError, 'metadata'),
])
def test_damaged_data_sets(prepared, tmp_path, damage, error, match):
  root = shutil.copytree(prepared['tfrecord'], tmp_path / 'copy')
  file = sorted(glob.glob(f'{root}/mini/*/*train*'))[1]
  if damage == 'missing file':
    os.remove(file)
  elif damage == 'metadata':
    with open(f'{root}/mini/1.0.0/dataset_info.json', 'w') as f:
      f.write('{')
  else:
    ends = records._record_starts(file)
    os.truncate(file, int(ends[-1]) + (9 if damage[0] == 't' else 0))
  with runs.refused(match, error):
    open_data(str(root))


def test_features_that_are_not_one_image_and_one_class(tmp_path):
  image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
  label = tfds.features.ClassLabel(names=list(CLASSES))
  other = write(tmp_path / 'x', 'tfrecord', picture=image, kind=label)
  assert open_data(other).train.load(1)[1] == 1
  bad = write(tmp_path / 'y', 'tfrecord', picture=image,
              kind=tfds.features.Scalar(np.int64))
  with runs.refused("no feature 'label' that is a ClassLabel"):
    open_data(bad)


def test_example_parser_agrees_with_tensorflow():
  tf = pytest.importorskip('tensorflow')
  feature = lambda **kind: tf.train.Feature(**kind)
  example = tf.train.Example(features=tf.train.Features(feature={
      'other': feature(float_list=tf.train.FloatList(value=[1, 2])),
      'image': feature(bytes_list=tf.train.BytesList(value=[b'\0abc\0'])),
      'label': feature(int64_list=tf.train.Int64List(value=[-1]))}))
  data = example.SerializeToString()
  assert records.parse_example(data, 'image', 'label') == (b'\0abc\0', -1)
  for broken in (data[:-3], b'', b'text', data + b'\xff'):
    with pytest.raises(ValueError, match='the record'):
      records.parse_example(broken, 'image', 'label')


def test_orders_of_streams_are_permutations_of_their_own():
  usual = order.permuted(0, 0, np.arange(100), 100)
  other = order.permuted(0, 0, np.arange(100), 100, stream=order.FILES)
  assert sorted(other) == list(range(100)) and (other != usual).mean() > .9
  assert tfds_source.Records.streamed is False


def test_another_data_set_is_another_experiment():
  of = lambda source, path: {'input': dict(source=source, path=path)}
  assert config.differences(of('tfds', 'a'), of('tfds', 'b'))[0]
  assert config.differences(of('folder', 'a'), of('folder', 'b'))[0] == []


def test_some_classes_and_a_few_images_of_each(prepared):
  chosen = dict(only_classes=('c', 'a'), per_class=4)
  data = {kind: open_data(d, **chosen) for kind, d in prepared.items()}
  assert data['tfrecord'].train.counts() == {'c': 4, 'a': 4}
  first, second = (take(d, 2) for d in data.values())
  np.testing.assert_array_equal(first[0]['label'], second[0]['label'])
  np.testing.assert_array_equal(first[0]['image'], second[0]['image'])
  assert data['tfrecord'].evals['val'].counts() == {'c': 4, 'a': 5}
  for key, value in chosen.items():
    with runs.refused(f'streamed source has no input.{key}'):
      open_data(prepared['tfrecord'], stream=True, **{key: value})
