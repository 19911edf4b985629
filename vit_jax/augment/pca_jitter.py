"""AlexNet's colour jitter along the principal components of ImageNet's pixels.

A. Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural
Networks", section 4.1; the eigenvalues and eigenvectors (of RGB in [0, 1]) are
those of fb.resnet.torch and pycls/datasets/imagenet.py.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_VALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
_VECTORS = np.array([[-0.5675, 0.7192, 0.4009],   # R
                     [-0.5808, -0.0045, -0.8140],  # G
                     [-0.5836, -0.6948, 0.4203]],  # B
                    np.float32)


@dataclasses.dataclass(frozen=True)
class PcaJitter:
  """`pca_jitter(deviation)`: the paper's (ViT_C) 0.1."""
  deviation: float
  stage = 'floats'

  def __post_init__(self):
    if isinstance(self.deviation, bool) or not isinstance(
        self.deviation, (int, float)) or not 0 < self.deviation <= 10:
      raise TypeError(
          f'deviation={self.deviation!r} must be a number above 0, at most 10')

  def apply(self, image, key, std):
    """Adds one colour to the whole image, without clipping.

    Args:
      image: float32 [H, W, 3], normalised.
      key: of the image.
      std: float32 [3], by which it was divided.

    Returns:
      float32 [H, W, 3].
    """
    return image + (self.draw(key) / std).reshape(1, 1, 3)

  def draw(self, key):
    """The colour: float32 [3], RGB, as a fraction of full scale."""
    alpha = self.deviation * jax.random.normal(key, (3,), jnp.float32)
    # No matrix product, which would be less exact on accelerators.
    return jnp.sum(_VECTORS * (alpha * _VALUES).reshape(1, 3), axis=1)

  def title(self, key, height, width):
    """What is drawn, for people, in levels of 255."""
    del height, width
    colour = (255 * self.draw(key)).round().astype(int).tolist()
    return 'PCA({:+d} {:+d} {:+d})'.format(*colour)
