"""Small runs of the real program, for the tests."""
import contextlib
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A folder that holds imagenet_sample/<class>/*.JPEG; it need not exist.
TEST_DATA = os.path.join(ROOT, os.environ.get(
    'VIT_JAX_TEST_DATA', os.path.join(os.pardir, 'shared', 'data')))
DIGITS = os.path.join(ROOT, 'configs', 'digits.py')
TRAIN = os.path.join(ROOT, 'vit_jax', 'train.py')
# What differs between two runs of the same thing.
TIMES = ('time', 'train/images_per_s', 'train/data_wait')


def config(cache, args='epochs=1', **changes):
  """configs/digits.py cut down to a few steps; changes are dotted with '__'."""
  spec = importlib.util.spec_from_file_location('digits', DIGITS)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(args)
  c.compilation_cache = str(cache)
  c.model.scan = True  # compiles in half the time
  c.log.every_steps = 1
  c.eval = dict(every_steps=0, batch_size=512)
  c.checkpoint = dict(every_steps=0, keep_last=2, keep_best='')
  for path, value in changes.items():
    if isinstance(value, dict):
      value = ml_collections.ConfigDict(value)
    section = c
    *parents, leaf = path.split('__')
    for parent in parents:
      section = section[parent]
    section[leaf] = value
  return c


@contextlib.contextmanager
def refused(match, error=ValueError):
  """pytest.raises, for a message of one line of cause and one of remedy."""
  with pytest.raises(error, match=match) as info:
    yield info
  lines = str(info.value).split('\n')
  assert len(lines) == 2 and all(line.strip() for line in lines), lines
  assert lines[0].endswith('.') and lines[1].endswith('.'), lines


def total_steps(c, steps, warmup=2):
  """Sets the length of the run and of its warm-up in steps.

  The schedule becomes a constant one, so that the compiled step does not
  depend on the length, and all the tests' runs share it.
  """
  del c['total_epochs']
  c.total_steps = steps
  c.schedule = dict(name='constant', warmup_steps=warmup, warmup_start=0.0,
                    cooldown_steps=0, per='step')
  return c


def short(cache, steps=4, **changes):
  """A run of a few steps, evaluated and saved every second."""
  changes = dict(eval__every_steps=2, checkpoint__every_steps=2,
                 checkpoint__keep_best='test/top1', warmup=2) | changes
  warmup = changes.pop('warmup')
  return total_steps(config(cache, **changes), steps, warmup)


def command(workdir, *flags, cache, args=''):
  """The command line of a run in a process of its own, on one device."""
  return [sys.executable, TRAIN, f'--config={DIGITS}:{args}',
          f'--workdir={workdir}', f'--config.compilation_cache={cache}',
          '--config.model.scan', *flags]


def environment(**changes):
  """An environment with one CPU device, whatever this process has."""
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return {**env, 'JAX_PLATFORMS': 'cpu', 'PYTHONFAULTHANDLER': '1', **changes}


def launch(workdir, *flags, cache, args='', timeout=180):
  """Runs the program to its end; returns the finished process."""
  return subprocess.run(
      command(workdir, *flags, cache=cache, args=args), capture_output=True,
      text=True, timeout=timeout, env=environment(), check=False)


def start_pair(workdir, *flags, ids=(0, 1), **options):
  """`start_processes`, two of them, or one of two."""
  return start_processes(workdir, *flags, ids=ids, count=2, **options)


def start_processes(workdir, *flags, cache, count, args='', ids=None,
                    timeout=60):
  """Starts processes of two devices that form one run; returns them.

  Their output is in <workdir>.<id>.log.
  """
  # JAX lets process 0 alone write to the compilation cache: the other compiles
  # each time, and is not to take long over it.
  env = environment(XLA_FLAGS='--xla_force_host_platform_device_count=2 '
                    '--xla_backend_optimization_level=0')
  port = free_port()
  started = []
  for i in ids or range(count):
    with open(f'{workdir}.{i}.log', 'w') as log:
      started.append(subprocess.Popen(
          [*command(workdir, *flags, cache=cache, args=args),
           f'--coordinator=localhost:{port}', f'--num_processes={count}',
           f'--process_id={i}', f'--peer_timeout_seconds={timeout}'],
          env=env, stdout=log, stderr=subprocess.STDOUT))
  return started


def log(workdir, process):
  """What a process of `start_pair` has printed so far."""
  with open(f'{workdir}.{process}.log') as f:
    return f.read()


def free_port():
  with socket.create_server(('localhost', 0)) as s:
    return s.getsockname()[1]


def wait_until(condition, timeout=180):
  """Asks until it holds; fails after so many seconds."""
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline, 'it did not come'
    time.sleep(0.02)


def arrays(workdir, step=None):
  """{path: array} of the newest (or a given) checkpoint, as numpy."""
  folder = os.path.join(workdir, 'checkpoints')
  if step is None:
    step = max(int(n) for n in os.listdir(folder) if n.isdigit())
  with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as c:
    path = os.path.join(folder, str(step), 'default')
    saved = c.metadata(path).item_metadata.tree
    tree = c.restore(path, args=ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)))
  return {jax.tree_util.keystr(k): np.asarray(v)
          for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def restored(workdir, devices):
  """The newest state, on a mesh of the given devices."""
  from vit_jax import checkpoint
  from vit_jax import sharding
  mesh = sharding.create_mesh({'data': -1}, devices)
  folder = os.path.join(workdir, checkpoint.FOLDER)
  with ocp.CheckpointManager(folder) as manager:
    path = os.path.join(folder, str(manager.latest_step()), 'default')
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      shapes = reader.metadata(path).item_metadata.tree
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.replicated(mesh)), shapes)
    return manager.restore(
        manager.latest_step(), args=ocp.args.StandardRestore(target))


def digest(workdir, step=None):
  """A hash of every bit of a checkpoint."""
  md5 = hashlib.md5()
  for path, value in sorted(arrays(workdir, step).items()):
    md5.update(f'{path} {value.dtype} {value.shape}'.encode())
    md5.update(np.ascontiguousarray(value).tobytes())
  return md5.hexdigest()


def untimed(rows):
  """Rows of metrics.jsonl without what differs between equal runs."""
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
