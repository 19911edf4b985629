"""Position embeddings for another grid of tokens, and with or without a class.

Shapes: (N, D) and grids (h, w) with h * w = N.
"""
import math

import numpy as np

RESIZE = ('aligned', 'antialias')


def square(tokens: int) -> tuple[int, int] | None:
  """The square grid of so many tokens, or None."""
  side = math.isqrt(tokens)
  return (side, side) if side * side == tokens else None


def resize(table: np.ndarray, old: tuple[int, int], new: tuple[int, int],
           method: str = 'aligned') -> np.ndarray:
  """Interpolates an embedding to another grid.

  Args:
    table: (old h * old w, D).
    old, new: grids (h, w).
    method: 'aligned', bilinear with aligned corners, the rule of the reference
      code (scipy.ndimage.zoom of order 1 in vision_transformer and big_vision);
      'antialias', bilinear on pixel centres and averaged when shrunk (as
      `jax.image.resize` and torch's `interpolate(antialias=True)`).

  Returns:
    float32 (new h * new w, D).
  """
  if old == new:
    return np.asarray(table, np.float32)
  grid = np.asarray(table, np.float64).reshape(*old, -1)
  rows, columns = (_weights(a, b, method)
                   for a, b in zip(old, new, strict=True))
  grid = np.einsum('ah,bw,hwd->abd', rows, columns, grid, optimize=True)
  return grid.reshape(new[0] * new[1], -1).astype(np.float32)


def _weights(old, new, method):
  """[new, old]: how much of each old position goes into a new one."""
  if method == 'aligned':
    centre, reach = np.linspace(0.0, old - 1, new), 1.0
  else:
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    reach = max(old / new, 1.0)
  distance = np.abs(centre[:, None] - np.arange(old)[None]) / reach
  weights = np.maximum(1.0 - distance, 0.0)
  return weights / weights.sum(axis=1, keepdims=True)
