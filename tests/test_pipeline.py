"""Batches: exactness, resumption, engines, errors, and the device side."""
import glob
import itertools
import os
import subprocess
import sys
import threading

import jax
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import pipeline
from input_pipeline import sources
from input_pipeline import to_device
from tests import runs

CONFIG = dict(
    source='digits', path='', pp='pad_crop(32, 4)|flip_lr', eval_pp='',
    epoch='exact', channels=1, holdout=.2, classes='', max_bad_fraction=.001,
    repeats=1, only_classes=(), validation=0.0, per_class=0,
    **sources.TFDS_ONLY)


def _tiny(n=20, n_test=9):
  """Image i is filled with the value i."""
  pixels = np.arange(n, dtype=np.uint8)[:, None, None]
  pixels = np.broadcast_to(pixels, (n, 4, 4))
  labels = np.arange(n) % 3
  return input_pipeline.open_data({**CONFIG, 'pp': ''}, 0, sources.from_arrays(
      dict(train_images=pixels, train_labels=labels,
           test_images=pixels[:n_test], test_labels=labels[:n_test])))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder of 14 images in several formats, and its config."""
  root = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for i, kind in enumerate(('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'JPEG',
                            'JPEG') * 2):
    os.makedirs(root / 'ab'[i % 2], exist_ok=True)
    size = (int(rng.integers(40, 60)), int(rng.integers(40, 60)), 3)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    # The suffix lies for most.
    Image.fromarray(small).resize(size[:2], Image.Resampling.BICUBIC).save(
        root / 'ab'[i % 2] / f'{i}.jpg', kind)
  return {**CONFIG, 'source': 'folder', 'path': str(root), 'channels': 3,
          'pp': 'decode|inception_crop(32)|flip_lr',
          'eval_pp': 'decode|resize_small(36)|central_crop(32)'}


def _equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key])


def _take(iterator, n):
  return list(itertools.islice(iterator, n))


@pytest.mark.parametrize('n', [1, 2, 7, 8, 9])
@pytest.mark.parametrize('batch, processes', [(4, 1), (4, 2), (8, 4), (12, 3)])
def test_evaluation_sees_every_example_once(n, batch, processes):
  data = _tiny(n_test=n)
  parts = [list(input_pipeline.eval_batches(
      data, 'test', global_batch_size=batch, process_index=i,
      process_count=processes)) for i in range(processes)]
  assert {len(p) for p in parts} == {-(-n // batch)}
  seen = []
  for b in itertools.chain(*parts):
    assert b['image'].shape == (batch // processes, 4, 4, 1)
    assert not b['image'][~b['mask']].any()
    seen += b['image'][b['mask'], 0, 0, 0].tolist()
    np.testing.assert_array_equal(
        b['label'][b['mask']], b['image'][b['mask'], 0, 0, 0] % 3)
  assert sorted(seen) == list(range(n))


def test_training_rows_do_not_depend_on_processes():
  data = _tiny()
  kwargs = dict(global_batch_size=6, data_seed=1)
  parts = [_take(input_pipeline.train_batches(
      data, process_index=i, process_count=2, **kwargs), 8) for i in range(2)]
  for whole, *part in zip(
      _take(input_pipeline.train_batches(data, **kwargs), 8), *parts,
      strict=True):
    for key in ('image', 'label'):
      np.testing.assert_array_equal(
          whole[key], np.concatenate([p[key] for p in part]))
    np.testing.assert_array_equal(
        whole['label'], whole['image'][:, 0, 0, 0] % 3)


def test_resume_in_memory():
  data = input_pipeline.open_data(CONFIG, 0)
  kwargs = dict(global_batch_size=512, data_seed=5)  # 2.5 steps an epoch
  whole = _take(input_pipeline.train_batches(data, **kwargs), 7)
  for start in (1, 4):
    resumed = input_pipeline.train_batches(data, start_step=start, **kwargs)
    for a, b in zip(whole[start:], resumed, strict=False):
      _equal(a, b)
  assert whole[0]['image'].shape == (512, 32, 32, 1)
  other = next(input_pipeline.train_batches(
      data, global_batch_size=512, data_seed=6))
  assert (other['label'] != whole[0]['label']).any()


def test_folder_in_both_engines(photos, monkeypatch):
  pytest.importorskip('tensorflow')
  data = input_pipeline.open_data(photos, 0)
  assert data.image_shape == data.eval_shape == (32, 32, 3)
  assert data.train.num_examples == 11

  def batches():
    kwargs = dict(global_batch_size=4, data_seed=2)
    train = _take(input_pipeline.train_batches(data, **kwargs), 5)
    later = input_pipeline.train_batches(data, start_step=3, **kwargs)
    for a, b in zip(train[3:], later, strict=False):
      _equal(a, b)
    evals = [list(input_pipeline.eval_batches(
        data, 'val', global_batch_size=4, process_index=i, process_count=2))
        for i in range(2)]
    # Three examples: the second process has one and a row of padding.
    assert [b['mask'].tolist() for b in evals[1]] == [[True, False]]
    return [*train, *evals[0], *evals[1]]

  with_tensorflow = batches()
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  monkeypatch.delitem(sys.modules, 'input_pipeline.pipeline_tf')
  monkeypatch.delattr(input_pipeline, 'pipeline_tf')
  for a, b in zip(with_tensorflow, batches(), strict=True):
    difference = np.abs(a['image'].astype(int) - b['image'])
    assert difference.max() <= 1 and difference.mean() < .25
    _equal({**a, 'image': a['label']}, {**b, 'image': b['label']})


@pytest.mark.parametrize('engine', ['tensorflow', 'numpy'])
@pytest.mark.parametrize('damage', ['truncated', 'text', 'missing'])
def test_unreadable_image_is_named(tmp_path, photos, engine, damage,
                                   monkeypatch):
  if engine == 'tensorflow':
    pytest.importorskip('tensorflow')
  for c in 'ab':
    os.makedirs(tmp_path / c)
    for i in range(3):
      Image.effect_noise((40, 40), 50).save(tmp_path / c / f'{i}.jpg')
  data = input_pipeline.open_data({**photos, 'path': str(tmp_path)}, 0)
  bad = data.train.describe(2)
  if damage == 'missing':
    os.remove(bad)
  else:
    with open(bad, 'rb+') as f:
      if damage == 'text':
        f.write(b'this is no image')
      f.truncate(500)
  if engine == 'numpy':
    from input_pipeline import pipeline_tf
    monkeypatch.setattr(
        pipeline_tf, 'images', pipeline._numpy_images)
  batches = input_pipeline.train_batches(
      data, global_batch_size=2, data_seed=0)
  with runs.refused('cannot be read') as e:
    _take(batches, 3)
  assert str(e.value).startswith(bad) and 'node' not in str(e.value)


def test_data_that_needs_no_tensorflow_does_not_import_it():
  # With and without: not importing it is not the same as being able to.
  code = f'''
import sys
if sys.argv[1] == 'absent': sys.modules['tensorflow'] = None
import input_pipeline
data = input_pipeline.open_data({CONFIG!r}, 0)
next(input_pipeline.train_batches(data, global_batch_size=8, data_seed=0))
list(input_pipeline.eval_batches(data, 'test', global_batch_size=100))
assert sys.modules.get('tensorflow') is None
# Left open: the thread that fills it must not keep the process from exiting.
import jax
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ahead = input_pipeline.to_device.prefetch(
    input_pipeline.train_batches(data, global_batch_size=8, data_seed=0),
    sharding)
next(ahead)
'''
  for case in ('absent', 'there'):
    subprocess.run([sys.executable, '-c', code, case], check=True,
                   cwd=runs.ROOT, timeout=60)


@pytest.mark.parametrize('change, error, match', [
    (dict(source='tfrecord'), ValueError, 'There is: digits, arrays'),
    (dict(source='digit'), ValueError, "Did you mean 'digits'"),
    (dict(epoch='exakt'), ValueError, "Did you mean 'exact'"),
    (dict(path='x'), ValueError, 'reads no file'),
    (dict(channels=2), ValueError, r'input\.channels'),
    (dict(epoch='half'), ValueError, r'input\.epoch'),
    (dict(holdout=1), ValueError, r'input\.holdout'),
    (dict(eval_pp='flip_lr'), ValueError, 'flip_lr: random'),
    (dict(pp='decode|resise(3)'), ValueError, "Did you mean 'resize'"),
    (dict(pp='central_crop(40)'), ValueError, r'input\.pp: a crop of 40'),
    (dict(source='folder', path='/nowhere'), FileNotFoundError, 'nowhere'),
    (dict(source='arrays', path='/nowhere'), FileNotFoundError, 'nowhere'),
    (dict(classes='/nowhere'), FileNotFoundError, r'input\.classes'),
])
def test_open_data_refuses(change, error, match):
  with runs.refused(match, error):
    input_pipeline.open_data({**CONFIG, **change}, 0)


def test_open_data_refuses_images_of_many_sizes(photos):
  with runs.refused('one size'):
    input_pipeline.open_data({**photos, 'pp': 'decode|resize_small(32)'}, 0)
  with runs.refused("begin with 'decode'"):
    input_pipeline.open_data({**photos, 'pp': 'resize(32)'}, 0)


def test_image_shape_needs_no_data():
  config = {**CONFIG, 'source': 'folder', 'path': '/nowhere', 'channels': 3}
  for pp in ('decode|inception_crop(24)|flip_lr', 'pad_crop(24, 4)',
             'decode|resize(24)|central_crop(24)'):
    assert input_pipeline.image_shape({**config, 'pp': pp}) == (24, 24, 3)
  assert input_pipeline.image_shape(CONFIG) == input_pipeline.open_data(
      CONFIG, 0).image_shape
  for pp, match in (('decode|resize_small(24)', 'one size'),
                    ('resize(8)|central_crop(9)', 'does not fit')):
    with runs.refused(match):
      input_pipeline.image_shape({**config, 'pp': pp})


def test_open_data_reads_every_key():
  read = set()

  class Tracked(dict):
    def __getitem__(self, key):
      read.add(key)
      return super().__getitem__(key)

  data = input_pipeline.open_data(Tracked({**CONFIG, 'channels': 3}), 0)
  assert read == set(CONFIG)
  assert data.image_shape == (32, 32, 3)
  with runs.refused('There is: test'):
    input_pipeline.eval_batches(data, 'val', global_batch_size=8)


def _sharding():
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))


def test_prefetch_gives_the_batches_sharded():
  data = _tiny()
  kwargs = dict(global_batch_size=8, data_seed=1)
  wanted = _take(input_pipeline.train_batches(data, **kwargs), 3)
  with to_device.prefetch(
      input_pipeline.train_batches(data, **kwargs), _sharding()) as batches:
    for a, b in zip(wanted, batches, strict=False):
      assert b['image'].sharding == _sharding()
      _equal(a, jax.tree.map(np.asarray, b))
  assert not [t for t in threading.enumerate() if t.name == 'prefetch']
  assert next(batches, None) is None
  evals = input_pipeline.eval_batches(data, 'test', global_batch_size=8)
  assert len(list(to_device.prefetch(evals, lambda _: _sharding()))) == 2


def test_prefetch_raises_after_the_batches_before():
  def batches():
    yield {'x': np.zeros(8)}
    raise ValueError('broken image')
  ahead = to_device.prefetch(batches(), _sharding())
  next(ahead)
  with pytest.raises(ValueError, match='broken image'):
    next(ahead)
  assert next(ahead, None) is None


def test_prefetch_is_bounded():
  made = []

  def batches():
    for i in range(100):
      made.append(i)
      yield {'x': np.zeros(8)}
  with to_device.prefetch(batches(), _sharding(), size=2) as ahead:
    next(ahead)
    threading.Event().wait(.3)
    assert len(made) <= 4


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(runs.TEST_DATA, 'imagenet_sample')),
    reason='no sample of photographs; set VIT_JAX_TEST_DATA')
def test_photographs_decode_alike_in_both_engines():
  tf = pytest.importorskip('tensorflow')
  from input_pipeline import ops
  from input_pipeline import ops_numpy
  from input_pipeline import ops_tf
  paths = sorted(glob.glob(f'{runs.TEST_DATA}/imagenet_sample/*/*'))[::10]
  parsed = ops.parse('decode|inception_crop(96)')
  for i, path in enumerate(paths):
    with open(path, 'rb') as f:
      content = f.read()
    image = ops_numpy.decode(content, 3)
    np.testing.assert_array_equal(image, tf.io.decode_jpeg(
        content, 3, dct_method='INTEGER_ACCURATE'))
    views = ops.views(parsed, *image.shape[:2],
                      ops.draw(parsed, 0, 0, [i])[0])
    # Decoding the box only must not change its edges.
    file = ops_tf.look(content)
    assert file.kind == ops_tf.JPEG and file[1:3] == image.shape[:2]
    box = ops_tf.decode_box(content, file.kind, file.margin,
                            np.array(views, np.int32), False, 3)
    np.testing.assert_array_equal(
        box, ops_numpy.apply(image, [ops.CentralCrop(1)], views[1:]))
    # libjpeg's small transforms are the same ones in both, too.
    for scale in (2, 4, 8):
      np.testing.assert_array_equal(
          ops_numpy.pixels(ops_numpy.open_image(content), 3, scale),
          ops_tf._decode_jpeg(content, tf.constant(scale), True))
