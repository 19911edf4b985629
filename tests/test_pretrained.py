"""Released files: all layouts, containers and conventions, and bad input."""
import io
import json
import struct
import zipfile

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from scipy import ndimage

from tests import runs
from vit_jax import checkpoint
from vit_jax import models
from vit_jax import param_paths
from vit_jax import pretrained
from vit_jax import recipes
from vit_jax.pretrained import files
from vit_jax.pretrained import layouts
from vit_jax.pretrained import posembed
from vit_jax.pretrained import writers

PATCHIFY = dict(size='micro', stem='patchify')


def shapes(image_size=32, num_classes=10, **fields):
  model = models.create(num_classes=num_classes, **fields)
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return jax.eval_shape(
      lambda key, x: model.init(key, x, train=False),
      jax.random.key(0), images)


def draw(variables):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), dict(variables))


def write(path, arrays):
  """Any {key: array} as a file; returns its path as a string."""
  suffix = {'.npz': files.write_npz, '.safetensors': files.write_safetensors}
  suffix[path.suffix](path, arrays)
  return str(path)


def differ(tree, given):
  flat = param_paths.flatten(tree)
  assert flat.keys() == given.keys()
  return max(float(np.abs(flat[k] - given[k]).max()) for k in flat)


@pytest.fixture(scope='module')
def vit_p():
  """(shapes, values) of a small ViT_P."""
  variables = shapes(**PATCHIFY)
  return variables, draw(variables)


@pytest.mark.parametrize('layout, fields', [
    ('augreg', PATCHIFY),
    ('augreg', dict(PATCHIFY, pool='map', pre_logits=True)),
    ('augreg', dict(size='R+Ti/16', stem='resnet', scan=True)),
    ('big_vision', dict(PATCHIFY, scan=True)),
    ('timm', PATCHIFY),
    ('timm', dict(PATCHIFY, pool='map', scan=True)),
    ('huggingface', dict(PATCHIFY, pre_logits=True)),
    ('pycls', dict(size='micro', stem='conv')),
    ('torchvision', dict(size='micro', stem='conv', pre_logits=True)),
    ('torchvision', PATCHIFY),
    ('mixer', dict(size='Mixer-micro', scan=True)),
    ('timm_mixer', dict(size='Mixer-micro')),
    ('bit', dict(size='BiT-micro')),
    ('timm_bit', dict(size='BiT-micro')),
    ('ours', dict(size='micro', stem='conv', scan=True)),
    ('our_mixer', dict(size='Mixer-micro')),
    ('our_bit', dict(size='BiT-micro')),
])
def test_what_is_written_is_read(layout, fields, tmp_path):
  variables = shapes(64 if 'R+' in fields['size'] else 32, **fields)
  values = draw(variables)
  arrays = writers.arrays(
      values['params'], layout, values.get('batch_stats'))
  suffix = 'safetensors' if layouts.LAYOUTS[layout].torch else 'npz'
  path = write(tmp_path / f'weights.{suffix}', arrays)
  given, report = pretrained.load(path, variables, channels='rgb')
  assert differ(values['params'], given['params']) == 0
  assert not report.unexpected and not report.reset
  assert fields['size'] in str(report), report
  if 'batch_stats' in values:
    assert differ(values['batch_stats'], given['batch_stats']) == 0


def test_every_layout_is_tested():
  marks = test_what_is_written_is_read.pytestmark
  assert {row[0] for row in marks[0].args[1]} == layouts.LAYOUTS.keys()


def _void(arrays):  # bfloat16, as numpy keeps it
  return {k: (v.view('<u4') >> 16).astype('<u2').view('V2')
          for k, v in arrays.items()}


def _bfloat16(values):
  return jax.tree.map(
      lambda x: (x.view('<u4') >> 16 << 16).view(np.float32), values)


@pytest.mark.parametrize('wrap', [
    lambda a: {f'opt/target/{k}': v for k, v in a.items()} | {
        'opt/state/step': np.int32(3)},
    lambda a: {f'params/{k}': v for k, v in a.items()},
    lambda a: {k: v[None, None, None] if k.endswith('scale') else v
               for k, v in a.items()},
    lambda a: a | {'pre_logits/kernel': np.eye(64, dtype=np.float32)},
], ids=['optimizer', 'params', 'norms of four axes', 'pre_logits'])
def test_what_releases_put_around(wrap, vit_p, tmp_path):
  variables, values = vit_p
  arrays = writers.arrays(values['params'], 'augreg')
  given, report = pretrained.load(
      write(tmp_path / 'a.npz', wrap(arrays)), variables)
  assert differ(values['params'], given['params']) == 0
  assert report.unexpected == [k for k in wrap(arrays) if 'pre_logits' in k]


