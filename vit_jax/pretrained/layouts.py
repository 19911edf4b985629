"""Where each release keeps what we call 'encoder/block_00/mlp/fc1/kernel'.

A layout is a table from our modules to theirs, read from left to right when
weights are loaded and when they are written. In a name on the right:
  {i} {i1} {i0}   a number of the name on the left, that plus 1, that minus 1
  name|query      one third of a tensor that holds query, key and value
  {leaf}          where 'kernel' or 'bias' stands if not at the end
  name_           the leaf follows without a separator
  (a, b)          spelled a or b; b in older or newer files
Sources: google-research/vision_transformer, big_vision, big_transfer,
facebookresearch/pycls, pytorch/vision, huggingface's timm and transformers.
"""
import dataclasses
import re
from typing import NamedTuple

import numpy as np

_BLOCK = r'encoder/block_(?P<i>\d+)/'
_UNIT = r'stage_(?P<i>\d+)_unit_(?P<j>\d+)/'
_LEAVES = ('kernel', 'bias', 'scale', 'mean', 'var')
_TORCH = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
          'mean': 'running_mean', 'var': 'running_var'}
_TF_NORM = {'scale': 'gamma', 'bias': 'beta'}
# Which part of how many: torch fuses what we keep apart.
_PARTS = {'query': (0, 3), 'key': (1, 3), 'value': (2, 3),
          'kv_key': (0, 2), 'kv_value': (1, 2)}


class Place(NamedTuple):
  """A tensor of a file, or the part of it (0, 3): the first of three."""
  key: str
  part: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  """One release's names.

  Attributes:
    title: what people call it.
    family: of the models: vit, mixer, bit.
    signature: regex of keys that no other layout has.
    rules: {regex of our module: their module, or several spellings}.
    torch: kernels are [out, in] and OIHW, names are joined by dots.
    bgr: the first convolution takes its channels as blue, green, red.
  """
  title: str
  family: str
  signature: str
  rules: dict[str, str | tuple[str, ...]]
  torch: bool = False
  bgr: bool = False

  def places(self, path: str) -> list[Place]:
    """Where our parameter may be; [] where the release has no such thing."""
    module, _, leaf = path.rpartition('/')
    if leaf not in _LEAVES:
      module, leaf = path, ''
    for ours, theirs in self.rules.items():
      if match := re.fullmatch(ours, module):
        spellings = (theirs,) if isinstance(theirs, str) else theirs
        return [self._place(name, leaf, match) for name in spellings]
    return []

  def _place(self, name, leaf, match):
    numbers = {}
    for key, value in match.groupdict().items():
      numbers[key] = value
      if (value or '').isdigit():
        n = int(value)
        numbers |= {key: n, f'{key}1': n + 1, f'{key}0': n - 1}
    if 'n' in numbers:
      numbers['abc'] = ' abc'[numbers['n']]
    has_leaf = '{leaf}' in name
    name, _, part = name.format(leaf=leaf, **numbers).partition('|')
    if leaf and not has_leaf:
      if self.torch:
        leaf = _TORCH[leaf]
      elif name.endswith('group_norm'):
        leaf = _TF_NORM[leaf]
      joint = '' if name.endswith('_') else '.' if self.torch else '/'
      name += joint + leaf
    return Place(name, _PARTS.get(part))

  def to_file(self, path: str, array: np.ndarray) -> np.ndarray:
    """Our array in their order of axes (its part of a fused one)."""
    leaf = path.rpartition('/')[2]
    # BiT's head is a convolution.
    is_conv_head = self.family == 'bit' and path == 'head/kernel'
    if not self.torch or leaf not in _LEAVES:
      return array[None, None] if is_conv_head else array
    if leaf != 'kernel':
      return array.reshape(-1)
    if array.ndim == 4:
      return array.transpose(3, 2, 0, 1)
    inputs = array.shape[:2] if path.endswith('out/kernel') else array.shape[:1]
    array = array.reshape(int(np.prod(inputs)), -1).T
    return array[..., None, None] if is_conv_head else array

  def from_file(self, path: str, array: np.ndarray, shape) -> np.ndarray:
    """Undoes `to_file`; `shape` is ours."""
    if self.torch and path.endswith('/kernel'):
      if len(shape) == 4:
        return array.transpose(2, 3, 1, 0)
      array = array.reshape(array.shape[0], -1).T
    return array.reshape(shape)


