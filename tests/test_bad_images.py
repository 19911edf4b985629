"""Unreadable images: replaced, masked, listed, limited; odd ones: read."""
import io
import itertools
import json
import os
import random
import re
import time

import jax
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import bad_images
from input_pipeline import ops
from input_pipeline import ops_numpy
from input_pipeline import order
from input_pipeline import pipeline
from input_pipeline import sources
from tests import runs
from tests import test_tfds
from vit_jax import train
from vit_jax import train_step
from vit_jax.models import vit

N = 24
INPUT = {**sources.TFDS_ONLY, 'source': 'folder',
         'pp': 'decode|inception_crop(16)|flip_lr',
         'eval_pp': 'decode|resize(16)', 'epoch': 'exact', 'channels': 3,
         'holdout': .1, 'classes': '', 'max_bad_fraction': .3,
         'repeats': 1, 'only_classes': (), 'validation': 0.0,
         'per_class': 0}


def encode(pixels, kind, mode=None, **options):
  file = io.BytesIO()
  Image.fromarray(pixels, mode).save(file, kind, **options)
  return file.getvalue()


def noise(i, *shape):
  return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def broken_checksum(content):
  """A PNG that libpng refuses and Pillow reads: of its pixels' checksum."""
  at = content.index(b'IEND') - 8
  return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


DAMAGE = {
    'half.jpg': lambda c: c[:len(c) // 2],
    'end.jpg': lambda c: c[:-8],
    'text.jpg': lambda c: b'this is no image',
    'empty.jpg': lambda c: b'',
    'tables.jpg': lambda c: c.replace(b'\xff\xc4\x00', b'\xff\xc4\xff', 1),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """N images to train on, 5 of them broken; 9 to evaluate, 1 of them broken."""
  root = tmp_path_factory.mktemp('damaged')
  for part, n in (('train', N), ('val', 9)):
    for i in range(n):
      folder = root / part / 'ab'[i % 2]
      os.makedirs(folder, exist_ok=True)
      (folder / f'{i:02}.jpg').write_bytes(
          encode(noise(i, 40, 30 + i, 3), 'JPEG'))
  for i, (name, damage) in enumerate(DAMAGE.items()):
    path = root / 'train' / 'ab'[i % 2] / f'{i:02}.jpg'
    content = path.read_bytes()
    assert damage(content) != content
    (path.parent / name).write_bytes(damage(content))
    path.unlink()
  (root / 'val/a/04.jpg').write_bytes(b'')
  (root / 'train/b/21.jpg').write_bytes(
      broken_checksum(encode(noise(1, 30, 30, 3), 'PNG')))
  return str(root)


@pytest.fixture(params=['tensorflow', 'numpy'])
def engine(request, monkeypatch):
  if request.param == 'tensorflow':
    pytest.importorskip('tensorflow')
  else:
    from input_pipeline import pipeline_tf
    monkeypatch.setattr(pipeline_tf, 'images', pipeline._numpy_images)
  return request.param


def open_data(root, **changes):
  return input_pipeline.open_data({**INPUT, 'path': root, **changes}, 0)


def take(data, n, start=0, seed=1):
  return list(itertools.islice(input_pipeline.train_batches(
      data, global_batch_size=8, data_seed=seed, start_step=start), n))


_LABELS = {}


def test_substitutes_keep_order_and_resumption(root, engine):
  data = open_data(root)
  batches = take(data, 9)
  bad = {os.path.basename(p) for p in data.bad.paths['train']}
  # That PNG is read by Pillow, in both engines.
  assert bad == set(DAMAGE)
  # Rows of readable images are where they always are; others are drawn.
  broken = {i for i in range(N) if os.path.basename(
      data.train.describe(i)) in DAMAGE}
  labels = []
  for step in range(9):
    for epoch, index, _ in zip(*order.batch_examples(
        1, step, num_examples=N, global_batch_size=8), strict=True):
      attempt = itertools.count(1)
      i = int(index)
      while i in broken:
        i = order.substitute(1, epoch, index, next(attempt), N)
      labels.append(data.train.labels[i])
  found = np.concatenate([b['label'] for b in batches])
  assert found.tolist() == labels
  # Known as bad or not, a resumed run gives the same.
  for again in (data, open_data(root)):
    for a, b in zip(batches[4:], take(again, 5, start=4), strict=True):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])
  # Both engines give the same pixels, up to rounding.
  for a, b in zip(_LABELS.setdefault('batches', batches), batches, strict=True):
    np.testing.assert_array_equal(a['label'], b['label'])
    assert np.abs(a['image'].astype(int) - b['image']).max() <= 1


def test_evaluation_masks_what_it_cannot_read(root, engine):
  data = open_data(root)
  batches = [b for p in range(2) for b in input_pipeline.eval_batches(
      data, 'val', global_batch_size=4, process_index=p, process_count=2)]
  mask, unreadable = (
      np.concatenate([b[k] for b in batches]) for k in ('mask', 'unreadable'))
  assert mask.sum() == 8 and unreadable.sum() == 1
  assert not (mask & unreadable).any() and len(mask) == 12
  for b in batches:
    assert not b['image'][~b['mask']].any()
  assert list(data.bad.paths) == ['val']


