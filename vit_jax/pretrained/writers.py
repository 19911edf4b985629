"""Writes weights in the names of other code bases."""
import re

import numpy as np

from vit_jax import param_paths
from vit_jax.pretrained import files
from vit_jax.pretrained import layouts

# Our sizes -> timm's models.
TIMM = {
    'Ti/16': 'vit_tiny_patch16_224', 'S/32': 'vit_small_patch32_224',
    'S/16': 'vit_small_patch16_224', 'B/32': 'vit_base_patch32_224',
    'B/16': 'vit_base_patch16_224', 'B/8': 'vit_base_patch8_224',
    'L/32': 'vit_large_patch32_224', 'L/16': 'vit_large_patch16_224',
    'H/14': 'vit_huge_patch14_224', 'R+Ti/16': 'vit_tiny_r_s16_p8_224',
    'R26+S/32': 'vit_small_r26_s32_224', 'R50+L/32': 'vit_large_r50_s32_224',
    'Mixer-S/32': 'mixer_s32_224', 'Mixer-S/16': 'mixer_s16_224',
    'Mixer-B/32': 'mixer_b32_224', 'Mixer-B/16': 'mixer_b16_224',
    'Mixer-L/32': 'mixer_l32_224', 'Mixer-L/16': 'mixer_l16_224',
    'BiT-R50x1': 'resnetv2_50x1_bit', 'BiT-R50x3': 'resnetv2_50x3_bit',
    'BiT-R101x1': 'resnetv2_101x1_bit', 'BiT-R101x3': 'resnetv2_101x3_bit',
    'BiT-R152x2': 'resnetv2_152x2_bit', 'BiT-R152x4': 'resnetv2_152x4_bit',
}
POOLS = {'token': 'token', 'gap': 'avg', 'map': 'map'}


def arrays(params, layout_name, batch_stats=None):
  """Returns a model's arrays by a layout's names, in its order of axes.

  Args:
    params: nested dict of the model's parameters.
    layout_name: a key of `layouts.LAYOUTS`.
    batch_stats: nested dict of BatchNorm's statistics, if any.

  Returns:
    {key: float32 array}.

  Raises:
    ValueError: the layout has no name for a parameter.
  """
  layout, result, parts = layouts.LAYOUTS[layout_name], {}, {}
  flat = {**param_paths.flatten(params),
          **param_paths.flatten(batch_stats or {})}
  for path, array in _unstacked(flat):
    places = layout.places(path)
    if not places:
      raise ValueError(
          f'{layout.title} has no name for {path}.\nWrite another format: '
          'there is no such model in that code base.')
    (key, part), value = places[0], layout.to_file(path, np.asarray(array))
    if part:
      parts.setdefault(key, [None] * part[1])[part[0]] = value
    else:
      result[key] = np.ascontiguousarray(value, np.float32)
  for key, values in parts.items():
    result[key] = np.ascontiguousarray(np.concatenate(values), np.float32)
  return result


def _unstacked(flat):
  """(path, array) with one for each block where blocks are stacked."""
  for path, array in flat.items():
    if match := re.fullmatch(r'(.*/)?blocks/(.*)', path):
      for i in range(array.shape[0]):
        yield f'{match[1] or ""}block_{i:02d}/{match[2]}', array[i]
    else:
      yield path, array


def write_npz(path, params):
  """Writes .npz as ViT, Mixer or BiT were released, by what `params` are.

  AugReg's names, in the numbering before flax was Linen, which
  vision_transformer, big_vision and timm read. ValueError for a model that has
  none, as with a convolutional stem.
  """
  from vit_jax import pretrained
  name = {'vit': 'augreg', 'mixer': 'mixer', 'bit': 'bit'}[
      pretrained.family(param_paths.flatten(params))]
  files.write_npz(path, arrays(params, name))


def write_timm(path, params, *, size, num_classes, image_size=224,
               gelu='tanh', pool='token'):
  """Writes .safetensors for timm; returns the line of Python that opens it.

  Args:
    path: of the file.
    params: nested dict of the model's parameters.
    size, num_classes, gelu, pool: of the model; see `models.create`.
    image_size: pixels, square.

  Returns:
    "timm.create_model(...)", whose logits are the model's. timm's ViT has the
    erf form of GELU unless told otherwise, so the line says which. timm
    standardises the kernels of hybrids and BiT with an epsilon of its own: up
    to 1e-4 of the largest logit.

  Raises:
    ValueError: timm has no such model.
  """
  from vit_jax import pretrained
  kind = pretrained.family(param_paths.flatten(params))
  if size not in TIMM:
    raise ValueError(f'timm has no model of size {size!r}.\n'
                     f'There is: {", ".join(TIMM)}.')
  name = {'vit': 'timm', 'mixer': 'timm_mixer', 'bit': 'timm_bit'}[kind]
  values = arrays(params, name)
  if size == 'R+Ti/16':  # whose ResNet is a root and nothing more
    values = {key.replace('backbone.stem.', 'backbone.'): value
              for key, value in values.items()}
  files.write_safetensors(path, values)
  options = [f'num_classes={num_classes}', f'checkpoint_path={str(path)!r}']
  if kind == 'vit':
    options.append(f'img_size={image_size}')
    if pool != 'token':
      options += [f'global_pool={POOLS[pool]!r}', 'class_token=False',
                  'fc_norm=False']
  if kind != 'bit':
    act = {'tanh': "'gelu_tanh'", 'erf': "'gelu'"}[gelu]
    # timm's Mixer takes a class and no name.
    options.append(f'act_layer={act}' if kind == 'vit' else
                   f'act_layer=timm.layers.get_act_layer({act})')
  return f'timm.create_model({TIMM[size]!r}, {", ".join(options)})'
