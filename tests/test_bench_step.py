"""vit-jax bench step: what it reports, on models of no size; no times."""
import re
import sys
import types

import jax
import numpy as np
import pytest

from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import chips
from vit_jax import devices
from vit_jax import errors
from vit_jax import experiment
from vit_jax import sharding
from vit_jax.commands import bench_step


def config(cache, **changes):
  devices.enable_compilation_cache(str(cache))
  return runs.short(cache, **{'model__stem': 'patchify', 'warmup': 0,
                              'optimizer__weight_decay': 0.0, **changes})


@pytest.fixture
def one_device(monkeypatch):
  create = sharding.create_mesh
  monkeypatch.setattr(
      sharding, 'create_mesh', lambda c: create(c, jax.devices()[:1]))


def test_the_report(cache, one_device, monkeypatch):
  made = bench_step.create(config(cache), batch_size=8)
  assert made.batch_size == 8
  calls = []
  # A step of 1 s, and a matmul at 1 TFLOP/s.
  seconds = {'ours': 1.0, 'matmul': 2 * 2048**3 / 1e12, 'timm a': 3.0,
             'timm b': 2.0}
  def measure(functions, rounds, steps):
    calls.append((list(functions), rounds, steps))
    for function in functions.values():
      function(1)
    return {name: np.full(rounds, seconds[name]) for name in functions}
  monkeypatch.setattr(bench_step, 'measure', measure)
  others = lambda: dict.fromkeys(('timm a', 'timm b'), lambda steps: None)
  text = '\n'.join(bench_step.report(made, others, 3))
  assert calls == [(['ours', 'matmul', 'timm a', 'timm b'], 3, 1)]
  macs = int(re.search(r'([\d,]+) multiply-adds', text)[1].replace(',', ''))
  mfu = float(re.search(r'MFU +([\d.]+)% of a matmul \(1 TFLOP', text)[1])
  assert mfu == pytest.approx(100 * 6 * macs * 8 / 1e12, abs=0.05)
  assert '1000.00 ms a step (1000.00 to 1000.00), 8.0 images/s' in text
  assert 'best of timm (timm b): 2.000 x' in text
  assert 'data sheet' not in text  # a CPU has none
  assert '  encoder/blocks/' in text
  memory = float(re.search(r'peak memory +([\d.]+) GB', text)[1])
  # At least what the step carries.
  carried = sum(x.size * x.dtype.itemsize
                for x in jax.tree.leaves(made.abstract_state))
  assert memory * 1e9 >= 0.95 * carried


def test_plain_trains_the_same_model(cache, one_device):
  """Its first step leaves the parameters where AdamW without decay would."""
  c = config(cache)
  made = bench_step.create(c, batch_size=8)
  run = bench_step.plain(c, made)['plain']
  run()
  closure = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
  params = closure['state'].cell_contents[0]
  key = jax.random.key(0, impl='threefry2x32')
  start = made.init_fn(key).params
  assert jax.tree.structure(params) == jax.tree.structure(start)
  ours, _ = made.compile_step()(
      made.init_fn(key),
      jax.device_put(bench_step.noise(made.image_shape, 8, 10),
                     sharding.batch(made.mesh)), made.hypers)
  moved = jax.tree.leaves(jax.tree.map(
      lambda a, b: np.abs(a - b).max(), params, start))
  assert max(moved) > 1e-4
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(ours.params),
                  strict=True):
    # Adam's first step is lr times the gradient's sign, which rounding
    # decides where it is about 0: nearly all agree.
    np.testing.assert_array_less(np.mean(np.abs(a - b) > 1e-5), 0.02)


def test_the_loop_takes_the_batches_of_a_run(cache, one_device, monkeypatch):
  seen = []
  c = config(cache)
  run = experiment.create(experiment.checked(c))
  expected = run.train_batches()
  compiled = run.compile_step()
  def step(state, batch, hypers):
    seen.append(jax.device_get(batch))
    return compiled(state, batch, hypers)
  monkeypatch.setattr(
      experiment.Experiment, 'compile_step', lambda self: step)
  loop = bench_step.loop(c, None)['loop']
  loop(2)
  loop(1)
  assert len(seen) == 3
  for batch in seen:
    jax.tree.map(np.testing.assert_array_equal, batch, next(expected))


@pytest.mark.parametrize('changes, match', [
    ({'model__stem': 'conv'}, "no model of size 'micro' with stem='conv'"),
    ({'model__pool': 'map'}, 'timm has no model')])
def test_timm_has_no_such_model(changes, match, cache):
  c = config(cache, **changes)
  with runs.refused(match):
    bench_step.timm(c, bench_step.create(c))


def test_timm_is_not_installed(cache, monkeypatch):
  monkeypatch.setitem(sys.modules, 'timm', None)
  c = config(cache)
  made = bench_step.create(c)
  with pytest.raises(ValueError, match='timm does not import') as info:
    bench_step.timm(c, made)
  assert 'pip install' in str(info.value)


def test_plain_is_for_one_device(cache):
  c = config(cache)
  with runs.refused('for one device; there are 8'):
    bench_step.plain(c, bench_step.create(c))


def test_an_unknown_rival(capsys):
  assert command_line.main(
      ['bench', 'step', '--config', runs.DIGITS, '--versus=tim']
  ) == errors.BAD_INPUT
  assert "Did you mean 'timm'" in capsys.readouterr().err


def test_turns():
  order = []
  functions = {name: lambda steps, name=name: order.append((name, steps))
               for name in 'ab'}
  times = bench_step.measure(functions, rounds=2, steps=5)
  # One turn warms up, and every other one is the other way round.
  assert order == [(name, 5) for name in 'abbaab']
  assert {name: t.shape for name, t in times.items()} == {'a': (2,), 'b': (2,)}


@pytest.mark.parametrize('kind, name', [
    ('TPU v4', 'v4'), ('TPU v5 lite', 'v5e'), ('TPU v5', 'v5p'),
    ('TPU v5p', 'v5p'), ('TPU v6 lite', 'v6e'),
    ('NVIDIA A100-SXM4-80GB', 'a100'), ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200')])
def test_chips_are_found_by_their_kind(kind, name):
  assert chips.of(kind) == chips.CHIPS[name]


def test_a_chip_that_is_not_listed():
  # The 40 GB and PCIe forms have other figures.
  for kind in ('cpu', 'NVIDIA A100-SXM4-40GB', 'NVIDIA H100 PCIe'):
    assert chips.of(kind) is None


def test_memory_as_the_device_counts_it():
  device = types.SimpleNamespace(
      memory_stats=lambda: {'peak_bytes_in_use': 7})
  mesh = types.SimpleNamespace(local_devices=[device])
  assert bench_step.peak_memory(None, mesh) == (7, 'measured')
