"""Final metrics of finished runs by config, mean and spread over seeds.

  vit-jax results RUN_DIR [RUN_DIR ...] [--metric test_ema/top1]
                  [--versus RUN_DIR [RUN_DIR ...]]

Runs whose configs differ in nothing but the seed form a row; a row is named by
the keys in which the groups differ. Without --metric it is the averaged
weights' top-1 where a run kept an average, else the raw weights'. Members of a
population are runs.

With --versus both lists are one row each, and the differences between runs of
equal seeds have a mean and a 95 % interval: Student's t.
"""
import argparse
import json
import math
import statistics

from etils import epath
from scipy import stats

from vit_jax import config as config_lib
from vit_jax import metric_writer
from vit_jax import workdir

SEEDS = ('seed', 'data_seed')
DEFAULT_METRICS = ('test_ema/top1', 'test/top1', 'val_ema/top1', 'val/top1')


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax results')
  parser.add_argument('runs', nargs='+')
  parser.add_argument('--metric', default='')
  parser.add_argument('--versus', nargs='+', default=[])
  args = parser.parse_args(argv)
  print(paired(args.runs, args.versus, args.metric) if args.versus
        else table(args.runs, args.metric))
  return 0


def table(runs, metric=''):
  """Returns a Markdown table; see the module's docstring.

  Raises:
    ValueError: a folder without a finished run.
  """
  groups = {}
  for config, value in (pair for run in runs for pair in read(run, metric)):
    key = tuple(sorted((k, json.dumps(v)) for k, v in config.items()
                       if k not in SEEDS and not config_lib.is_how(k)))
    groups.setdefault(key, []).append(value)
  sets = [set(key) for key in groups]
  differing = set.union(*sets) - set.intersection(*sets)
  keys = {k for k, _ in differing}
  # Where components differ, their own settings differ with them: name those.
  kinds = ('name', 'stem', 'size')
  names = sorted(k for k in keys if k.split('.')[-1] in kinds) or sorted(keys)
  lines = ['| ' + ' | '.join([*names, 'runs', 'mean', 'sd', 'min', 'max'])
           + ' |', '|' + '---|' * (len(names) + 5)]
  for key, values in groups.items():
    cells = [json.loads(dict(key).get(n, '"-"')) for n in names]
    lines.append(_line(cells, values))
  return '\n'.join(lines)


def _line(cells, values):
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  numbers = [statistics.mean(values), spread, min(values), max(values)]
  cells = [*map(str, cells), str(len(values)), *(f'{v:.2%}' for v in numbers)]
  return '| ' + ' | '.join(cells) + ' |'


def paired(runs, others, metric=''):
  """Returns a table of two lists of runs, and their difference by seed.

  Raises:
    ValueError: a folder without a finished run, or seeds that are not the same
      two or more, each once, on both sides.
  """
  sides = [[row for run in side for row in read(run, metric)]
           for side in (runs, others)]
  seeds = [[config['seed'] for config, _ in side] for side in sides]
  if sorted(seeds[0]) != sorted(seeds[1]) or len(set(seeds[0])) < max(
      len(seeds[0]), 2):
    raise ValueError(
        f'The seeds are {seeds[0]} and, after --versus, {seeds[1]}.\n'
        'Give runs of the same seeds on both sides, two or more, each once.')
  ours, theirs = (dict(zip(numbers, (value for _, value in side), strict=True))
                  for numbers, side in zip(seeds, sides, strict=True))
  gains = [ours[seed] - theirs[seed] for seed in sorted(ours)]
  mean = statistics.mean(gains)
  half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
  return '\n'.join([
      '| side | runs | mean | sd | min | max |', '|' + '---|' * 6,
      _line(['runs'], list(ours.values())),
      _line(['versus'], list(theirs.values())),
      f'Difference of {len(gains)} pairs of equal seeds: {100 * mean:+.2f} '
      f'points, 95 % interval {100 * (mean - half):+.2f} to '
      f'{100 * (mean + half):+.2f}.'])


def read(run, metric=''):
  """Yields (flat config, final value of the metric) of a run's folder.

  One; or, of a population's, one for each member.
  """
  rows = metric_writer.read(run)
  wanted = (metric,) if metric else DEFAULT_METRICS
  found = [n for n in wanted if any(n in row for row in rows)]
  if not found:
    raise ValueError(
        f'{run} holds no {" or ".join(wanted)}.\n'
        'Give folders of runs that were evaluated, or another --metric.')
  path = epath.Path(run) / workdir.CONFIG
  config = config_lib.flatten(json.loads(path.read_text()))
  last = {r.get('member'): r[found[0]] for r in rows if found[0] in r}
  members = dict(enumerate(config.pop('members', ()))) or {None: {}}
  for i, member in members.items():
    own = {k if k == 'seed' else f'optimizer.{k}': v for k, v in member.items()}
    yield {**config, **own}, math.nan if last[i] is None else last[i]
