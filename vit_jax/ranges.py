"""Numbers of a config, checked where they are used."""
import math


def check(name, value, low=-math.inf, high=math.inf, below=math.inf):
  """Returns a number of a config.

  Args:
    name: its key, for the message.
    value: what stands there.
    low, high: bounds, included.
    below: bound, excluded.

  Raises:
    ValueError: no finite number within the bounds; cause and remedy.
  """
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if (is_number and abs(value) < math.inf and low <= value <= high
      and value < below):
    return value
  wanted = [text for text, used in (
      (f'at least {low:g}', low > -math.inf),
      (f'at most {high:g}', high < math.inf),
      (f'below {below:g}', below < math.inf)) if used]
  bounds = ', '.join(['', ' and '.join(wanted)]) if wanted else ''
  raise ValueError(f'{name}={str(value)[:60]} is out of range.\n'
                   f'Give a finite number{bounds}.')