def test_scanned_bfloat16_sub_tree_of_big_vision(vit_p, tmp_path):
  variables, values = vit_p
  arrays = _void(writers.arrays(values['params'], 'big_vision'))
  name = 'Transformer/encoderblock'
  blocks = {k for k in arrays if k.startswith(f'{name}_0/')}
  stacked = {k.replace('_0/', '/', 1): np.stack(
      [arrays.pop(k.replace('_0/', f'_{i}/', 1)) for i in range(4)])
      for k in blocks}
  arrays = {f'img/{k}': v for k, v in (arrays | stacked).items()}
  path = write(tmp_path / 'a.npz', arrays | {'t': np.zeros(1)})
  given, _ = pretrained.load(f'{path}:img', variables)
  assert differ(_bfloat16(values)['params'], given['params']) == 0
  with runs.refused("nothing below 'txt'"):
    pretrained.load(f'{path}:txt', variables)


def test_numbered_names_of_bit(tmp_path):
  variables = shapes(size='BiT-micro')
  values = draw(variables)
  arrays = writers.arrays(values['params'], 'bit')
  arrays = {k.replace('standardized_conv2d', f'standardized_conv2d_{i}'):
            v[None, None, None] if 'group_norm' in k else v
            for i, (k, v) in enumerate(arrays.items())}
  given, _ = pretrained.load(write(tmp_path / 'a.npz', arrays), variables)
  assert differ(values['params'], given['params']) == 0


def test_spellings_of_big_vision_and_of_the_first_mixer(tmp_path):
  """The later spellings of a rule are read, too."""
  for size, layout in (('BiT-micro', 'bit'), ('Mixer-micro', 'mixer')):
    variables = shapes(size=size)
    values = param_paths.flatten(draw(variables)['params'])
    layout, arrays = layouts.LAYOUTS[layout], {}
    for path, value in values.items():
      arrays[layout.places(path)[-1].key] = value
    given, _ = pretrained.load(
        write(tmp_path / f'{size}.npz', arrays), variables)
    assert differ(param_paths.unflatten(values), given['params']) == 0
  assert 'Mixer/encoderblock_1/token_mixing_phase_0/kernel2' in arrays


def test_pycls_takes_blue_first(tmp_path):
  variables = shapes(size='micro', stem='conv')
  values = draw(variables)
  path = write(tmp_path / 'a.safetensors', writers.arrays(
      values['params'], 'pycls', values['batch_stats']))
  kernel = values['params']['stem']['conv_0']['kernel']
  for channels, expected in (('auto', kernel[:, :, ::-1]), ('rgb', kernel)):
    given, _ = pretrained.load(path, variables, channels=channels)
    assert (given['params']['stem/conv_0/kernel'] == expected).all()


# Position embeddings.


@pytest.mark.parametrize('new', [(6, 6), (2, 2), (3, 9), (4, 4)])
def test_resizing_is_the_references(new):
  table = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  zoomed = ndimage.zoom(
      table.reshape(4, 4, 5), (new[0] / 4, new[1] / 4, 1), order=1)
  np.testing.assert_allclose(
      posembed.resize(table, (4, 4), new), zoomed.reshape(-1, 5), atol=1e-6)
  smooth = jax.image.resize(table.reshape(4, 4, 5), (*new, 5), 'linear')
  np.testing.assert_allclose(
      posembed.resize(table, (4, 4), new, 'antialias'),
      np.reshape(smooth, (-1, 5)), atol=1e-5)


@pytest.mark.parametrize('file_pool, pool, image_size, grid', [
    ('token', 'token', 64, None), ('token', 'gap', 32, None),
    ('gap', 'map', 64, None), ('token', 'token', 64, (4, 16)),
    ('gap', 'gap', 32, (2, 8))])
def test_grids_and_pools(file_pool, pool, image_size, grid, tmp_path):
  values = draw(shapes(**PATCHIFY, pool=file_pool))['params']
  path = write(tmp_path / 'a.npz', writers.arrays(values, 'augreg'))
  variables = shapes(image_size, **PATCHIFY, pool=pool)
  given, report = pretrained.load(
      path, variables, grid=grid, reset=('map/.*',) if pool == 'map' else ())
  table, old = given['params']['pos_embedding'], values['pos_embedding'][0]
  side = image_size // 8
  new = grid or (side, side)
  with_class = file_pool == 'token'
  expected = posembed.resize(old[with_class:], (4, 4), new)
  if pool == 'token':
    expected = np.concatenate([old[:1], expected])
  np.testing.assert_array_equal(table[0], expected)
  assert bool(report.reshaped) == (new != (4, 4))
  assert ('cls' in report.unexpected) == (with_class and pool != 'token')


