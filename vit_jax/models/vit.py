"""Vision Transformer: a stem, an encoder, a head.

  images [B, H, W, C] -> stem [B, h, w, D] -> tokens [B, N, D]
                      -> encoder [B, N, D] -> pool [B, D] -> logits [B, C]

Letters of axes, here and in all of vit_jax:
  B    examples of the batch
  H W  pixels: rows, columns
  h w  token grid: rows, columns
  N    tokens: h * w, plus 1 where there is a class token
  D    width
  M    width of the MLP
  K    heads
  C    channels of images, classes of logits
"""
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import choices
from vit_jax.models import attention as attention_lib
from vit_jax.models import convolutions
from vit_jax.models import encoder
from vit_jax.models import initializers
from vit_jax.models import stems
from vit_jax.models import variants

POOLS = ('token', 'gap', 'map')
POS_EMBEDDINGS = ('learned', 'sincos2d')


class ViT(nn.Module):
  """Vision Transformer, whatever its stem; `create` builds one.

  Parameters, all float32:
    stem/...        see `stems`
    cls             (1, 1, D), only with pool 'token'
    pos_embedding   (1, N, D), class token included; none with 'sincos2d'
    encoder/block_00/{norm_attention, attention/{query, key, value, out},
                      norm_mlp, mlp/{fc1, fc2}}, encoder/block_01/..., or
    encoder/blocks/..., the same stacked on a leading axis, with scan
    encoder/norm/{scale, bias}
    map/{probe (1, 1, D), attention, norm, mlp}, only with pool 'map'
    pre_logits/{kernel (D, D), bias}, only with pre_logits
    head/{kernel, bias}
  The collection `batch_stats` exists where the stem has BatchNorm. With
  mutable=['intermediates'] it returns, beside the logits, what `features` reads
  there: `tokens` [B, N, D] behind the encoder, `pooled` [B, D], each block's
  `output` [B, N, D] and `attention/weights` [B, K, N, N].

  The attributes are `create`'s, but for these: `stem` is a module (see
  `stems`); `depth`, `heads` and `mlp` come from the size; `init_name` is
  `create`'s `init`, a name that linen has taken for a method.
  """
  stem: nn.Module
  depth: int
  heads: int
  mlp: int
  num_classes: int
  pool: str = 'token'
  pre_logits: bool = False
  pos_embedding: str = 'learned'
  gelu: str = 'erf'
  norm_eps: float = 1e-6
  init_name: str = 'paper'
  head_bias: float = 0.0
  dropout: float = 0.0
  stochastic_depth: float = 0.0
  scan: bool = False
  remat: str = 'none'
  dtype: str = 'float32'
  attention: str = 'xla'

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits.

    Args:
      images: float [B, H, W, C], normalised. Pixels to the right of and below
        the last whole patch are ignored; see `token_grid`.
      train: dropout, stochastic depth and BatchNorm in training mode. Needs
        rngs={'dropout': key} if a rate is not 0, and mutable=['batch_stats'] if
        the stem has BatchNorm that is not frozen.

    Returns:
      float32 [B, C], not normalised.

    Raises:
      ValueError: the images are smaller than one patch.
    """
    patch, width = self.stem.patch, self.stem.width
    (h, w), _ = token_grid(patch, images.shape[1:3])
    # 3x3 convolutions with padding would make a token out of a partial patch,
    # a patchify layer would not: cut it off for all stems.
    x = images[:, :h * patch, :w * patch].astype(self.dtype)

    x = self.stem(x, train=train)  # [B, h, w, D]
    x = x.reshape(x.shape[0], h * w, width)  # [B, N, D], still without cls
    if self.pos_embedding == 'sincos2d':
      x = x + sincos2d(h, w, width).astype(x.dtype)
    if self.pool == 'token':
      cls = self.param('cls', nn.initializers.zeros, (1, 1, width))
      cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, width))
      x = jnp.concatenate([cls, x], axis=1)  # [B, N, D]
    if self.pos_embedding == 'learned':
      x = x + self.param(
          'pos_embedding',
          initializers.INITIALIZERS[self.init_name].pos_embedding,
          (1, *x.shape[1:])).astype(x.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)

    x = encoder.Encoder(
        depth=self.depth, heads=self.heads, mlp=self.mlp, gelu=self.gelu,
        norm_eps=self.norm_eps, init_name=self.init_name, dropout=self.dropout,
        stochastic_depth=self.stochastic_depth, scan=self.scan,
        remat=self.remat, dtype=self.dtype, attention=self.attention,
        name='encoder')(x, train=train)

    self.sow('intermediates', 'tokens', x)
    x = self._pool(x, train)  # [B, D]
    self.sow('intermediates', 'pooled', x)
    # float32, like the encoder's output: it costs nothing and keeps logits
    # that differ by less than a bfloat16's 8 bits apart.
    if self.pre_logits:
      x = nn.tanh(nn.Dense(width, name='pre_logits')(x))
    return nn.Dense(
        self.num_classes, kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(self.head_bias),
        name='head')(x)  # [B, C]

  @property
  def patch(self) -> int:
    """Pixels per token and axis."""
    return self.stem.patch

  def _pool(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, N, D] -> [B, D], in the module's own names."""
    if self.pool == 'token':
      return x[:, 0]
    if self.pool == 'gap':
      return x.mean(axis=1)
    return AttentionPool(
        self.heads, self.mlp, self.gelu, self.norm_eps, self.init_name,
        self.dropout, self.dtype, name='map')(x, train=train)


