"""Durations and schedules against the papers' and peers' values."""
from ml_collections import ConfigDict
import numpy as np
import pytest

from vit_jax import durations
from vit_jax import ema
from vit_jax import recipes
from vit_jax import schedules

IMAGENET = durations.Units.of(1_281_167, 2048, 'floor')  # 625 steps an epoch


def values(section, total, steps, units=None):
  units = units or durations.Units(num_examples=10_000, batch_size=10,
                                   steps_per_epoch=1000)
  schedule = schedules.create(ConfigDict(section), units, total)
  return [float(schedule(t)) for t in steps]


def test_the_papers_schedule_is_set_once_an_epoch():
  # lr(e) = base [0.995 (1 + cos(pi e/E))/2 + 0.005], times 0.1(1-e/5) + e/5
  # while e < 5: pycls's optimizer.py, for E = 50.
  expected = {0: 0.1, 1: 0.27972512, 4: 0.80718350, 5: 0.97565062,
              49: 0.00598170}
  steps = [e * 625 + k for e in expected for k in (0, 1, 624)]
  got = values(recipes.pycls_cosine(), 50 * 625, steps, IMAGENET)
  want = [v for v in expected.values() for _ in range(3)]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rsqrt_against_big_vision():
  section = dict(name='rsqrt', warmup_steps=10_000, warmup_start=0.0,
                 cooldown_steps=50_000, timescale_steps=10_000, per='step')
  golden = {0: 0, 1: 1e-4, 5000: .5, 10_000: 1, 20_000: .70711, 40_000: .5,
            100_000: .316228, 500_000: .141421, 950_000: .1025978,
            960_000: .0816497, 975_000: .0506370, 1_000_000: 0}
  got = values(section, 1_000_000, golden)
  np.testing.assert_allclose(got, list(golden.values()), rtol=2e-5, atol=1e-9)


def test_cosine_and_linear_against_big_vision():
  cosine = recipes.cosine(warmup_epochs=0.01)  # 10 steps
  np.testing.assert_allclose(
      values(cosine, 100, [0, 5, 10, 32, 55, 100]),
      [0, .5, 1, .859670, .5, 0], atol=1e-6)
  linear = dict(name='linear', warmup_steps=10, warmup_start=0.0,
                cooldown_steps=0, final=1e-5, progress='after_warmup',
                per='step')
  np.testing.assert_allclose(
      values(linear, 100, [0, 5, 10, 55, 100]), [0, .5, 1, .500005, 1e-5],
      atol=1e-7)


def test_constant():
  section = dict(name='constant', warmup_steps=4, warmup_start=0.5,
                 cooldown_steps=2, per='step')
  np.testing.assert_allclose(
      values(section, 10, range(11)),
      [.5, .625, .75, .875, 1, 1, 1, 1, 1, .5, 0], atol=1e-6)


@pytest.mark.parametrize('n, golden', [
    # Step: rate, of big_transfer's bit_hyperrule.get_lr.
    (1000, {0: 0, 50: .0015, 99: .00297, 100: .003, 200: .003, 201: 3e-4,
            300: 3e-4, 301: 3e-5, 400: 3e-5, 401: 3e-6, 499: 3e-6}),
    (20_000, {500: .003, 3000: .003, 3001: 3e-4, 6001: 3e-5, 9001: 3e-6}),
    (500_000, {500: .003, 6000: .003, 6001: 3e-4, 12_001: 3e-5, 18_001: 3e-6}),
])
def test_bit_hyperrule(n, golden):
  total, warmup, drops, _ = recipes.bit_hyperrule(n)
  got = values(recipes.staircase(warmup, drops), total, golden)
  np.testing.assert_allclose(
      0.003 * np.array(got), list(golden.values()), rtol=1e-6, atol=1e-12)