def test_a_class_token_that_holds_its_position(vit_p, tmp_path):
  """big_vision adds the first position to the class token, and drops it."""
  variables, values = vit_p
  arrays = writers.arrays(values['params'], 'big_vision')
  table = arrays.pop('Transformer/posembed_input/pos_embedding')
  arrays['cls'] = arrays['cls'] + table[:, :1]
  arrays['pos_embedding'] = table[:, 1:]
  given, _ = pretrained.load(write(tmp_path / 'a.npz', arrays), variables)
  params = given['params']
  assert (params['pos_embedding'][:, :1] == 0).all()
  total = values['params']['cls'] + table[:, :1]
  np.testing.assert_array_equal(params['cls'], total)
  np.testing.assert_array_equal(params['pos_embedding'][:, 1:], table[:, 1:])


# What is taken, and how lazily.


def section(**changes):
  return ConfigDict({**recipes.base().init_from.to_dict(), **changes})


def test_init_from_says_what_it_took(tmp_path, capsys, vit_p):
  path = write(tmp_path / 'a.npz', writers.arrays(
      vit_p[1]['params'], 'augreg'))
  variables = shapes(64, num_classes=7, **PATCHIFY)
  config = section(checkpoint=path, reset=('head/.*',))
  given = checkpoint.init_from(config, variables, (8, 8))
  assert not any(k.startswith('head/') for k in given['params'])
  text = capsys.readouterr().out
  assert 'reset: head/bias, head/kernel' in text
  assert 'pos_embedding 4x4 -> 8x8' in text and 'micro, AugReg' in text
  with runs.refused('are both given'):
    checkpoint.init_from(section(checkpoint=path, run='/some/run'), variables)


def test_only_what_is_taken_is_read(vit_p, tmp_path, monkeypatch):
  path = write(tmp_path / 'a.npz', writers.arrays(
      vit_p[1]['params'], 'augreg'))
  read, real = [], np.lib.format.read_array

  def read_array(*args, **kwargs):
    read.append(args)
    return real(*args, **kwargs)

  monkeypatch.setattr(np.lib.format, 'read_array', read_array)
  variables = shapes(**PATCHIFY)
  pretrained.load(path, variables, paths=('encoder/norm/.*',))
  assert len(read) == 2


@pytest.mark.parametrize('fields, load, match', [
    (dict(size='S/16'), {}, r"looks like micro, AugReg.*: .* has to be "),
    (dict(size='Mixer-micro', stem=None), {}, 'looks like micro.*no mixer'),
    (dict(size='BiT-micro', stem=None), {}, 'looks like micro.*no bit'),
    (dict(num_classes=7), {}, r'head of 10 classes.*\n.*head/\.'),
    (dict(stem='conv'), {}, 'no place for Transformer/encoderblock_3'),
    (dict(pre_logits=True), {}, r'has no pre_logits/.*\n.*init_from.reset'),
    (dict(pool='map'), {}, r'has no map/'),
    ({}, dict(paths=('stemm/.*',)), 'matches no parameter'),
    ({}, dict(resize='bicubic'), 'There is: aligned, antialias; auto, rgb'),
])
def test_another_model(fields, load, match, vit_p, tmp_path):
  path = write(tmp_path / 'a.npz', writers.arrays(
      vit_p[1]['params'], 'augreg'))
  fields = {k: v for k, v in {**PATCHIFY, **fields}.items() if v}
  with runs.refused(match):
    pretrained.load(path, shapes(**fields), **load)


def _npz(array):
  stream = io.BytesIO()
  np.savez(stream, array=array, allow_pickle=True)
  return stream.getvalue()


GOOD = _npz(np.arange(1000.0))


def _header(**entry):
  text = json.dumps({'a': entry}).encode()
  return struct.pack('<Q', len(text)) + text


