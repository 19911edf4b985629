"""The models' size tables: what a name such as 'S/16' or '4GF' stands for.

Two families of names:
  '1GF' .. '72GF'   "Early Convolutions Help Transformers See Better"
                    (arXiv 2106.14881, Table 1, Figure 8, Appendix C), all with
                    patch 16. The number is that of the paper: flops, in
                    multiply-adds, of one 224x224 image.
  'Ti/16' .. 'e/14' "How to train your ViT?" (arXiv 2106.10270, Table 2) and
                    "Scaling Vision Transformers" (arXiv 2106.04560, Table 2),
                    written with the patch behind the slash.
  'R26+S/32', ...   the same behind a ResNet, with stem 'resnet' and no other.
and 'micro', 'micro-deep' (patch 8) and 'mini' (patch 4), for images of 32
pixels and for tests.
`MIXERS` and `BITS` are the other two families.

ViT_C is ViT_P with another stem and one block fewer, so that flops stay equal:
that block is a column below. The names of stems are listed in `stems.STEMS`.
"""
from typing import NamedTuple

from vit_jax import choices


class Size(NamedTuple):
  """One model size, without its stem.

  Attributes:
    patch: pixels per token and axis; the stem reduces H and W by it.
    width: D. heads: K. mlp: M.
    depth: number of blocks behind a patchify stem.
    depth_conv: number of blocks behind a convolutional stem.
    conv_stem: key of `CONV_STEMS`.
  """
  patch: int
  width: int
  heads: int
  mlp: int
  depth: int
  depth_conv: int
  conv_stem: str


class ConvStem(NamedTuple):
  """The convolutions of a stem in front of its last, 1x1, one."""
  kernels: tuple[int, ...]
  strides: tuple[int, ...]
  widths: tuple[int, ...]


_FIXED_PATCH = {
    #            patch width heads  mlp depth depth_conv conv_stem
    '1GF':   Size(16,  192,   3,   576,  12,  11, '1GF'),
    '4GF':   Size(16,  384,   6,  1152,  12,  11, '4GF'),
    '16GF':  Size(16,  384,   6,  1152,  48,  47, '4GF'),  # deep 4GF, App. B
    '18GF':  Size(16,  768,  12,  3072,  12,  11, '18GF'),
    '36GF':  Size(16, 1024,  16,  4096,  14,  13, '18GF'),
    '72GF':  Size(16, 1152,  18,  4608,  22,  22, '18GF'),  # App. C
    'micro': Size(8,    64,   4,   192,   4,   3, 'micro'),
    'micro-deep': Size(8, 64, 4, 192,  12,  11, 'micro'),
    'mini':  Size(4,   128,   4,   384,   6,   5, 'mini'),
}

# The paper has no convolutional stem for these: the rows take the stem whose
# flops are nearest to those of one block, and lose one block, as in the paper,
# up to L. Above, a stem costs much less than a block, and none is lost.
_ANY_PATCH = {
    #            width heads  mlp  depth depth_conv conv_stem
    'mu':       (32,    2,   128,   1,   1, '1GF'),
    'Ti':       (192,   3,   768,  12,  11, '1GF'),
    'S':        (384,   6,  1536,  12,  11, '4GF'),
    'M':        (512,   8,  2048,  12,  11, '4GF'),
    'B':        (768,  12,  3072,  12,  11, '18GF'),
    'L':        (1024, 16,  4096,  24,  23, '18GF'),
    'So400m':   (1152, 16,  4304,  27,  27, '18GF'),
    'H':        (1280, 16,  5120,  32,  32, '18GF'),
    'g':        (1408, 16,  6144,  40,  40, '18GF'),
    'G':        (1664, 16,  8192,  48,  48, '18GF'),
    'e':        (1792, 16, 15360,  56,  56, '18GF'),
}
PATCHES = (8, 14, 16, 32)

