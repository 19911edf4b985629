"""Logits of the public reference implementations, from synthetic weights.

`goldens/logits.json` holds what each code base computes from weights that are
a pure function of (seed, name on disk, shape). Here they are written to a file
under those names, read as a released one, and have to give the same logits.
"""
import functools
import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax import param_paths
from vit_jax import pretrained
from vit_jax.pretrained import files
from vit_jax.pretrained import layouts
from vit_jax.pretrained import writers

with open(os.path.join(os.path.dirname(__file__), 'goldens',
                       'logits.json')) as f:
  GOLDENS = json.load(f)
VIT = dict(stem='patchify', gelu='tanh', scan=True)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# entry: (layout, fields of the model)
ENTRIES = {
    'Ti/16': ('augreg', dict(VIT, size='Ti/16')),
    'S/32': ('augreg', dict(VIT, size='S/32')),
    'R+Ti/16': ('augreg', dict(VIT, size='R+Ti/16', stem='resnet')),
    'R26+S/32': ('augreg', dict(VIT, size='R26+S/32', stem='resnet')),
    'Mixer-B/32': ('mixer', dict(size='Mixer-B/32', scan=True)),
    'Ti/16@384': ('augreg', dict(VIT, size='Ti/16')),
    'R50x1': ('bit', dict(size='BiT-R50x1')),
    'ViT_C-1GF': ('pycls', dict(size='1GF', stem='conv', scan=True)),
    'ViT_P-1GF': ('pycls', dict(size='1GF', stem='patchify', scan=True)),
    'bv Ti/16 map': ('big_vision', dict(VIT, size='Ti/16', pool='map')),
    'bv S/32 gap sincos2d rep': ('big_vision', dict(
        VIT, size='S/32', pool='gap', pos_embedding='sincos2d',
        pre_logits=True)),
}
FAST = ('R+Ti/16', 'ViT_C-1GF', 'bv Ti/16 map')


def synthetic(seed, key, shape, torch):
  """The value of a tensor; see the module's docstring."""
  rng = np.random.default_rng(zlib.crc32(f'{seed}/{key}'.encode()))
  x = rng.standard_normal(shape)
  name = key.replace('.', '/').split('/')[-1]
  if torch:
    if name == 'running_var':
      return (1 + 0.1 * np.abs(x)).astype(np.float32)
    if 'weight' in name:
      return (x / np.sqrt(np.prod(shape[1:])) if len(shape) > 1
              else 1 + 0.1 * x).astype(np.float32)
  elif name == 'kernel':
    is_qkv = key.split('/')[-2] in ('query', 'key', 'value')
    fan_in = shape[0] if is_qkv else np.prod(shape[:-1])
    return (x / np.sqrt(fan_in)).astype(np.float32)
  elif name in ('scale', 'gamma'):
    return (1 + 0.1 * x).astype(np.float32)
  return (0.1 * x).astype(np.float32)


def shapes(model, size):
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(
      lambda key, x: model.init(key, x, train=False),
      jax.random.key(0), images)


def on_disk(entry, variables):
  """{key: array} as the reference code had it on disk."""
  layout, _ = ENTRIES[entry]
  empty = jax.tree.map(
      lambda x: np.broadcast_to(np.float32(0), x.shape), variables)
  result = {}
  for key, value in writers.arrays(
      empty['params'], layout, empty.get('batch_stats')).items():
    if layout == 'big_vision':
      key = key.removeprefix('Transformer/posembed_input/')
    shape = value.shape
    if layout == 'pycls' and key == 'pos_embedding':
      shape = (shape[1], shape[0], shape[2])
    value = synthetic(GOLDENS[entry]['seed'], key, shape, layout == 'pycls')
    if '/gn' in key or key.startswith('gn') or 'group_norm' in key:
      value = value.reshape(1, 1, 1, -1)
    result[key] = value
  return result


def compare(entry, tmp_path):
  """Largest differences of logits, [evaluation, training mode]."""
  golden = GOLDENS[entry]
  layout, fields = ENTRIES[entry]
  model = models.create(num_classes=golden['classes'], **fields)
  variables = shapes(model, golden['size'])
  assert param_paths.size(variables['params']) == golden['params']
  path = str(tmp_path / ('weights.safetensors' if layout == 'pycls'
                         else 'weights.npz'))
  write = files.write_safetensors if layout == 'pycls' else files.write_npz
  write(path, on_disk(entry, variables))
  channels = 'rgb' if layout == 'pycls' else 'auto'
  given, report = pretrained.load(path, variables, channels=channels)
  assert not report.unexpected and not report.missing and not report.reshaped
  given = {kind: param_paths.unflatten(flat) for kind, flat in given.items()}
  rng = np.random.default_rng(golden['seed'])
  images = rng.uniform(
      -1, 1, (2, golden['size'], golden['size'], 3)).astype(np.float32)
  differ = []
  for name, train in (('logits', False), ('logits_train_mode', True)):
    if name in golden:
      apply = jax.jit(
          lambda v, x, train=train: model.apply(
              v, x, train=train, mutable=['batch_stats'] if train else False),
          compiler_options={'xla_backend_optimization_level': 0})
      with jax.default_matmul_precision('highest'):
        logits = apply(given, images)
      logits = np.asarray(logits[0] if train else logits)
      differ.append(float(np.abs(logits - np.array(golden[name])).max()))
  return differ


@pytest.mark.parametrize('entry', [
    entry if entry in FAST else slow(entry) for entry in ENTRIES])
def test_logits(entry, tmp_path):
  differ = compare(entry, tmp_path)
  print(entry, *(f'{d:.2g}' for d in differ))
  assert len(differ) == 1 + ('logits_train_mode' in GOLDENS[entry])
  assert max(differ) < 1e-4


@pytest.mark.slow
def test_bfloat16_of_released_size(tmp_path):
  """Logits in bfloat16 stay within 3 % of the largest logit."""
  golden, (_, fields) = GOLDENS['Ti/16'], ENTRIES['Ti/16']
  logits = []
  for dtype in ('float32', 'bfloat16'):
    model = models.create(num_classes=10, **fields, dtype=dtype)
    variables = shapes(model, 224)
    path = str(tmp_path / 'weights.npz')
    files.write_npz(path, on_disk('Ti/16', variables))
    given, _ = pretrained.load(path, variables)
    images = np.random.default_rng(golden['seed']).uniform(
        -1, 1, (2, 224, 224, 3)).astype(np.float32)
    logits.append(np.asarray(jax.jit(lambda p, x, model=model: model.apply(
        {'params': p}, x, train=False))(
            param_paths.unflatten(given['params']), images)))
  differ = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
  print(f'bfloat16: {differ:.2g} of the largest logit')
  assert 1e-4 < differ < 0.03


def test_every_golden_has_its_test():
  assert ENTRIES.keys() == GOLDENS.keys()
  assert {layout for layout, _ in ENTRIES.values()} <= layouts.LAYOUTS.keys()
