"""ResNet with group norm and standardised convolutions, before a ViT.

ResNet-v1 (the activation follows the addition) as in AugReg's hybrids:
google-research/vision_transformer models_resnet.py. `bit` has the ResNet-v2 of
the same group. Letters of axes: see `vit.py`; n is here the width of a stage.
"""
from collections.abc import Callable

from flax import linen as nn
import jax
from jax.nn.initializers import Initializer

ROOT_WIDTH = 64
GROUPS = 32


def standardize(kernel: jax.Array) -> jax.Array:
  """Weights minus their mean over their standard deviation, for each output.

  Args:
    kernel: [rows, columns, in, out], float32.
  """
  axes = (0, 1, 2)
  kernel = kernel - kernel.mean(axes, keepdims=True)
  return kernel / (kernel.std(axes, keepdims=True) + 1e-5)


class Conv(nn.Module):
  """Convolution without bias whose kernel is standardised before use.

  Attributes:
    padding: as in `jax.lax`: 'SAME' pads on the right and below where the
      numbers are odd, unlike torch's.
    standardize: from a float32 kernel to a float32 kernel.
  """
  features: int
  kernel_size: int
  stride: int
  kernel_init: Initializer
  dtype: str
  padding: str | tuple[tuple[int, int], ...] = 'SAME'
  standardize: Callable[[jax.Array], jax.Array] = standardize

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = (self.kernel_size, self.kernel_size)
    kernel = self.param(
        'kernel', self.kernel_init, (*size, x.shape[-1], self.features))
    return jax.lax.conv_general_dilated(
        x.astype(self.dtype), self.standardize(kernel).astype(self.dtype),
        (self.stride, self.stride), self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


class Unit(nn.Module):
  """Bottleneck: 1x1 to n, 3x3 with the stride, 1x1 to 4n, added, relu."""
  width: int
  stride: int
  kernel_init: Initializer
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def conv(features, size, stride, name):
      return Conv(features, size, stride, self.kernel_init, self.dtype,
                  name=name)

    def norm(name, scale_init=nn.initializers.ones):
      return nn.GroupNorm(
          GROUPS, epsilon=1e-6, dtype=self.dtype, scale_init=scale_init,
          name=name)

    residual, features = x, 4 * self.width
    if x.shape[-1] != features or self.stride != 1:
      residual = conv(features, 1, self.stride, 'conv_proj')(x)
      residual = norm('norm_proj')(residual)
    y = nn.relu(norm('norm_1')(conv(self.width, 1, 1, 'conv_1')(x)))
    y = nn.relu(norm('norm_2')(conv(self.width, 3, self.stride, 'conv_2')(y)))
    # Its scale starts at 0, so that the unit starts as its shortcut.
    y = norm('norm_3', nn.initializers.zeros)(
        conv(features, 1, 1, 'conv_3')(y))
    return nn.relu(residual + y)


class ResNet(nn.Module):
  """Root and stages, [B, H, W, C] -> [B, H / r, W / r, n].

  r is 4 for the root, and twice as much for every stage but the first. n is 64
  for the root, 256 for the first stage, and twice as much for every other.

  Attributes:
    units: units in each stage.
  """
  units: tuple[int, ...]
  kernel_init: Initializer
  dtype: str

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = Conv(ROOT_WIDTH, 7, 2, self.kernel_init, self.dtype,
             name='conv_root')(images)
    x = nn.GroupNorm(
        GROUPS, epsilon=1e-6, dtype=self.dtype, name='norm_root')(x)
    x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), 'SAME')
    for i, units in enumerate(self.units):
      for j in range(units):
        x = Unit(
            ROOT_WIDTH * 2 ** i, 2 if i and not j else 1, self.kernel_init,
            self.dtype, name=f'stage_{i}_unit_{j:02d}')(x)
    return x
