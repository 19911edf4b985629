"""The encoder: pre-norm Transformer blocks, [B, N, D] -> [B, N, D].

Letters of axes: see `vit.py`; h is here the width of one head.
"""
from flax import linen as nn
from flax.linen.spmd import RulesFallback
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models import attention
from vit_jax.models import initializers

# 'tanh' is AugReg's and big_vision's, 'erf' the paper's and timm's: released
# weights lose accuracy under the other one.
GELUS = {
    'erf': lambda x: nn.gelu(x, approximate=False),
    'tanh': lambda x: nn.gelu(x, approximate=True),
}
DTYPES = ('float32', 'bfloat16')
REMATS = {
    'none': lambda block, **_: block,
    'full': nn.remat,
    # Keeps the results of matmuls, recomputes what lies between them.
    'dots': lambda block, **kw: nn.remat(
        block, policy=jax.checkpoint_policies.checkpoint_dots, **kw),
}


class Attention(nn.Module):
  """Multi-head attention with biases, [B, N, D] -> [B, N, D].

  Queries are made of the same tokens, or of others if there are two arguments.
  """
  heads: int
  init_name: str
  dtype: str
  form: str = 'xla'  # of attention.ATTENTIONS

  @nn.compact
  def __call__(self, x: jax.Array, asking: jax.Array | None = None):
    width = x.shape[-1]
    init = initializers.INITIALIZERS[self.init_name]
    sows = self.is_mutable_collection('intermediates')
    out = nn.DenseGeneral(
        width, axis=(-2, -1), dtype=self.dtype, kernel_init=init.out,
        name='out')
    if (self.form == 'pallas' and asking is None and not sows
        and not self.is_initializing()):
      y = attention.attend_fused(self._qkv(x), self.heads)  # [B, N, D]
      return out(y.reshape(*y.shape[:-1], self.heads, -1))
    # Three layers, as they are in released checkpoints.
    query, key, value = (
        nn.DenseGeneral(
            (self.heads, width // self.heads), dtype=self.dtype,
            kernel_init=init.qkv, name=name)(tokens)
        for name, tokens in (
            ('query', x if asking is None else asking), ('key', x),
            ('value', x)))  # [B, N, K, h]
    # For whoever asks, by mutable=['intermediates']; otherwise not computed.
    if sows:
      self.sow('intermediates', 'weights',
               attention.attention_weights(query, key))
    form = 'xla' if self.form == 'pallas' else self.form
    return out(attention.attend(query, key, value, form))  # [B, N, D]

  def _qkv(self, x):
    """The three layers as one matmul, [B, N, D] -> [B, N, 3 D]."""
    params = [self.variables['params'][name]
              for name in ('query', 'key', 'value')]
    join = lambda leaf, *shape: jnp.concatenate(
        [p[leaf].reshape(*shape).astype(self.dtype) for p in params], axis=-1)
    kernel, bias = join('kernel', x.shape[-1], -1), join('bias', 1, 1, -1)
    return x.astype(self.dtype) @ kernel + bias


class Mlp(nn.Module):
  """D -> M -> GELU -> D, [B, N, D] -> [B, N, D]."""
  mlp: int
  gelu: str
  init_name: str
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    init = initializers.INITIALIZERS[self.init_name]

    def dense(features, name):
      return nn.Dense(
          features, dtype=self.dtype, kernel_init=init.mlp,
          bias_init=init.mlp_bias, name=name)

    width = x.shape[-1]
    x = GELUS[self.gelu](dense(self.mlp, 'fc1')(x))  # [B, N, M]
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = dense(width, 'fc2')(x)  # [B, N, D]
    return nn.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
  """x += attention(norm(x)); x += mlp(norm(x)), [B, N, D] -> [B, N, D]."""
  heads: int
  mlp: int
  gelu: str
  norm_eps: float
  init_name: str
  dropout: float
  dtype: str
  attention: str = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array, drop_rate: jax.Array | None, train: bool):
    """Returns (x, None), which is what `nn.scan` wants of a body.

    Args:
      x: [B, N, D].
      drop_rate: probability, scalar in [0, 1), that an example skips a branch;
        None: no stochastic depth.
      train: positional, because `nn.remat` takes static arguments by position.
    """
    # Without it the partitioner guesses the sharding of a scan's carry, badly:
    # FSDP then holds and moves whole activations (times 30 in memory). Names
    # are logical, so models know no mesh; without rules or mesh it does
    # nothing; a name without a rule is an error, not "replicated".
    x = nn.with_logical_constraint(
        x, ('batch', 'tokens', 'embed'), fallback=RulesFallback.RAISE_ERROR)

    y = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name='norm_attention')(x)
    y = Attention(self.heads, self.init_name, self.dtype, self.attention,
                  name='attention')(y)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    x = x + self._skip_examples(y, drop_rate, train)

    y = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name='norm_mlp')(x)
    y = Mlp(
        self.mlp, self.gelu, self.init_name, self.dropout, self.dtype,
        name='mlp')(y, train=train)
    x = x + self._skip_examples(y, drop_rate, train)
    self.sow('intermediates', 'output', x)
    return x, None

  def _skip_examples(self, y, drop_rate, train):
    """Stochastic depth: zeroes y for some examples, rescales it for the others.

    The factor 1 / (1 - rate) keeps the expectation, as in timm and pycls;
    big_vision's Mixer has no such factor (and its ViT no stochastic depth).
    """
    if drop_rate is None or not train:
      return y
    keep_rate = 1.0 - drop_rate
    keep = jax.random.bernoulli(
        self.make_rng('dropout'), keep_rate, (y.shape[0], 1, 1))
    return y * (keep / keep_rate).astype(y.dtype)