@pytest.mark.parametrize('name, content, match', [
    ('a.npz', b'<html>404</html>', "starts with '<html>404</html>'"),
    ('a.npz', b'version https://git-lfs.github.com/spec/v1\n', "'version http"),
    ('a.npz', b'', 'truncated or no .npz'),
    ('a.npz', GOOD[:-40], 'truncated or no .npz'),
    ('a.npz', GOOD[:500] + b'!!!!' + GOOD[504:], 'no layout that is known'),
    ('a.npz', _npz(np.array([{}])), 'pickled objects'),
    ('a.npz', _npz(np.arange(3)), 'no layout that is known'),
    ('a.safetensors', b'PK', 'truncated or no .safetensors'),
    ('a.safetensors', struct.pack('<Q', 2**60), 'header of'),
    ('a.safetensors', _header(dtype='F32', shape=[2], data_offsets=[0, 8]),
     'a does not lie in the file'),
    ('a.safetensors', _header(dtype='X', shape=[], data_offsets=[0, 0]), "'X'"),
])
def test_bad_files(name, content, match, vit_p, tmp_path):
  (tmp_path / name).write_bytes(content)
  with runs.refused(match):
    pretrained.load(str(tmp_path / name), vit_p[0])


def test_no_file(vit_p):
  with runs.refused('There is no file gs://a/b.npz.\nDownload it first'):
    pretrained.load('gs://a/b.npz', vit_p[0])


def test_damaged_values(vit_p, tmp_path):
  path = tmp_path / 'a.npz'
  write(path, writers.arrays(vit_p[1]['params'], 'augreg'))
  with zipfile.ZipFile(path) as archive:
    begin = archive.getinfo('embedding/kernel.npy').header_offset + 20_000
  content = path.read_bytes()
  path.write_bytes(content[:begin] + b'!!!!' + content[begin + 4:])
  with runs.refused(r'is damaged in embedding/kernel.npy \(Bad CRC'):
    pretrained.load(str(path), vit_p[0])


@pytest.mark.parametrize('suffix', ['npz', 'safetensors'])
def test_changed_bytes_are_two_lines_or_harmless(suffix, vit_p, tmp_path):
  variables, values = vit_p
  path = tmp_path / f'a.{suffix}'
  write(path, writers.arrays(
      values['params'], 'augreg' if suffix == 'npz' else 'timm'))
  good, refused = path.read_bytes(), 0
  for case in range(40):
    rng = np.random.default_rng(case)
    content = bytearray(good)
    # Where names, shapes and offsets stand: both ends.
    for at in rng.integers(0, 3000, 3):
      content[at if case % 2 else -1 - at] = rng.integers(256)
    path.write_bytes(content[:rng.integers(len(good))] if case % 5 == 0
                     else content)
    try:
      pretrained.load(str(path), variables)
    except ValueError as e:
      refused += 1
      lines = str(e).split('\n')
      assert len(lines) == 2 and all(x.endswith('.') for x in lines), lines
  assert refused > 10


def test_torch_files(vit_p, tmp_path):
  """The program is data only; and torch is not needed for anything else."""
  variables, values = vit_p
  path = str(tmp_path / 'a.pyth')
  try:
    import torch
  except ImportError:
    (tmp_path / 'a.pyth').touch()
    with runs.refused('needs torch, which is not installed'):
      pretrained.load(path, variables)
    return
  arrays = writers.arrays(values['params'], 'pycls')
  state = {k: torch.from_numpy(v) for k, v in arrays.items()}
  torch.save({'epoch': 3, 'model_state': state}, path)
  given, _ = pretrained.load(path, variables, channels='rgb')
  assert differ(values['params'], given['params']) == 0
  torch.save({'model_state': state, 'args': io.StringIO}, path)
  with runs.refused('does not read .* as plain weights'):
    pretrained.load(path, variables)


# Writing.


def test_writers_say_how_to_open_or_refuse(vit_p, tmp_path):
  _, values = vit_p
  writers.write_npz(tmp_path / 'a.npz', values['params'])
  assert 'embedding/kernel' in np.load(tmp_path / 'a.npz').files
  with runs.refused("timm has no model of size 'micro'"):
    writers.write_timm(tmp_path / 'a.safetensors', values['params'],
                       size='micro', num_classes=10)
  conv = draw(shapes(size='micro', stem='conv'))['params']
  with runs.refused('has no name for stem/conv_0/kernel'):
    writers.write_npz(tmp_path / 'b.npz', conv)
  small = {'cls': np.zeros((1, 1, 2), np.float32),
           'encoder': {'norm': {'scale': np.ones(2, np.float32)}}}
  line = writers.write_timm(
      tmp_path / 'a.safetensors', small, size='S/16', num_classes=3)
  assert line.startswith("timm.create_model('vit_small_patch16_224', num_cl")
  assert "act_layer='gelu_tanh'" in line