def test_too_many_end_the_run(root, engine):
  with runs.refused(r'5 of 24 training images.*max_bad_fraction=0\.2'):
    take(open_data(root, max_bad_fraction=.2), 20)
  # Images are read side by side, and judged by their place in the order.
  data = open_data(root, max_bad_fraction=0)
  read = data.train.read
  data.train.read = lambda indices: time.sleep(.01 * random.random()) or (
      read(indices))
  _, index, _ = order.batch_examples(1, 0, num_examples=N, global_batch_size=8)
  first = next(p for p in map(data.train.describe, index)
               if os.path.basename(p) in DAMAGE)
  with runs.refused(rf'^{re.escape(first)}.*with it 1 of 24 training images'):
    take(data, 20)


def test_images_too_small_for_the_crop_count_as_unreadable(tmp_path, engine):
  for path in ('a/0.png', 'a/1.png', 'b/0.png', 'b/1.png', 'b/2.png'):
    os.makedirs((tmp_path / path).parent, exist_ok=True)
    (tmp_path / path).write_bytes(encode(noise(0, 9, 9, 3), 'PNG'))
  with runs.refused(r'does not fit into an image of 9 x 9.*with it 1 of 3'):
    take(open_data(str(tmp_path), pp='decode|central_crop(10)', holdout=.3), 3)


@pytest.mark.parametrize('damage', ['gone', 'text', 'smaller'])
def test_a_file_that_breaks_while_training(tmp_path, engine, damage):
  """Its header is known by then; it is unreadable, and the rest as before."""
  for i in range(N):
    path = tmp_path / 'ab'[i % 2] / f'{i:02}.jpg'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode(noise(i, 40, 40, 3), 'JPEG'))
  data = open_data(str(tmp_path))
  count = data.train.num_examples
  whole = take(data, 9)
  path = data.train.describe(3)
  if damage == 'gone':
    os.remove(path)
  else:
    with open(path, 'wb') as f:
      f.write(b'no image' if damage == 'text' else
              encode(noise(0, 2, 2, 3), 'JPEG')[:-9])
  for step, (a, b) in enumerate(zip(whole, take(data, 9), strict=True)):
    _, index, _ = order.batch_examples(
        1, step, num_examples=count, global_batch_size=8)
    np.testing.assert_array_equal(
        (a['image'] != b['image']).any((1, 2, 3)), index == 3)
  assert list(data.bad.paths['train']) == [path]


def test_substitute_is_a_fair_draw():
  drawn = [order.substitute(0, epoch, 3, 1, 10) for epoch in range(3000)]
  assert np.abs(np.bincount(drawn, minlength=10) / 300 - 1).max() < .2


@pytest.mark.parametrize('stream', [False, True])
def test_tfds_records(tmp_path, monkeypatch, engine, stream):
  good = list(test_tfds.examples(test_tfds.N, 0))
  monkeypatch.setattr(test_tfds, 'examples', lambda n, seed: (
      {**e, 'image': io.BytesIO(b'' if seed == 0 and i in (3, 17, 18) else
                                e['image'].getvalue())}
      for i, e in enumerate(good[:n])))
  root = test_tfds.write(tmp_path, 'tfrecord')
  data = test_tfds.open_data(root, stream=stream, max_bad_fraction=.1)
  batches = test_tfds.take(data, 14)
  assert len(data.bad.paths['train']) == 3
  assert all(' record ' in p for p in data.bad.paths['train'])
  again = test_tfds.open_data(root, stream=stream, max_bad_fraction=.1)
  for a, b in zip(batches[6:], test_tfds.take(again, 8, start=6), strict=True):
    test_tfds.equal(a, b)
  assert all(b['image'].any((1, 2, 3)).all() for b in batches)
  strict = test_tfds.open_data(root, stream=stream, max_bad_fraction=0)
  if stream:
    indices = (i for _, i, _ in strict.train.shuffled(3, 0, 0, 1))
  else:
    indices = order.permuted(3, 0, np.arange(test_tfds.N), test_tfds.N)
  first = strict.train.describe(next(i for i in indices if i in (3, 17, 18)))
  with runs.refused(rf'^{re.escape(first)} cannot be read.*with it 1 of 50'):
    test_tfds.take(strict, 14)


def test_list_is_written_and_kept(tmp_path):
  path = tmp_path / 'bad_files.json'
  source = sources.Pixels(np.zeros((9, 4, 4, 1), np.uint8), np.arange(9) % 2,
                          ('a', 'b'), 'pixels')
  for index in (2, 5):  # two launches of the same run
    bad = bad_images.BadImages(.5)
    with bad.saved_to(str(path)):
      assert not bad.knows('train', index)
      for _ in range(2):
        bad.add('train', source, index, 'broken')
    assert bad.knows('train', index) and len(bad) == 1
  assert json.loads(path.read_text()) == {
      'train': {'pixels #2': 'broken', 'pixels #5': 'broken'}}
  path.unlink()
  bad.save(str(path))
  assert not path.exists()


