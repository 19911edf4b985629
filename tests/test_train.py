"""The whole program: resume, kill, fork, faults, and what it leaves behind."""
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from tests import runs
from vit_jax import config as config_lib
from vit_jax import errors
from vit_jax import metric_writer
from vit_jax import train


def test_what_a_run_leaves_behind(finished):
  workdir, results = finished
  assert results['test/count'] == results['test_ema/count'] == 500
  rows = metric_writer.read(workdir)
  assert [r['step'] for r in rows if 'train/loss' in r] == [1, 2, 3, 4]
  assert [r['step'] for r in rows if 'test/top1' in r] == [2, 4]
  assert set(rows[0]) == {
      'step', 'time', 'train/loss', 'train/lr', 'train/grad_norm',
      'train/images_per_s', 'train/data_wait'}
  for name in ('test', 'test_ema'):
    for key in ('top1', 'top5', 'loss', 'count'):
      assert f'{name}/{key}' in rows[-1]
  assert rows[-1]['test/top1'] <= rows[-1]['test/top5'] <= 1
  with open(os.path.join(workdir, 'config.json')) as f:
    saved = json.load(f)
  with open(os.path.join(workdir, 'classes.json')) as f:
    assert json.load(f) == [str(i) for i in range(10)]
  assert saved['total_steps'] == 4 and saved['model']['stem'] == 'conv'
  with open(os.path.join(workdir, 'launches.jsonl')) as f:
    launch = json.loads(f.readline())
  assert {'command', 'jax', 'git', 'device_kind', 'backend'} <= set(launch)
  assert os.path.getsize(os.path.join(workdir, 'curves.png')) > 5000
  with open(os.path.join(workdir, 'per_class.json')) as f:
    per_class = json.load(f)['test']
  assert list(per_class) == [str(i) for i in range(10)]
  assert np.isclose(np.average(
      [c['top1'] for c in per_class.values()],
      weights=[c['count'] for c in per_class.values()]), results['test/top1'])


def test_events_hold_the_rows(finished):
  workdir, _ = finished
  events = event_accumulator.EventAccumulator(os.path.join(workdir, 'events'))
  events.Reload()
  rows = metric_writer.read(workdir)
  for name in ('train/loss', 'test_ema/top1'):
    assert [(e.step, np.float32(e.value)) for e in events.Scalars(name)] == [
        (r['step'], np.float32(r[name])) for r in rows if name in r]


def test_two_steps_and_two_resumed_are_four(finished, cache, tmp_path):
  workdir, _ = finished
  half = str(tmp_path)
  shutil.copytree(workdir, half, dirs_exist_ok=True)
  # As if the run had been killed after step 3: the checkpoint of step 2 is the
  # newest, rows of step 3 are there, the last of them half-written.
  shutil.rmtree(os.path.join(half, 'checkpoints', '4'))
  rows = [r for r in metric_writer.read(workdir) if r['step'] <= 3]
  with open(os.path.join(half, 'metrics.jsonl'), 'w') as f:
    f.writelines(json.dumps(r) + '\n' for r in rows)
    f.write('{"step": 3, "ti')
  train.train_and_evaluate(runs.short(cache), half)
  assert runs.digest(half) == runs.digest(workdir)
  assert runs.untimed(metric_writer.read(half)) == runs.untimed(
      metric_writer.read(workdir))
  events = event_accumulator.EventAccumulator(os.path.join(half, 'events'))
  events.Reload()
  assert [e.step for e in events.Scalars('train/loss')] == [1, 2, 3, 4]


def test_resuming_augments_as_before(cache, tmp_path):
  options = dict(augment='randaug(2, 10)|mixup(0.2)', model__stem='patchify',
                 eval__every_steps=0, checkpoint__keep_best='')
  whole, half = str(tmp_path / 'whole'), str(tmp_path / 'half')
  train.train_and_evaluate(runs.short(cache, **options), whole)
  shutil.copytree(whole, half)
  shutil.rmtree(os.path.join(half, 'checkpoints', '4'))
  train.train_and_evaluate(runs.short(cache, **options), half)
  assert runs.digest(half) == runs.digest(whole)


def test_a_finished_run_is_left_as_it_is(finished, cache):
  workdir, _ = finished
  before = runs.digest(workdir)
  train.train_and_evaluate(runs.short(cache), workdir)
  assert runs.digest(workdir) == before
  steps = collections.Counter(
      r['step'] for r in metric_writer.read(workdir) if 'test/top1' in r)
  assert steps == {2: 1, 4: 1}


