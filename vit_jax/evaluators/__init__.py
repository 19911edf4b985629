"""Evaluators: one file each; `run(variables)` yields (name, value)."""
import json

import jax

from vit_jax import choices
from vit_jax import sharding
from vit_jax.evaluators.classification import Classification
from vit_jax.metric_writer import say

EVALUATORS = {'classification': Classification}


def create(config, predict, data, mesh, batch_size):
  """Returns {name: evaluator} from a config section of {name: section}.

  Raises:
    ValueError: unknown kind of evaluator, or a split that is not there.
  """
  sharding.check_batch_size('eval.batch_size', batch_size, mesh)
  made = {}
  for name in config:
    section = config[name]
    make = choices.pick(EVALUATORS, section['name'], 'evaluator')
    made[name] = make(section, predict, data, mesh, batch_size)
  return made


def run(evals, state, step, writer, stop):
  """Runs all evaluators on the weights and their averages; writes one row.

  Args:
    evals: see `create`.
    state: `TrainState`.
    step: updates done.
    writer: `MetricWriter`.
    stop: `preemption.Stop`; a signal ends the evaluation without a row: the
      resumed run does it again.

  Returns:
    {'<name>/top1': ..., '<name>_ema/top1': ...}.
  """
  row = {}
  for name, evaluator in evals.items():
    weights = {name: state.variables()}
    if state.ema:
      weights[f'{name}_ema'] = state.ema_variables()
    for label, variables in weights.items():
      found = dict(evaluator.run(variables, stop.requested))
      if stop.requested():
        return {}
      row |= {f'{label}/{key}': value for key, value in found.items()}
      say(f'step {step} {label}: top-1 {found["top1"]:.2%}, top-5 '
          f'{found["top5"]:.2%}, loss {found["loss"]:.4f}, evaluated '
          f'{found["count"]}/{evaluator.num_examples}')
  if row:
    writer.write(step, row)
  return row


def check_metric(name, evals, with_ema):
  """Raises ValueError unless `name` is '' or a metric where more is better."""
  suffixes = ('', '_ema') if with_ema else ('',)
  known = [f'{e}{s}/{k}' for e in evals for s in suffixes
           for k in ('top1', 'top5')]
  if name and name not in known:
    raise ValueError(choices.unknown(name, known, 'checkpoint.keep_best'))


def report_classes(evals, path):
  """Writes and prints accuracy by class, of the last weights evaluated.

  Args:
    evals: see `create`.
    path: of a JSON file {evaluator: {class: {'top1', 'count'}}}.
  """
  table = {name: e.by_class() for name, e in evals.items() if e.by_class()}
  if jax.process_index() or not table:
    return
  with open(path, 'w') as f:
    json.dump(table, f, indent=1, ensure_ascii=False)
  for name, classes in table.items():
    worst = sorted(classes.items(), key=lambda item: item[1]['top1'])[:10]
    say(f'{name} by class, lowest first: ' + ', '.join(
        f'{c} {v["top1"]:.1%} of {v["count"]}' for c, v in worst))
