"""Learning-rate schedules: step -> fraction of the base rate, in [0, 1].

A schedule is shape x warm-up x cool-down. The shape is a function of the
progress through the run; the first update is step 0, so that a warm-up from 0
makes the first update a null one, as in big_vision.
"""
import jax.numpy as jnp
import numpy as np

from vit_jax import choices
from vit_jax import durations
from vit_jax import ranges

# What progress counts: 'after_warmup' is big_vision's and the ViT papers',
# 'from_start' pycls's, where warm-up only scales the running cosine.
PROGRESS = ('after_warmup', 'from_start')
# pycls sets the rate once an epoch, everyone else once a step.
PER = ('step', 'epoch')


def cosine(final):
  """Half a period from 1 to `final` (a fraction of the base rate)."""
  return lambda p: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * p))


def linear(final):
  """A line from 1 to `final`."""
  return lambda p: final + (1 - final) * (1 - p)


SHAPES = {'cosine': cosine, 'linear': linear}
NAMES = (*SHAPES, 'rsqrt', 'staircase', 'constant')


def create(config, units, total_steps):
  """Returns `schedule(step) -> float32 []` from a config section.

  Args:
    config: `name`; `warmup_*` (duration) and `warmup_start` (fraction of the
      shape at step 0); `cooldown_*` (duration of the last, linear fall to 0);
      `per`; cosine and linear: `final`, `progress`; rsqrt: `timescale_*`;
      staircase: `drops` (fractions of the run after which the rate falls) and
      `drop_factor` (what it is multiplied with each time).
    units: `durations.Units`.
    total_steps: length of the run.

  Source: big_vision's formulae; the paper's code (pycls) for `per='epoch'`,
  `progress='from_start'`, `warmup_start=0.1`, `final=0.005`; big_transfer's
  bit_hyperrule.py for `staircase`.

  Raises:
    ValueError: unknown name, a fraction that is none, or a warm-up longer than
      the run.
  """
  name = config['name']
  if name not in NAMES:
    raise ValueError(choices.unknown(name, NAMES, 'schedule'))
  steps = lambda key: durations.to_steps(config, key, units, total_steps)
  fraction = lambda key: ranges.check(f'schedule.{key}', config[key], 0, 1)
  warmup, cooldown = steps('warmup'), steps('cooldown')
  warmup_start, per = fraction('warmup_start'), config['per']
  if per not in PER:
    raise ValueError(choices.unknown(per, PER, 'value of schedule.per'))
  if warmup + cooldown > total_steps:
    raise ValueError(
        f'warm-up ({warmup} steps) and cool-down ({cooldown}) are longer than '
        f'the run ({total_steps} steps).\n'
        'Train longer or shorten schedule.warmup_*.')

  if name in SHAPES:
    shape = SHAPES[name](fraction('final'))
    progress = config['progress']
    if progress not in PROGRESS:
      raise ValueError(
          choices.unknown(progress, PROGRESS, 'value of schedule.progress'))
    start = warmup if progress == 'after_warmup' else 0
    span = max(total_steps - start, 1)
    value = lambda t: shape(jnp.clip((t - start) / span, 0, 1))
  elif name == 'rsqrt':
    timescale = max(steps('timescale'), 1)
    value = lambda t: 1 / jnp.sqrt(1 + jnp.maximum(t - warmup, 0) / timescale)
  elif name == 'staircase':
    drops, factor = config['drops'], fraction('drop_factor')
    if not isinstance(drops, (tuple, list)):
      raise ValueError(f'schedule.drops={drops!r} is no tuple.\n'
                       'Give fractions of the run, such as (0.3, 0.6, 0.9).')
    ends = np.array([
        round(total_steps * ranges.check('schedule.drops', d, 0, 1))
        for d in drops], np.float32)
    # A step at which the rate falls is the last one at the old rate.
    value = lambda t: factor ** jnp.sum(t > ends).astype(jnp.float32)
  else:
    value = lambda t: jnp.ones(())

  def schedule(step):
    t = jnp.asarray(step)
    if per == 'epoch':
      t = start_of_epoch(t, units.steps_per_epoch)
    t = t.astype(jnp.float32)
    out = value(t)
    if warmup:
      ramp = jnp.minimum(t / warmup, 1)
      out *= warmup_start * (1 - ramp) + ramp
    if cooldown:
      out *= jnp.clip((total_steps - t) / cooldown, 0, 1)
    return out.astype(jnp.float32)

  return schedule


def start_of_epoch(step, steps_per_epoch):
  """Rounds a step down to the (possibly fractional) step its epoch began at."""
  if float(steps_per_epoch).is_integer():
    n = int(steps_per_epoch)
    return step // n * n
  # Batches straddle epochs: a step belongs to the epoch of its first example.
  # The nudge keeps float32 division from falling short of a whole epoch.
  return jnp.floor(step / steps_per_epoch + 1e-5) * steps_per_epoch