def test_a_checkpoint_of_eight_devices_is_restored_on_one(finished):
  workdir, _ = finished
  eight = runs.restored(workdir, jax.devices())
  one = runs.restored(workdir, jax.devices()[:1])
  assert {len(x.devices()) for x in jax.tree.leaves(eight)} == {8}
  assert {len(x.devices()) for x in jax.tree.leaves(one)} == {1}
  jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_resuming_may_change_how_but_not_what(
    finished, cache, tmp_path, capsys):
  workdir, _ = finished
  with pytest.raises(ValueError, match=r'seed: 0 -> 3') as e:
    train.train_and_evaluate(runs.short(cache, seed=3), workdir)
  assert '--fork' in str(e.value)
  # A fork goes on from the checkpoint, with the new setting.
  forked = str(tmp_path / 'fork')
  train.train_and_evaluate(
      runs.short(cache, steps=6, seed=3), workdir, fork=forked)
  assert [r['step'] for r in metric_writer.read(forked)
          if 'train/loss' in r] == [5, 6]
  with pytest.raises(ValueError, match='no checkpoint to fork from'):
    train.train_and_evaluate(
        runs.short(cache), str(tmp_path / 'none'), fork=str(tmp_path / 'new'))
  train.train_and_evaluate(runs.short(cache, prefetch=1), workdir)
  assert 'prefetch: 2 -> 1' in capsys.readouterr().out


def test_another_rate_or_seed_compiles_nothing(finished, cache, tmp_path):
  hits = collections.Counter()
  listen = lambda event, **_: hits.update([event.rsplit('/', 1)[-1]])
  jax.monitoring.register_event_listener(listen)
  changes = runs.short(cache, seed=5)
  changes.optimizer.lr = 3e-4
  train.train_and_evaluate(changes, str(tmp_path))
  assert hits['cache_hits'] > 0 and hits['cache_misses'] == 0, hits


def test_weights_of_another_run(finished, cache, tmp_path):
  workdir, _ = finished
  c = runs.short(cache, steps=10, optimizer__lr=0.0,
            eval__every_steps=5)
  c.init_from.update(run=workdir, weights='raw', paths=('stem/.*', 'head/.*'),
                     reset=('head/bias',))
  c.frozen = ('stem/.*',)
  c.precise_bn.examples = 64  # which a frozen BatchNorm has no use for
  train.train_and_evaluate(c, str(tmp_path))
  old, new = runs.arrays(workdir), runs.arrays(str(tmp_path))
  same = lambda a, b: np.array_equal(old[a], new[b])
  assert same("['params']['stem']['conv_0']['kernel']",
              "['frozen']['stem']['conv_0']['kernel']")
  # A frozen BatchNorm keeps its statistics, whatever it is shown.
  stats = [k for k in old if k.startswith("['batch_stats']")]
  assert len(stats) == 6 and all(same(k, k) for k in stats)
  assert all(same(k, f"['ema']{k}") for k in stats)
  assert same(*["['params']['head']['kernel']"] * 2)
  assert not same(*["['params']['head']['bias']"] * 2)
  other = "['params']['encoder']['blocks']['mlp']['fc1']['kernel']"
  assert not same(other, other)


