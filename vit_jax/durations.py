"""Durations are written in the unit that the author thinks in.

A section holds `NAME_steps`, `NAME_epochs`, `NAME_examples` or `NAME_percent`
(of the whole run); all are resolved once, against the real size of the data.
"""
import dataclasses

from vit_jax import ranges

MAX_STEPS = 2**31 - 2  # the state counts them in an int32
UNITS = ('steps', 'epochs', 'examples', 'percent')


@dataclasses.dataclass(frozen=True)
class Units:
  """How long things are in this run.

  Attributes:
    num_examples: training examples, N.
    batch_size: examples a step, over all devices and processes, B.
    steps_per_epoch: N / B when batches straddle epochs (`exact`), N // B
      when the tail of an epoch is dropped (`floor`, the paper's code).
  """
  num_examples: int
  batch_size: int
  steps_per_epoch: float

  @classmethod
  def of(cls, num_examples, batch_size, epoch):
    if epoch == 'floor':
      if num_examples < batch_size:
        raise ValueError(
            f'A batch of {batch_size} is more than the {num_examples} training '
            "examples, and input.epoch='floor' drops what fills no batch.\n"
            "Lower global_batch_size, or set input.epoch='exact'.")
      return cls(num_examples, batch_size, num_examples // batch_size)
    return cls(num_examples, batch_size, num_examples / batch_size)

  def describe(self, steps):
    """'1,297 training examples, 811 steps of 64 (40 epochs)'."""
    return (f'{self.num_examples:,} training examples, {steps:,} steps of '
            f'{self.batch_size:,} ({steps / self.steps_per_epoch:.4g} epochs)')


def find(section, name):
  """Returns the (unit, value) of `name` in a config section.

  Raises:
    ValueError: none or several of the four spellings are there.
  """
  found = [u for u in UNITS if f'{name}_{u}' in section]
  if len(found) != 1:
    spellings = ', '.join(f'{name}_{u}' for u in UNITS)
    raise ValueError(
        f'{len(found) or "none"} of {spellings} given.\n'
        'Give exactly one of them.')
  return found[0], section[f'{name}_{found[0]}']


def to_steps(section, name, units, total_steps=None):
  """Resolves `name` of a config section to a whole number of steps.

  Args:
    section: has exactly one of name_{steps, epochs, examples, percent}.
    name: the duration's name, such as 'warmup'.
    units: `Units` of the run.
    total_steps: what percent refers to; None while that is resolved.

  Returns:
    int >= 0; a duration above 0 is at least one step.

  Raises:
    ValueError: negative, not exactly one spelling, or percent of nothing.
  """
  steps = _fractional(section, name, units, total_steps)
  ranges.check(f'The number of steps of {name}_*', steps, 0, MAX_STEPS)
  return max(1, round(steps)) if steps > 0 else 0


def cadence(section, units, total_steps):
  """Returns `due(step) -> bool` of a section with an `every_*` duration.

  The last step is always due; with 0 it is the only one. An epoch may be a
  fraction of a step more than a whole number of them: the k-th time is due at
  round(k * every), so that `5 epochs` and `10 epochs` coincide.
  """
  every = _fractional(section, 'every', units, total_steps)
  every = max(every, 1.0) if every else 0.0
  return lambda step: step == total_steps or (
      every > 0 and step > 0 and step == round(round(step / every) * every))


def _fractional(section, name, units, total_steps):
  """`to_steps` before rounding."""
  unit, value = find(section, name)
  ranges.check(f'{name}_{unit}', value, 0)
  if unit == 'percent' and total_steps is None:
    raise ValueError(f'{name}_percent has nothing to be a part of.\n'
                     f'Give {name}_steps, {name}_epochs or {name}_examples.')
  return {
      'steps': lambda: value,
      'epochs': lambda: value * units.steps_per_epoch,
      'examples': lambda: value / units.batch_size,
      'percent': lambda: value / 100 * (total_steps or 0),
  }[unit]()
