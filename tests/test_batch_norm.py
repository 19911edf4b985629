"""BatchNorm in groups, against numpy in float64 and over devices."""
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_state
from vit_jax.models import batch_norm
from vit_jax.models import stems
from vit_jax.models import vit

B = 64
RNG = np.random.default_rng(0)
# Means and scales that differ by example and channel: statistics of another
# set of examples are other statistics.
X = (RNG.normal(size=(B, 4, 4, 6)) * RNG.uniform(0.5, 2, (B, 1, 1, 6))
     + RNG.normal(size=(B, 1, 1, 6))).astype(np.float32)
SCALE, BIAS, OLD_MEAN = (
    RNG.normal(size=6).astype(np.float32) for _ in range(3))
OLD_VAR = RNG.uniform(0.5, 2, 6).astype(np.float32)
VARIABLES = {'params': {'scale': SCALE, 'bias': BIAS},
             'batch_stats': {'mean': OLD_MEAN, 'var': OLD_VAR}}


def moments(x, group):
  """(mean, biased variance) [G, D] of each group of [B, h, w, D], float64."""
  groups = np.float64(x).reshape(len(x) // group, -1, x.shape[-1])
  return groups.mean(1), groups.var(1)


def normalized(x, group, scale=1.0, bias=0.0):
  mean, var = (np.repeat(m, group, 0)[:, None, None] for m in moments(x, group))
  return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def apply(module, x, variables=VARIABLES):
  y, new = jax.jit(lambda v, x: module.apply(
      v, x, mutable=['batch_stats']))(variables, x)
  return y, new['batch_stats']


@pytest.mark.parametrize('group', [4, 16, 64])
def test_groups_are_those_of_numpy(group):
  y, stats = apply(batch_norm.GroupedBatchNorm(group), X)
  expected = normalized(X, group, SCALE, BIAS)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  mean, var = (m.mean(0) for m in moments(X, group))
  np.testing.assert_allclose(
      stats['mean'], 0.9 * OLD_MEAN + 0.1 * mean, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 * OLD_VAR + 0.1 * var, rtol=1e-5)
  # Other groups, and groups of the same size that are not consecutive, are
  # told apart.
  assert np.abs(normalized(X, group // 2, SCALE, BIAS) - expected).max() > 0.1
  strided = X.reshape(group, -1, 4, 4, 6).swapaxes(0, 1).reshape(X.shape)
  if group < B:
    assert np.abs(moments(strided, group)[0] - moments(X, group)[0]).max() > 0.1


def test_one_group_is_linens_batch_norm():
  linen = nn.BatchNorm(use_running_average=False, momentum=0.9)
  ours = batch_norm.GroupedBatchNorm(B)
  for a, b in zip(jax.tree.leaves(apply(linen, X)),
                  jax.tree.leaves(apply(ours, X)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  trees = [jax.eval_shape(m.init, jax.random.key(0), X) for m in (linen, ours)]
  assert trees[0] == trees[1]


def test_moments_of_bfloat16_are_float32():
  x = jnp.asarray(X + 8, jnp.bfloat16)
  y, stats = apply(batch_norm.GroupedBatchNorm(4, dtype='bfloat16'), x)
  assert y.dtype == jnp.bfloat16 and stats['mean'].dtype == jnp.float32
  mean, var = moments(x, 4)
  # A mean in bfloat16 would be off by up to 2**-6.
  np.testing.assert_allclose(
      stats['mean'], 0.9 * OLD_MEAN + 0.1 * mean.mean(0), atol=1e-5)
  np.testing.assert_allclose(
      stats['var'], 0.9 * OLD_VAR + 0.1 * var.mean(0), rtol=1e-4)


@pytest.mark.parametrize('group, message', [
    (48, 'groups that do: 32 and 64 .*nearest batches: 48 and 96'),
    (128, 'groups that do: 64 .*nearest batches: 128 and 256'),
    (3, 'groups that do: 2 and 4 .*nearest batches: 63 and 66'),
])
def test_groups_that_do_not_fit(group, message):
  with pytest.raises(ValueError, match=message) as e:
    apply(batch_norm.GroupedBatchNorm(group), X)
  assert len(str(e.value).splitlines()) == 2
  batch_norm.check_group(0, 'batch', 7)


def test_a_group_of_less_than_nothing():
  with pytest.raises(ValueError, match='batch_norm_group is -1'):
    vit.create(size='micro', stem='conv', num_classes=2, batch_norm_group=-1)


# On devices.


@functools.cache
def on_devices(num_devices, group, name='patchify_bn'):
  """(outputs, gradients, statistics, forward HLO)."""
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:num_devices])
  stem = stems.create(size='micro', stem=name, batch_norm_group=group)
  rng = np.random.default_rng(1)
  draw = lambda shape, scale=1.0: rng.normal(
      size=shape, scale=scale).astype(np.float32)
  images = draw((B, 32, 32, 3)) + np.arange(B, dtype=np.float32).reshape(
      B, 1, 1, 1) / 8
  images, weights = jax.device_put(
      (images, draw((B, 4, 4, 64))), sharding.batch(mesh))
  # Drawn by numpy: to compile the initialisation takes longer than all else.
  variables = jax.eval_shape(
      lambda key: stem.init(key, images[:1], train=False), jax.random.key(0))
  variables = jax.device_put(
      jax.tree.map(lambda x: draw(x.shape, 0.2), variables),
      sharding.replicated(mesh))

  def forward(variables, images):
    return stem.apply(variables, images, train=True, mutable=['batch_stats'])

  def loss(params, variables, images, weights):
    y, new = forward({**variables, 'params': params}, images)
    return jnp.sum(y * weights) / B, (y, new['batch_stats'])

  with sharding.tracing(mesh):
    compiled = jax.jit(
        lambda v, x: forward(v, x)[0], out_shardings=sharding.batch(mesh)
        ).lower(variables, images).compile()
    y = compiled(variables, images)
    grads, (_, stats) = jax.jit(jax.grad(loss, has_aux=True))(
        variables['params'], variables, images, weights)
  return *jax.device_get((y, grads, stats)), compiled.as_text()


def close(a, b, **tolerance):
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize('group, name', [
    (4, 'patchify_bn'), (8, 'patchify_bn'), (16, 'patchify_bn'),
    pytest.param(4, 'conv', marks=pytest.mark.slow)])
def test_groups_do_not_depend_on_devices(group, name):
  # On 8 devices of 8 examples: two groups, one, and half of one.
  one, eight = on_devices(1, group, name), on_devices(8, group, name)
  if group == 4:
    np.testing.assert_array_equal(one[0], eight[0])
  else:  # XLA adds up a device's only group in another order
    close(one[0], eight[0], atol=3e-5 if group == 8 else 1e-4)
  exchanged = 'all-reduce' in eight[3] or 'all-gather' in eight[3]
  assert exchanged == (group == 16)
  close(one[1], eight[1], atol=2e-5, rtol=1e-4)
  close(one[2], eight[2], atol=1e-5, rtol=1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(one[1])) > 0.1
  if name == 'patchify_bn':
    other = on_devices(1, 8 if group == 4 else 4)[0]
    assert np.abs(one[0] - other).max() > 0.01


def test_the_whole_batch_does_communicate():
  *_, text = on_devices(8, 0)
  assert 'all-reduce' in text
  assert np.abs(on_devices(8, 0)[0] - on_devices(8, 8)[0]).max() > 0.01


# Which BatchNorms are frozen.


@pytest.mark.parametrize('stem, frozen, expected', [
    ('conv', ('stem/.*',), 'frozen'),
    ('conv', (r'stem/norm_\d/.*',), 'frozen'),
    ('conv', (r'.*/scale', r'.*/bias'), 'frozen'),
    ('conv', ('stem/conv_.*', 'head/.*'), 'train'),
    ('conv', (), 'train'),
    ('patchify_bn', ('stem/norm/.*',), 'frozen'),
    ('patchify_bn', ('stem/embedding/.*',), 'train'),
    ('S1', ('stem/.*',), 'frozen'),
    ('conv_ln', ('stem/.*',), 'train'),
    ('patchify', ('stem/.*',), 'train'),
])
def test_frozen_parameters_freeze_statistics(stem, frozen, expected):
  config = recipes.base().model
  config.size, config.stem = 'micro', stem
  fields = train_state.model_fields(config, frozen)
  assert fields['batch_norm'] == expected
  config.batch_norm = 'frozen'
  assert train_state.model_fields(config, frozen)['batch_norm'] == 'frozen'


@pytest.mark.parametrize('frozen', ['stem/norm_0/.*', '.*/scale'])
def test_half_frozen_is_an_error(frozen):
  config = recipes.base().model
  with pytest.raises(ValueError, match='Freeze all of') as e:
    train_state.model_fields(config, (frozen,))
  assert len(str(e.value).splitlines()) == 2


def test_the_papers_groups():
  groups = recipes.BATCH_NORM_GROUP
  assert set(groups) == set(recipes.SIMPLE)
  assert all(2048 % n == 0 for n in groups.values())