def _linen(attention, norm, mlp):
  """vision_transformer's names; flax numbered submodules in two ways."""
  block = 'Transformer/encoderblock_{i}/'
  attention = f'MultiHeadDotProductAttention_{attention}'
  return {
      'cls': 'cls',
      'pos_embedding': (
          'Transformer/posembed_input/pos_embedding',
          'Transformer/pos_embedding', 'pos_embedding'),
      'stem/embedding': 'embedding',
      'stem/resnet/conv_root': 'conv_root',
      'stem/resnet/norm_root': 'gn_root',
      f'stem/resnet/{_UNIT}conv_proj': 'block{i1}/unit{j1}/conv_proj',
      f'stem/resnet/{_UNIT}norm_proj': 'block{i1}/unit{j1}/gn_proj',
      rf'stem/resnet/{_UNIT}conv_(?P<n>\d)': 'block{i1}/unit{j1}/conv{n}',
      rf'stem/resnet/{_UNIT}norm_(?P<n>\d)': 'block{i1}/unit{j1}/gn{n}',
      f'{_BLOCK}norm_attention': f'{block}LayerNorm_0',
      rf'{_BLOCK}attention/(?P<part>\w+)': f'{block}{attention}/{{part}}',
      f'{_BLOCK}norm_mlp': f'{block}LayerNorm_{norm}',
      rf'{_BLOCK}mlp/fc(?P<n>\d)': f'{block}MlpBlock_{mlp}/Dense_{{n0}}',
      'encoder/norm': 'Transformer/encoder_norm',
      'map/probe': ('MAPHead_0/probe', 'probe'),
      r'map/attention/(?P<part>\w+)': (
          'MAPHead_0/MultiHeadDotProductAttention_0/{part}',
          'MultiHeadDotProductAttention_0/{part}'),
      'map/norm': ('MAPHead_0/LayerNorm_0', 'LayerNorm_0'),
      r'map/mlp/fc(?P<n>\d)': (
          'MAPHead_0/MlpBlock_0/Dense_{n0}', 'MlpBlock_0/Dense_{n0}'),
      'pre_logits': 'pre_logits',
      'head': 'head',
  }


def _torch_units(prefix):
  return {
      rf'{prefix[0]}{_UNIT}conv_proj':
          prefix[1] + 'stages.{i}.blocks.{j}.downsample.conv',
      rf'{prefix[0]}{_UNIT}norm_proj':
          prefix[1] + 'stages.{i}.blocks.{j}.downsample.norm',
      rf'{prefix[0]}{_UNIT}(?P<kind>conv|norm)_(?P<n>\d)':
          prefix[1] + 'stages.{i}.blocks.{j}.{kind}{n}',
  }


_MIXER = r'block_(?P<i>\d+)/'
_SAME = {'(?P<path>.*)': '{path}'}