@pytest.mark.parametrize('changes, message', [
    (dict(init_from__paths=('stem/.*', 'had/.*')), 'matches no parameter'),
    (dict(model__stem='patchify', init_from__paths=('stem/.*',)),
     r'has no stem/embedding'),
    (dict(model__size='S/8'), r'List it in init_from.reset'),
    (dict(init_from__run='/nowhere'), 'holds no checkpoints'),
    (dict(init_from__weights='best'), 'ema or raw'),
])
def test_weights_that_do_not_fit(finished, cache, tmp_path, changes, message):
  workdir, _ = finished
  changes = {'init_from__run': workdir, **changes}
  with pytest.raises(ValueError, match=message):
    train.train_and_evaluate(runs.short(cache, **changes), str(tmp_path))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    finished, cache, tmp_path, caplog):
  workdir, _ = finished
  damaged = str(tmp_path)
  shutil.copytree(workdir, damaged, dirs_exist_ok=True)
  largest = max(
      (os.path.join(d, f) for d, _, files in os.walk(
          os.path.join(damaged, 'checkpoints', '4')) for f in files),
      key=os.path.getsize)
  with open(largest, 'r+b') as f:
    f.truncate(os.path.getsize(largest) // 2)
  train.train_and_evaluate(runs.short(cache), damaged)
  assert 'checkpoint 4 cannot be read' in caplog.text
  assert os.path.isdir(os.path.join(damaged, 'checkpoints', '4.unreadable'))
  assert runs.digest(damaged) == runs.digest(workdir)


def test_a_non_finite_loss_stops_with_its_step(cache, tmp_path):
  c = runs.short(cache, steps=8)
  c.log.every_steps = 100
  c.optimizer.lr = 1e38
  with pytest.raises(train.NonFiniteLoss, match=r'loss of step [23] '):
    train.train_and_evaluate(c, str(tmp_path))
  saved = os.path.join(str(tmp_path), 'checkpoints')
  assert all(int(n) < 3 for n in os.listdir(saved) if n.isdigit())


def test_keep_best_keeps_the_best(cache, tmp_path):
  c = runs.short(cache, steps=6)
  c.checkpoint.keep_last = 1
  train.train_and_evaluate(c, str(tmp_path))
  top1 = {r['step']: r['test/top1'] for r in metric_writer.read(str(tmp_path))
          if 'test/top1' in r}
  best = max(top1.values())
  kept = {int(n) for n in os.listdir(tmp_path / 'checkpoints') if n.isdigit()}
  assert 6 in kept and any(top1[s] == best for s in kept) and len(kept) <= 2


def test_precise_statistics_are_for_evaluation_only(
    finished, cache, tmp_path):
  workdir, results = finished
  c = runs.short(cache, eval__every_steps=0)
  c.precise_bn.examples = 256
  precise = train.train_and_evaluate(c, str(tmp_path))
  for name in ('test/loss', 'test_ema/loss'):
    assert abs(precise[name] - results[name]) > 1e-3
  # Training knows nothing of it, nor of how often there was an evaluation.
  assert runs.digest(tmp_path) == runs.digest(workdir)


def test_overfitting_one_batch(cache, tmp_path):
  c = runs.short(cache, steps=30)
  train.train_and_evaluate(c, str(tmp_path), overfit_batch=True)
  loss = [r['train/loss'] for r in metric_writer.read(str(tmp_path))
          if 'train/loss' in r]
  # Smoothed labels leave 0.5 nats at the least.
  assert loss[-1] < 0.5 + 0.5 * (loss[0] - 0.5)
  with pytest.raises(ValueError, match='overfit_batch: True -> '):
    train.train_and_evaluate(c, str(tmp_path))  # no run resumes a check


def test_an_unread_key_stops_before_the_first_step(cache, tmp_path):
  c = runs.short(cache)
  c.optimizer.momentum = 0.9
  with pytest.raises(ValueError, match=r'Nothing reads.*optimizer\.momentum'):
    train.train_and_evaluate(c, str(tmp_path))


@pytest.mark.parametrize('changes, message', [
    (dict(model__batch_norm_group=48),
     r'divide global_batch_size=64(.|\n)*groups that do: 32 and 64'),
    (dict(model__batch_norm_group=-1), 'whole batch'),
    (dict(precise_bn__examples=-1), 'is negative'),
    (dict(frozen=('stem/norm_0/.*',)), 'Freeze all'),
    (dict(global_batch_size=63), 'nearest sizes that do: 56 and 64'),
    (dict(mesh=dict(data=3, fsdp=1, tensor=1)), 'does not fit 8 device'),
    (dict(model__size='mikro'), 'Did you mean'),
    (dict(model__stem='covn'), 'Did you mean'),
    (dict(optimizer__name='adamm'), 'Did you mean'),
    (dict(loss__name='softmax'), 'Did you mean'),
    (dict(ema__name='deccay'), 'Did you mean'),
    (dict(input__source='digit'), 'Did you mean'),
    (dict(input__pp='decod'), 'decode'),
    (dict(input__pp='resize(4)', input__eval_pp='resize(4)'), 'patch'),
    (dict(input__pp='resize(16)'), 'end in one size'),
    (dict(input__num_classes=12), 'input.num_classes=12 is expected'),
    (dict(evaluators=dict(test=dict(name='classification', split='vall'))),
     'no evaluation split'),
    (dict(checkpoint__keep_last=0), 'Keep at least 1'),
    (dict(checkpoint__keep_best='tset/top1'), 'keep_best'),
    (dict(frozen=('stme/.*',)), 'matches no parameter'),
    (dict(eval__batch_size=100), 'eval.batch_size=100 does not divide'),
    (dict(warmup=100), 'longer than the run'),
])
def test_bad_input_is_two_lines_before_the_first_compile(
    cache, tmp_path, changes, message, monkeypatch):
  def compiled(*_):
    raise AssertionError('compiled before the check')
  monkeypatch.setattr(train.experiment.Experiment, 'compile_step', compiled)
  with pytest.raises(ValueError, match=message) as e:
    train.train_and_evaluate(runs.short(cache, **changes), str(tmp_path))
  lines = str(e.value).splitlines()
  assert len(lines) == 2 and all(lines), str(e.value)
  assert errors.is_message(e.value)


def test_an_unwritable_workdir(cache, tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(ValueError, match='Cannot write to the workdir'):
    train.train_and_evaluate(runs.short(cache), str(file / 'run'))


def test_a_gpu_that_jax_does_not_see_stops_the_run(
    monkeypatch, cache, tmp_path):
  monkeypatch.setattr('vit_jax.devices.nvidia_gpus', lambda: 2)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  with pytest.raises(ValueError, match=r'pip install .*gpu'):
    train.train_and_evaluate(runs.short(cache), str(tmp_path))


def test_exit_codes_and_messages_of_the_command(tmp_path, capsys):
  flags = ['--config', runs.DIGITS, '--workdir', str(tmp_path),
           '--config.model.size=S/15', '--config.compilation_cache=']
  assert train.main(flags) == errors.BAD_INPUT
  error = capsys.readouterr().err
  assert error.startswith('error: ') and 'Traceback' not in error
  assert train.main([*flags, '--traceback']) == errors.BAD_INPUT
  assert 'Traceback' in capsys.readouterr().err
  assert train.main(flags[:2]) == errors.BAD_INPUT
  assert '--workdir is missing' in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, capsys, monkeypatch):
  def broken(*_):
    return np.zeros(3) + np.zeros(4)  # a ValueError that numpy raises
  monkeypatch.setattr(train.optimizer, 'describe', broken)
  flags = ['--config', runs.DIGITS, '--workdir', str(tmp_path),
           '--config.compilation_cache=', '--config.model.scan']
  assert train.main(flags) == 1
  assert 'Traceback' in capsys.readouterr().err


KILLED_STEPS = 60


def killed_flags():
  return (f'--config.total_steps={KILLED_STEPS}',
          '--config.schedule.warmup_steps=5', '--config.log.every_steps=1',
          '--config.eval.every_steps=20', '--config.checkpoint.every_steps=4')


@pytest.fixture(scope='session')
def whole(cache, tmp_path_factory):
  """An unbroken run in a process that cannot import TensorFlow."""
  workdir = str(tmp_path_factory.mktemp('whole'))
  code = ('import sys; sys.modules["tensorflow"] = None\n'
          'from vit_jax import train\n'
          'sys.exit(train.main(sys.argv[1:]))')
  flags = runs.command(workdir, *killed_flags(), cache=cache)[2:]
  done = subprocess.run(
      [sys.executable, '-c', code, *flags], env=runs.environment(),
      capture_output=True, text=True, timeout=180, check=False)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_without_tensorflow(whole):
  workdir, output = whole
  assert f'step {KILLED_STEPS} test: ' in output
  assert output.count('evaluated 500/500') == 6
  assert len(runs.arrays(workdir)) > 100


def test_three_kills_leave_no_trace(whole, cache, tmp_path):
  whole, broken = whole[0], str(tmp_path)
  rng = random.Random(0)
  for kill_at in sorted(rng.sample(range(5, KILLED_STEPS - 5), 3)):
    process = subprocess.Popen(
        runs.command(broken, *killed_flags(), cache=cache),
        env=runs.environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
      rows = metric_writer.read(broken)
      if rows and rows[-1]['step'] >= kill_at:
        break
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it ended before it was killed'
  done = runs.launch(broken, *killed_flags(), cache=cache)
  assert done.returncode == 0, done.stderr
  assert runs.digest(broken) == runs.digest(whole)
  assert runs.untimed(metric_writer.read(broken)) == runs.untimed(
      metric_writer.read(whole))


def test_sigterm_saves_and_says_so(cache, tmp_path):
  flags = (*killed_flags()[:3], '--config.total_steps=2000',
           '--config.eval.every_steps=0', '--config.checkpoint.every_steps=0')
  process = subprocess.Popen(
      runs.command(tmp_path, *flags, cache=cache), env=runs.environment(),
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  deadline = time.time() + 120
  while not metric_writer.read(tmp_path) and time.time() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=60)
  assert process.returncode == train.STOPPED, error
  saved = [int(n) for n in os.listdir(tmp_path / 'checkpoints')]
  assert len(saved) == 1 and f'SIGTERM: step {saved[0]} ' in error


@pytest.mark.parametrize('args', ['', 'stem=patchify,optimizer=sgd'])
def test_no_key_of_the_digits_config_is_dead(
    cache, tmp_path, args, monkeypatch):
  class Reached(Exception):
    pass
  def reached(*_):
    raise Reached
  monkeypatch.setattr(train.experiment.Experiment, 'compile_step', reached)
  c = runs.config(cache, args)
  with pytest.raises(Reached):  # every check has passed by then
    train.train_and_evaluate(c, str(tmp_path))
  assert config_lib.unread(c) == []
