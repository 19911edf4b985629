"""check-data and soak."""
import json
import os

import numpy as np
import pytest

from tests import runs
from tests import test_bad_images
from tests import test_tfds
from vit_jax import __main__ as command_line
from vit_jax import recipes
from vit_jax.commands import check_data
from vit_jax.commands import soak


def tree(root, n=6):
  for part in ('train', 'val'):
    for i in range(n):
      path = root / part / 'ab'[i % 2] / f'{i}.jpg'
      os.makedirs(path.parent, exist_ok=True)
      path.write_bytes(
          test_bad_images.encode(test_bad_images.noise(i, 24, 24, 3), 'JPEG'))
  return str(root)


def test_check_data_of_a_folder(tmp_path, capsys):
  root = tree(tmp_path / 'data')
  assert command_line.main(['check-data', '--path', root]) == 0
  assert 'train  6 images, 2 classes of 3 (a) to 3 (b), 0 unreadable' in (
      capsys.readouterr().out)
  (tmp_path / 'data/val/b/1.jpg').write_bytes(b'no image')
  report = str(tmp_path / 'report.json')
  assert command_line.main(
      ['check-data', f'--path={root}', f'--json={report}']) == 2
  out = capsys.readouterr().out
  assert 'val/b/1.jpg: it is damaged' in out
  assert 'problem: val: 1 images cannot be read\n1 problem(s)' in out
  with open(report) as f:
    found = json.load(f)
  assert list(found['splits']['val']['unreadable']) == [
      os.path.join(root, 'val/b/1.jpg')]
  assert found['splits']['train']['classes'] == {'a': 3, 'b': 3}


def test_check_data_compares_with_the_config(tmp_path, capsys):
  root = tree(tmp_path)
  config = os.path.join(runs.ROOT, 'configs', 'vit_c_i1k.py')
  assert command_line.main(
      ['check-data', '--config', f'{config}:data={root}']) == 2
  out = capsys.readouterr().out
  for line in ('6 training examples, and 1,281,167 are expected',
               '2 classes, and 1,000 are expected',
               '6 validation examples, and 50,000 are expected'):
    assert f'problem: {line}' in out
  assert command_line.main(['check-data', '--config', runs.DIGITS]) == 0


@pytest.mark.parametrize('stream', [False, True])
def test_check_data_of_tfds(tmp_path, stream):
  config = recipes.base()
  config.input.update({
      **test_tfds.INPUT, 'stream': stream,
      'data_dir': test_tfds.write(tmp_path, 'tfrecord')})
  report = check_data.check(config)
  assert report['problems'] == []
  assert report['splits']['train']['classes'] == {'a': 17, 'b': 17, 'c': 16}
  assert report['splits']['val']['count'] == test_tfds.N_EVAL


@pytest.mark.parametrize('argv, message', [
    (['check-data'], 'Neither'),
    (['check-data', '--pth=x'], 'pth'),
    (['check-data', '--path=/nowhere'], 'nowhere'),
    (['check-data', '--config', runs.DIGITS, '--path=x'], 'Both'),
    (['soak', '--config', runs.DIGITS, '--examples=64'], '1 batches of 64'),
    (['bench', 'data'], 'Neither'),
    (['bench', 'data', '--images=/nowhere'], '0 JPEG files'),
    (['bench', 'data', '--config', runs.DIGITS], 'no files'),
    (['bench', 'data', '--rounds=0'], 'rounds'),
    (['bench', 'dta'], "Did you mean 'data'"),
])
def test_bad_input(argv, message, capsys):
  assert command_line.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 2, error


def test_bench_data_says_what_it_measured(tmp_path, capsys):
  pytest.importorskip('tensorflow')
  root = tmp_path / 'photos'
  for i in range(9):
    path = root / 'ab'[i % 2] / f'{i}.jpg'
    os.makedirs(path.parent, exist_ok=True)
    path.write_bytes(
        test_bad_images.encode(test_bad_images.noise(i, 250, 240, 3), 'JPEG'))
  (root / 'notes.txt').write_text('no image')
  argv = ['bench', 'data', '--images', str(root), '--batch=8', '--batches=1',
          '--rounds=1', '--short_side=96', '--augment=',
          '--consumer=5000']
  assert command_line.main(argv) == 0
  out = capsys.readouterr().out
  assert out.startswith('9 images of ')
  rows = {line.split('  ')[0]: line for line in out.splitlines()}
  for name in ('decode', 'crop', 'delivery', 'packed', 'randaugment',
               'end to end'):
    assert len(rows[name][12:].split()) == 5, rows[name]
  assert rows['crop'].split()[-2:] == ['1.00', '1.00']
  assert 'to feed 5,000 images/s (given)' in out and ' CPUs' in out


def test_bench_data_takes_the_ops_of_the_paper():
  """At magnitude 10 each op changes noise, and some in a known way."""
  tf = pytest.importorskip('tensorflow')
  from input_pipeline import probes_tf
  image = test_bad_images.noise(0, 224, 224, 3)
  results = [op(tf.constant(image)).numpy() for op in probes_tf._ops(10)]
  assert len(results) == 16
  for k, result in enumerate(results):
    assert result.shape == image.shape and result.dtype == np.uint8
    # Noise uses all levels already; its histogram is flat.
    assert k in (0, 1) or (result != image).mean() > .02, k
  np.testing.assert_array_equal(results[4], image // 16 * 16)
  np.testing.assert_array_equal(results[5], 255 - image)
  np.testing.assert_array_equal(results[15], np.where(
      image < 128, np.minimum(image.astype(int) + 110, 255), image))
  assert (results[14] == 128).all(-1).sum() <= 80 * 80


def test_soak_says_what_it_measured(capsys):
  argv = ['soak', '--config', runs.DIGITS, '--examples', '2000']
  assert command_line.main(argv) == 0
  out = capsys.readouterr().out
  assert out.count(' MB\n') >= 10 and 'grew by' in out


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    'digits', 'arrays', 'folder', 'tfrecord', 'array_record', 'stream'])
def test_memory_does_not_grow(kind, tmp_path, capsys):
  config = recipes.base()
  config.global_batch_size = 128
  config.input.source = {'tfrecord': 'tfds', 'array_record': 'tfds',
                         'stream': 'tfds'}.get(kind, kind)
  if kind == 'digits':
    config.input.pp = 'pad_crop(32, 4)|flip_lr'
  else:
    config.input.pp = 'decode|inception_crop(16)|flip_lr'
    config.input.eval_pp = 'decode|resize(16)'
  if kind == 'arrays':
    files = [test_bad_images.encode(test_bad_images.noise(i, 24, 24, 3), 'JPEG')
             for i in range(300)]
    config.input.path = str(tmp_path / 'x.npz')
    np.savez(config.input.path, train_labels=np.arange(300) % 3,
             train_jpeg=np.frombuffer(b''.join(files), np.uint8),
             train_offsets=np.cumsum([0, *map(len, files)]))
  elif kind == 'folder':
    config.input.path = tree(tmp_path, 300)
  elif kind != 'digits':
    config.input.path = 'mini:1.0.0'
    config.input.data_dir = test_tfds.write(
        tmp_path, 'tfrecord' if kind == 'stream' else kind)
    config.input.stream = kind == 'stream'
  growth, rate = soak.soak(config, 200_000)
  with capsys.disabled():
    print(f'\n{kind}: {growth / 1e6:+.1f} MB, {rate:,.0f} examples/s')
  assert growth < 50e6
