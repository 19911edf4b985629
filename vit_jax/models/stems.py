"""Stems: from pixels to tokens, [B, H, W, C] -> [B, h, w, D].

Siblings behind one interface. A stem is a linen module with the fields
  patch       pixels per token and axis: H = h * patch, W = w * patch
  width       D
  batch_norm  'train': BatchNorm normalises with the statistics of the batch if
              train=True and with running statistics if not; 'frozen': always
              with running statistics, which then never change
  batch_norm_group  examples whose statistics BatchNorm takes together in
              training; 0: those of the whole batch
  bn_momentum of the running statistics; with 0 they are replaced by those of
              the batch: model.clone(stem=model.stem.clone(bn_momentum=0.0))
  norm_eps    of LayerNorm
  init_name   a key of `initializers.INITIALIZERS`
  conv        a key of `convolutions.FORMS`
  dtype       of convolutions; normalisation computes in float32
and `stem(images, train=...)`. Letters of axes: see `vit.py`.
"""
import functools
import math

from flax import linen as nn
import jax

from vit_jax import choices
from vit_jax.models import batch_norm
from vit_jax.models import convolutions
from vit_jax.models import initializers
from vit_jax.models import resnet
from vit_jax.models import variants

BATCH_NORM = ('train', 'frozen')
ACTIVATIONS = {'relu': nn.relu, 'none': lambda x: x}


class _Stem(nn.Module):
  """The fields that all stems have, and the choice of normalisation."""
  patch: int
  width: int
  norm: str = 'none'
  activation: str = 'none'
  batch_norm: str = 'train'
  batch_norm_group: int = 0
  bn_momentum: float = 0.9
  norm_eps: float = 1e-6
  init_name: str = 'paper'
  conv: str = 'xla'
  dtype: str = 'float32'

  def _convolution(self, features: int, kernel: int, **fields) -> nn.Conv:
    """A convolution with a square kernel, in the stem's form."""
    return nn.Conv(
        features, (kernel, kernel), dtype=self.dtype,
        conv_general_dilated=convolutions.FORMS[self.conv], **fields)

  def _normalize(self, x: jax.Array, name: str, train: bool) -> jax.Array:
    """Normalises [B, h, w, D] over D ('ln') or over B, h, w ('bn')."""
    if self.norm == 'ln':
      return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)(x)
    if self.norm == 'bn':
      train = train and self.batch_norm == 'train'
      fields = dict(momentum=self.bn_momentum, epsilon=1e-5, dtype=self.dtype,
                    name=name)
      if train and self.batch_norm_group:
        return batch_norm.GroupedBatchNorm(self.batch_norm_group, **fields)(x)
      return nn.BatchNorm(use_running_average=not train, **fields)(x)
    return x


class PatchifyStem(_Stem):
  """One convolution whose kernel equals its stride, the paper's section 3.

  With norm='bn' and activation='relu' it is the ViT_P(bn) of Figure 7; its
  convolution then has no bias, like every normalised one, because the
  normalisation would take it away again: D parameters more than ViT_P, not 2D.
  """

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    init = initializers.INITIALIZERS[self.init_name]
    x = self._convolution(
        self.width, self.patch, strides=self.patch, padding='VALID',
        use_bias=self.norm == 'none', kernel_init=init.embedding,
        name='embedding')(images)  # [B, h, w, D]
    x = self._normalize(x, 'norm', train)
    return ACTIVATIONS[self.activation](x)