# Units in each stage of the ResNet in front: google-research/vision_transformer
# models_resnet.py. The number behind its R is that of the ResNet's layers, the
# one behind the slash the pixels per token. R+Ti/16 has the root only, and
# patches of 8x8 on it: 32 pixels per token, whatever its name.
HYBRIDS = {
    'R+Ti/16': ('Ti/32', ()),
    'R26+S/32': ('S/32', (2, 2, 2, 2)),
    'R26+B/32': ('B/32', (2, 2, 2, 2)),
    'R50+L/32': ('L/32', (3, 4, 6, 3)),
    'R50+B/16': ('B/16', (3, 4, 9)),
}

SIZES = _FIXED_PATCH | {
    f'{name}/{patch}': Size(patch, *row)
    for name, row in _ANY_PATCH.items() for patch in PATCHES}
SIZES |= {name: SIZES[behind] for name, (behind, _) in HYBRIDS.items()}

# 3x3 convolutions (padding 1) of the paper's stems, at patch 16. A convolution
# either has stride 2 and doubles the channels, or stride 1 and keeps them. The
# last two rows are ours.
CONV_STEMS = {
    '1GF': ConvStem((3,) * 4, (2, 2, 2, 2), (24, 48, 96, 192)),
    '4GF': ConvStem((3,) * 4, (2, 2, 2, 2), (48, 96, 192, 384)),
    '18GF': ConvStem(
        (3,) * 6, (2, 2, 1, 2, 1, 2), (64, 128, 128, 256, 256, 512)),
    'micro': ConvStem((3,) * 3, (2, 2, 2), (16, 32, 64)),
    'mini': ConvStem((3,) * 2, (2, 2), (64, 128)),
}

# Stems between 'conv' and 'patchify': three 3x3 convolutions, then one whose
# kernel equals its stride, a patchify layer of 2, 4, 8 or 16 pixels (the
# paper's Table 3). The table prints 42 channels for the first convolution of
# S1; its own 422M flops, 0.8M parameters and 1.3M activations need 52 (42
# gives 389M, 0.74M, 1.17M), which is also half of the 104 that follow.
#
# The paper's four keep the flops near those of 'conv'. So do the analogues for
# micro, with two 3x3 convolutions. Multiply-adds of the stem at 32 pixels,
# 1x1 convolution included: conv 765,952; S1 763,904 (-0.3 %); S2 775,680
# (+1.3 %); S3 757,760 (-1.1 %). An S4 would patchify 16 pixels, more than the
# 8 of a token.
PATCHIFYING_STEMS = {
    ('4GF', 'S1'): ConvStem((3, 3, 3, 2), (2, 2, 2, 2), (52, 104, 208, 416)),
    ('4GF', 'S2'): ConvStem((3, 3, 3, 4), (2, 2, 1, 4), (32, 64, 128, 256)),
    ('4GF', 'S3'): ConvStem((3, 3, 3, 8), (2, 1, 1, 8), (17, 34, 68, 136)),
    ('4GF', 'S4'): ConvStem((3, 3, 3, 16), (1, 1, 1, 16), (8, 16, 32, 64)),
    ('micro', 'S1'): ConvStem((3, 3, 2), (2, 2, 2), (18, 36, 80)),
    ('micro', 'S2'): ConvStem((3, 3, 4), (2, 1, 4), (10, 20, 40)),
    ('micro', 'S3'): ConvStem((3, 3, 8), (1, 1, 8), (5, 9, 20)),
}



class Mixer(NamedTuple):
  """One size of MLP-Mixer (arXiv 2105.01601, Table 1).

  Attributes:
    patch: pixels per token and axis.
    width: D.
    depth: number of blocks.
    channels_mlp: width of the MLP over channels, which each token has.
    tokens_mlp: width of the MLP over tokens, which each channel has.
  """
  patch: int
  width: int
  depth: int
  channels_mlp: int
  tokens_mlp: int


