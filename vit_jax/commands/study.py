"""Runs a study of many trials, and reports what it shows.

  vit-jax study run configs/studies/edf.py --dir runs/studies --workers 2
  vit-jax study report runs/studies

`run` prints what it will cost, then trains: the same command again goes on, on
the same machine or, with a --storage that they share, on others at the same
time. Trials of a worker that died are taken again and go on from their last
checkpoint. What another study in DIR has run is not run twice.
DIR/NAME/trials.csv has a row for each finished trial, DIR/NAME/runs its curves.
`report` writes report.md and report.html beside them, of what is there.

Flags of run:
  --dir DIR         results go to DIR/NAME, of the study's name
  --study NAME      in the storage (the study's)
  --storage URL     of Optuna (a SQLite file); with others, such as
                    postgresql://user:password@host/db, many machines draw
  --workers N       processes here; 1: this one (1)
  --population P    trials of an arm trained at once, in one program, for small
                    models on an accelerator (1)
  --keep_checkpoints    and model files, of finished runs
  --only_cost       prints what it will cost, and stops
"""
import argparse
import os

from vit_jax import choices
from vit_jax import config as config_lib
from vit_jax import ranges
from vit_jax.studies import ledger
from vit_jax.studies import plan
from vit_jax.studies import report
from vit_jax.studies import worker


def main(argv):
  """Runs the command; returns its exit code."""
  parts = {'run': _run, 'report': _report}
  return choices.pick(parts, argv[0] if argv else '', 'part of study')(argv[1:])


def _run(argv):
  parser = argparse.ArgumentParser(prog='vit-jax study run', allow_abbrev=False)
  parser.add_argument('config')
  parser.add_argument('--only_cost', action='store_true')
  add_arguments(parser)
  args = parser.parse_args(argv)
  study = config_lib.load(args.config)
  folder = os.path.join(args.dir, study.name)
  beside = os.path.dirname(os.path.abspath(args.config.partition(':')[0]))
  trials = plan.trials_of(study, folder)
  name = args.study or study.name
  if not args.worker:
    steps, flop = plan.cost(trials, beside)
    print(f'{name}: {len(trials)} trials in {len(study.arms)} arms, {steps:,} '
          f'steps, {flop:.3g} FLOP: on a GPU of 790 TFLOP/s used at 55 % about '
          f'{flop / (0.55 * 790e12) / 3600:.2g} h, an estimate', flush=True)
  if args.only_cost:
    return 0
  if not args.worker:
    report.describe(folder, ['study', 'run', *argv], study)
  return work(['study', 'run', *argv], args, trials, name, folder, beside)


def _report(argv):
  parser = argparse.ArgumentParser(
      prog='vit-jax study report', allow_abbrev=False)
  parser.add_argument('dir')
  for path in report.write(parser.parse_args(argv).dir):
    print(f'wrote {path}')
  return 0


def add_arguments(parser):
  """Adds the flags that `run` and sweep have in common."""
  parser.add_argument('--dir', required=True)
  parser.add_argument('--study', default='')
  parser.add_argument('--storage', default='')
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--population', type=int, default=1)
  parser.add_argument('--keep_checkpoints', action='store_true')
  # One of the processes that --workers asked for.
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)


def work(argv, args, trials, name, folder, beside, space=None):
  """Trains the trials that are left, here or in processes.

  Args:
    argv: the command, for processes of it.
    args: parsed, with `add_arguments`.
    trials: [plan.Trial].
    name: of the study in the storage.
    folder: of its results.
    beside: folder that paths of the trials' configs are relative to.
    space: {key: (low, high)} to sample by TPE in; None: trials as they are.
  """
  from vit_jax import train
  ranges.check('--workers', args.workers, 1)
  ranges.check('--population', args.population, 1)
  for trial in {t.config: t for t in trials}.values():
    plan.build(trial, beside)  # a fault in a config is found before all
  book = ledger.Ledger(
      name, trials, folder, args.storage, 'tpe' if space else '', space)
  code = 0
  if args.workers > 1 and not args.worker:
    code = worker.spawn([*argv, '--worker'], args.workers)
  else:
    try:
      worker.work(book, folder, beside, train, print, args.keep_checkpoints,
                  args.population)
    except train.Stopped as e:
      print(e)
      return train.STOPPED
  rows = book.write_table()
  if not args.worker:
    print(f'{len(rows)} of {len(trials)} trials are done: '
          f'{os.path.join(folder, ledger.TABLE)}')
  return code