class ConvStem(_Stem):
  """A few small convolutions and a 1x1 convolution to D, the paper's section 3.

  Each but the last: no bias -> norm -> activation. The last: bias, and neither
  norm nor activation.

  Attributes:
    kernels, strides, widths: of each convolution but the last. A kernel of 3 is
      padded by 1; one that equals its stride (a patchify layer) is not padded.

  Raises:
    ValueError: tuples of unequal length, strides that do not multiply to the
      patch, or a kernel that is neither 3 nor the stride.
  """
  kernels: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()
  widths: tuple[int, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    kernels, strides, widths = self.kernels, self.strides, self.widths
    if not len(kernels) == len(strides) == len(widths):
      raise ValueError(
          f'There are {len(kernels)} kernels, {len(strides)} strides and '
          f'{len(widths)} widths.\nGive one of each for every convolution but '
          'the last, 1x1, one.')
    if math.prod(strides) != self.patch:
      raise ValueError(
          f'The strides {tuple(strides)} multiply to {math.prod(strides)}, '
          f'not to the patch {self.patch}.\nChange the strides, or take a size '
          f'with patch {math.prod(strides)}.')
    for kernel, stride in zip(kernels, strides, strict=True):
      if kernel != stride and (kernel != 3 or stride not in (1, 2)):
        raise ValueError(
            f'Kernel {kernel} with stride {stride} would skip or shift '
            'pixels.\nTake kernel 3 with stride 1 or 2, or a kernel equal to '
            'its stride.')

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    init = initializers.INITIALIZERS[self.init_name]
    x = images
    for i, (kernel, stride, width) in enumerate(
        zip(self.kernels, self.strides, self.widths, strict=True)):
      # Padding 1 on both sides, as in torch: 'SAME' pads stride 2 on one only.
      padding = 0 if kernel == stride else 1
      x = self._convolution(
          width, kernel, strides=stride, padding=padding, use_bias=False,
          kernel_init=init.conv, name=f'conv_{i}')(x)
      x = self._normalize(x, f'norm_{i}', train)
      x = ACTIVATIONS[self.activation](x)
    return self._convolution(
        self.width, 1, kernel_init=init.projection,
        name='projection')(x)  # [B, h, w, D]


class ResNetStem(_Stem):
  """A ResNet and a patchify layer on its last feature map: AugReg's hybrids.

  Attributes:
    units: units in each stage; () for the root alone. The root reduces by 4,
      every stage but the first by 2; the patchify layer by what is left of the
      patch, which is 1 but for R+Ti/16.
  """
  units: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    init = initializers.INITIALIZERS[self.init_name]
    x = resnet.ResNet(
        self.units, init.conv, self.dtype, name='resnet')(images)
    patch = self.patch // (4 * 2 ** max(len(self.units) - 1, 0))
    return nn.Conv(
        self.width, (patch, patch), strides=patch, padding='VALID',
        dtype=self.dtype, kernel_init=init.embedding,
        name='embedding')(x)  # [B, h, w, D]


_PATCHIFY_BN = functools.partial(PatchifyStem, norm='bn', activation='relu')
_CONV_BN = functools.partial(ConvStem, norm='bn', activation='relu')
_CONV_LN = functools.partial(ConvStem, norm='ln', activation='relu')

STEMS = {
    'patchify': PatchifyStem,    # ViT_P
    'patchify_bn': _PATCHIFY_BN,
    'conv': _CONV_BN,            # ViT_C
    'conv_ln': _CONV_LN,
    'S1': _CONV_BN,
    'S2': _CONV_BN,
    'S3': _CONV_BN,
    'S4': _CONV_BN,
    'resnet': ResNetStem,        # the hybrids: R26+S/32, ...
}
_CONVOLUTIONAL = ('conv', 'conv_ln', 'S1', 'S2', 'S3', 'S4')


def is_convolutional(stem: str) -> bool:
  """Whether a stem takes the place of one block (`Size.depth_conv`)."""
  choices.pick(STEMS, stem, 'stem')
  return stem in _CONVOLUTIONAL


def create(*, size: str, stem: str, **fields) -> nn.Module:
  """Builds a stem for a model size.

  Args:
    size: a key of `variants.SIZES`.
    stem: a key of `STEMS`.
    **fields: batch_norm, batch_norm_group, norm_eps, init_name, conv, dtype:
      see the module's top.

  Returns:
    An unbound stem: [B, H, W, C] -> [B, h, w, D].

  Raises:
    ValueError: unknown names, or a stem that the size does not have.
  """
  row = variants.size(size)
  variants.check_stem(size, stem)
  if stem == 'resnet':
    if fields.get('conv', 'xla') != 'xla':
      raise ValueError(
          f"The convolutions of a ResNet have no form {fields['conv']!r}.\n"
          "Leave model.conv at 'auto' or 'xla'.")
    fields['units'] = variants.HYBRIDS[size][1]
  if is_convolutional(stem):
    convolutions = variants.conv_stem(
        size, 'conv' if stem == 'conv_ln' else stem)
    fields |= convolutions._asdict()
  return STEMS[stem](patch=row.patch, width=row.width, **fields)
