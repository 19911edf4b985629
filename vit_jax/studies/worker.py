"""Takes trials from a ledger and trains them, each as an ordinary run."""
import contextlib
import glob
import os
import shutil
import subprocess
import sys
import time

from vit_jax import checkpoint
from vit_jax import metric_writer
from vit_jax.studies import ledger as ledger_lib
from vit_jax.studies import plan

RUNS = 'runs'


def work(ledger, folder, beside, train, say, keep_checkpoints=False):
  """Trains trials until none is left.

  Args:
    ledger: ledger.Ledger.
    folder: of the study's results; runs go below it.
    beside: folder that paths of the trials' configs are relative to.
    train: module with `train_and_evaluate`, `NonFiniteLoss` and `Stopped`.
    say: called with a line for each trial.
    keep_checkpoints: whether finished runs keep theirs.

  Raises:
    train.Stopped: by a signal; the trial is back in the queue, and goes on
      from its checkpoint.
  """
  while claimed := ledger.claim():
    trial, key = claimed
    if known := elsewhere(trial, folder):
      ledger.finish(key, trial, known)
      ledger.write_table()
      say(f'{trial.index} {trial.name} taken from {known["run"]}')
      continue
    run = os.path.join(folder, RUNS, trial.name)
    begin = time.time()
    with ledger.signing(key):
      try:
        result = one(trial, run, beside, train)
      except BaseException:
        ledger.release(key)
        raise
    result['seconds'] = round(time.time() - begin, 1)
    result['run'] = os.path.relpath(run, folder)
    ledger.finish(key, trial, result)
    ledger.write_table()
    if not keep_checkpoints:
      shutil.rmtree(os.path.join(run, checkpoint.FOLDER), ignore_errors=True)
    error = ('diverged' if result['diverged'] else
             f'error {result["test_error"]:.2%}')
    say(f'{trial.index} {trial.name} {error} {result["seconds"]:.0f} s')


def elsewhere(trial, folder):
  """The result of the same run in another study beside this one, or None."""
  beside = os.path.dirname(os.path.abspath(folder))
  for table in sorted(glob.glob(os.path.join(
      glob.escape(beside), '*', ledger_lib.TABLE))):
    path = os.path.dirname(table)
    if os.path.samefile(path, folder):
      continue
    for row in ledger_lib.read_table(path):
      changes = {k: row.get(k) for k in trial.changes}
      if (row.get('config'), changes) == (trial.config, trial.changes):
        return {**{k: row[k] for k in ledger_lib.RESULT},
                'run': os.path.join(
                    os.pardir, os.path.basename(path), row['run'])}
  return None


def one(trial, run, beside, train):
  """Trains one trial; returns its result, see `Ledger.finish`."""
  config = plan.evaluated(plan.build(trial, beside))
  os.makedirs(run, exist_ok=True)
  with open(os.path.join(run, 'log.txt'), 'a', encoding='utf-8') as log, \
      contextlib.redirect_stdout(log):
    try:
      found = train.train_and_evaluate(config, run)
    except train.NonFiniteLoss:
      found = None
  rows = metric_writer.read(run)
  steps = max((row['step'] for row in rows), default=0)
  if found is None:
    return {'test_error': None, 'validation_error': None, 'diverged': True,
            'steps': steps}
  error = lambda part: next(
      (1 - found[name] for name in (f'{part}_ema/top1', f'{part}/top1')
       if name in found), None)
  # The part to report on: the one that is not there to select.
  part = next(n for n in config.evaluators if n != plan.VALIDATION)
  return {'test_error': error(part), 'validation_error': error(plan.VALIDATION),
          'diverged': False, 'steps': steps}


def spawn(argv, count):
  """Runs `count` copies of a vit-jax command; returns the worst exit code.

  On CPUs each has one core: a small model gains nothing from a second.
  """
  env = {**os.environ, 'NPROC': '1', 'OMP_NUM_THREADS': '1'}
  children = [subprocess.Popen(
      [sys.executable, '-m', 'vit_jax', *argv], env=env) for _ in range(count)]
  try:
    return max((child.wait() for child in children), key=abs)
  except KeyboardInterrupt:
    for child in children:
      child.wait()  # the terminal sent them the signal, too: they save
    raise
