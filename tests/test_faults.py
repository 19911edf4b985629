"""Full disks, signals in evaluation, loggers that fail: the run goes on."""
import contextlib
import errno
import os
import signal
import subprocess
import sys
import types

import flax.struct
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import runs
from vit_jax import checkpoint
from vit_jax import metric_writer
from vit_jax import recipes
from vit_jax import train
from vit_jax import wandb_logger
from vit_jax.evaluators import classification


class State(flax.struct.PyTreeNode):
  """As much of a `TrainState` as `Manager` looks at, and 400 kB."""
  step: jax.Array
  first_nonfinite_step: jax.Array
  params: jax.Array


def state(step):
  return State(np.int32(step), np.int32(-1),
               jax.random.normal(jax.random.key(step), (100_000,)))


def abstract():
  return jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state(0)))


def names(workdir):
  return sorted(os.listdir(os.path.join(workdir, 'checkpoints')))


def fails_at(monkeypatch, steps):
  """Saves of these steps find the disk full."""
  real = ocp.CheckpointManager.save
  def save(self, step, *args, **kwargs):
    if step in steps:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return real(self, step, *args, **kwargs)
  monkeypatch.setattr(ocp.CheckpointManager, 'save', save)


def test_a_failed_save_is_a_warning_and_the_next_one_a_new_try(
    tmp_path, monkeypatch, capsys):
  fails_at(monkeypatch, [2, 4])
  with checkpoint.Manager(tmp_path, keep_last=1) as manager:
    for step in (1, 2):
      manager.save(state(step))
    manager.wait()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and 'No space left' in lines[0]
    assert 'checkpoint of step 2 cannot be written' in lines[0]
    assert lines[1].endswith('the newest is that of step 1.')
    assert names(tmp_path) == ['1'] and manager.latest_step() == 1
    manager.save(state(3))
    manager.finish()  # the newest save went well
    assert names(tmp_path) == ['3']
    manager.save(state(4))
    with runs.refused('step 4(.|\n)*from step 3', checkpoint.SaveFailed):
      manager.finish()


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 4 MB."""
  mount = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(tmp_path)],
      check=False, capture_output=True)
  if mount.returncode:
    pytest.skip('mounting is not permitted here')
  yield tmp_path
  subprocess.run(['umount', '-l', str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(small_disk, capsys):
  filler = small_disk / 'filler'
  with checkpoint.Manager(small_disk, keep_last=1) as manager:
    manager.save(state(1))
    manager.wait()
    with contextlib.suppress(OSError), open(filler, 'wb', 0) as f:
      while f.write(b'x' * 4096):
        pass
    # It fails in the background: the next call hears of it.
    assert manager.save(state(2))
    assert manager.save(state(3))
    manager.wait()
    assert capsys.readouterr().out.count('the newest is that of step 1.') == 2
    assert [n for n in names(small_disk) if n.isdigit()] == ['1']
    os.remove(filler)
    manager.save(state(4))
    manager.finish()
    assert names(small_disk) == ['4']  # and nothing is left of the others
    jax.tree.map(np.testing.assert_array_equal,
                 manager.restore(abstract()), state(4))


def test_a_run_whose_last_save_fails_says_so_and_is_resumed(
    finished, cache, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    fails_at(patch, [4])
    with runs.refused('step 4(.|\n)*goes on from step 2',
                      checkpoint.SaveFailed) as info:
      train.train_and_evaluate(runs.short(cache), str(tmp_path))
  assert train.exit_code(info.value) == train.NOT_SAVED
  train.train_and_evaluate(runs.short(cache), str(tmp_path))
  assert runs.digest(tmp_path) == runs.digest(finished[0])
  assert runs.untimed(metric_writer.read(tmp_path)) == runs.untimed(
      metric_writer.read(finished[0]))


def test_rows_that_cannot_be_written_are_written_later(tmp_path, capsys):
  class Full:
    """A file that takes half a line."""
    def write(self, text):
      with open(path, 'a') as f:
        f.write(text[:len(text) // 2])
      raise OSError(errno.ENOSPC, 'No space left on device')
    def close(self):
      pass
  path = tmp_path / 'metrics.jsonl'
  with metric_writer.MetricWriter(str(tmp_path), 0, 9) as writer:
    writer.write(1, {'train/loss': 1.0})
    writer._file.close()
    writer._file = Full()
    writer.write(2, {'train/loss': 2.0})
    assert [r['step'] for r in metric_writer.read(tmp_path)] == [1]
    writer._file = Full()
    writer.write(3, {'train/loss': 3.0})
    writer.write(4, {'train/loss': 4.0})
  assert [r['step'] for r in metric_writer.read(tmp_path)] == [1, 2, 3, 4]
  assert capsys.readouterr().out.count('cannot be written') == 1


def signal_in_evaluation(monkeypatch, number, nth=1):
  """The n-th evaluation gets a signal between two batches."""
  real, calls = classification.Classification.run, []
  def run(self, variables, should_stop):
    calls.append(0)
    if len(calls) == nth:
      os.kill(os.getpid(), number)
    return real(self, variables, should_stop)
  monkeypatch.setattr(classification.Classification, 'run', run)


def test_a_signal_in_evaluation_saves_and_the_evaluation_is_done_again(
    finished, cache, tmp_path, monkeypatch):
  def stop(number, nth, match):
    with monkeypatch.context() as patch:
      signal_in_evaluation(patch, number, nth)
      with pytest.raises(train.Stopped, match=match):
        train.train_and_evaluate(runs.short(cache), str(tmp_path))
  # In the evaluation of the averaged weights of step 4.
  stop(signal.SIGTERM, 4, 'SIGTERM: step 4 is saved')
  assert names(tmp_path) == ['2', '4']
  assert [r['step'] for r in metric_writer.read(tmp_path)
          if 'test/top1' in r] == [2]
  # The evaluation is all that there is left to do.
  stop(signal.SIGINT, 1, 'SIGINT: step 4 had been saved')
  results = train.train_and_evaluate(runs.short(cache), str(tmp_path))
  assert results == finished[1]
  assert runs.digest(tmp_path) == runs.digest(finished[0])
  assert runs.untimed(metric_writer.read(tmp_path)) == runs.untimed(
      metric_writer.read(finished[0]))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_aborts(number):
  code = ('import os, signal, time\n'
          # In the background a shell starts programs without it.
          'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
          'from vit_jax import preemption\n'
          'with preemption.Stop() as stop:\n'
          f'  os.kill(os.getpid(), {int(number)})\n'
          '  print(stop.requested(), flush=True)\n'
          f'  os.kill(os.getpid(), {int(number)})\n'
          '  time.sleep(60)\n')
  done = subprocess.run(
      [sys.executable, '-c', code], env=runs.environment(), cwd=runs.ROOT,
      capture_output=True, text=True, timeout=30, check=False)
  assert done.returncode == -number, done.stderr
  assert done.stdout == signal.Signals(number).name + '\n'


class Wandb(types.ModuleType):
  """Stands in for the package; counts what it is given."""

  def __init__(self):
    super().__init__('wandb')
    self.inits, self.rows, self.finished, self.fault = [], [], 0, None

  def init(self, **kwargs):
    self.inits.append(kwargs)
    if self.fault == 'init':
      raise RuntimeError('no network\nno nothing')
    return self

  def log(self, metrics, step):
    if self.fault == 'log':
      raise ConnectionError('gone')
    self.rows.append((step, metrics))

  def finish(self):
    self.finished += 1


def write_rows(workdir, start, steps, project='digits'):
  """What a run that resumes after `start` hands to the logger."""
  logger = wandb_logger.Logger(
      dict(project=project, mode='offline'), str(workdir), dict(seed=0))
  with metric_writer.MetricWriter(str(workdir), start, 9, logger) as writer:
    for step in steps:
      writer.write(step, {'train/loss': 1.0 / step})


def test_wandb_mirrors_the_rows_and_a_resumed_run_is_the_same(
    tmp_path, monkeypatch):
  fake = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  write_rows(tmp_path, 0, [1, 2])
  write_rows(tmp_path, 2, [3])
  first, second = fake.inits
  assert first == second and fake.finished == 2
  assert first['id'] == (tmp_path / 'wandb_id.txt').read_text().strip()
  assert first['project'] == 'digits' and first['mode'] == 'offline'
  assert first['name'] == tmp_path.name and first['config'] == dict(seed=0)
  assert fake.rows == [
      (r['step'], {'train/loss': r['train/loss']})
      for r in metric_writer.read(tmp_path)]


@pytest.mark.parametrize('fault, warning', [
    ('init', 'RuntimeError: no network)'), ('log', 'ConnectionError: gone'),
    ('absent', 'pip install wandb')])
def test_a_failing_wandb_is_one_warning(
    tmp_path, monkeypatch, caplog, fault, warning):
  fake = Wandb()
  fake.fault = fault
  monkeypatch.setitem(
      sys.modules, 'wandb', None if fault == 'absent' else fake)
  write_rows(tmp_path, 0, [1, 2, 3])
  (warned,) = [r.getMessage() for r in caplog.records]
  assert warning in warned and len(warned.splitlines()) == 2
  assert len(fake.inits) <= 1
  assert [r['step'] for r in metric_writer.read(tmp_path)] == [1, 2, 3]


def test_wandb_is_off_and_not_imported_by_default(tmp_path, monkeypatch):
  fake = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  write_rows(tmp_path, 0, [1], project=recipes.base().wandb.project)
  assert not fake.inits and not (tmp_path / 'wandb_id.txt').exists()


def test_an_unknown_mode_of_wandb():
  with runs.refused("Unknown wandb.mode 'onlin'"):
    wandb_logger.Logger(dict(project='', mode='onlin'), '', {})
