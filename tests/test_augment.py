"""The line, its draws, and that neither driver, place nor devices matter."""
import types

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from scipy import stats

from tests import runs
from vit_jax import augment
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_step
from vit_jax.augment import autoaugment
from vit_jax.augment import op_policy
from vit_jax.augment import pca_jitter
from vit_jax.augment import randaugment
from vit_jax.augment import random_erasing

SHAPE = (24, 20, 3)
B = 16
NORMALIZE = train_step.normalizer((0.5,), (0.25,), 3)
N = 4000  # draws of the tests of laws
KEY = jax.random.key(7, impl='threefry2x32')


def create(line, driver='auto', on='device', shape=SHAPE, classes=5, devices=1):
  config = ConfigDict(dict(
      augment=line, augment_driver=driver, augment_on=on,
      input=dict(mean=(0.5,), std=(0.25,))))
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:devices])
  return augment.create(config, shape, classes, NORMALIZE, mesh)


def batch(size=B, seed=0):
  rng = np.random.default_rng(seed)
  y, x, c = np.ogrid[:SHAPE[0], :SHAPE[1], :SHAPE[2]]
  phase = rng.uniform(0, 6, (size, 1, 1, 1))
  image = 128 + 60 * np.sin(x / 4 + c + phase) + 50 * np.cos(y / 3 - phase)
  return {'image': image.astype(np.uint8),
          'label': rng.integers(0, 5, size).astype(np.int32)}


def augmented(line, step=3, devices=1, **options):
  """Under jit: the batch after the line, and its pixels before they are floats.

  Unoptimized, which compiles in half the time.
  """
  made = create(line, devices=devices, **options)
  batches = made.on_host(lambda start_step=0: (b for b in [batch()]), KEY)
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:devices])
  args = (jax.device_put(next(batches(start_step=step)), sharding.batch(mesh)),
          KEY, jnp.int32(step))
  def both(batch, key, step):
    pixels = batch['image']
    if made.where == 'device':
      pixels = made._pixels(
          pixels, key, step, jnp.arange(len(pixels)), made.mesh)
    return made(batch, key, step), pixels
  with sharding.tracing(mesh):
    compiled = jax.jit(both).lower(*args).compile(
        {'xla_backend_optimization_level': 0})
  # One image of each device goes to the next, by a collective-permute.
  for exchange in ('all-gather', 'all-to-all', 'all-reduce'):
    assert exchange not in compiled.as_text()
  return jax.tree.map(np.asarray, compiled(*args))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_drivers_places_and_devices_do_not_matter():
  line = 'randaug(2, 15)|pca_jitter(0.1)|mixup_cutmix(0.8, 1.0)'
  reference, pixels = augmented(line, devices=8)  # a loop on each
  assert reference['image'].dtype == np.float32
  assert reference['label'].shape == (B, 5)
  np.testing.assert_allclose(reference['label'].sum(axis=1), 1, atol=1e-6)
  for options in (dict(driver='batched'), dict(on='host')):
    other, other_pixels = augmented(line, **options)
    np.testing.assert_array_equal(pixels, other_pixels)
    # Floats are rounded by each program in its own way.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
                 other, reference)
  plain, same = augmented('')
  equal(same, batch()['image'])
  assert (pixels != same).mean() > 0.5
  equal(plain['label'], batch()['label'])
  assert (np.abs(plain['image'] - reference['image']) > 0.01).mean() > 0.5


def test_an_example_has_its_own_draws():
  made = create("randaug(2, 9, 'timm')")
  run = jax.jit(made.examples)
  images = np.broadcast_to(batch()['image'][:1], (B, *SHAPE))
  first, again, later = (np.asarray(run(images, KEY, s)) for s in (3, 3, 4))
  equal(first, again)
  other_seed = np.asarray(run(images, jax.random.key(8), 3))
  distinct = lambda x: len({row.tobytes() for row in x})
  # Of equal images, some draw the same or nothing visible.
  assert distinct(first) > B / 2
  assert distinct([*first, *later, *other_seed]) > 1.5 * B
  # Rows are counted over the batch, whatever else is in it.
  rows = lambda *r: jax.random.key_data(
      augment.example_keys(KEY, 3, jnp.array(r), 0))
  equal(rows(2, 5), rows(0, 1, 2, 3, 4, 5)[jnp.array([2, 5])])
  keys = [augment.example_keys(KEY, s, jnp.array([r]), p)
          for s in (0, 1) for r in (0, 1) for p in (0, 1)]
  keys += [augment.batch_key(KEY, s, p)[None] for s in (0, 1) for p in (0, 1)]
  keys += [jax.random.fold_in(KEY, s)[None] for s in (0, 1)]  # dropout's
  assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys)


