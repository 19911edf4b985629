"""Evaluators: one file each; `run(variables)` yields (name, value)."""
from vit_jax import choices
from vit_jax.metric_writer import say
from vit_jax.evaluators.classification import Classification

EVALUATORS = {'classification': Classification}


def create(config, predict, data, mesh, batch_size):
  """Returns {name: evaluator} from a config section of {name: section}.

  Raises:
    ValueError: unknown kind of evaluator, or a split that is not there.
  """
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
