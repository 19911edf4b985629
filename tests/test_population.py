"""Populations: a member is its single run, and knows nothing of the others."""
import contextlib
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from vit_jax import experiment
from vit_jax import metric_writer
from vit_jax import param_paths
from vit_jax import population
from vit_jax import sharding
from vit_jax.commands import results as results_command

# SGD's momentum after a first step without decay is the gradient.
MEMBERS = [dict(lr=0.02, weight_decay=0.0, seed=0),
           dict(lr=0.05, weight_decay=0.0, seed=1),
           dict(lr=0.03, weight_decay=0.1, seed=1)]
STEPS = 10


@pytest.fixture(scope='module')
def config(cache):
  def config(optimizer='sgd', **changes):
    c = runs.config(cache, f'optimizer={optimizer}', data_seed=3,
                    global_batch_size=32, **changes)
    return runs.total_steps(c, STEPS, warmup=0)
  return config


@pytest.fixture(scope='module')
def build(config):
  """Returns build(optimizer, driver, devices): a population, made once."""
  @functools.cache
  def build(optimizer='sgd', driver='map', devices=1, **changes):
    with on(devices):
      return population.create(
          experiment.checked(config(optimizer, **changes)), MEMBERS, driver)
  return build


@pytest.fixture(scope='module')
def single(config):
  """Returns single(optimizer, member): (state after a step, losses)."""
  @functools.cache
  def made(optimizer, augment):
    with on(1):
      run = experiment.create(
          experiment.checked(config(optimizer, augment=augment)))
    return run, jax.jit(run.step)

  def single(optimizer, member, augment=''):
    run, step = made(optimizer, augment)
    hypers = population.train_step.make_hypers(member, member['seed'])
    state, rows, first = noisy(run.init_fn(hypers['key'])), [], None
    batches = run.train_batches()
    for _ in range(STEPS):
      with sharding.tracing(run.mesh):
        state, metrics = step(state, next(batches), hypers)
      first = first or state
      rows.append(metrics)
    return first, np.array([float(m['loss']) for m in rows])
  return single


