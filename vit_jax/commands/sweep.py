"""Trains one config at many points of a space of hyperparameters.

  vit-jax sweep --config configs/digits.py:stem=conv --space digits-adamw \
    --trials 64 --dir runs/sweep --workers 2
  vit-jax sweep --config FILE --dir DIR \
    --space optimizer.lr=1e-4:1e-2,model.dropout=.01:.3

The points are a function of (--seed, trial), drawn before the first one starts;
workers only take them. The same command again goes on, on the same machine or,
with a --storage that they share, on others at the same time; trials of a worker
that died are taken again and go on from their last checkpoint. trials.csv in
--dir has a row for each finished trial, runs/ its curves (metrics.jsonl).

Flags:
  --config FILE[:arg=value,...]
  --space SPACE     a row of vit_jax/studies/spaces.py, or KEY=LOW:HIGH,...
  --trials N        (64)
  --points random|grid|tpe   (random)
  --seed N          of the random points (0)
  --dir DIR         of the table and the runs
  --study NAME      in the storage (the name of --dir)
  --storage URL     of Optuna (a SQLite file in --dir); with others, such as
                    postgresql://user:password@host/db, many machines draw
  --workers N       processes here; 1: this one (1)
  --population P    trials trained at once, in one program, for small models on
                    an accelerator (1)
  --keep_checkpoints    and model files, of finished runs
"""
import argparse
import os

from vit_jax import recipes
from vit_jax.commands import study as study_command
from vit_jax.studies import plan
from vit_jax.studies import spaces


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax sweep', allow_abbrev=False)
  parser.add_argument('--config', required=True)
  parser.add_argument('--space', required=True)
  parser.add_argument('--trials', type=int, default=64)
  parser.add_argument(
      '--points', choices=('random', 'grid', 'tpe'), default='random')
  parser.add_argument('--seed', type=int, default=0)
  study_command.add_arguments(parser)
  args = parser.parse_args(argv)
  space = spaces.parse(args.space)
  name = args.study or os.path.basename(os.path.abspath(args.dir))
  study = recipes.sweep(name, args)
  trials = plan.trials_of(study)
  spaces.check(space, plan.build(trials[0]))
  return study_command.work(
      ['sweep', *argv], args, trials, name, args.dir, '',
      space if args.points == 'tpe' else None)
