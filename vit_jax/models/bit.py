"""BiT (arXiv 1912.11370): ResNet-v2 with group norm, standardised convolutions.

google-research/big_transfer bit_jax/models.py and bit_pytorch/models.py, whose
released weights it takes. Any resolution. Letters of axes: see `vit.py`; n is
here the width of a stage.
"""
from flax import linen as nn
from flax.linen.spmd import RulesFallback
import jax
import jax.numpy as jnp

from vit_jax import choices
from vit_jax.models import encoder
from vit_jax.models import initializers
from vit_jax.models import resnet
from vit_jax.models import variants
from vit_jax.models import vit

_INIT = initializers.INITIALIZERS['flax'].conv
# As torch pads; 'SAME' would be one pixel off where the stride is 2.
_PADDING = {1: 'VALID', 3: ((1, 1), (1, 1)), 7: ((3, 3), (3, 3))}


def standardize(kernel: jax.Array) -> jax.Array:
  """`resnet.standardize`, with 1e-10 added to the variance instead."""
  axes = (0, 1, 2)
  kernel = kernel - kernel.mean(axes, keepdims=True)
  return kernel * jax.lax.rsqrt(kernel.var(axes, keepdims=True) + 1e-10)


def _conv(features, size, stride, dtype, name):
  return resnet.Conv(
      features, size, stride, _INIT, dtype, _PADDING[size], standardize,
      name=name)


def _norm(dtype, name):
  return nn.GroupNorm(resnet.GROUPS, epsilon=1e-5, dtype=dtype, name=name)


class Unit(nn.Module):
  """Bottleneck whose activations come first: 1x1 to n, 3x3, 1x1 to 4n."""
  width: int
  stride: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.with_logical_constraint(
        x, ('batch', None, None, None), fallback=RulesFallback.RAISE_ERROR)
    y = nn.relu(_norm(self.dtype, 'norm_1')(x))
    features = 4 * self.width
    if x.shape[-1] != features or self.stride != 1:
      x = _conv(features, 1, self.stride, self.dtype, 'conv_proj')(y)
    y = _conv(self.width, 1, 1, self.dtype, 'conv_1')(y)
    y = nn.relu(_norm(self.dtype, 'norm_2')(y))
    y = _conv(self.width, 3, self.stride, self.dtype, 'conv_2')(y)
    y = nn.relu(_norm(self.dtype, 'norm_3')(y))
    return x + _conv(features, 1, 1, self.dtype, 'conv_3')(y)


class BiT(nn.Module):
  """ResNet-v2; `create` builds one, and its arguments are the attributes.

  Parameters, all float32:
    conv_root/kernel
    stage_0_unit_00/{norm_1, conv_1, norm_2, conv_2, norm_3, conv_3,
                     conv_proj (first units)}, stage_0_unit_01/..., ...
    norm/{scale, bias}
    head/{kernel, bias}
  """
  units: tuple[int, ...]
  width: int
  num_classes: int
  head_bias: float = 0.0
  remat: str = 'none'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits, float32 [B, C]; `train` changes nothing."""
    del train
    x = _conv(self.width, 7, 2, self.dtype, 'conv_root')(images)
    # Zeros, as the released weights were trained, where max_pool's own padding
    # is -inf: they differ where all of a border is negative.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = nn.max_pool(x, (3, 3), (2, 2), 'VALID')
    unit = encoder.REMATS[self.remat](Unit)
    for i, units in enumerate(self.units):
      for j in range(units):
        x = unit(
            self.width * 2 ** i, 2 if i and not j else 1, self.dtype,
            name=f'stage_{i}_unit_{j:02d}')(x)
    x = nn.relu(_norm('float32', 'norm')(x)).mean(axis=(1, 2))  # [B, 4n]
    self.sow('intermediates', 'pooled', x)
    return nn.Dense(
        self.num_classes, kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(self.head_bias),
        name='head')(x)  # [B, C]


def create(
    *,
    size: str,
    num_classes: int,
    head_bias: float = 0.0,
    remat: str = 'none',
    dtype: str = 'float32',
) -> BiT:
  """Builds a BiT ResNet from names.

  Args:
    size: a key of `variants.BITS`: 'BiT-R50x1', ...
    num_classes, head_bias, remat, dtype: see `vit.create`.

  Raises:
    ValueError: an unknown name, or a number out of range.
  """
  choices.check({
      'size': (size, variants.BITS), 'remat': (remat, encoder.REMATS),
      'dtype': (dtype, encoder.DTYPES)})
  vit.check_numbers(num_classes, 1e-5, head_bias)
  return BiT(
      **variants.BITS[size]._asdict(), num_classes=num_classes,
      head_bias=head_bias, remat=remat, dtype=dtype)
