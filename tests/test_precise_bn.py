"""Precise statistics of BatchNorm, against numpy in float64."""
import functools

import jax
import numpy as np
import pytest

from tests.test_batch_norm import B
from tests.test_batch_norm import close
from tests.test_batch_norm import moments
from tests.test_batch_norm import normalized
from vit_jax import augment
from vit_jax import param_paths
from vit_jax import precise_bn
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import train_step
from vit_jax.models import vit

PLAIN = augment.none(train_step.normalizer((0.5,), (0.25,), 3))
# Darker from image to image, so that batches and groups differ.
IMAGES = np.random.default_rng(3).integers(
    0, 256, (4, B, 32, 32, 3)) * 50 // np.arange(50, 50 + 4 * B).reshape(
        4, B, 1, 1, 1)
IMAGES = IMAGES.astype(np.uint8)


def train_batches():
  for image in IMAGES:
    yield {'image': image, 'label': np.zeros(B, np.int32)}
  raise AssertionError('read more than it was asked for')


@functools.cache
def setup(stem='conv', group=0, batch_norm='train', num_devices=8):
  """(estimate(examples) -> its function, a state whose EMA differs)."""
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:num_devices])
  model = vit.create(
      size='micro', stem=stem, num_classes=3, scan=True, dropout=0.1,
      batch_norm=batch_norm, batch_norm_group=group)
  variables = train_state.abstract_variables(model, (32, 32, 3), mesh)
  # Arrays of the shapes that matter here; nothing of it is trained.
  rng = np.random.default_rng(4)
  draw = lambda tree: jax.device_put(
      jax.tree.map(lambda x: rng.normal(
          size=x.shape, scale=0.1).astype(np.float32), tree),
      sharding.replicated(mesh))
  stats = variables.get('batch_stats', {})
  params, frozen = param_paths.split(
      variables['params'], ('stem/conv_0/.*',) if stem == 'conv' else ())
  state = train_state.TrainState(
      step=0, params=draw(params), frozen=draw(frozen),
      batch_stats=draw(stats),
      ema={'params': draw(params), 'batch_stats': draw(stats)}, opt_state={},
      first_nonfinite_step=-1)

  def create(examples, batches=train_batches, augment=PLAIN):
    return precise_bn.create(
        dict(examples=examples), model, variables, augment, batches, B, mesh,
        jax.random.key(0, impl='threefry2x32'))
  return create, state


def conv(x, kernel):
  """A 3x3 convolution with stride 2 and padding 1, float64."""
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  h, w = x.shape[1] - 2, x.shape[2] - 2
  return sum(x[:, i:i + h:2, j:j + w:2] @ kernel[i, j]
             for i in range(3) for j in range(3))


def expected_stats(variables, group, batches):
  """{path: mean over batches and groups of the moments}, float64."""
  params = jax.tree.map(np.float64, jax.device_get(variables['params']['stem']))
  found = {}
  for images in batches:
    x = (images / 255 - 0.5) / 0.25
    for i in range(3):
      x = conv(x, params[f'conv_{i}']['kernel'])
      for name, m in zip(('mean', 'var'), moments(x, group), strict=True):
        found.setdefault(f'stem/norm_{i}/{name}', []).append(m.mean(0))
      norm = params[f'norm_{i}']
      x = np.maximum(normalized(x, group, norm['scale'], norm['bias']), 0)
  return {path: np.mean(m, axis=0) for path, m in found.items()}


@pytest.mark.parametrize('group', [0, 16])
def test_precise_statistics_are_those_of_numpy(group):
  create, state = setup(group=group)
  new = create(2 * B - 1)(state)  # rounded up to two batches
  for old, variables, stats in (
      (state.batch_stats, state.variables(), new.batch_stats),
      (state.ema['batch_stats'], state.ema_variables(),
       new.ema['batch_stats'])):
    stats = param_paths.flatten(stats)
    expected = expected_stats(variables, group or B, IMAGES[:2])
    assert set(stats) == set(expected)
    one_batch = expected_stats(variables, group or B, IMAGES[:1])
    other_groups = expected_stats(variables, 4, IMAGES[:2])
    old = param_paths.flatten(old)
    for path, value in expected.items():
      off = lambda x, value=value: np.abs(x - value).max() / np.abs(value).max()
      assert off(stats[path]) < 1e-5, path
      assert off(old[path]) > 0.1 and off(one_batch[path]) > 1e-3, path
      # The mean of the first norm's input is that of any groups.
      assert off(other_groups[path]) > 1e-3 or path == 'stem/norm_0/mean', path
  # What is trained, and what the averages hold else, is the same arrays.
  assert new.params is state.params
  assert new.ema['params'] is state.ema['params']


def test_raw_and_averaged_weights_compile_once_and_only_the_stem():
  create, state = setup()
  compiled = []
  def listen(event, _, **kwargs):
    if event.endswith('backend_compile_duration'):
      compiled.append(kwargs)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    create(2 * B)(state)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(compiled) == 1
  images = jax.ShapeDtypeStruct((B, 32, 32, 3), np.uint8)
  model = vit.create(size='micro', stem='conv', num_classes=3, scan=True)
  text = jax.jit(precise_bn.make_moments(model, PLAIN)).lower(
      state.variables(), images, jax.random.key(0), 0).compile().as_text()
  assert 'stem/conv_2' in text
  assert 'while(' not in text and 'encoder' not in text


def test_one_device_agrees_with_eight():
  (create1, state1), (create8, state8) = setup(num_devices=1), setup()
  one, eight = create1(2 * B)(state1), create8(2 * B)(state8)
  close(jax.device_get(one.batch_stats), jax.device_get(eight.batch_stats),
        rtol=1e-4, atol=1e-5)
  leaf = jax.tree.leaves(eight.ema['batch_stats'])[0]
  assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize('kwargs, examples', [
    (dict(stem='patchify'), 2 * B),  # no BatchNorm
    (dict(batch_norm='frozen'), 2 * B),
    (dict(), 0),  # off
])
def test_what_is_left_alone(kwargs, examples):
  create, state = setup(**kwargs)
  def unread():
    raise AssertionError('read for nothing')
  assert create(examples, unread)(state) is state
  assert bool(state.batch_stats) == (kwargs.get('stem') != 'patchify')


def test_a_signal_ends_it_and_without_averages_it_works():
  create, state = setup()
  asked = []
  stop = lambda: asked.append(0) or len(asked) > 1
  assert create(2 * B)(state, stop) is state
  assert len(asked) == 2
  new = create(B)(state.replace(ema={}))
  assert new.ema == {}
  close(new.batch_stats, create(B)(state).batch_stats, rtol=0)


def test_less_than_no_examples():
  with pytest.raises(ValueError, match=r'precise_bn.examples=-1') as e:
    setup()[0](-1)
  assert len(str(e.value).splitlines()) == 2


class Darkened:
  """An Augment that darkens from step to step, and cannot mix."""

  def examples(self, images, key, step):
    assert jax.random.key_data(key).shape == (2,)
    return PLAIN.normalize(images >> (step + 1).astype(np.uint8))


def test_it_sees_examples_that_are_augmented_but_not_mixed():
  create, state = setup()
  new = create(2 * B, augment=Darkened())(state)
  expected = expected_stats(
      state.variables(), B, [IMAGES[0] >> 1, IMAGES[1] >> 2])
  for path, value in param_paths.flatten(new.batch_stats).items():
    assert np.abs(value - expected[path]).max() < (
        1e-5 * np.abs(expected[path]).max()), path
