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
from vit_jax import model_file
from vit_jax import population
from vit_jax.studies import ledger as ledger_lib
from vit_jax.studies import plan
from vit_jax.studies import spaces

RUNS = 'runs'
# Keys of a config -> of a population's members.
MEMBER = {spaces.LR: 'lr', spaces.WD: 'weight_decay', 'seed': 'seed'}


def work(ledger, folder, beside, train, say, keep_checkpoints=False,
         together=1):
  """Trains trials until none is left.

  Args:
    ledger: ledger.Ledger.
    folder: of the study's results; runs go below it.
    beside: folder that paths of the trials' configs are relative to.
    train: module with `train_and_evaluate`, `NonFiniteLoss` and `Stopped`.
    say: called with a line for each trial.
    keep_checkpoints: whether finished runs keep theirs.
    together: how many trials of an arm to train at once; see `population`.

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
    group = [claimed]
    while len(group) < together and (more := ledger.claim(trial.arm)):
      group.append(more)
    trials, keys = zip(*group, strict=True)
    begin = time.time()
    with contextlib.ExitStack() as stack:
      for key in keys:
        stack.enter_context(ledger.signing(key))
      try:
        results = (several(trials, run, beside) if together > 1 else
                   [one(trial, run, beside, train)])
      except BaseException:
        for key in keys:
          ledger.release(key)
        raise
    seconds = round((time.time() - begin) / len(group), 1)
    for trial, key, result in zip(trials, keys, results, strict=True):
      result |= {'seconds': seconds, 'run': os.path.relpath(run, folder)}
      ledger.finish(key, trial, result)
      error = ('diverged' if result['diverged'] else
               f'error {result["test_error"]:.2%}')
      say(f'{trial.index} {trial.name} {error} {seconds:.0f} s')
    ledger.write_table()
    if not keep_checkpoints:
      shutil.rmtree(os.path.join(run, checkpoint.FOLDER), ignore_errors=True)
      with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(run, model_file.NAME))


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
  steps = max((row['step'] for row in metric_writer.read(run)), default=0)
  return result_of(config, found, steps)


def several(trials, run, beside):
  """Trains trials of one arm at once; returns their results.

  They are not saved on the way: what is interrupted starts anew.

  Raises:
    ValueError: trials that differ in more than a population's members may.
  """
  members = []
  for trial in trials:
    own = {k: v for k, v in trial.changes.items() if k in MEMBER}
    rest = {k: v for k, v in trial.changes.items() if k not in MEMBER}
    shared = {k: v for k, v in trials[0].changes.items() if k not in MEMBER}
    if rest != shared:
      raise ValueError(
          'Trials of a population differ in '
          f'{", ".join(k for k in rest if rest[k] != shared.get(k))}.\n'
          f'Leave --population out, or vary {", ".join(MEMBER)} only.')
    members.append({MEMBER[k]: v for k, v in own.items()})
  config = plan.evaluated(plan.build(trials[0], beside))
  shutil.rmtree(run, ignore_errors=True)
  os.makedirs(run)
  with open(os.path.join(run, 'log.txt'), 'w', encoding='utf-8') as log, \
      contextlib.redirect_stdout(log):
    found = population.train(config, members, run)
  steps = max(row['step'] for row in metric_writer.read(run))
  return [result_of(
      config, None if member['diverged_step'] else member['metrics'],
      member['diverged_step'] or steps) for member in found]


def result_of(config, found, steps):
  """What `Ledger.finish` takes, of metrics; None: the run diverged."""
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
