"""Kills runs at random moments and compares them with unbroken ones.

  python -m tests.kill [--kills 20] [--seed 0] [--sources digits,folder,...]

Every other moment is drawn from the whole time of a run, most of which are
imports, opening of data and compiling; the others from the time behind the
compile: training, evaluation and saves. After the last kill a run ends
undisturbed; its last checkpoint and its metrics have to be those of the
unbroken run, bit for bit.
"""
import argparse
import collections
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from tests import runs
from vit_jax import metric_writer

STEPS = 48
FLAGS = (f'--config.total_steps={STEPS}', '--config.schedule.warmup_steps=5',
         '--config.log.every_steps=1', '--config.eval.every_steps=3',
         '--config.checkpoint.every_steps=2', '--config.global_batch_size=16')


def pixels(seed, count):
  return np.random.default_rng(seed).integers(
      0, 256, (count, 32, 32, 3), np.uint8)


def make_arrays(folder):
  path = os.path.join(folder, 'data.npz')
  np.savez(path, train_images=pixels(0, 100), train_labels=np.arange(100) % 5,
           test_images=pixels(1, 30), test_labels=np.arange(30) % 5)
  return ['--config.input.source=arrays', f'--config.input.path={path}']


def make_folder(folder):
  for part, seed, count in (('train', 0, 100), ('test', 1, 30)):
    for i, image in enumerate(pixels(seed, count)):
      path = os.path.join(folder, 'data', part, str(i % 5))
      os.makedirs(path, exist_ok=True)
      Image.fromarray(image).save(os.path.join(path, f'{i}.png'))
  return ['--config.input.source=folder',
          f'--config.input.path={folder}/data',
          '--config.input.eval_pp=decode|resize(32)']


def make_tfds(folder, file_format):
  from tests import test_tfds
  test_tfds.write(os.path.join(folder, 'data'), file_format)
  return ['--config.input.source=tfds', '--config.input.path=mini:1.0.0',
          f'--config.input.data_dir={folder}/data',
          '--config.input.pp=decode|resize(32)|pad_crop(32, 3)',
          '--config.input.eval_pp=decode|resize(32)',
          '--config.evaluators.test.split=val']


# Writes the data of a source; returns the flags that name it.
SOURCES = {
    'digits': lambda folder: [], 'arrays': make_arrays, 'folder': make_folder,
    'array_record': functools.partial(make_tfds, file_format='array_record'),
    'tfrecord': functools.partial(make_tfds, file_format='tfrecord')}


def phase(log):
  """What a killed process was at, by what it had printed."""
  lines = log.splitlines()
  if not any('trained parameters' in line for line in lines):
    return 'start-up'
  if not any('compiled' in line for line in lines):
    return 'compile'
  # The averages' evaluation comes last.
  if re.match(r'step \d+ test: ', lines[-1]):
    return 'evaluation'
  step = re.match(r'step (\d+)', lines[-1])
  if step and not int(step[1]) % 3 and ' test' not in lines[-1]:
    return 'evaluation'
  return 'save' if step and not int(step[1]) % 2 else 'training'


def read(path):
  with open(path) as f:  # a handle of our own: the process shares the other's
    return f.read()


def check(source, kills, seed, folder, cache):
  """Returns Counter of the phases killed in; AssertionError on a difference."""
  rng = random.Random(f'{seed}/{source}')
  flags = [*FLAGS, *SOURCES[source](folder)]
  whole, broken = (os.path.join(folder, n) for n in ('whole', 'broken'))
  for workdir in (whole, os.path.join(folder, 'timed')):  # the second is warm
    begin = time.time()
    done = runs.launch(workdir, *flags, cache=cache, timeout=600)
    finished(done.returncode, done.stderr)
  duration = time.time() - begin
  times = [row['time'] for row in metric_writer.read(workdir)]
  behind_compile = times[-1] - times[0]
  phases = collections.Counter()
  while phases.total() < kills:
    log = os.path.join(folder, 'log')
    with open(log, 'w') as output:
      process = subprocess.Popen(
          runs.command(broken, *flags, cache=cache), stdout=output,
          stderr=subprocess.STDOUT, env=runs.environment())
      late = phases.total() % 2
      while late and 'compiled' not in read(log) and process.poll() is None:
        time.sleep(0.02)
      try:
        process.wait(rng.uniform(0, behind_compile / 4) if late else
                     rng.uniform(0.1, duration))
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        phases[phase(read(log))] += 1
      else:  # it got to its end, and no kill counts: from the start
        finished(process.returncode, read(log))
        compare(broken, whole)
        shutil.rmtree(broken)
  done = runs.launch(broken, *flags, cache=cache, timeout=600)
  finished(done.returncode, done.stderr)
  compare(broken, whole)
  return phases


def finished(code, log):
  assert code == 0, f'exit code {code}: {log}'


def compare(broken, whole):
  assert runs.digest(broken) == runs.digest(whole), 'the checkpoints differ'
  rows = [runs.untimed(metric_writer.read(w)) for w in (broken, whole)]
  assert rows[0] == rows[1], 'the metrics differ'
  assert len(rows[0]) == STEPS + STEPS // 3


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--sources', default=','.join(SOURCES))
  args = parser.parse_args()
  names = args.sources.split(',')
  with tempfile.TemporaryDirectory() as folder:
    for i, source in enumerate(names):
      kills = args.kills // len(names) + (i < args.kills % len(names))
      place = os.path.join(folder, source)
      os.makedirs(place)
      phases = check(source, kills, args.seed, place, f'{folder}/xla')
      print(f'{source}: {kills} kills, equal; {dict(phases)}', flush=True)


if __name__ == '__main__':
  sys.exit(main())