class AttentionPool(nn.Module):
  """A learned token asks the others, [B, N, D] -> [B, D], float32.

  "Scaling Vision Transformers" (arXiv 2106.04560), section 3.2, in the form of
  big_vision: y = attention(probe, x); y + mlp(norm(y)).
  """
  heads: int
  mlp: int
  gelu: str
  norm_eps: float
  init_name: str
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    probe = self.param(
        'probe', nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
    probe = jnp.broadcast_to(probe, (x.shape[0], *probe.shape[1:]))
    y = encoder.Attention(
        self.heads, self.init_name, self.dtype, name='attention')(x, probe)
    z = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name='norm')(y)
    z = encoder.Mlp(
        self.mlp, self.gelu, self.init_name, self.dropout, self.dtype,
        name='mlp')(z, train=train)
    return (y + z)[:, 0].astype('float32')


def create(
    *,
    size: str,
    stem: str,
    num_classes: int,
    pool: str = 'token',
    pre_logits: bool = False,
    pos_embedding: str = 'learned',
    gelu: str = 'erf',
    norm_eps: float = 1e-6,
    init: str = 'paper',
    head_bias: float = 0.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    batch_norm: str = 'train',
    batch_norm_group: int = 0,
    conv: str = 'xla',
    scan: bool = False,
    remat: str = 'none',
    dtype: str = 'float32',
    attention: str = 'xla',
) -> ViT:
  """Builds a ViT from names. The defaults are those of the paper.

  Args:
    size: a key of `variants.SIZES`: '4GF', 'S/16', 'micro', ...
    stem: a key of `stems.STEMS`: 'patchify' (ViT_P), 'conv' (ViT_C), ...;
      'resnet' with the sizes of `variants.HYBRIDS`, which have no other.
    num_classes: C of the logits, at least 1.
    pool: 'token' (class token), 'gap' (mean over tokens, no class token) or
      'map' (a learned token that attends to the others).
    pre_logits: whether a dense layer and a tanh come before the head, as in
      the first ViTs on ImageNet-21k.
    pos_embedding: 'learned', or 'sincos2d': no parameter, patch tokens only.
    gelu: 'erf' (the paper, timm) or 'tanh' (AugReg, big_vision).
    norm_eps: epsilon of LayerNorm; BatchNorm's is 1e-5.
    init: a key of `initializers.INITIALIZERS`.
    head_bias: start value of the head's bias.
    dropout: rate, in [0, 1), after the position embedding, after the
      attention's output, after the MLP's GELU and after its second layer.
    stochastic_depth: rate, in [0, 1), of the last block; the first has 0, the
      others lie on the line between.
    batch_norm: 'train' or 'frozen': running statistics even with train=True,
      and left as they are.
    batch_norm_group: examples whose statistics BatchNorm takes together in
      training, consecutive ones; divides the batch. 0: all of the batch.
    conv: a key of `convolutions.FORMS`, of the stem's convolutions: 'xla', or
      'im2col' where their kernels differ by member of a population.
    scan: one compiled block for all; parameters are stacked.
    remat: 'none', 'full' or 'dots' (keeps the results of matmuls): what the
      backward pass computes again.
    dtype: 'float32' or 'bfloat16', of convolutions, matmuls and the residual
      stream. Parameters, statistics of normalisation, softmax, the last
      LayerNorm, the head and the logits are float32 in any case.
    attention: of `attention.ATTENTIONS`, for the encoder's blocks: 'xla';
      'pallas', one kernel, for TPUs; 'cudnn', for NVIDIA GPUs, needs bfloat16.

  Returns:
    A linen module; `model.apply(variables, images, train=False)` gives logits.

  Raises:
    ValueError: an unknown name (the message lists the choices), a rate out of
      range, or a stem that the size does not have.
  """
  choices.check({
      'size': (size, variants.SIZES), 'stem': (stem, stems.STEMS),
      'pool': (pool, POOLS), 'pos_embedding': (pos_embedding, POS_EMBEDDINGS),
      'gelu': (gelu, encoder.GELUS), 'init': (init, initializers.INITIALIZERS),
      'batch_norm': (batch_norm, stems.BATCH_NORM),
      'conv': (conv, convolutions.FORMS),
      'attention': (attention, attention_lib.ATTENTIONS),
      'remat': (remat, encoder.REMATS), 'dtype': (dtype, encoder.DTYPES)})
  check_numbers(num_classes, norm_eps, head_bias, dropout=dropout,
                stochastic_depth=stochastic_depth)
  if batch_norm_group < 0:
    raise ValueError(
        f'batch_norm_group is {batch_norm_group}.\nIt is a number of examples, '
        'or 0: statistics of the whole batch.')
  row = variants.size(size)
  return ViT(
      stem=stems.create(
          size=size, stem=stem, batch_norm=batch_norm,
          batch_norm_group=batch_norm_group, norm_eps=norm_eps, init_name=init,
          conv=conv, dtype=dtype),
      depth=row.depth_conv if stems.is_convolutional(stem) else row.depth,
      heads=row.heads, mlp=row.mlp, num_classes=num_classes, pool=pool,
      pre_logits=pre_logits, pos_embedding=pos_embedding, gelu=gelu,
      norm_eps=norm_eps, init_name=init, head_bias=head_bias, dropout=dropout,
      stochastic_depth=stochastic_depth, scan=scan, remat=remat, dtype=dtype,
      attention=attention)


