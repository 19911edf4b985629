"""Final metrics of finished runs by config, mean and spread over seeds.

  vit-jax results RUN_DIR [RUN_DIR ...] [--metric test_ema/top1]

Runs whose configs differ in nothing but the seed form a row; a row is named by
the keys in which the groups differ. Without --metric it is the averaged
weights' top-1 where a run kept an average, else the raw weights'. Members of a
population are runs.
"""
import argparse
import json
import math
import statistics

from etils import epath

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
  args = parser.parse_args(argv)
  print(table(args.runs, args.metric))
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
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    stats = [statistics.mean(values), spread, min(values), max(values)]
    lines.append('| ' + ' | '.join(
        [*map(str, cells), str(len(values)), *(f'{v:.2%}' for v in stats)])
        + ' |')
  return '\n'.join(lines)


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
