"""Packs: what `vit-jax pack` writes is the folder again, only smaller."""
import io
import itertools
import os

import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import packed
from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import recipes

pytest.importorskip('array_record')
CONFIG = os.path.join(runs.ROOT, 'configs', 'from_scratch_small.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Images of 20 to 200 pixels a side, one of them no image."""
  root = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for part, count in (('train', 11), ('val', 4)):
    for name in 'ab':
      os.makedirs(root / part / name)
      for i in range(count):
        size = tuple(rng.integers(20, 200, 2).tolist())
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(root / part / name / f'{i}.{"png" if i % 4 else "jpg"}')
  (root / 'train' / 'a' / 'broken.jpg').write_bytes(b'\xff\xd8\xff no image')
  return str(root)


def open_data(**changes):
  config = recipes.base().input
  config.update(pp='decode|inception_crop(24)|flip_lr', max_bad_fraction=0.2,
                eval_pp='decode|resize(24)', **changes)
  return input_pipeline.open_data(config, 0)


def splits(folder):
  data = open_data(source='folder', path=folder)
  return sources.Splits(data.train, data.evals)


def take(data):
  return list(itertools.islice(input_pipeline.train_batches(
      data, global_batch_size=8, data_seed=3), 6))


def test_a_pack_is_the_folder_again(folder, tmp_path, capsys):
  out = str(tmp_path / 'pack')
  assert command_line.main(
      ['pack', '--config', f'{CONFIG}:data={folder}', '--out', out,
       '--short_side', '64', '--per_shard', '8']) == 0
  assert 'train: 23/23 images' in capsys.readouterr().out
  whole = open_data(source='folder', path=folder)
  small = open_data(source='packed', path=out)
  assert small.class_names == whole.class_names == ('a', 'b')
  for a, b in ((whole.train, small.train),
               (whole.evals['val'], small.evals['val'])):
    np.testing.assert_array_equal(a.labels, b.labels)
    for i in range(a.num_examples):
      before, after = a.read([i])[0], b.read([i])[0]
      try:
        size = Image.open(io.BytesIO(before)).size
      except OSError:
        assert after == before
        continue
      if min(size) <= 64:
        assert after == before
      else:
        image = Image.open(io.BytesIO(after))
        assert image.format == 'JPEG' and min(image.size) == 64
        assert abs(max(image.size) - max(size) * 64 / min(size)) <= 0.5
  # The same examples in the same order, and nearly the same pixels.
  for a, b in zip(take(whole), take(small), strict=True):
    np.testing.assert_array_equal(a['label'], b['label'])
    assert np.abs(a['image'].astype(int) - b['image']).mean() < 12


def test_an_interrupted_pack_goes_on(folder, tmp_path, monkeypatch):
  whole, broken = (str(tmp_path / name) for name in ('whole', 'broken'))
  packed.write(splits(folder), whole, 64, per_shard=8)
  calls = itertools.count()
  real = packed.shrunk

  def fails(*args):
    if next(calls) == 50:  # past the estimate, in the second file
      raise KeyboardInterrupt
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(packed, 'shrunk', fails)
    with pytest.raises(KeyboardInterrupt):
      packed.write(splits(folder), broken, 64, per_shard=8)
  with pytest.raises(FileNotFoundError, match=r'holds no pack\.json'):
    open_data(source='packed', path=broken)
  first = os.path.join(broken, 'train-00000.array_record')
  made = os.stat(first).st_mtime_ns
  packed.write(splits(folder), broken, 64, per_shard=8)
  assert os.stat(first).st_mtime_ns == made
  assert not [f for f in os.listdir(broken) if f.endswith('.tmp')]
  for a, b in zip(take(open_data(source='packed', path=whole)),
                  take(open_data(source='packed', path=broken)), strict=True):
    np.testing.assert_array_equal(a['image'], b['image'])


def test_refused(folder, tmp_path, monkeypatch):
  out = str(tmp_path / 'pack')
  with runs.refused('short_side=4 is not in'):
    packed.write(splits(folder), out, 4)
  packed.write(splits(folder), out, 64)
  with runs.refused('other settings'):
    packed.write(splits(folder), out, 48)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'mine').touch()
  with runs.refused('is not empty'):
    packed.write(splits(folder), str(tmp_path / 'full'), 64)
  data = open_data(source='digits', channels=1)
  with runs.refused('not made of files'):
    packed.write(sources.Splits(data.train, data.evals),
                 str(tmp_path / 'digits'), 64)
  usage = type('Usage', (), dict(free=10))
  monkeypatch.setattr(packed.shutil, 'disk_usage', lambda _: usage)
  with runs.refused('The pack needs about'):
    packed.write(splits(folder), str(tmp_path / 'large'), 64)
  os.remove(os.path.join(out, 'train_labels.npy'))
  with runs.refused('is damaged'):
    open_data(source='packed', path=out)
