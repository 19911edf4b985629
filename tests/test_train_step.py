"""The pure step: devices, seeds, rates, frozen parameters, averages."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import augment
from vit_jax import durations
from vit_jax import ema
from vit_jax import optimizer
from vit_jax import param_paths
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import train_step
from vit_jax.models import vit

STEPS = 5
UNITS = durations.Units(num_examples=160, batch_size=32, steps_per_epoch=5)
NORMALIZE = train_step.normalizer((0.5,), (0.5,), 1)


def batches():
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    yield {'image': rng.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8),
           'label': rng.integers(0, 10, 32).astype(np.int32)}


@functools.cache
def build(stem, num_devices=1, frozen=(), optimizer_name='adamw', average=True):
  """Returns (init_fn, jitted step, mesh), once per set of arguments."""
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:num_devices])
  model = vit.create(
      size='micro', stem=stem, num_classes=10, pool='gap', dropout=0.1,
      scan=True, batch_norm='frozen' if frozen else 'train')
  variables = train_state.abstract_variables(model, (32, 32, 3), mesh)
  trained, _ = param_paths.split(variables['params'], frozen)
  config = getattr(recipes, optimizer_name)(1e-3, 0.1)
  make_tx = optimizer.create(config, trained)
  alpha = ema.create(dict(name='decay', decay=0.9), UNITS, STEPS, 0)
  init_fn, abstract = train_state.init(
      model, (32, 32, 3), make_tx, frozen, average, mesh)
  loss_fn = train_step.make_classification_loss(
      model, 10, dict(name='softmax_xent', label_smoothing=0.1))
  step = train_step.make(
      jax.value_and_grad(loss_fn, has_aux=True), augment.none(NORMALIZE),
      make_tx, schedules.create(
          recipes.cosine(1.0, warmup_start=0.5), UNITS, STEPS),
      alpha if average else None)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
  return init_fn, jitted, mesh


def run(stem, num_devices=1, seed=0, lr=1e-3, wd=0.1, **kwargs):
  init_fn, step, mesh = build(stem, num_devices, **kwargs)
  hypers = train_step.make_hypers(dict(lr=lr, weight_decay=wd), seed)
  state = init_fn(hypers['key'])
  first = state
  losses = []
  with sharding.tracing(mesh):
    for batch in batches():
      batch = jax.device_put(batch, sharding.batch(mesh))
      state, metrics = step(state, batch, hypers)
      losses.append(float(metrics['loss']))
  return first, state, np.array(losses), step


@pytest.mark.parametrize('stem', [
    'conv', pytest.param('patchify', marks=pytest.mark.slow)])
def test_eight_devices_agree_with_one(stem):
  one, eight = run(stem, 1), run(stem, 8)
  np.testing.assert_allclose(one[2], eight[2], rtol=1e-5)
  for leaf in jax.tree.leaves(eight[1].params):
    assert len(leaf.sharding.device_set) == 8
  stats = param_paths.flatten(one[1].batch_stats)
  assert bool(stats) == (stem == 'conv')
  for path, value in param_paths.flatten(eight[1].batch_stats).items():
    np.testing.assert_allclose(stats[path], value, rtol=1e-4, atol=1e-5)


def test_first_losses_are_those_on_record():
  # A zero head makes the first loss that of a uniform guess; the others are
  # golden values of this code (float32, CPU): a change of them is a change of
  # the initialisation, the data order of this test, or the step.
  losses = run('conv')[2]
  np.testing.assert_allclose(losses[0], np.log(10), rtol=1e-6)
  np.testing.assert_allclose(losses[1:], GOLDEN, rtol=2e-4)


GOLDEN = [2.305758, 2.304660, 2.304138, 2.305696]


def test_another_rate_decay_or_seed_compiles_nothing_and_matters():
  base = run('patchify')
  compiled = base[3]._cache_size()
  for change in (dict(lr=2e-3), dict(wd=5.0), dict(seed=1)):
    other = run('patchify', **change)
    assert not np.allclose(base[2], other[2], rtol=1e-6), change
  assert base[3]._cache_size() == compiled == 1


def test_frozen_parameters_and_statistics_stay():
  first, last, losses, _ = run('conv', frozen=('stem/.*',))
  assert set(last.frozen) == {'stem'} and 'stem' not in last.params
  assert len(jax.tree.leaves(last.opt_state)) < len(
      jax.tree.leaves(run('conv')[1].opt_state))
  for before, after in ((first.frozen, last.frozen),
                        (first.batch_stats, last.batch_stats)):
    assert jax.tree.leaves(before)
    jax.tree.map(np.testing.assert_array_equal, before, after)
  assert losses[-1] != losses[0]
  # The averages hold what is trained; together they are the whole model.
  assert set(last.ema_variables()['params']) == set(
      run('conv')[1].params)


def test_averages_follow_the_weights():
  first, last, _, _ = run('conv')
  path = 'encoder/blocks/mlp/fc1/kernel'
  new, old, mean = (param_paths.flatten(t)[path] for t in (
      last.params, first.params, last.ema['params']))
  assert np.abs(new - mean).max() > 0
  assert np.abs(new - mean).max() < np.abs(new - old).max()
  assert param_paths.flatten(last.ema['batch_stats'])


def test_a_non_finite_loss_leaves_its_step_in_the_state():
  _, state, losses, _ = run('patchify', lr=1e38)
  bad = int(np.argmax(~np.isfinite(losses))) + 1
  assert bad > 1 and int(state.first_nonfinite_step) == bad


def test_label_smoothing_has_a_range():
  with pytest.raises(ValueError, match='label_smoothing'):
    train_step.make_classification_loss(
        None, 10, dict(name='softmax_xent', label_smoothing=1.0))


def test_normalisation_is_of_fractions():
  x = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_allclose(
      NORMALIZE(x).reshape(-1), np.arange(256) / 127.5 - 1, atol=1e-6)
  rgb = train_step.normalizer((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), 3)
  np.testing.assert_allclose(
      rgb(jnp.full((1, 1, 1, 3), 255, jnp.uint8)).reshape(-1),
      [0.9, 0.4, 0.175], rtol=1e-6)