@contextlib.contextmanager
def on(devices):
  """A context in which meshes are of so many devices."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'create_mesh', functools.partial(
        sharding.create_mesh, devices=jax.devices()[:devices]))
    yield


def noisy(state, leading=0):
  """With noise on all weights: behind a head of zeros there is no gradient."""
  def add(path, x):
    rng = np.random.default_rng(len(jax.tree_util.keystr(path)))
    noise = rng.normal(0, 0.02, x.shape[leading:]).astype(np.float32)
    return jax.device_put(x + jnp.broadcast_to(noise, x.shape), x.sharding)
  return state.replace(params=jax.tree_util.tree_map_with_path(
      add, state.params))


def run(made, hypers=None, steps=STEPS):
  """Returns (states after a step, losses [steps, members])."""
  hypers = hypers or made.hypers
  states, losses, first = noisy(made.init(), 1), [], None
  batches = made.batches()
  for _ in range(steps):
    batch = jax.device_put(next(batches), made.batch_sharding)
    states, metrics = made.step(states, batch, hypers)
    first = first or jax.tree.map(np.array, states)
    losses.append(np.asarray(metrics['loss']))
  return first, np.stack(losses)


def with_lr(made, row, value):
  lr = np.array(made.hypers['lr'])
  lr[row] = value
  return {**made.hypers, 'lr': jax.device_put(lr, made.hypers['lr'].sharding)}


def near(tree, other, tolerance):
  """Asserts that leaves agree to a part of their norm."""
  tree, other = param_paths.flatten(tree), param_paths.flatten(other)
  norms = {k: np.linalg.norm(v) for k, v in other.items()}
  whole = np.sqrt(sum(n ** 2 for n in norms.values()))
  assert tree.keys() == other.keys() and whole > 0
  for path, value in other.items():
    # Attention takes no notice of a key's bias: its gradient is rounding.
    bound = (0.1 * tolerance * whole if path.endswith('key/bias') else
             tolerance * norms[path])
    assert norms[path] > 0, path
    assert np.linalg.norm(tree[path] - value) <= bound, path


@pytest.mark.parametrize('driver', population.DRIVERS)
def test_a_member_is_its_single_run(build, single, driver):
  made = build('sgd', driver)
  assert made.run.model.stem.conv == 'im2col'
  states, losses = run(made)
  assert losses.shape == (STEPS, 3) and np.ptp(losses[-1]) > 1e-3
  for i, member in enumerate(MEMBERS):
    state, expected = single('sgd', member)
    own = jax.tree.map(lambda x, i=i: x[i], states)
    near(own.params, state.params, 1e-5)
    if not member['weight_decay']:
      (gradient,), (other,) = (
          [part.trace for part in s.opt_state if hasattr(part, 'trace')]
          for s in (own, state))
      near(gradient, other, 1e-5)
    np.testing.assert_allclose(losses[:, i], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('augment', ['', 'randaug(2, 10)|mixup(0.2)'])
def test_with_adam_losses_agree(build, single, augment):
  made = build('adamw', augment=augment)
  _, losses = run(made, with_lr(made, slice(None), 1e-3))
  for i, member in enumerate(MEMBERS):
    _, expected = single('adamw', {**member, 'lr': 1e-3}, augment)
    np.testing.assert_allclose(losses[:, i], expected, rtol=1e-4)


@pytest.mark.parametrize('driver', population.DRIVERS)
@pytest.mark.parametrize('lr', [np.inf, 1e30])
def test_a_member_that_diverges_leaves_the_others_bits(build, driver, lr):
  made = build('sgd', driver)
  states, losses = run(made, steps=4)
  other_states, other = run(made, with_lr(made, 1, lr), steps=4)
  assert not np.isfinite(other[-1, 1])
  np.testing.assert_array_equal(losses[:, [0, 2]], other[:, [0, 2]])
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(other_states),
                  strict=True):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(a[0], b[0])


def test_devices_share_members_and_agree(build):
  one, two = build('sgd', 'map'), build('sgd', 'map', 2)
  states = two.init()
  for leaf in jax.tree.leaves(states):
    # Three members are made four, two a device.
    assert leaf.shape[0] == 4 and len(leaf.sharding.device_set) == 2
    assert leaf.addressable_shards[0].data.shape[0] == 2
  batch = jax.device_put(next(two.batches()), two.batch_sharding)
  text = two.step.lower(states, batch, two.hypers).compile().as_text()
  assert not [op for op in ('all-reduce', 'all-gather', 'collective-permute',
                            'all-to-all') if op in text]
  np.testing.assert_allclose(
      run(one, steps=4)[1], run(two, steps=4)[1][:, :3], rtol=1e-5)


def test_another_rate_decay_or_seed_compiles_nothing(build, config):
  made = build()
  _, losses = run(made, steps=2)
  with on(1):
    others = population.create(experiment.checked(config()), [
        dict(lr=0.5, weight_decay=1.0, seed=9)] * 3, 'map')
  _, other = run(made, others.hypers, steps=2)
  assert (losses[1] != other[1]).all()
  assert made.step._cache_size() == 1


def test_a_start_has_the_bits_of_a_single_one(build, single):
  made = build()
  states = jax.device_get(made.init())
  for i in range(3):
    one = made.run.init_fn(made.hypers['key'][i])
    jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y),
                 states, jax.device_get(one))


def test_order_and_crops_follow_the_seed_unless_it_is_given(config):
  c = config()
  with on(1):
    shared = next(population.create(
        experiment.checked(c), MEMBERS).batches())
    c.data_seed = -1
    made = population.create(experiment.checked(c), MEMBERS)
  own = next(made.batches())
  assert shared['image'].shape == (32, 32, 32, 3)
  assert own['image'].shape == (3, 32, 32, 32, 3)
  for i, seed in enumerate((0, 1, 1)):
    expected = next(made.run.train_batches(data_seed=seed))
    for key, value in expected.items():
      np.testing.assert_array_equal(own[key][i], value)
  assert not np.array_equal(own['label'][0], own['label'][1])


def test_train_gives_each_member_the_metrics_of_its_run(
    finished, cache, tmp_path):
  workdir, results = finished
  c = runs.short(cache)
  before = c.to_dict()
  members = [{}, dict(lr=1e30), dict(seed=np.int64(1))]
  found = population.train(c, members, str(tmp_path))
  assert c.to_dict() == before
  assert [m['diverged_step'] is None for m in found] == [True, False, True]
  assert [m['seed'] for m in found] == [0, 0, 1]
  assert found[0]['lr'] == c.optimizer.lr
  assert found[0]['metrics'].keys() == results.keys()
  for name in ('test', 'test_ema'):
    assert {m['metrics'][f'{name}/count'] for m in found} == {500}
    np.testing.assert_allclose(found[0]['metrics'][f'{name}/loss'],
                               results[f'{name}/loss'], rtol=1e-3)

  rows = metric_writer.read(tmp_path)
  assert [(r['step'], r['member']) for r in rows if 'train/loss' in r] == [
      (step, i) for step in (1, 2, 3, 4) for i in range(3)]
  assert [(r['step'], r['member']) for r in rows if 'test/top1' in r] == [
      (step, i) for step in (2, 4) for i in range(3)]
  of_run = [r for r in metric_writer.read(workdir) if 'train/loss' in r]
  for row, other in zip(
      [r for r in rows if 'train/loss' in r and not r['member']], of_run,
      strict=True):
    for key in ('train/loss', 'train/lr', 'train/grad_norm'):
      np.testing.assert_allclose(row[key], other[key], rtol=1e-3)
  assert None in [r.get('train/loss', 0) for r in rows if r['member'] == 1]
  assert os.path.exists(tmp_path / 'classes.json')
  with open(tmp_path / 'config.json') as f:
    assert [m['seed'] for m in json.load(f)['members']] == [0, 0, 1]

  table = results_command.table([str(tmp_path), workdir]).splitlines()
  cells = {line.split('|')[1].strip(): line.split('|')[2:-1] for line in table}
  top1 = [m['metrics']['test_ema/top1'] for m in found]
  same = [top1[0], top1[2], results['test_ema/top1']]
  assert cells['1e+30'][0].strip() == '1'
  assert cells['0.002'][0].strip() == '3'
  assert cells['0.002'][1].strip() == f'{np.mean(same):.2%}'

  with runs.refused('holds a run'):
    population.train(c, members, str(tmp_path))


@pytest.mark.parametrize('changes, members, match', [
    (dict(precise_bn__examples=64), [{}], 'precise_bn.examples=64'),
    (dict(init_from__run='a'), [{}], "init_from.run='a'"),
    (dict(init_from__checkpoint='a'), [{}], "init_from.checkpoint='a'"),
    (dict(augment='randaug(2, 10)', augment_on='host'), [{}], 'augment_on'),
    (dict(wandb__project='a'), [{}], "wandb.project='a'"),
    ({}, [], 'no members'),
    ({}, [dict(rate=1.0)], "key of a member 'rate'"),
    ({}, [{}, dict(lr=-1.0)], 'optimizer.lr=-1.0'),
    ({}, [dict(seed=[])], r'seed=\[\]'),
])
def test_what_is_not_done_is_refused(config, changes, members, match):
  with runs.refused(match):
    population.train(config(**changes), members)


@pytest.mark.parametrize('path', ['typo', 'checkpoint__typo'])
def test_a_key_that_nothing_reads_is_refused(config, path):
  with runs.refused('typo'):
    population.train(config(**{path: 1}), [{}])


def test_drivers_and_forms(config):
  c = config()
  with runs.refused("Unknown driver 'loop'"):
    population.train(c, [{}], driver='loop')
  for changes, driver, form in (
      ({}, 'map', 'im2col'), (dict(model__conv='xla'), 'vmap', 'xla')):
    made = population.create(experiment.checked(config(**changes)), [{}])
    assert (made.driver, made.run.model.stem.conv) == (driver, form)
