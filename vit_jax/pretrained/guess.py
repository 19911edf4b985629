"""What a released file is a model of, and which pixels it was trained on.

The file says the size, the stem, the pooling and the resolution; the code that
released it says the rest: the form of GELU, epsilon, and how it prepared
images. Sources: the input pipelines of google-research/vision_transformer,
big_vision (configs of ViT-S/16) and big_transfer; timm's default_cfgs of
augreg; transformers' ViTImageProcessor; pycls and torchvision's presets.
"""
import math
from typing import NamedTuple

from vit_jax import pretrained
from vit_jax import recipes
from vit_jax.models import variants
from vit_jax.pretrained import files
from vit_jax.pretrained import posembed

# (mean, std), fractions.
NORMALIZATIONS = {
    'half': (recipes.HALF, recipes.HALF),
    'imagenet': (recipes.IMAGENET_MEAN, recipes.IMAGENET_STD),
}


class Release(NamedTuple):
  """What a code base does around its models.

  Attributes:
    gelu: 'tanh' or 'erf'. norm_eps: of LayerNorm.
    pp: line of ops, given `size` and `larger`, which is size * `enlarge`.
    enlarge: see pp.
    normalize: a key of NORMALIZATIONS.
  """
  gelu: str
  norm_eps: float
  pp: str
  normalize: str = 'half'
  enlarge: float = 1.0


_RESIZE = 'decode|resize({size})'
_CROP = 'decode|resize_small({larger})|central_crop({size})'
_PILLOW = ("decode|resize_small({larger}, '{filter}_antialias')|"
           'central_crop({size})')


def _release(origin, pp, enlarge=1.0):
  """The Release of a key of `recipes.ORIGINS`, which says what it shares."""
  gelu, norm_eps, *normalization = recipes.ORIGINS[origin]
  name = next(k for k, v in NORMALIZATIONS.items() if v == (*normalization,))
  return Release(gelu, norm_eps, pp, name, enlarge)


_TIMM = _release('timm', _PILLOW.replace('{filter}', 'bicubic'), 1 / 0.9)
_TORCH = _release(
    'torchvision', _PILLOW.replace('{filter}', 'bilinear'), 256 / 224)
_AUGREG = _release('augreg', _RESIZE)
RELEASES = {
    'augreg': _AUGREG, 'mixer': _AUGREG, 'bit': _AUGREG,
    'big_vision': _release('augreg', _CROP, 256 / 224),
    'timm': _TIMM, 'timm_mixer': _TIMM, 'timm_bit': _TIMM,
    'huggingface': _release(
        'hf', "decode|resize({size}, method='bilinear_antialias')"),
    'pycls': _TORCH, 'torchvision': _TORCH,
}


class Guess(NamedTuple):
  """What a file says of its model.

  Attributes:
    fields: what `models.create` takes, of what follows from names and shapes;
      without `size` where no size of ours has these dimensions.
    looks_like: in words.
    resolution: pixels, or None where the file does not say.
    release: a `Release`.
  """
  fields: dict
  looks_like: str
  resolution: int | None
  release: Release


def guess(path: str) -> Guess:
  """Looks at names and shapes in a released file; reads no values.

  Raises:
    ValueError: it cannot be read, is of unknown layout, or has no head.
  """
  tensors = pretrained.normalize(files.open_file(path))
  layout = pretrained.detect(tensors, path)
  name = next(k for k, v in pretrained.layouts.LAYOUTS.items() if v is layout)
  if name not in RELEASES:
    raise ValueError(f'{path} is a model file of ours already.\n'
                     'Use it as it is, or fine-tune from it.')
  shape = lambda ours: pretrained.shape_of(tensors, layout, ours)
  text = pretrained.looks_like(tensors, layout)
  if not shape('head/bias'):
    raise ValueError(
        f'{path} looks like {text} and has no head: it names no classes.\n'
        'Fine-tune it (init_from.checkpoint), and use what that run exports.')
  fields = {'num_classes': shape('head/bias')[0]}
  size, _, convolutional = text.partition(' with a ')
  release = RELEASES[name]
  known = size in variants.SIZES | variants.MIXERS | variants.BITS
  if known:
    fields['size'] = size
  if layout.family == 'vit':
    fields |= {
        'stem': 'patchify', 'pool': 'gap', 'norm_eps': release.norm_eps,
        'pre_logits': bool(shape('pre_logits/bias')), 'gelu': release.gelu,
        'pos_embedding': 'learned' if shape('pos_embedding') else 'sincos2d'}
    if shape('map/probe'):
      fields['pool'] = 'map'
    elif shape('cls'):
      fields['pool'] = 'token'
    if convolutional:
      fields['stem'] = 'conv' if shape('stem/norm_0/mean') else 'conv_ln'
    elif shape('stem/resnet/conv_root/kernel'):
      fields['stem'] = 'resnet'
  elif layout.family == 'mixer':
    fields |= {'gelu': release.gelu, 'norm_eps': release.norm_eps}
  return Guess(fields, f'{text}, {layout.title}',
               _resolution(shape, layout, size) if known else None, release)


def _resolution(shape, layout, size):
  """Pixels of the images that the number of tokens stands for, or None."""
  if layout.family == 'mixer':
    kernel = shape('block_00/mlp_tokens/fc1/kernel')
    tokens = kernel[-1 if layout.torch else 0]
    return math.isqrt(tokens) * variants.MIXERS[size].patch
  if layout.family == 'bit' or not shape('pos_embedding'):
    return None
  width, table = variants.SIZES[size].width, shape('pos_embedding')
  tokens = math.prod(table) // width
  grid = posembed.square(tokens) or posembed.square(tokens - 1)
  return grid and grid[0] * variants.SIZES[size].patch


def preprocessing(release, resolution, pp='', normalize=''):
  """The release's way to prepare images, for `model_file.Model`.

  Args:
    release: `Release`.
    resolution: pixels.
    pp: a line of ops in place of the release's.
    normalize: a key of NORMALIZATIONS in place of the release's.
  """
  larger = round(resolution * release.enlarge)
  mean, std = NORMALIZATIONS[normalize or release.normalize]
  return {
      'eval_pp': pp or release.pp.format(size=resolution, larger=larger),
      'mean': list(mean), 'std': list(std), 'channels': 3,
      'image_shape': [resolution, resolution, 3]}