def draws(function):
  """What `function` makes of N keys, as numpy."""
  keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(N))
  return jax.tree.map(np.asarray, jax.jit(jax.vmap(function))(keys))


def rows_drawn(op):
  policy = op.policy((224, 224, 3), (0.5,))
  rows, center = draws(lambda key: op_policy.draw(policy, key, 224, 224))
  return policy, rows, center


def uniform(values, count):
  """Whether integers look uniform below `count` (p > 0.001)."""
  return stats.chisquare(np.bincount(values, minlength=count)).pvalue > 1e-3


def test_randaugment_draws_ops_and_signs_uniformly():
  policy, rows, center = rows_drawn(randaugment.RandAug(2, 10))
  assert rows.shape == (N, 2)
  for layer in range(2):
    assert uniform(rows[:, layer], 32)  # 16 ops with a sign each
    assert uniform(center[:, layer, 0], 224)
    assert uniform(center[:, layer, 1], 224)
  both = rows[:, 0] // 2 * 16 + rows[:, 1] // 2
  assert uniform(both, 256)  # with replacement, independently
  assert len(policy.titles) == 33


def test_timm_carries_out_half_of_what_is_drawn():
  policy, rows, _ = rows_drawn(randaugment.RandAug(2, 9, 'timm'))
  nothing = len(policy.titles) - 1
  share = (rows == nothing).mean()
  assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(2 * N)
  assert uniform(rows[rows != nothing] // (64 * 2), 15)


def test_autoaugment_draws_pairs_of_ops_with_their_probabilities():
  policy, rows, _ = rows_drawn(autoaugment.AutoAugment())
  nothing = len(policy.titles) - 1
  pair = np.where(rows == nothing, -1, rows // 4)
  both = (pair >= 0).all(axis=1)
  assert (pair[both, 0] == pair[both, 1]).all()
  # The first op of a row of the table is even, the second odd.
  assert ((rows[both] // 2 % 2) == [0, 1]).all()
  for i, ops in enumerate(autoaugment.V0):
    for layer, (_, probability, _) in enumerate(ops):
      expected = probability / 25
      found = (pair[:, layer] == i).mean()
      assert abs(found - expected) <= 4.5 * np.sqrt(
          expected * (1 - expected) / N), (i, layer)


def test_area_and_place_of_random_erasing():
  op = random_erasing.RandomErasing(0.25)
  top, left, h, w = draws(lambda key: op.draw(key, 224, 200))
  erased = h > 0
  assert abs(erased.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / N)
  top, left, h, w = (v[erased] for v in (top, left, h, w))
  area, aspect = h * w / (224 * 200), np.log(h / w)
  assert stats.kstest(area, stats.uniform(0.02, 0.3133).cdf).pvalue > 1e-3
  # Extreme boxes of a large area do not fit, and are drawn again.
  small = area < 0.1
  low, high = np.log(0.3), np.log(1 / 0.3)
  assert stats.kstest(
      aspect[small], stats.uniform(low, high - low).cdf).pvalue > 1e-3
  for values in (top / (224 - h), left / (200 - w)):
    assert stats.kstest(values, stats.uniform(-0.002, 1.004).cdf).pvalue > 1e-3
  assert (top + h <= 224).all() and (left + w <= 200).all()


def test_random_erasing_is_the_same_on_eight_devices():
  (one, _), (eight, _) = (
      augmented('random_erasing(0.9)', devices=n) for n in (1, 8))
  np.testing.assert_allclose(one['image'], eight['image'], atol=2e-6)
  assert (one['image'] != NORMALIZE(batch()['image'])).mean() > 0.05


def test_random_erasing_fills_with_standard_noise():
  op = random_erasing.RandomErasing(1.0, 0.2, 0.3)
  image = jnp.full((64, 64, 3), 9.0)
  out = draws_of_one = np.asarray(jax.jit(
      lambda key: op.apply(image, key, None))(KEY))
  noise = draws_of_one[out != 9]
  assert 0.15 < len(noise) / out.size < 0.35
  assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_pca_jitter_is_normal_along_the_components():
  colour = draws(pca_jitter.PcaJitter(0.1).draw)
  alpha = np.linalg.solve(
      pca_jitter._VECTORS * np.float64(pca_jitter._VALUES), colour.T)
  for component in alpha:
    assert stats.kstest(component, stats.norm(0, 0.1).cdf).pvalue > 1e-3
  assert np.abs(np.corrcoef(alpha) - np.eye(3)).max() < 0.06
  image = jnp.zeros((2, 2, 3))
  out = pca_jitter.PcaJitter(0.1).apply(image, KEY, np.array([.5, .25, .125]))
  np.testing.assert_allclose(
      out[1, 1], pca_jitter.PcaJitter(0.1).draw(KEY) * np.array([2, 4, 8]),
      rtol=1e-6)


@pytest.mark.parametrize('line, match', [
    ('randag(2, 10)', "unknown op 'randag'"),
    ('randaug', r'Write it as randaug\(layers, magnitude, variant='),
    ('randaug(2, 21)', r'magnitude=21 must be a number in \[0, 20\]'),
    ('randaug(2, -1)', 'magnitude=-1'),
    ('randaug(2, True)', 'magnitude=True'),
    ("randaug(2, 11, 'timm')", r'in \[0, 10\]'),
    ('randaug(0, 10)', 'layers=0'),
    ('randaug(2.5, 10)', 'layers=2.5'),
    ("randaug(2, 10, 'big')", "'augreg', 'fixed', 'timm'"),
    ('randaug(2, 10, [1])', "is none of 'augreg'"),
    ('autoaugment(1)', 'autoaugment'),
    ('mixup(0)', 'alpha=0 must be a number above 0'),
    ('mixup(-0.2)', 'alpha=-0.2'),
    ('mixup_cutmix(0.8, 0)', 'cutmix_alpha=0'),
    ('cutmix("a")', "alpha='a'"),
    ('random_erasing(1.5)', 'probability=1.5'),
    ('random_erasing(0.25, 0.5, 0.2)', 'area_min must not be above'),
    ('pca_jitter(0)', 'deviation=0'),
    ('mixup(0.2)|randaug(2, 10)', 'not in the order of its stages'),
    ('pca_jitter(0.1)|autoaugment', 'First randaug/autoaugment, then'),
    ('randaug(2, 10) mixup', 'cannot be parsed'),
    (3, 'is not a string'),
])
def test_a_line_that_is_wrong(line, match):
  with runs.refused(match):
    create(line)


@pytest.mark.parametrize('options, match', [
    (dict(line='mixup(0.2)', classes=1), 'the data has 1 class'),
    (dict(line='pca_jitter(0.1)', shape=(24, 20, 1)), 'needs colour'),
    (dict(line='randaug(2, 10)', shape=(2, 20, 3)), 'not 2 x 20'),
    (dict(line='autoaugment', shape=(24, 1025, 3)), 'not 24 x 1025'),
    (dict(line='', driver='fast'), "Unknown augment_driver 'fast'"),
    (dict(line='', on='gpu'), "Unknown augment_on 'gpu'"),
    (dict(line='mixup(0.2)', on='host'), 'nothing of .* can run there'),
])
def test_what_data_or_machine_cannot_have(options, match):
  with runs.refused(match):
    create(**options)


def test_the_host_needs_a_cpu_backend(monkeypatch):
  def missing(backend):
    raise RuntimeError(f'Unknown backend {backend}')
  monkeypatch.setattr(jax, 'local_devices', missing)
  with runs.refused('JAX_PLATFORMS=cuda,cpu'):
    create('randaug(2, 10)', on='host')


def test_images_that_are_scaled_already():
  with runs.refused('images of a batch are float32'):
    jax.eval_shape(create('randaug(2, 10)'), jax.eval_shape(
        lambda: {'image': jnp.zeros((B, *SHAPE)), 'label': jnp.zeros(B, int)}),
        KEY, 0)


def test_grey_images_are_augmented():
  made = create('randaug(1, 15)|mixup(0.2)', shape=(24, 20, 1))
  grey = {**batch(), 'image': batch()['image'][..., :1]}
  out = jax.eval_shape(made, grey, KEY, 0)
  assert out['image'].shape == (B, 24, 20, 1)


@pytest.mark.parametrize('platform, line, place', [
    ('tpu', 'randaug(2, 10)', 'host'), ('tpu', 'mixup(0.2)', 'device'),
    ('gpu', 'randaug(2, 10)', 'device'), ('cpu', 'randaug(2, 10)', 'device')])
def test_tpus_get_images_that_are_augmented(platform, line, place):
  chip = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(devices=np.array([chip]))
  config = recipes.base()
  config.augment = line
  made = augment.create(config, (32, 32, 3), 10, NORMALIZE, mesh)
  assert made.where == place
