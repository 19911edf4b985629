"""Exponential moving averages of weights and BatchNorm statistics.

An EMA is an `alpha(step) -> float32 []`: how far the average moves to the new
value after update `step` (from 0); 0 is no move, 1 a copy. Averages are kept
in float32: in bfloat16 a small alpha stalls.
"""
import jax
import jax.numpy as jnp

from vit_jax import choices
from vit_jax import durations
from vit_jax import ranges


def pycls(config, units, total_steps, warmup_steps):
  """The paper's rule, as in its code.

  Every `every_steps` updates alpha = min(1, alpha * every * B / epochs), which
  makes the average's length a fixed share of the run whatever its length; a
  plain copy during warm-up.
  """
  every = max(durations.to_steps(config, 'every', units, total_steps), 1)
  epochs = total_steps / units.steps_per_epoch
  alpha = ranges.check('ema.alpha', config['alpha'], 0, 1)
  alpha = min(1.0, alpha * every * units.batch_size / epochs)
  return lambda step: jnp.where(
      step % every, 0.0, jnp.where(step < warmup_steps, 1.0, alpha))


def decay(config, units, total_steps, warmup_steps):
  """average <- decay * average + (1 - decay) * new, after every update.

  The decay starts at 1/10 and grows as (1 + t) / (10 + t) towards its value,
  so that the average forgets the initial weights (TensorFlow's `num_updates`).
  """
  del units, total_steps, warmup_steps
  value = ranges.check('ema.decay', config['decay'], 0, below=1)
  return lambda step: 1 - jnp.minimum(value, (1 + step) / (10 + step))


RULES = {'pycls': pycls, 'decay': decay}


def create(config, units, total_steps, warmup_steps):
  """Returns `alpha(step)`, or None where `name` is 'none'.

  Args:
    config: `name`; pycls: `alpha`, `every_*`; decay: `decay`.
    units: `durations.Units`.
    total_steps: length of the run.
    warmup_steps: the schedule's.

  Raises:
    ValueError: unknown name.
  """
  if config['name'] == 'none':
    return None
  rule = choices.pick({**RULES, 'none': None}, config['name'], 'EMA rule')
  return rule(config, units, total_steps, warmup_steps)


def update(average, new, alpha):
  """Moves a tree of averages towards `new` by `alpha` (float32 [])."""
  move = lambda tree: jax.tree.map(
      lambda a, n: a + alpha * (n - a), tree, new)
  # A conditional, because most steps of the paper's rule change nothing; and a
  # copy has to be exact: a + 1 * (n - a) is not n.
  copy = lambda tree: jax.tree.map(lambda a, n: n.astype(a.dtype), tree, new)
  return jax.lax.switch(
      jnp.where(alpha == 0, 0, jnp.where(alpha == 1, 1, 2)),
      [lambda tree: tree, copy, move], average)