MIXERS = {
    #                     patch width depth channels tokens
    'Mixer-S/32':    Mixer(32,  512,   8,   2048,   256),
    'Mixer-S/16':    Mixer(16,  512,   8,   2048,   256),
    'Mixer-B/32':    Mixer(32,  768,  12,   3072,   384),
    'Mixer-B/16':    Mixer(16,  768,  12,   3072,   384),
    'Mixer-L/32':    Mixer(32, 1024,  24,   4096,   512),
    'Mixer-L/16':    Mixer(16, 1024,  24,   4096,   512),
    'Mixer-H/14':    Mixer(14, 1280,  32,   5120,   640),
    'Mixer-micro':   Mixer(8,    64,   4,    192,    32),
}


class BiT(NamedTuple):
  """One size of BiT (arXiv 1912.11370): a ResNet-v2, wider by a factor.

  Attributes:
    units: units in each stage.
    width: channels of the root and of the first stage's 3x3 convolutions, 64
      times the factor.
  """
  units: tuple[int, ...]
  width: int


BITS = {
    'BiT-R50x1': BiT((3, 4, 6, 3), 64),
    'BiT-R101x1': BiT((3, 4, 23, 3), 64),
    'BiT-R50x3': BiT((3, 4, 6, 3), 192),
    'BiT-R101x3': BiT((3, 4, 23, 3), 192),
    'BiT-R152x2': BiT((3, 8, 36, 3), 128),
    'BiT-R152x4': BiT((3, 8, 36, 3), 256),
    'BiT-micro': BiT((1, 1), 32),
}


def size(name: str) -> Size:
  """Returns the row of a size; ValueError for a name not in `SIZES`."""
  return choices.pick(SIZES, name, 'size')


def check_stem(size_name: str, stem: str) -> None:
  """Raises ValueError unless both or neither are those of a hybrid."""
  if (size_name in HYBRIDS) == (stem == 'resnet'):
    return
  if stem == 'resnet':
    raise ValueError(
        f'Size {size_name!r} has no stem {stem!r}.\n'
        f'There is: {", ".join(HYBRIDS)}.')
  raise ValueError(
      f'Size {size_name!r} is one behind a ResNet and has no stem {stem!r}.\n'
      f"Take the stem 'resnet', or the size {HYBRIDS[size_name][0]!r}.")


def conv_stem(size_name: str, stem: str) -> ConvStem:
  """Returns the convolutions in front of the last, 1x1, one.

  Args:
    size_name: a key of `SIZES`.
    stem: 'conv', or 'S1' .. 'S4' where `PATCHIFYING_STEMS` has them.

  Returns:
    Convolutions whose strides multiply to the size's patch. `CONV_STEMS` as
    they stand at patch 16 (micro: 8); at patch 32 one more with stride 2 and
    twice the channels; at patch 8 without the last, which has stride 2.

  Raises:
    ValueError: there is no such stem for this size.
  """
  row = size(size_name)
  if stem != 'conv':
    if (size_name, stem) not in PATCHIFYING_STEMS:
      have = ', '.join(
          f'{s} at {n}' for n, s in sorted(PATCHIFYING_STEMS))
      raise ValueError(
          f'Size {size_name!r} has no stem {stem!r}.\n'
          f'There is: {have}; and at every size patchify, patchify_bn, conv '
          'and conv_ln (the last two not at patch 14).')
    return PATCHIFYING_STEMS[size_name, stem]
  kernels, strides, widths = CONV_STEMS[row.conv_stem]
  if size_name in _FIXED_PATCH or row.patch == 16:
    return ConvStem(kernels, strides, widths)
  if row.patch == 32:
    return ConvStem(
        (*kernels, 3), (*strides, 2), (*widths, 2 * widths[-1]))
  if row.patch == 8:
    return ConvStem(kernels[:-1], strides[:-1], widths[:-1])
  raise ValueError(
      f'Size {size_name!r} has no convolutional stem: strides of 2 multiply to '
      f'a power of two, never to the patch {row.patch}.\n'
      f'Take {size_name.split("/")[0]}/16 (or patch 8 or 32), or the stem '
      'patchify.')