def test_an_epoch_of_straddling_batches_starts_where_its_examples_do():
  units = durations.Units.of(1297, 64, 'exact')
  schedule = schedules.create(recipes.cosine(0.0, per='epoch'), units, 1216)
  lr = [float(schedule(t)) for t in range(200)]
  changes = [t for t in range(1, 200) if lr[t] != lr[t - 1]]
  assert changes == [t for t in range(1, 200)
                     if t * 64 // 1297 != (t - 1) * 64 // 1297]


@pytest.mark.parametrize('section, steps', [
    (dict(x_steps=7), 7), (dict(x_epochs=2), 1250), (dict(x_examples=4096), 2),
    (dict(x_percent=10), 100), (dict(x_epochs=0.0), 0),
    (dict(x_examples=1), 1)])
def test_durations(section, steps):
  assert durations.to_steps(section, 'x', IMAGENET, 1000) == steps


def test_exact_epochs_round_the_whole_not_the_epoch():
  units = durations.Units.of(1297, 64, 'exact')
  assert durations.to_steps(dict(x_epochs=60), 'x', units) == 1216  # not 1200
  floor = durations.Units.of(1297, 64, 'floor')
  assert durations.to_steps(dict(x_epochs=60), 'x', floor) == 1200


@pytest.mark.parametrize('section', [
    {}, dict(x_steps=1, x_epochs=1), dict(x_steps=-1)])
def test_bad_durations(section):
  with pytest.raises(ValueError, match=r'\n'):
    durations.to_steps(section, 'x', IMAGENET, 10)
  with pytest.raises(ValueError, match='nothing to be a part of'):
    durations.to_steps(dict(x_percent=1), 'x', IMAGENET)


def test_a_cadence_is_due_at_the_end_in_any_case():
  due = durations.cadence(dict(every_steps=4), IMAGENET, 10)
  assert [s for s in range(1, 11) if due(s)] == [4, 8, 10]
  due = durations.cadence(dict(every_steps=0), IMAGENET, 10)
  assert [s for s in range(1, 11) if due(s)] == [10]


def test_bad_schedules():
  with pytest.raises(ValueError, match="Did you mean 'cosine'"):
    values({**recipes.cosine(0.0), 'name': 'cosin'}, 10, [0])
  for drops, match in (((1.5,), 'drops=1.5 is out'), (0.5, 'is no tuple')):
    with pytest.raises(ValueError, match=match):
      values(recipes.staircase(0, drops), 10, [0])
  with pytest.raises(ValueError, match='longer than the run'):
    values(recipes.cosine(5.0), 10, [0])


@pytest.mark.parametrize('epochs, batch, alpha', [
    (50, 2048, 1.31e-2), (100, 2048, 6.55e-3), (400, 2048, 1.64e-3),
    (90, 4096, 1.46e-2)])
def test_the_papers_ema_rule(epochs, batch, alpha):
  units = durations.Units.of(1_281_167, batch, 'floor')
  spe = units.steps_per_epoch
  rule = ema.create(dict(name='pycls', alpha=1e-5, every_steps=32), units,
                    epochs * spe, 5 * spe)
  first = -(-5 * spe // 32) * 32
  assert float(rule(first - 32)) == 1.0  # a copy while warming up
  assert float(rule(first + 1)) == 0.0
  np.testing.assert_allclose(float(rule(first)), alpha, rtol=4e-3)


def test_ema_updates_are_exact_at_both_ends():
  old = {'a': np.float32([0.1, 0.2])}
  new = {'a': np.float32([0.7, -1e8])}
  update = lambda alpha: ema.update(old, new, np.float32(alpha))['a']
  np.testing.assert_array_equal(update(0.0), old['a'])
  np.testing.assert_array_equal(update(1.0), new['a'])
  np.testing.assert_allclose(update(0.25), 0.75 * old['a'] + 0.25 * new['a'])


def test_five_and_ten_epochs_coincide_when_batches_straddle_epochs():
  units = durations.Units.of(1297, 64, 'exact')
  five, ten = (durations.cadence(dict(every_epochs=e), units, 1216)
               for e in (5, 10))
  fives = [s for s in range(1, 1217) if five(s)]
  assert fives == [101, 203, 304, 405, 507, 608, 709, 811, 912, 1013, 1115,
                   1216]
  assert [s for s in range(1, 1217) if ten(s)] == fives[1::2]
