"""MLP-Mixer (arXiv 2105.01601): a patchify stem, MLPs over tokens and channels.

  images [B, H, W, C] -> tokens [B, N, D] -> blocks [B, N, D] -> mean [B, D]
                      -> logits [B, C]

The number of tokens is in the parameters, so a model has one resolution.
Letters of axes: see `vit.py`.
"""
from flax import linen as nn
from flax.linen.spmd import RulesFallback
import jax

from vit_jax import choices
from vit_jax.models import encoder
from vit_jax.models import initializers
from vit_jax.models import variants
from vit_jax.models import vit

_INIT = 'flax'


class Block(nn.Module):
  """x += mlp(norm(x)^T)^T; x += mlp(norm(x)), [B, N, D] -> [B, N, D]."""
  tokens_mlp: int
  channels_mlp: int
  gelu: str
  norm_eps: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, drop_rate: jax.Array | None, train: bool):
    """Returns (x, None); arguments as in `encoder.Block`."""
    x = nn.with_logical_constraint(
        x, ('batch', 'tokens', 'embed'), fallback=RulesFallback.RAISE_ERROR)

    def norm(x, name):
      return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)(x)

    def mlp(x, width, name):
      return encoder.Mlp(
          width, self.gelu, _INIT, 0.0, self.dtype, name=name)(x, train=train)

    y = norm(x, 'norm_tokens').swapaxes(1, 2)  # [B, D, N]
    y = mlp(y, self.tokens_mlp, 'mlp_tokens').swapaxes(1, 2)
    x = x + self._skip_examples(y, drop_rate, train)
    y = mlp(norm(x, 'norm_channels'), self.channels_mlp, 'mlp_channels')
    x = x + self._skip_examples(y, drop_rate, train)
    self.sow('intermediates', 'output', x)
    return x, None

  def _skip_examples(self, y, drop_rate, train):
    """Zeroes y for some examples, and leaves it as it is for the others.

    Unlike in `encoder.Block`, whose factor 1 / (1 - rate) big_vision's
    mlp_mixer.py does not have. The two branches are skipped independently.
    """
    if drop_rate is None or not train:
      return y
    keep = jax.random.bernoulli(
        self.make_rng('dropout'), 1.0 - drop_rate, (y.shape[0], 1, 1))
    return y * keep.astype(y.dtype)


class Mixer(nn.Module):
  """MLP-Mixer; `create` builds one, and its arguments are the attributes.

  Parameters, all float32:
    stem/{kernel, bias}
    block_00/{norm_tokens, mlp_tokens/{fc1, fc2},
              norm_channels, mlp_channels/{fc1, fc2}}, block_01/..., or
    blocks/..., the same stacked on a leading axis, with scan
    norm/{scale, bias}
    head/{kernel, bias}
  """
  patch: int
  width: int
  depth: int
  channels_mlp: int
  tokens_mlp: int
  num_classes: int
  gelu: str = 'tanh'
  norm_eps: float = 1e-6
  head_bias: float = 0.0
  stochastic_depth: float = 0.0
  scan: bool = False
  remat: str = 'none'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits, float32 [B, C]; see `vit.ViT`."""
    patch = self.patch
    (h, w), _ = vit.token_grid(patch, images.shape[1:3])
    x = images[:, :h * patch, :w * patch]
    x = nn.Conv(
        self.width, (patch, patch), strides=patch, padding='VALID',
        dtype=self.dtype, name='stem',
        kernel_init=initializers.INITIALIZERS[_INIT].embedding)(x)
    x = x.reshape(x.shape[0], h * w, self.width)  # [B, N, D]
    fields = {
        'tokens_mlp': self.tokens_mlp, 'channels_mlp': self.channels_mlp,
        'gelu': self.gelu, 'norm_eps': self.norm_eps, 'dtype': self.dtype}
    x = encoder.apply_blocks(
        Block, fields, x, self.depth, self.stochastic_depth, self.scan,
        self.remat, train)
    x = nn.LayerNorm(self.norm_eps, dtype='float32', name='norm')(x)
    self.sow('intermediates', 'tokens', x)
    x = x.mean(axis=1)  # [B, D]
    self.sow('intermediates', 'pooled', x)
    return nn.Dense(
        self.num_classes, kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(self.head_bias),
        name='head')(x)  # [B, C]


def create(
    *,
    size: str,
    num_classes: int,
    gelu: str = 'tanh',
    norm_eps: float = 1e-6,
    head_bias: float = 0.0,
    stochastic_depth: float = 0.0,
    scan: bool = False,
    remat: str = 'none',
    dtype: str = 'float32',
) -> Mixer:
  """Builds an MLP-Mixer from names.

  Args:
    size: a key of `variants.MIXERS`: 'Mixer-B/16', ...
    stochastic_depth: rate, in [0, 1), of the last block; the first has 0, the
      others lie on the line between. The paper trains with 0.1. What is kept
      is not rescaled.
    num_classes, gelu, norm_eps, head_bias, scan, remat, dtype: see
      `vit.create`; released weights are for 'tanh' (timm's: 'erf').

  Raises:
    ValueError: an unknown name, or a number out of range.
  """
  choices.check({
      'size': (size, variants.MIXERS), 'gelu': (gelu, encoder.GELUS),
      'remat': (remat, encoder.REMATS), 'dtype': (dtype, encoder.DTYPES)})
  vit.check_numbers(num_classes, norm_eps, head_bias,
                    stochastic_depth=stochastic_depth)
  return Mixer(
      **variants.MIXERS[size]._asdict(), num_classes=num_classes, gelu=gelu,
      norm_eps=norm_eps, head_bias=head_bias,
      stochastic_depth=stochastic_depth, scan=scan, remat=remat, dtype=dtype)