LAYOUTS = {
    # Of `model_file`, blocks unstacked.
    'ours': Layout('our ViT', 'vit', 'encoder/block_00/norm_mlp/.*', _SAME),
    'our_mixer': Layout('our Mixer', 'mixer', 'block_00/norm_tokens/.*', _SAME),
    'our_bit': Layout('our BiT', 'bit', 'stage_0_unit_00/norm_1/.*', _SAME),
    # Written before flax was Linen: one counter for all submodules.
    'augreg': Layout(
        'AugReg .npz (also ViT, SAM, hybrids)', 'vit',
        r'Transformer/encoderblock_\d+/MlpBlock_3/.*', _linen(1, 2, 3)),
    'big_vision': Layout(
        'big_vision .npz', 'vit',
        r'Transformer/encoderblock_\d+/MlpBlock_0/.*', _linen(0, 1, 0)),
    'mixer': Layout(
        'Mixer .npz', 'mixer', r'(MixerBlock|Mixer/encoderblock)_\d+/.*', {
            'stem': ('stem', 'embedding'),
            f'{_MIXER}norm_tokens': (
                'MixerBlock_{i}/LayerNorm_0',
                'Mixer/encoderblock_{i}/LayerNorm_0'),
            f'{_MIXER}norm_channels': (
                'MixerBlock_{i}/LayerNorm_1',
                'Mixer/encoderblock_{i}/LayerNorm_1'),
            rf'{_MIXER}mlp_(?P<mix>token|channel)s/fc(?P<n>\d)': (
                'MixerBlock_{i}/{mix}_mixing/Dense_{n0}',
                'Mixer/encoderblock_{i}/{mix}_mixing_phase_0/{leaf}{n}'),
            'norm': ('pre_head_layer_norm', 'Mixer/encoder_norm'),
            'head': 'head'}),
    'bit': Layout('BiT .npz', 'bit', '(resnet/)?root_block/.*', {
        'conv_root': ('resnet/root_block/standardized_conv2d',
                      'root_block/conv_root'),  # big_vision's, here and below
        f'{_UNIT}conv_proj': (
            'resnet/block{i1}/unit{j1:02d}/a/proj/standardized_conv2d',
            'block{i1}/unit{j1:02d}/conv_proj'),
        rf'{_UNIT}conv_(?P<n>\d)': (
            'resnet/block{i1}/unit{j1:02d}/{abc}/standardized_conv2d',
            'block{i1}/unit{j1:02d}/conv{n}'),
        rf'{_UNIT}norm_(?P<n>\d)': (
            'resnet/block{i1}/unit{j1:02d}/{abc}/group_norm',
            'block{i1}/unit{j1:02d}/gn{n}'),
        'norm': ('resnet/group_norm', 'norm-pre-head'),
        'head': ('resnet/head/conv2d', 'head')}),
    'timm': Layout('timm ViT', 'vit', r'blocks\.\d+\.attn\.qkv\.weight', {
        'cls': 'cls_token',
        'pos_embedding': 'pos_embed',
        'stem/embedding': 'patch_embed.proj',
        'stem/resnet/conv_root': (
            'patch_embed.backbone.stem.conv', 'patch_embed.backbone.conv'),
        'stem/resnet/norm_root': (
            'patch_embed.backbone.stem.norm', 'patch_embed.backbone.norm'),
        **_torch_units(('stem/resnet/', 'patch_embed.backbone.')),
        f'{_BLOCK}norm_attention': 'blocks.{i}.norm1',
        f'{_BLOCK}attention/out': 'blocks.{i}.attn.proj',
        rf'{_BLOCK}attention/(?P<part>\w+)': 'blocks.{i}.attn.qkv|{part}',
        f'{_BLOCK}norm_mlp': 'blocks.{i}.norm2',
        rf'{_BLOCK}mlp/fc(?P<n>\d)': 'blocks.{i}.mlp.fc{n}',
        'encoder/norm': 'norm',
        'map/probe': 'attn_pool.latent',
        'map/attention/query': 'attn_pool.q',
        r'map/attention/(?P<part>key|value)': 'attn_pool.kv|kv_{part}',
        'map/attention/out': 'attn_pool.proj',
        'map/norm': 'attn_pool.norm',
        r'map/mlp/fc(?P<n>\d)': 'attn_pool.mlp.fc{n}',
        'head': 'head'}, torch=True),
    'timm_mixer': Layout(
        'timm Mixer', 'mixer', r'blocks\.\d+\.mlp_tokens\..*', {
            'stem': 'stem.proj',
            f'{_MIXER}norm_tokens': 'blocks.{i}.norm1',
            f'{_MIXER}norm_channels': 'blocks.{i}.norm2',
            rf'{_MIXER}(?P<mlp>\w+)/fc(?P<n>\d)': 'blocks.{i}.{mlp}.fc{n}',
            'norm': 'norm',
            'head': 'head'}, torch=True),
    'timm_bit': Layout(
        'timm BiT', 'bit', r'stages\.\d+\.blocks\.\d+\.conv3.*', {
            'conv_root': 'stem.conv',
            **_torch_units(('', '')),
            'norm': 'norm',
            'head': 'head.fc'}, torch=True),
    'huggingface': Layout(
        'Hugging Face ViT', 'vit',
        r'encoder\.layer\.\d+\.attention\.attention\.query\.weight', {
            'cls': 'embeddings.cls_token',
            'pos_embedding': 'embeddings.position_embeddings',
            'stem/embedding': 'embeddings.patch_embeddings.projection',
            f'{_BLOCK}norm_attention': 'encoder.layer.{i}.layernorm_before',
            f'{_BLOCK}attention/out':
                'encoder.layer.{i}.attention.output.dense',
            rf'{_BLOCK}attention/(?P<part>\w+)':
                'encoder.layer.{i}.attention.attention.{part}',
            f'{_BLOCK}norm_mlp': 'encoder.layer.{i}.layernorm_after',
            f'{_BLOCK}mlp/fc1': 'encoder.layer.{i}.intermediate.dense',
            f'{_BLOCK}mlp/fc2': 'encoder.layer.{i}.output.dense',
            'encoder/norm': 'layernorm',
            'pre_logits': 'pooler.dense',
            'head': 'classifier'}, torch=True),
    'pycls': Layout(
        'pycls ViT', 'vit', r'encoder\.block_\d+\.self_attention\..*', {
            'cls': 'class_token',
            'pos_embedding': 'pos_embedding',
            'stem/embedding': 'stem.patchify',
            r'stem/conv_(?P<i>\d)': 'stem.cstem{i}_conv',
            r'stem/norm_(?P<i>\d)': 'stem.cstem{i}_bn',
            'stem/projection': 'stem.cstem_last_conv',
            f'{_BLOCK}norm_attention': 'encoder.block_{i}.ln_1',
            f'{_BLOCK}attention/out':
                'encoder.block_{i}.self_attention.block.out_proj',
            rf'{_BLOCK}attention/(?P<part>\w+)':
                'encoder.block_{i}.self_attention.block.in_proj_|{part}',
            f'{_BLOCK}norm_mlp': 'encoder.block_{i}.ln_2',
            rf'{_BLOCK}mlp/fc(?P<n>\d)':
                'encoder.block_{i}.mlp_block.linear_{n}',
            'encoder/norm': 'encoder.ln',
            'head': 'head.head_fc'}, torch=True, bgr=True),
    'torchvision': Layout(
        'torchvision ViT', 'vit', r'encoder\.layers\.encoder_layer_\d+\..*', {
            'cls': 'class_token',
            'pos_embedding': 'encoder.pos_embedding',
            'stem/embedding': 'conv_proj',
            r'stem/conv_(?P<i>\d)': 'conv_proj.conv_bn_relu_{i}.0',
            r'stem/norm_(?P<i>\d)': 'conv_proj.conv_bn_relu_{i}.1',
            'stem/projection': 'conv_proj.conv_last',
            f'{_BLOCK}norm_attention': 'encoder.layers.encoder_layer_{i}.ln_1',
            f'{_BLOCK}attention/out':
                'encoder.layers.encoder_layer_{i}.self_attention.out_proj',
            rf'{_BLOCK}attention/(?P<part>\w+)':
                'encoder.layers.encoder_layer_{i}.self_attention.in_proj_'
                '|{part}',
            f'{_BLOCK}norm_mlp': 'encoder.layers.encoder_layer_{i}.ln_2',
            f'{_BLOCK}mlp/fc1': (
                'encoder.layers.encoder_layer_{i}.mlp.0',
                'encoder.layers.encoder_layer_{i}.mlp.linear_1'),
            f'{_BLOCK}mlp/fc2': (
                'encoder.layers.encoder_layer_{i}.mlp.3',
                'encoder.layers.encoder_layer_{i}.mlp.linear_2'),
            'encoder/norm': 'encoder.ln',
            'pre_logits': 'heads.pre_logits',
            'head': 'heads.head'}, torch=True),
}
