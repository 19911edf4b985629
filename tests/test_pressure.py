"""Too little memory, and data that come too slowly: what the user is told."""
import re
import time

import jax
import jax.numpy as jnp
import pytest

from tests import runs
from vit_jax import errors
from vit_jax import out_of_memory
from vit_jax import pace
from vit_jax import recipes
from vit_jax import train


@pytest.fixture(scope='module')
def real_error():
  """What JAX raises for 256 TiB."""
  with pytest.raises(jax.errors.JaxRuntimeError) as info:
    jax.jit(lambda key: jax.random.uniform(key, (2**46,)))(
        jax.random.key(0)).block_until_ready()
  return info.value


def config(**changes):
  c = recipes.base()
  c.optimizer = recipes.adamw(1e-3, 0.1)
  c.update(changes)
  return c


def test_which_errors_are_meant(real_error):
  assert out_of_memory.is_out_of_memory(real_error)
  assert not out_of_memory.is_out_of_memory(ValueError('RESOURCE_EXHAUSTED'))
  assert not out_of_memory.is_out_of_memory(
      jax.errors.JaxRuntimeError('INTERNAL: Gloo'))


def test_train_names_three_settings(real_error, monkeypatch, tmp_path, capsys):
  def fail(*_, **__):
    raise real_error
  monkeypatch.setattr(train, 'train_and_evaluate', fail)
  assert train.main([
      '--config', f'{runs.DIGITS}:stem=patchify', '--workdir',
      str(tmp_path / 'run'), '--config.global_batch_size=512',
  ]) == errors.BAD_INPUT
  cause, *settings = capsys.readouterr().err.splitlines()
  assert cause.startswith('error: The memory of cpu is too small: ')
  assert len(settings) == 3
  # 512 examples on 8 devices: the parts have to divide over these.
  assert settings[0].split()[:1] == ['--config.accumulation_steps=2']
  for line in settings:
    new, old = re.search(
        r'  (\S+) GB a device by estimate in place of (\S+):', line).groups()
    assert float(new) < float(old)
  assert '256 examples at once in place of 512: 50%' in settings[0]
  for line in settings:
    assert re.match(r'  --config\.[a-z_.]+=\S+  \S', line)


def test_each_setting_is_one_that_the_config_can_take():
  """Taken one after the other, they run out with the memory unsaved."""
  c, seen = config(global_batch_size=32), []
  while text := out_of_memory.advise(c):
    path, value = re.match(r'--config\.(\S+)=(\S+)', text).groups()
    *parents, leaf = path.split('.')
    section = c
    for key in parents:
      section = section[key]
    assert section[leaf] != type(section[leaf])(value)
    section[leaf] = type(section[leaf])(value)
    seen.append(path)
    if path == 'global_batch_size':
      break
  assert seen == ['accumulation_steps'] * 2 + [
      'model.remat', 'mesh.fsdp', 'model.remat',
      'optimizer.momentum_dtype', 'global_batch_size']


def test_what_somebody_else_knows_of_a_setting_is_shown():
  assert '--config.model.remat=dots  3.1 GB' in out_of_memory.advise(
      config(), {'model.remat=dots': '3.1 GB'})


def test_settings_that_the_config_does_not_allow_are_left_out():
  # Micro-batches would cut the statistics of its BatchNorm.
  c = recipes.base()
  c.model.size, c.global_batch_size = 'micro', 64
  c.input.pp = c.input.eval_pp = 'decode|resize(32)'
  assert 'accumulation_steps=2' in out_of_memory.advise(c)
  found = out_of_memory.figures(c)
  assert len(found) == 3
  assert not any(setting.startswith('accumulation') for setting in found)


def _laps(monkeypatch, *laps):
  """The lines of a Pace whose laps are (seconds, of which waiting)."""
  clock = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
  said = []
  speed = pace.Pace(said.append)

  def wait(seconds):
    clock[0] += seconds
    yield

  for seconds, waiting in laps:
    speed.next(wait(waiting))
    clock[0] += seconds - waiting
    speed.lap(8)
  return said


def test_waiting_for_data_is_said_once_with_its_remedy(monkeypatch):
  said = _laps(monkeypatch, (9, 8), (10, 0.9), (10, 2), (10, 5))
  assert len(said) == 1
  assert 'waited for data 20% of the last 1 steps' in said[0]
  assert 'vit-jax bench data' in said[0]


@pytest.mark.parametrize('laps', [
    [(9, 8)],  # the first: queues fill
    [(9, 0), (10, 1)],  # 10 % and no more
    [(9, 0), (.5, .4)]])  # too short to mean much
def test_other_waiting_is_not(laps, monkeypatch):
  assert _laps(monkeypatch, *laps) == []


@pytest.mark.parametrize('ready', [True, False])
def test_devices_that_are_busy_wait_for_nothing(ready, monkeypatch):
  """Dispatch is a step ahead; the batch comes 3 s, the step ends 2 s on."""
  clock = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])

  class Stream:
    def ready(self):
      return ready
    def __next__(self):
      clock[0] = max(clock[0], 0.0 if ready else 3.0)

  class Last:
    def block_until_ready(self):
      assert not ready  # no step waits for the one before where data are there
      clock[0] = 2.0

  speed = pace.Pace()
  speed.next(Stream(), Last())
  clock[0] = 4.0
  assert speed.lap(8)['data_wait'] == (0 if ready else 0.25)


def test_a_real_lap():
  speed = pace.Pace()
  speed.next(iter([jnp.zeros(1)]))
  assert 0 <= speed.lap(1)['data_wait'] <= 1
