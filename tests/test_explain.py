"""Attention and features: what is sown, what it costs, what is drawn."""
import os

import jax
import numpy as np
from PIL import Image
import pytest

from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import features
from vit_jax import model_file
from vit_jax import models
from vit_jax import train
from vit_jax.commands import explain

INK = 64  # grey level


def drawn(**config):
  """A `Model` with drawn weights, for images of 32 pixels."""
  config = config if 'size' in config else {
      'size': 'mu/8', 'stem': 'patchify', **config}
  model = models.create(num_classes=3, **config)
  shapes = jax.eval_shape(lambda key: model.init(key, np.zeros(
      (1, 32, 32, 3), np.float32), train=False), jax.random.key(0))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda x: rng.normal(0, .3, x.shape).astype(np.float32), dict(shapes))
  return model_file.Model(config, variables, tuple('abc'), {
      'eval_pp': 'decode|resize(32)', 'mean': [0.5], 'std': [0.5],
      'channels': 3, 'image_shape': [32, 32, 3]}, {})


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize('fields, names', [
    (dict(pool='token'), {'cls': (32,), 'tokens': (16, 32),
                          'block_00': (17, 32)}),
    (dict(pool='map'), {'tokens': (16, 32), 'block_00': (16, 32)}),
    (dict(size='Mixer-micro'), {'tokens': (16, 64), **{
        f'block_0{i}': (16, 64) for i in range(4)}}),
    (dict(size='BiT-micro'), {}),
])
def test_layers_of_each_family(fields, names):
  layers = features.Features(drawn(**fields))
  pooled = layers.shapes.pop('pooled')
  assert layers.shapes == names and len(pooled) == 1
  layers.shapes['pooled'] = pooled
  assert layers.layer('pooled', IMAGES, 2).shape == (3, *pooled)
  if not layers.attends:
    with runs.refused('has no attention'):
      layers.attention(IMAGES)


def test_layers_are_what_the_head_sees():
  model = drawn(pool='token')
  layers = features.Features(model)
  pooled = layers.layer('pooled', IMAGES)
  np.testing.assert_array_equal(pooled, layers.layer('cls', IMAGES))
  head = model.variables['params']['head']
  np.testing.assert_allclose(pooled @ head['kernel'] + head['bias'],
                             model.logits(IMAGES), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
      layers.layer('block_00', IMAGES).shape, (3, 17, 32))


def test_a_scan_gives_the_same_attention():
  """Blocks that are stacked, and blocks that are not, with equal weights."""
  model = drawn(size='micro', stem='patchify', pool='map')
  params = dict(model.variables['params'])
  blocks = [params['encoder'][f'block_{i:02d}'] for i in range(4)]
  params['encoder'] = {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
                       'norm': params['encoder']['norm']}
  stacked = model_file.Model(
      model.config | dict(scan=True), {'params': params}, model.class_names,
      model.preprocessing, {})
  a, b = features.Features(model), features.Features(stacked)
  assert a.shapes == b.shapes and len(a.shapes) == 6
  for x, y in zip(a.attention(IMAGES), b.attention(IMAGES), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_allclose(x.sum(axis=-1), 1, atol=1e-5)
  assert a.attention(IMAGES)[0].shape == (3, 4, 4, 16, 16)
  for name in ('block_02', 'tokens'):
    np.testing.assert_allclose(
        a.layer(name, IMAGES), b.layer(name, IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('scan', [False, True])
def test_what_nobody_asks_for_costs_nothing(scan, monkeypatch):
  """The program of training is the same to the letter without sowing."""
  from flax import linen as nn

  def lowered():
    model = models.create(
        size='micro', stem='patchify', num_classes=3, pool='map', scan=scan)
    variables = jax.eval_shape(lambda key: model.init(key, np.zeros(
        (1, 32, 32, 3), np.float32), train=False), jax.random.key(0))
    loss = lambda params, x: model.apply(
        {'params': params}, x, train=True, mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(0)})[0].sum()
    return jax.jit(jax.grad(loss)).lower(
        variables['params'], np.zeros((2, 32, 32, 3), np.float32)).as_text()

  sowing = lowered()
  assert 'exponential' in sowing
  monkeypatch.setattr(nn.Module, 'sow', lambda *_, **__: False)
  monkeypatch.setattr(nn.Module, 'is_mutable_collection', lambda *_: False)
  assert lowered() == sowing


def test_rollout_by_hand():
  # One block, one head: token 0 takes all of token 2, the others themselves.
  block = np.eye(3)[None, None].copy()
  block[0, 0, 0] = [0, 0, 1]
  np.testing.assert_allclose(features.rollout(block, has_class=True), [0, 1])
  np.testing.assert_allclose(
      features.rollout(block, has_class=False), [1 / 6, 1 / 3, 1 / 2])
  probe = np.array([[[1, 0, 0]]])
  np.testing.assert_allclose(
      features.rollout(block, probe, has_class=False), [0.5, 0, 0.5])
  # Two blocks: half of the half stays.
  np.testing.assert_allclose(
      features.rollout(np.concatenate([block, block]), probe, False),
      [0.25, 0, 0.75])


@pytest.mark.parametrize('pool', ['token', 'gap', 'map'])
def test_explain_draws(pool, tmp_path, capsys):
  path = str(tmp_path / 'model.safetensors')
  model_file.save(path, drawn(pool=pool))
  for i, image in enumerate(IMAGES[:2]):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
  (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  out = tmp_path / 'out'
  assert command_line.main([
      'explain', path, str(tmp_path / 'bad.png'), str(tmp_path / '0.png'),
      str(tmp_path / '1.png'), '--out', str(out)]) == 0
  text, error = capsys.readouterr()
  assert '2 of 3 images' in text and 'bad.png cannot be read' in error
  assert sorted(os.listdir(out)) == ['00000_0.png', '00001_1.png']
  with Image.open(out / '00000_0.png') as image:
    assert image.width > 4 * 200 and np.asarray(image).std() > 10


def inside_the_ink(model, count):
  """(share of the attention, of the area, ink by patch), of test digits.

  The first two are those inside of the box around the ink.
  """
  pixels = sources.digits('', 0, ()).evals['test'].read(np.arange(count))
  images = model.preprocess(list(pixels))
  found = []
  for image, (rolled, _) in zip(pixels[..., 0], explain.maps(
      model, features.Features(model), images), strict=True):
    h, w = rolled.shape
    attention = np.kron(rolled, np.ones((32 // h, 32 // w)))
    rows, columns = (np.flatnonzero((image > INK).any(axis)) for axis in (1, 0))
    box = np.zeros((32, 32), bool)
    box[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = True
    ink = image.reshape(h, 32 // h, w, 32 // w).mean(axis=(1, 3))
    found.append((attention[box].sum() / attention.sum(), box.mean(),
                  np.corrcoef(rolled.ravel(), ink.ravel())[0, 1]))
  return np.transpose(found)


@pytest.mark.slow
@pytest.mark.parametrize('args, pool', [
    ('', 'gap'), ('stem=patchify', 'token'), ('stem=patchify', 'map')])
def test_attention_is_where_the_ink_is(args, pool, cache, tmp_path):
  c = runs.config(cache, f'{args},epochs=40'.lstrip(','), model__pool=pool)
  train.train_and_evaluate(c, str(tmp_path))
  inside, area, correlation = inside_the_ink(model_file.load(tmp_path), 500)
  assert (inside > area).mean() >= 0.9
  # The digits fill the middle, which a map that is the same for all would find,
  # too. The attention follows the strokes.
  assert correlation.mean() > 0.3, correlation.mean()