class Encoder(nn.Module):
  """`depth` blocks and a last LayerNorm, whose output is float32.

  Attributes:
    depth: number of blocks.
    stochastic_depth: largest rate; the rates grow linearly from 0 in the first
      block to this in the last.
    scan: one compiled block, parameters stacked on a leading axis of `depth`
      under `blocks`, in place of `block_00`, `block_01`, ...
    remat: a key of `REMATS`: what is computed again in the backward pass.
    attention: of `attention.ATTENTIONS`.
  """
  depth: int
  heads: int
  mlp: int
  gelu: str
  norm_eps: float
  init_name: str
  dropout: float
  stochastic_depth: float
  scan: bool
  remat: str
  dtype: str
  attention: str = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    fields = {
        'heads': self.heads, 'mlp': self.mlp, 'gelu': self.gelu,
        'norm_eps': self.norm_eps, 'init_name': self.init_name,
        'dropout': self.dropout, 'dtype': self.dtype,
        'attention': self.attention}
    x = apply_blocks(
        Block, fields, x, self.depth, self.stochastic_depth, self.scan,
        self.remat, train)
    return nn.LayerNorm(self.norm_eps, dtype='float32', name='norm')(x)


def apply_blocks(block, fields, x, depth, stochastic_depth, scan, remat, train):
  """Applies `depth` blocks to x in the compact method of a module.

  Args:
    block: a module class, called with (x, drop_rate, train), that returns
      (x, None); see `Block`.
    fields: its fields.
    x: [B, N, D].
    depth, stochastic_depth, scan, remat: see `Encoder`.
    train: whether dropout and stochastic depth are in training mode.

  Returns:
    [B, N, D].
  """
  drop_rates = None
  if stochastic_depth:
    drop_rates = np.linspace(0.0, stochastic_depth, depth, dtype=np.float32)
  # A scan already keeps XLA from merging the two passes.
  block = REMATS[remat](block, static_argnums=(3,), prevent_cse=not scan)
  if scan:
    blocks = nn.scan(
        block, length=depth, in_axes=(0, nn.broadcast),
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True})
    return blocks(**fields, name='blocks')(x, drop_rates, train)[0]
  for i in range(depth):
    drop_rate = None if drop_rates is None else drop_rates[i]
    x, _ = block(**fields, name=f'block_{i:02d}')(x, drop_rate, train)
  return x
