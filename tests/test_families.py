"""MLP-Mixer and BiT: sizes against the papers', and what differs from ViT.

Their logits are compared with the reference code's in test_goldens.py.
"""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from vit_jax import models
from vit_jax import recipes
from vit_jax import train
from vit_jax.commands import plan
from vit_jax.models import mixer
from vit_jax.models import variants

# Parameters without head and with one of 1000 classes.  the papers' code
MIXERS = {
    'Mixer-S/32': (18_591_624, 19_104_624),
    'Mixer-S/16': (18_015_264, 18_528_264),
    'Mixer-B/32': (59_524_428, 60_293_428),
    'Mixer-B/16': (59_111_472, 59_880_472),
    'Mixer-L/32': (205_914_264, 206_939_264),
    'Mixer-L/16': (207_171_168, 208_196_168),
    'Mixer-H/14': (431_069_952, 432_350_952),
}
BITS = {
    'BiT-R50x1': (23_500_352, 25_549_352),
    'BiT-R101x1': (42_492_480, 44_541_480),
    'BiT-R50x3': (211_174_080, 217_319_080),
    'BiT-R101x3': (381_789_888, 387_934_888),
    'BiT-R152x2': (232_238_208, 236_335_208),
    'BiT-R152x4': (928_340_224, 936_533_224),
}
IMAGES = jax.random.normal(jax.random.key(7), (4, 32, 32, 3))


def shapes(model, image_size):
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return jax.eval_shape(
      lambda key, x: model.init(key, x, train=False),
      jax.random.key(0), images)['params']


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('size', MIXERS | BITS)
def test_parameters(size):
  scan = {'scan': True} if size in MIXERS else {}
  model = models.create(size=size, num_classes=1000, **scan)
  params = shapes(model, 224 if size in MIXERS else 64)
  assert (MIXERS | BITS)[size] == (
      count(params) - count(params['head']), count(params))


def test_the_tables_hold_these_and_one_for_tests():
  assert variants.MIXERS.keys() == MIXERS.keys() | {'Mixer-micro'}
  assert variants.BITS.keys() == BITS.keys() | {'BiT-micro'}
  known = [name for _, sizes in models.FAMILIES.values() for name in sizes]
  assert len(known) == len(set(known))


@pytest.mark.parametrize('section, lines', [
    (recipes.mixer('Mixer-B/16'), [
        '59,880,472', '196 (14 x 14 patches of 16)']),
    (recipes.bit('BiT-R50x1'), ['25,549,352'])])
def test_plan(section, lines):
  c = recipes.base()
  c.model = section
  c.input.update(source='folder', path='', num_train=1000, num_classes=1000,
                 pp='decode|resize(224)', eval_pp='decode|resize(224)')
  text = plan.plan(c)
  assert all(line in text for line in lines), text


@pytest.mark.slow
@pytest.mark.parametrize('section', [
    recipes.mixer('Mixer-micro'), recipes.bit('BiT-micro')])
def test_training(section, cache, tmp_path):
  """The one loop takes them; a frozen part stays as it was initialised."""
  stem = 'stem' if 'scan' in section else 'conv_root'
  if 'scan' in section:
    section.update(scan=True, stochastic_depth=0.1)
  c = runs.short(cache, steps=2, model=section.to_dict(),
                 frozen=(f'{stem}/.*',))
  results = train.train_and_evaluate(c, str(tmp_path))
  assert 0 <= results['test/top1'] <= 1 and results['test/loss'] < 3
  arrays = runs.arrays(str(tmp_path))
  assert any("['frozen']" in path and stem in path for path in arrays)


# XLA's optimisations take longer than these programs run.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def _logits(model, params):
  return _jit(lambda p, x: model.apply({'params': p}, x, train=False))(
      params, IMAGES)


def _params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
      shapes(model, 32))


def test_scan_equals_loop():
  loop = models.create(size='Mixer-micro', num_classes=10)
  scan = models.create(size='Mixer-micro', num_classes=10, scan=True)
  params = _params(loop)
  blocks = [params[k] for k in sorted(params) if k.startswith('block')]
  stacked = {k: v for k, v in params.items() if not k.startswith('block')}
  stacked['blocks'] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  a, b = _logits(loop, params), _logits(scan, stacked)
  np.testing.assert_allclose(a, b, atol=1e-4)
  assert float(jnp.abs(a).max()) > 0.1


def test_mixers_stochastic_depth_does_not_rescale():
  """And its branches are skipped independently."""
  block = mixer.Block(
      tokens_mlp=4, channels_mlp=4, gelu='tanh', norm_eps=1e-6,
      dtype='float32')
  y = np.asarray(block.apply(
      {}, jnp.ones((4000, 2, 3)), 0.25, True,
      rngs={'dropout': jax.random.key(0)}, method='_skip_examples'))
  assert (y == y[:, :1, :1]).all()
  assert set(np.unique(y)) == {0.0, 1.0} and abs(y.mean() - 0.75) < 0.03


def test_bit_takes_any_resolution_and_standardises_its_kernels():
  model = models.create(size='BiT-micro', num_classes=10)
  params = _params(model)
  assert jax.tree.structure(params) == jax.tree.structure(shapes(model, 48))
  apply = _jit(lambda p, x: model.apply({'params': p}, x, train=False))
  a = apply(params, IMAGES)
  changed = {**params, 'conv_root': {
      'kernel': 5.0 * params['conv_root']['kernel'] + 3.0}}
  np.testing.assert_allclose(a, apply(changed, IMAGES), atol=2e-4)


@pytest.mark.parametrize('size, fields, match', [
    ('Mixer-C/16', {}, "Unknown size 'Mixer-C/16'.*\n.*'Mixer-./16'"),
    ('Mixer-B/16', {'gelu': 'exact'}, 'Unknown gelu'),
    ('Mixer-B/16', {'stochastic_depth': 1.0}, 'rate stochastic_depth is 1.0'),
    ('BiT-R50x2', {}, "Unknown size 'BiT-R50x2'"),
    ('BiT-R50x1', {'remat': 'some'}, 'Unknown remat'),
    ('BiT-R50x1', {'head_bias': math.inf}, 'head_bias is inf'),
])
def test_wrong_arguments(size, fields, match):
  with runs.refused(match):
    models.create(size=size, num_classes=10, **fields)


def test_an_image_smaller_than_a_patch():
  with runs.refused('smaller than one patch'):
    shapes(models.create(size='Mixer-micro', num_classes=10), 7)
