"""Several real processes: as one, stopped as one, and named when they die."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
from etils.epath import gpath
import fsspec
from fsspec.implementations import memory
import jax
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from vit_jax import distributed
from vit_jax import errors
from vit_jax import metric_writer
from vit_jax import model_file
from vit_jax import sharding
from vit_jax import train
from vit_jax import workdir as workdir_lib

FLAGS = (
    '--config.total_steps=6', '--config.schedule.warmup_steps=2',
    '--config.log.every_steps=1', '--config.eval.every_steps=3',
    # Five batches of 96 and one of 20.
    '--config.eval.batch_size=96', '--config.checkpoint.every_steps=3',
    '--config.precise_bn.examples=128')


def run_alone(workdir, cache):
  """The run in this process, on four devices."""
  create = sharding.create_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
        sharding, 'create_mesh', lambda c: create(c, jax.devices()[:4]))
    assert train.main(runs.command(workdir, *FLAGS, cache=cache)[2:]) == 0


@pytest.fixture(scope='module')
def alone(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  run_alone(workdir, cache)
  return workdir


def agree(a, b):
  """Whether two runs have the same rows, numbers to rounding."""
  a, b = (runs.untimed(metric_writer.read(w)) for w in (a, b))
  assert [sorted(row) for row in a] == [sorted(row) for row in b]
  for x, y in zip(a, b, strict=True):
    for key in x:
      if key.endswith(('top1', 'top5')):  # one example may change sides
        assert abs(x[key] - y[key]) <= 1.5 / 500, key
      else:
        np.testing.assert_allclose(x[key], y[key], rtol=1e-4, atol=1e-5,
                                   err_msg=key)


def test_two_processes_are_one(alone, cache, tmp_path):
  pair = tmp_path / 'run'
  started = runs.start_pair(pair, *FLAGS, cache=cache)
  assert [p.wait(300) for p in started] == [0, 0], runs.log(pair, 1)
  agree(pair, alone)
  assert metric_writer.read(pair)[-1]['test/count'] == 500
  ours, theirs = runs.arrays(pair), runs.arrays(alone)
  for path in ours:
    np.testing.assert_allclose(
        ours[path], theirs[path], rtol=1e-3, atol=2e-5, err_msg=path)
  # Each says who it is, and one says the rest.
  for i, text in enumerate(runs.log(pair, i) for i in (0, 1)):
    # Gloo's lines, which its threads mix up, and XLA's about a slow compilation
    # (E1121 11:00:00 ...).
    noise = r'.*(Gloo|peer ranks)|[EWI]\d{4} |\s*$|\*{3}|.*slow'
    lines = [x for x in text.splitlines() if not re.match(noise, x)]
    assert re.match(rf'process {i} of 2: host \S+, pid {started[i].pid}, 2 of '
                    '4 x cpu', lines[0])
    assert len(lines) > 10 if i == 0 else lines[1:] == [], text
  with open(pair / 'launches.jsonl') as f:
    assert [json.loads(line)['process_count'] for line in f] == [2]
  for name in ('curves.png', 'per_class.json', 'config.json', 'classes.json'):
    assert os.path.exists(pair / name)
  assert len(os.listdir(pair / 'events')) == 1


def test_another_number_of_processes_resumes(alone, cache, tmp_path):
  """One process, then two that share parameters, stopped before their first
  step, then one."""
  mixed = tmp_path / 'run'
  shutil.copytree(alone, mixed)
  shutil.rmtree(mixed / 'checkpoints' / '6')
  started = runs.start_pair(
      mixed, *FLAGS, '--config.mesh.fsdp=2', cache=cache)
  runs.wait_until(lambda: 'process 1 of 2' in runs.log(mixed, 1))
  started[1].send_signal(signal.SIGTERM)
  assert [p.wait(300) for p in started] == [train.STOPPED] * 2, runs.log(
      mixed, 1)
  for i in (0, 1):
    assert 'step 4 is saved' in runs.log(mixed, i)
  run_alone(mixed, cache)
  agree(mixed, alone)


@pytest.mark.slow
def test_four_processes_share_parameters_and_heads(alone, cache, tmp_path):
  four = tmp_path / 'run'
  started = runs.start_processes(
      four, *FLAGS, '--config.mesh.fsdp=4', '--config.mesh.tensor=2',
      cache=cache, count=4, timeout=120)
  assert [p.wait(600) for p in started] == [0] * 4, runs.log(four, 3)
  agree(four, alone)
  ours, theirs = (model_file.load(str(w)) for w in (four, alone))
  for a, b in zip(jax.tree.leaves(ours.variables),
                  jax.tree.leaves(theirs.variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_ctrl_c_of_one_stops_all_within_an_evaluation(cache, tmp_path):
  workdir = tmp_path / 'run'
  flags = [f for f in FLAGS if 'every' not in f and 'batch_size' not in f
           and 'total' not in f]
  started = runs.start_pair(
      workdir, *flags, '--config.total_steps=2000',
      '--config.log.every_steps=1', '--config.eval.every_steps=1',
      '--config.eval.batch_size=4', '--config.checkpoint.every_steps=0',
      cache=cache, args='stem=patchify')
  evaluated = lambda: [r['step'] for r in metric_writer.read(workdir)
                       if 'test/top1' in r]
  runs.wait_until(evaluated)
  started[1].send_signal(signal.SIGINT)
  assert [p.wait(300) for p in started] == [train.STOPPED] * 2, runs.log(
      workdir, 1)
  saved = [int(n) for n in os.listdir(workdir / 'checkpoints')]
  assert saved == [evaluated()[-1] + 1]  # its evaluation was broken off
  for i in (0, 1):
    assert f'step {saved[0]} is saved' in runs.log(workdir, i)


# A run without a model: the processes exchange numbers until they end.
EXCHANGE = '''
import sys, time
import jax, jax.numpy as jnp, numpy as np
from vit_jax import distributed, sharding, train
def run(config, workdir, **_):
  mesh = sharding.create_mesh({'data': -1})
  total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))
  while True:
    x = jax.make_array_from_process_local_data(
        sharding.batch(mesh), np.ones(1, np.float32))
    assert float(total(x)) == 2
    print('exchanged', flush=True)
    time.sleep(.05)
train.train_and_evaluate = run
sys.exit(train.main(sys.argv[1:]))
'''


def start_exchange(workdir, ids=(0, 1), num=2, timeout=6):
  port = runs.free_port()
  return {i: subprocess.Popen(
      [sys.executable, '-c', EXCHANGE, f'--config={runs.DIGITS}',
       f'--workdir={workdir}', f'--coordinator=localhost:{port}',
       f'--num_processes={num}', f'--process_id={i}',
       f'--peer_timeout_seconds={timeout}'],
      env=runs.environment(), cwd=runs.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in ids}


def test_a_dead_or_missing_process_is_named(tmp_path):
  killed = {k: start_exchange(tmp_path / str(k), timeout=12) for k in (0, 1)}
  missing = start_exchange(tmp_path / 'missing', ids=(1, 0), num=3, timeout=6)
  for k, pair in killed.items():
    while 'exchanged' not in pair[k].stdout.readline():
      assert pair[k].poll() is None
    pair[k].kill()
    other = pair[1 - k]
    _, error = other.communicate(timeout=60)
    assert other.returncode == distributed.PEER_LOST, error
    assert re.search(rf'error: process {k} \(host \S+, pid {pair[k].pid}\) '
                     r'(has been silent|is gone)', error), error
    pair[k].communicate()
  for process in missing.values():
    _, error = process.communicate(timeout=60)
    assert process.returncode == distributed.PEER_LOST, error
    assert 'error: no sign of life of process 2' in error, error


def test_an_outage_of_the_file_system_is_nobodys_death(tmp_path, monkeypatch):
  lost = []
  monkeypatch.setattr(
      distributed.Peers, '_give_up', lambda self, why: lost.append(why))
  peers = [distributed.Peers(tmp_path, i, 2, timeout=2) for i in (0, 1)]
  try:
    time.sleep(0.6)
    os.rename(tmp_path / distributed.FOLDER, tmp_path / 'away')
    time.sleep(3)
    os.rename(tmp_path / 'away', tmp_path / distributed.FOLDER)
    time.sleep(1)
    assert not lost
    peers[1]._left.set()  # as if it were killed
    time.sleep(3)
    assert lost and 'process 1' in lost[0] and 'silent for' in lost[0]
  finally:
    for peer in peers:
      peer.leave(None)


@pytest.mark.parametrize('flags, match', [
    (['--num_processes=2'], '--coordinator and --process_id is missing'),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=2'],
     'not in 0 to 1'),
    (['--coordinator=a', '--num_processes=2', '--process_id=0'],
     'not HOST:PORT'),
    (['--coordinator=a:1', '--num_processes=0', '--process_id=0'], 'below 1'),
    (['--peer_timeout_seconds=1'], 'below 2'),
])
def test_flags_that_do_not_go_together(flags, match, tmp_path, capsys):
  assert train.main(['--config', runs.DIGITS, '--workdir', str(
      tmp_path / 'run'), *flags]) == errors.BAD_INPUT
  error = capsys.readouterr().err
  assert match in error and error.count('\n') == 2
  assert not os.path.exists(tmp_path / 'run')


def _sources(tmp_path):
  """Configs of every random-access source, 13 examples to train on or more."""
  base = dict(sources.TFDS_ONLY, path='', eval_pp='decode|resize(8)',
              epoch='exact', channels=3, holdout=.2, classes='',
              repeats=1, only_classes=(), validation=0.0, per_class=0,
              max_bad_fraction=.001)
  for name in 'ab':
    os.makedirs(tmp_path / 'photos' / name)
    for i in range(8):
      Image.effect_noise((12, 10 + i), 50).convert('RGB').save(
          tmp_path / 'photos' / name / f'{i}.png')
  pixels = np.random.default_rng(0).integers(0, 256, (13, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'arrays.npz', train_images=pixels,
           train_labels=np.arange(13) % 3)
  pp = 'decode|inception_crop(8)|flip_lr'
  return [
      dict(base, source='digits', pp='decode|pad_crop(32, 3)', eval_pp='decode',
           channels=1),
      dict(base, source='arrays', path=str(tmp_path / 'arrays.npz'), pp=pp),
      dict(base, source='folder', path=str(tmp_path / 'photos'), pp=pp)]


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('kind', range(3), ids=['digits', 'arrays', 'folder'])
def test_the_data_do_not_depend_on_processes(kind, repeats, tmp_path):
  data = input_pipeline.open_data(_sources(tmp_path)[kind], 3)

  def batches(processes):
    streams = [input_pipeline.train_batches(
        data, global_batch_size=8, data_seed=3, repeats=repeats,
        process_index=i, process_count=processes) for i in range(processes)]
    for _ in range(4):  # epochs of 12 to 13 end within; digits' do not
      parts = [next(s) for s in streams]
      yield {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

  whole = list(batches(1))
  for processes in (2, 4):
    for a, b in zip(whole, batches(processes), strict=True):
      assert a.keys() == b.keys()
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_remote_workdir(monkeypatch):
  """An object store that has no folders and cannot be appended to."""
  # TensorFlow's file systems would hide it.
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)

  class Store(memory.MemoryFileSystem):
    protocol = 's3'
    store, pseudo_dirs = {}, ['']

    def open(self, path, mode='rb', **kwargs):
      assert 'a' not in mode and '+' not in mode
      return super().open(path, mode, **kwargs)

  fsspec.register_implementation('s3', Store, clobber=True)
  folder = 's3://bucket/run'
  workdir_lib.make(folder)
  for _ in range(2):
    workdir_lib.record(folder, {'seed': 0}, ['a'])
  with metric_writer.MetricWriter(folder, 0, 2) as writer:
    writer.write(1, {'train/loss': 1.0})
    writer.sync()
    assert [r['step'] for r in metric_writer.read(folder)] == [1]
    writer.write(2, {'train/loss': 0.5})
  with metric_writer.MetricWriter(folder, 1, 2) as writer:  # resumes at 1
    writer.write(2, {'train/loss': 0.25})
  rows = metric_writer.read(folder)
  assert [r['train/loss'] for r in rows] == [1.0, 0.25]
  metric_writer.plot_curves(rows, folder)
  files = {str(p.name) for p in epath.Path(folder).iterdir()}
  assert {'config.json', 'launches.jsonl', 'metrics.jsonl', 'events',
          'curves.png'} <= files
  assert len(list((epath.Path(folder) / 'events').iterdir())) == 1
  assert len((epath.Path(folder) / 'launches.jsonl').read_text().splitlines()
             ) == 2
