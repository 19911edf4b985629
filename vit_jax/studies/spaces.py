"""Ranges of hyperparameters, and the points that are drawn from them."""
import hashlib

import numpy as np

from vit_jax import choices

LR, WD = 'optimizer.lr', 'optimizer.weight_decay'
# Rows: name -> {key of the config: (low, high)}; log-uniform. A good centre
# times [1/8, 4]: "models are trainable with smaller but not larger values".
SPACES = {
    # "Early Convolutions ...", Table 4 right, for batch 2048.
    'vit-adamw': {LR: (2.5e-4, 8e-3), WD: (0.02, 0.8)},
    'vit-sgd': {LR: (0.1, 3.2), WD: (4e-6, 1.2e-4)},
    # Ours, for batch 64 on scikit-learn's digits: 4e-3, 0.1; 0.05, 1e-4.
    'digits-adamw': {LR: (5e-4, 1.6e-2), WD: (0.0125, 0.4)},
    'digits-sgd': {LR: (6.25e-3, 0.2), WD: (1.25e-5, 4e-4)},
    # Ours, for batch 128 on CIFAR-10; 2e-3, 0.1; 0.1, 1e-4.
    'cifar-adamw': {LR: (2.5e-4, 8e-3), WD: (0.0125, 0.4)},
    'cifar-sgd': {LR: (0.0125, 0.4), WD: (1.25e-5, 4e-4)},
}


def parse(text):
  """A space by its name, or 'optimizer.lr=1e-4:1e-2,model.dropout=0.01:0.3'.

  Returns:
    {key of a config: (low, high)}.

  Raises:
    ValueError: no such name, or a range that is none.
  """
  if '=' not in text:
    return choices.pick(SPACES, text, 'space')
  space = {}
  for part in text.split(','):
    key, _, span = part.partition('=')
    try:
      low, high = map(float, span.split(':'))
    except ValueError:
      low = high = 0
    if not 0 < low <= high < np.inf:
      raise ValueError(f'{part!r} in the space is no range above 0.\n'
                       f'Write {key.strip()}=LOW:HIGH, such as {LR}=1e-4:1e-2.')
    space[key.strip()] = low, high
  return space


def check(space, config):
  """Raises ValueError for a key of a space that is no number of a config."""
  from vit_jax import config as config_lib
  flat = config_lib.flatten(config.to_dict())
  for key in space:
    if not isinstance(flat.get(key), (int, float)):
      numbers = [k for k, v in flat.items() if isinstance(v, (int, float))]
      raise ValueError(choices.unknown(key, numbers, 'number of the config'))


def units(seed, index, count):
  """float64 [count] in [0, 1): the draws of point `index` of a study's seed.

  The same for every arm of a study, whatever its ranges.
  """
  text = f'{seed}/{index}'.encode()
  digest = hashlib.shake_256(text).digest(8 * count)
  return np.frombuffer(digest, '<u8') / 2.0**64


def random_points(space, seed, count):
  """[{key: value}]: `count` log-uniform draws, a function of (seed, index)."""
  points = []
  for index in range(count):
    draws = units(seed, index, len(space))
    points.append({
        key: float(low * (high / low) ** u)
        for (key, (low, high)), u in zip(space.items(), draws, strict=True)})
  return points


def grid_points(space, count):
  """[{key: value}]: a grid, about `count` points in all, log-spaced."""
  side = max(round(count ** (1 / len(space))), 1)
  axes = [np.geomspace(low, high, side) for low, high in space.values()]
  mesh = np.stack(np.meshgrid(*axes, indexing='ij'), -1).reshape(
      -1, len(space))
  return [dict(zip(space, map(float, row), strict=True)) for row in mesh]