def check_numbers(num_classes, norm_eps, head_bias, **rates):
  """Raises ValueError for what no model can have; see `create`."""
  for what, rate in rates.items():
    if not 0.0 <= rate < 1.0:
      raise ValueError(
          f'The rate {what} is {rate}.\nIt is a probability in [0, 1); 0 turns '
          'it off.')
  for what, number in (('norm_eps', norm_eps), ('head_bias', head_bias)):
    if not abs(number) < 1e30 or (what == 'norm_eps' and number < 0):
      raise ValueError(
          f'{what} is {number}.\nIt is a finite number; norm_eps is at least 0 '
          'and about 1e-6.')
  if num_classes < 1:
    raise ValueError(
        f'The model has {num_classes} classes.\nnum_classes is at least 1.')


def token_grid(
    patch: int, image_size: int | tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
  """Returns the token grid and the pixels that it leaves out.

  Args:
    patch: pixels per token and axis, `model.stem.patch`.
    image_size: pixels, (H, W) or one number for both.

  Returns:
    ((h, w), (cropped_h, cropped_w)): whole patches per axis, and the pixels
    below and to the right of the last one, which the model ignores. 384 pixels
    at patch 14: ((27, 27), (6, 6)).

  Raises:
    ValueError: the image is smaller than one patch.
  """
  if isinstance(image_size, int):
    image_size = (image_size, image_size)
  height, width = image_size
  if min(height, width) < patch:
    raise ValueError(
        f'An image of {height}x{width} pixels is smaller than one patch of '
        f'{patch}x{patch}.\nResize the images, or take a size with a smaller '
        'patch.')
  h, w = height // patch, width // patch
  return (h, w), (height - h * patch, width - w * patch)


def sincos2d(h: int, w: int, width: int) -> np.ndarray:
  """Fixed position embedding of a token grid, float32 (1, h * w, D).

  A quarter of the channels each for sin(x), cos(x), sin(y), cos(y), at
  wavelengths from 2 pi to 10,000 * 2 pi; MoCo v3 (arXiv 2104.02057), in the
  layout of big_vision's ViT. ValueError if D is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(
        f'Width {width} is not a multiple of 4, which sincos2d needs.\n'
        'Take pos_embedding=\'learned\'.')
  y, x = np.mgrid[:h, :w]
  frequency = 10_000.0 ** -np.linspace(0.0, 1.0, width // 4)
  x = x.reshape(-1, 1) * frequency[None]
  y = y.reshape(-1, 1) * frequency[None]
  table = np.concatenate(
      [np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table[None].astype(np.float32)
