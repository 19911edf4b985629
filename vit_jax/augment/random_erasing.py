"""Random erasing (arXiv 1708.04896) as DeiT used it: noise in a box.

timm/data/random_erasing.py, mode 'pixel', one box: of `area_min` to `area_max`
of the image and an aspect ratio of 0.3 to 1 / 0.3, uniform in its logarithm;
ten attempts to find one that is smaller than the image. It is filled after
normalisation, with normal noise of mean 0 and deviation 1.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp

_ATTEMPTS = 10
_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
  """`random_erasing(probability, area_min, area_max)`."""
  probability: float = 0.25
  area_min: float = 0.02
  area_max: float = 0.3333
  stage = 'floats'

  def __post_init__(self):
    for name in ('probability', 'area_min', 'area_max'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
          0 < value <= 1):
        raise TypeError(f'{name}={value!r} must be a number in (0, 1]')
    if self.area_min > self.area_max:
      raise TypeError('area_min must not be above area_max')

  def apply(self, image, key, std):
    """Erases a box, with the op's probability.

    Args:
      image: float32 [H, W, C], normalised.
      key: of the image.
      std: not used.

    Returns:
      float32 [H, W, C].
    """
    del std
    height, width, _ = image.shape
    top, left, h, w = self.draw(key, height, width)
    y = jnp.arange(height, dtype=jnp.int32).reshape(-1, 1, 1)
    x = jnp.arange(width, dtype=jnp.int32).reshape(1, -1, 1)
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    noise = jax.random.normal(
        jax.random.split(key)[1], image.shape, jnp.float32)
    return jnp.where(inside, noise, image)

  def draw(self, key, height, width):
    """The box: int32 (top, left, h, w), with h = w = 0 where there is none."""
    draws = jax.random.uniform(jax.random.split(key)[0], (_ATTEMPTS + 1, 4))
    area, aspect = draws[1:, 0], draws[1:, 1]
    area = (self.area_min + area * (self.area_max - self.area_min)) * (
        height * width)
    low, high = _LOG_ASPECT
    aspect = jnp.exp(low + aspect * (high - low))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    exists = fits[first] & (draws[0, 0] < self.probability)
    h, w = (jnp.where(exists, side[first], 0) for side in (h, w))
    corner = lambda u, room: jnp.minimum(
        (u * (room + 1)).astype(jnp.int32), room)
    return (corner(draws[0, 1], height - h), corner(draws[0, 2], width - w),
            h, w)

  def title(self, key, height, width):
    """What is drawn, for people."""
    _, _, h, w = map(int, self.draw(key, height, width))
    return f'erased {h} x {w}' if h else ''
