"""How parameters start: one row per code base, chosen by `vit.create(init=)`.

The same in all rows: biases 0 (but those of the MLP), class token 0,
normalisation scale 1 and bias 0, head kernel 0, head bias `head_bias`.
"""
import dataclasses
import math

import jax
from jax.nn.initializers import Initializer
from jax.nn.initializers import normal
from jax.nn.initializers import variance_scaling
from jax.nn.initializers import zeros
import jax.numpy as jnp


def _normal_over_channels(gain: float) -> Initializer:
  """Normal of std sqrt(gain / output channels), whatever the kernel's size."""

  def init(key, shape, dtype=jnp.float32):
    std = math.sqrt(gain / shape[-1])
    return std * jax.random.normal(key, shape, dtype)

  return init


# Bound sqrt(6 / (fan_in + fan_out)).
_xavier_uniform = variance_scaling(1.0, 'fan_avg', 'uniform')
# Bound 1 / sqrt(fan_in): kaiming_uniform(a=sqrt(5)), which torch gives to
# every convolution and linear layer that nobody initialises.
_torch_default = variance_scaling(1 / 3, 'fan_in', 'uniform')
# torch.nn.MultiheadAttention draws query, key and value as one [3D, D] matrix
# with xavier_uniform: bound sqrt(6 / (D + 3D)), not that of a [D, D] matrix.
_xavier_uniform_fused_qkv = variance_scaling(0.5, 'fan_in', 'uniform')
# Std sqrt(1 / fan_in). torch's trunc_normal_ cuts at -2 and 2, not at two
# standard deviations: with the std of a patchify kernel it cuts nothing.
_torch_trunc_normal = variance_scaling(1.0, 'fan_in', 'normal')
# Std sqrt(1 / fan_in), cut at two standard deviations: flax's default.
_lecun_normal = variance_scaling(1.0, 'fan_in', 'truncated_normal')


@dataclasses.dataclass(frozen=True)
class Initializers:
  """Initialisers of everything that differs between the code bases.

  Attributes:
    embedding: kernel of the patchify convolution.
    conv: kernels of a convolutional stem but for its last.
    projection: kernel of the last, 1x1, convolution of a convolutional stem.
    qkv: kernels of query, key and value, seen as [D, K * h].
    out: kernel of the attention's output, seen as [K * h, D].
    mlp: both kernels of the MLP.
    mlp_bias: both biases of the MLP.
    pos_embedding: learned position embedding, (1, N, D).
  """
  embedding: Initializer
  conv: Initializer
  projection: Initializer
  qkv: Initializer
  out: Initializer
  mlp: Initializer
  mlp_bias: Initializer
  pos_embedding: Initializer


# The authors' code of 2021, with which the paper's tables were made: pycls pull
# request 153 (July) and branch vitconfigs (August) agree.
_PAPER = Initializers(
    embedding=_torch_trunc_normal,
    conv=_torch_default,
    projection=_normal_over_channels(2.0),
    qkv=_xavier_uniform_fused_qkv,
    out=_torch_default,
    mlp=_xavier_uniform,
    mlp_bias=normal(1e-6),
    pos_embedding=normal(0.02),
)

# big_vision models/vit.py. It has no convolutional stem: flax's default.
_BIG_VISION = Initializers(
    embedding=_lecun_normal,
    conv=_lecun_normal,
    projection=_lecun_normal,
    qkv=_xavier_uniform,
    out=_xavier_uniform,
    mlp=_xavier_uniform,
    mlp_bias=normal(1e-6),
    pos_embedding=_normal_over_channels(1.0),
)

INITIALIZERS = {
    'paper': _PAPER,
    # pycls main since commit 8709e4f of March 2022, after the paper.
    'pycls_2022': dataclasses.replace(
        _PAPER,
        conv=_normal_over_channels(2.0),
        projection=_normal_over_channels(1.0),
    ),
    'big_vision': _BIG_VISION,
    # vision_transformer models_vit.py, the code of ViT and AugReg.
    'vision_transformer': dataclasses.replace(
        _BIG_VISION, pos_embedding=normal(0.02)),
    # What linen does unasked: big_vision models/mlp_mixer.py, bit_paper.py.
    'flax': Initializers(
        embedding=_lecun_normal,
        conv=_lecun_normal,
        projection=_lecun_normal,
        qkv=_lecun_normal,
        out=_lecun_normal,
        mlp=_lecun_normal,
        mlp_bias=zeros,
        pos_embedding=normal(0.02),
    ),
}
