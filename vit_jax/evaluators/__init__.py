"""Evaluators: one file each; `run(variables)` yields (name, value)."""
import json

from etils import epath
import jax

from vit_jax import choices
from vit_jax import metric_writer
from vit_jax import sharding
from vit_jax.evaluators.classification import Classification
from vit_jax.metric_writer import say

PER_CLASS = 'per_class.json'
EVALUATORS = {'classification': Classification}


def create(config, predict, data, mesh, batch_size, estimate):
  """Returns the `Suite` of a config section of {name: section}.

  Args:
    config: sections with `name`, a key of EVALUATORS, and what that one takes.
    predict: see `train_step.make_predict`.
    data: see `input_pipeline.open_data`.
    mesh: see `sharding`.
    batch_size: over all devices and processes.
    estimate: see `precise_bn.create`; called before each evaluation.

  Raises:
    ValueError: unknown kind of evaluator, or a split that is not there.
  """
  sharding.check_batch_size('eval.batch_size', batch_size, mesh)
  made = {}
  for name in config:
    section = config[name]
    if not hasattr(section, 'items'):
      raise ValueError(f'evaluators.{name}={section!r} is no section.\n'
                       "Write dict(name='classification', split='test').")
    make = choices.pick(EVALUATORS, section['name'], 'evaluator')
    made[name] = make(section, predict, data, mesh, batch_size)
  return Suite(made, estimate)


class Suite:
  """Evaluators that run together, on the weights and on their averages.

  Attributes:
    names: of the evaluators.
    by_class: {'<name>' or '<name>_ema': {class: {'top1', 'count'}}}, of the
      last run; {} before the first.
  """

  def __init__(self, evaluators, estimate=lambda state, should_stop: state):
    """Takes {name: evaluator}, and what is done to a state beforehand.

    Args:
      evaluators: see `create`.
      estimate: see `precise_bn.create`.
    """
    self._evaluators = evaluators
    self._estimate = estimate
    self.names = tuple(evaluators)
    self.by_class = {}

  def run(self, state, step, writer, stop):
    """Runs all on a `TrainState` and writes one row.

    Args:
      state: `TrainState`.
      step: updates done.
      writer: `MetricWriter`.
      stop: `preemption.Stop`; a signal ends the evaluation without a row: the
        resumed run does it again.

    Returns:
      {'<name>/top1': ..., '<name>_ema/top1': ...}.
    """
    row = self.evaluate(
        state, lambda line: say(f'step {step} {line}'), stop.requested)
    if row:
      writer.write(step, row)
    return row

  def evaluate(self, state, report=lambda line: None,
               should_stop=lambda: False):
    """Runs all on a `TrainState`.

    Args:
      state: `TrainState`.
      report: called with a line for each evaluator and kind of weights.
      should_stop: asked between batches; True ends the evaluation early.

    Returns:
      The row of `run`; {} if it was ended.
    """
    state = self._estimate(state, should_stop)
    row = {}
    for name, evaluator in self._evaluators.items():
      weights = {name: state.variables()}
      if state.ema:
        weights[f'{name}_ema'] = state.ema_variables()
      for label, variables in weights.items():
        found = dict(evaluator.run(variables, should_stop))
        if should_stop():
          return {}
        row |= {f'{label}/{key}': value for key, value in found.items()}
        self.by_class[label] = evaluator.by_class
        report(f'{label}: top-1 {found["top1"]:.2%}, top-5 '
               f'{found["top5"]:.2%}, loss {found["loss"]:.4f}, evaluated '
               f'{found["count"]:,}/{evaluator.num_examples:,}'
               + (f', {found["unreadable"]:,} unreadable'
                  if found['unreadable'] else ''))
    return row

  def check_metric(self, name, with_ema):
    """Raises ValueError unless `name` is '' or one where more is better."""
    suffixes = ('', '_ema') if with_ema else ('',)
    known = [f'{e}{s}/{k}' for e in self.names for s in suffixes
             for k in ('top1', 'top5')]
    if name and name not in known:
      raise ValueError(choices.unknown(name, known, 'checkpoint.keep_best'))

  def write_classes(self, workdir):
    """Writes accuracy by class to per_class.json, and prints the lowest."""
    if jax.process_index() or not self.by_class:
      return
    text = json.dumps(self.by_class, indent=1, ensure_ascii=False)
    metric_writer.attempt(
        PER_CLASS, epath.Path(workdir, PER_CLASS).write_text, text)
    for label, classes in self.by_class.items():
      lowest = sorted(classes.items(), key=lambda item: item[1]['top1'])[:10]
      say(f'{label} by class, lowest first: ' + ', '.join(
          f'{c} {v["top1"]:.1%} of {v["count"]}' for c, v in lowest))