def test_a_run_lists_and_counts_them(finished, cache, tmp_path, capsys):
  del finished  # its programs are compiled; ten classes here, too
  for part in ('train', 'test'):
    for i in range(20):
      path = tmp_path / 'data' / part / str(i // 2) / f'{i}.png'
      os.makedirs(path.parent, exist_ok=True)
      path.write_bytes(encode(noise(i, 32, 32, 3), 'PNG') if i else b'')
  c = runs.short(
      cache, input__source='folder', input__path=str(tmp_path / 'data'),
      input__eval_pp='decode|resize(32)', input__max_bad_fraction=.05)
  results = train.train_and_evaluate(c, str(tmp_path / 'run'))
  assert results['test/count'] == 19 and results['test/unreadable'] == 1
  assert 'evaluated 19/20, 1 unreadable' in capsys.readouterr().out
  listed = json.loads((tmp_path / 'run/bad_files.json').read_text())
  assert {part: len(paths) for part, paths in listed.items()} == {
      'train': 1, 'test': 1}
  assert str(tmp_path / 'data/train/0/0.png') in listed['train']


def palette(kind, **options):
  file = io.BytesIO()
  Image.fromarray(noise(0, 20, 30, 3)).quantize(16).save(file, kind, **options)
  return file.getvalue()


ODD = {
    'grey jpeg': lambda: encode(noise(0, 20, 30), 'JPEG'),
    'cmyk jpeg': lambda: encode(noise(0, 20, 30, 4), 'JPEG', 'CMYK'),
    'progressive': lambda: encode(
        noise(0, 20, 30, 3), 'JPEG', progressive=True),
    'grey png': lambda: encode(noise(0, 20, 30), 'PNG'),
    'bits': lambda: encode(noise(0, 20, 30) > 99, 'PNG'),
    'grey alpha': lambda: encode(noise(0, 20, 30, 2), 'PNG'),
    'alpha': lambda: encode(noise(0, 20, 30, 4), 'PNG'),
    '16 bits': lambda: encode(
        noise(0, 20, 30).astype(np.uint16) * 257 + 99, 'PNG'),
    'palette png': lambda: palette('PNG'),
    'transparent palette': lambda: palette('PNG', transparency=3),
    'gif': lambda: encode(noise(0, 20, 30), 'GIF'),
    'bmp': lambda: encode(noise(0, 20, 30, 3), 'BMP'),
    'webp': lambda: encode(noise(0, 20, 30, 4), 'WEBP', lossless=True,
                           exact=True),
}


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', ODD)
def test_odd_formats_are_read_alike(name, channels):
  tf = pytest.importorskip('tensorflow')
  from input_pipeline import ops_tf
  content = ODD[name]()
  ours = ops_numpy.decode(content, channels)
  assert ours.shape == (20, 30, channels) and ours.std() > 9
  file = ops_tf.look(content)
  assert (file.height, file.width) == (20, 30)
  view = np.array(ops.Decode().view(20, 30, None), np.int32)
  theirs = ops_tf.decode(ops_tf.prepare(content, file), tf.constant(file.kind),
                         view, False, channels)
  np.testing.assert_array_equal(ours, theirs)
  whole = noise(0, 20, 30, 4)
  if name == 'alpha' and channels == 3:  # dropped, nothing blended
    np.testing.assert_array_equal(ours, whole[..., :3])
  if name == '16 bits':
    np.testing.assert_array_equal(ours[..., 0], (
        noise(0, 20, 30).astype(int) * 257 + 99) % 65536 // 256)


def test_exif_rotation_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  content = encode(noise(0, 20, 30, 3), 'JPEG', exif=exif)
  assert ops_numpy.decode(content, 3).shape == (20, 30, 3)


def test_an_image_that_would_fill_the_memory_is_unreadable(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
  with pytest.raises(pipeline.READ_ERRORS, match='decompression bomb'):
    ops_numpy.decode(ODD['bmp'](), 3)


@pytest.mark.parametrize('channels', [1, 3])
def test_channels_from_loader_to_stem(channels):
  data = input_pipeline.open_data(
      {**INPUT, 'source': 'digits', 'path': '', 'pp': '', 'eval_pp': '',
       'channels': channels}, 0)
  for stem in ('conv', 'patchify'):
    model = vit.create(size='micro', stem=stem, num_classes=10, pool='gap')
    for batch in take(data, 2):
      assert batch['image'].shape == (8, 32, 32, channels)
      logits = jax.eval_shape(
          lambda x, m=model: m.init_with_output(
              jax.random.key(0), x, train=False)[0],
          jax.ShapeDtypeStruct(batch['image'].shape, np.float32))
      assert logits.shape == (8, 10)
  images = batch['image']
  scaled = train_step.normalizer((.5,) * channels, (.5,), channels)(images)
  assert scaled.shape == images.shape
  with runs.refused(r'input\.mean has 2 values'):
    train_step.normalizer((.5, .5), (.5,), channels)
