"""The model file: what is saved is what is loaded, and bad files."""
import json
import os
import struct

from etils.epath import gpath
import fsspec
from fsspec.implementations import memory
import jax
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import evaluators
from vit_jax import model_file
from vit_jax import models
from vit_jax import param_paths
from vit_jax import pretrained
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train
from vit_jax.commands import convert
from vit_jax.pretrained import files
from vit_jax.pretrained import guess
from vit_jax.pretrained import writers


def top1(model):
  """Accuracy on the digits, by the evaluator of training."""
  data = input_pipeline.open_data(recipes.base().input, 0)
  mesh = sharding.create_mesh({'data': -1})
  evaluator = evaluators.Classification(
      dict(split='test'), model.apply, data, mesh, 512)
  variables = jax.device_put(model.variables, sharding.replicated(mesh))
  return dict(evaluator.run(variables))


def test_accuracy_before_saving_is_accuracy_after_loading(finished):
  workdir, before = finished
  model = model_file.load(workdir)
  after = top1(model)
  assert before and model.facts['metrics'] == before
  for key in ('top1', 'top5', 'loss', 'count'):
    assert after[key] == before[f'test_ema/{key}'], key
  assert after['top1'] != before['test/top1']  # raw weights are others
  test = sources.digits('', 0, ()).evals['test']
  images = model.preprocess(test.read(np.arange(500)))
  found = model.predict(images).argmax(axis=1)
  assert (found == test.labels).mean() == before['test_ema/top1']


def test_statistics_are_those_of_the_evaluation(cache, tmp_path):
  """And a run that has nothing left to train writes its file again."""
  c = runs.short(cache, ema=dict(name='none'), precise_bn__examples=128)
  before = train.train_and_evaluate(c, str(tmp_path))
  model = model_file.load(tmp_path)
  assert model.facts['weights'] == 'raw'
  assert '128' in model.facts['batch_stats']
  assert top1(model)['loss'] == before['test/loss']
  path = tmp_path / model_file.NAME
  arrays = files.open_file(path)
  kept = {k: t.load() for k, t in arrays.items()}
  path.unlink()
  train.train_and_evaluate(c, str(tmp_path))
  arrays = files.open_file(path)
  assert arrays.keys() == kept.keys()
  for key, value in kept.items():
    np.testing.assert_array_equal(arrays[key].load(), value)
  written = path.stat().st_mtime_ns
  train.train_and_evaluate(c, str(tmp_path))
  assert path.stat().st_mtime_ns == written


def test_the_file_says_what_it_is(finished):
  workdir, results = finished
  model = model_file.load(os.path.join(workdir, model_file.NAME))
  with open(os.path.join(workdir, 'config.json')) as f:
    assert model.facts['config'] == json.load(f)
  assert model.class_names == tuple('0123456789')
  assert (model.facts['step'], model.facts['examples_seen']) == (4, 256)
  assert model.facts['weights'] == 'ema' and model.facts['seed'] == 0
  assert model.facts['data'] == {'train': 1297, 'test': 500}
  assert model.facts['metrics'] == results
  assert model.facts['written_by']['jax'] == jax.__version__
  assert 'encoder/blocks/mlp/fc1/kernel' in param_paths.flatten(
      model.variables['params'])
  # Other programs open it, too.
  tensors = files.open_file(os.path.join(workdir, model_file.NAME))
  assert {k.split('/')[0] for k in tensors} == {'params', 'batch_stats'}


def test_images_of_any_kind_are_the_same(finished, tmp_path):
  model = model_file.load(finished[0])
  pixels = sources.digits('', 0, ()).evals['test'].read(np.arange(3))[..., 0]
  path = tmp_path / 'a.png'
  Image.fromarray(pixels[0]).save(path)
  expected = model.preprocess([pixels[0]])
  assert expected.shape == (1, 32, 32, 3) and expected.dtype == np.uint8
  for same in (str(path), path, path.read_bytes(), Image.open(path),
               pixels[0][..., None], np.repeat(pixels[0][..., None], 3, -1)):
    np.testing.assert_array_equal(model.preprocess([same]), expected)
  # Another size is resized, though training's preprocessing had no resize.
  large = Image.fromarray(pixels[0]).resize((200, 150))
  assert model.preprocess([large]).shape == (1, 32, 32, 3)
  assert model.preprocess([]).shape == (0, 32, 32, 3)


def test_batches_are_padded_and_compiled_once(finished):
  model = model_file.load(finished[0])
  images = model.preprocess(
      sources.digits('', 0, ()).evals['test'].read(np.arange(21)))
  whole = model.predict(images, batch_size=8)
  np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
  for n in (0, 1, 8, 9):
    np.testing.assert_array_equal(
        model.predict(images[:n], batch_size=8), whole[:n])
  assert model.logits(images, batch_size=8).shape == (21, 10)
  assert model._forward._cache_size() == 1


def test_fine_tuning_from_a_model_file(finished, cache, tmp_path):
  """Stacked blocks or not, whatever the file has."""
  path = os.path.join(finished[0], model_file.NAME)
  saved = model_file.load(path).variables
  for scan in (False, True):
    model = models.create(
        size='micro', stem='conv', pool='gap', num_classes=10, scan=scan)
    variables = jax.eval_shape(
        lambda key, m=model: m.init(
            key, np.zeros((1, 32, 32, 3), np.float32), train=False),
        jax.random.key(0))
    given, report = pretrained.load(path, variables)
    assert not report.unexpected and not report.missing
    found = given['params'][
        'encoder/blocks/mlp/fc1/kernel' if scan else
        'encoder/block_02/mlp/fc1/kernel']
    expected = saved['params']['encoder']['blocks']['mlp']['fc1']['kernel']
    np.testing.assert_array_equal(found, expected if scan else expected[2])
    np.testing.assert_array_equal(
        given['batch_stats']['stem/norm_1/var'],
        saved['batch_stats']['stem']['norm_1']['var'])
  c = runs.short(cache, init_from__checkpoint=path,
                 init_from__reset=('head/.*',))
  train.train_and_evaluate(c, str(tmp_path))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """(path, Model) of a model that nothing has trained."""
  model = models.create(size='mu/16', stem='patchify', num_classes=3)
  variables = jax.jit(lambda key: model.init(key, np.zeros(
      (1, 32, 32, 3), np.float32), train=False))(jax.random.key(0))
  result = model_file.Model(
      {'size': 'mu/16', 'stem': 'patchify', 'dtype': 'auto'}, dict(variables),
      ('a', 'b', 'c'), model_file.preprocessing(
          {'eval_pp': 'decode|resize(32)', 'mean': (.5,), 'std': (.5,)},
          (32, 32, 3)), {})
  path = str(tmp_path_factory.mktemp('small') / model_file.NAME)
  model_file.save(path, result)
  return path, result


def rewrite(path, tmp_path, change):
  """A copy of a model file with another header; `change` alters it."""
  with open(path, 'rb') as f:
    (length,) = struct.unpack('<Q', f.read(8))
    header, body = json.loads(f.read(length)), f.read()
  change(header)
  text = json.dumps(header).encode()
  new = tmp_path / model_file.NAME
  new.write_bytes(struct.pack('<Q', len(text)) + text + body)
  return str(new)


def _set(key, value):
  def change(header):
    header['__metadata__'][key] = value
  return change


@pytest.mark.parametrize('change, message', [
    (_set('vit_jax', '2'), 'has format 2, and this program reads up to 1'),
    (lambda h: h.pop('__metadata__'), 'no model file of ours.*'),
    (lambda h: h.pop('params/head/bias'), 'params lacks head/bias'),
    (lambda h: [h.pop(k) for k in list(h) if 'block_00' in k],
     'params lacks encoder/block_00.* and 15 more'),
    (lambda h: h['params/head/bias'].update(shape=[1, 3]), 'head/bias is'),
    (_set('class_names', '["a", "b"]'), 'head/bias is'),
    (_set('class_names', '["a", "b", "b"]'), '3 class names are 2 different'),
    (_set('class_names', '['), 'is damaged: JSONDecodeError'),
    (_set('preprocessing', '{}'), 'is damaged: KeyError'),
    (_set('facts', '3'), 'is damaged: TypeError'),
    (_set('model', '{"size": "B/15", "stem": "patchify"}'), 'Unknown size'),
    (lambda h: h['__metadata__'].update(preprocessing=h['__metadata__'][
        'preprocessing'].replace('resize(32)', 'inception_crop(32)')),
     'random'),
])
def test_bad_model_files(change, message, small, tmp_path):
  path = rewrite(small[0], tmp_path, change)
  with runs.refused(message):
    model_file.load(path)


def test_files_that_are_no_model_files(small, tmp_path):
  with open(small[0], 'rb') as f:
    content = f.read()
  for size in (0, 5, 100, len(content) // 2, len(content) - 1):
    path = tmp_path / 'cut.safetensors'
    path.write_bytes(content[:size])
    with runs.refused('truncated or no .safetensors file'):
      model_file.load(path)
  np.savez(tmp_path / 'a.npz', x=np.zeros(3))
  for path, message in (('a.npz', 'no model file of ours'),
                        ('none', 'There is no model file'),
                        ('', 'There is no model file')):
    with runs.refused(message):
      model_file.load(tmp_path / path)


def test_a_failed_save_leaves_nothing(small, tmp_path, monkeypatch):
  path = str(tmp_path / model_file.NAME)
  model_file.save(path, small[1])
  before = os.stat(path).st_mtime_ns

  def full(*_):
    with open(path + '.part', 'wb') as f:
      f.write(b'some')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'write_safetensors', full)
  with pytest.raises(OSError, match='No space'):
    model_file.save(path, small[1])
  assert os.listdir(tmp_path) == [model_file.NAME]
  assert os.stat(path).st_mtime_ns == before


def test_a_remote_model_file(small, monkeypatch):
  """Through fsspec, as it is for gs:// without TensorFlow."""
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)

  class Store(memory.MemoryFileSystem):
    protocol = 's3'
    store, pseudo_dirs = {}, ['']

  fsspec.register_implementation('s3', Store, clobber=True)
  path = f's3://bucket/{model_file.NAME}'
  model_file.save(path, small[1])
  assert model_file.exists('s3://bucket')
  for source in (path, 's3://bucket'):
    jax.tree.map(np.testing.assert_array_equal,
                 model_file.load(source).variables['params'],
                 small[1].variables['params'])
  with runs.refused('There is no model file s3://bucket/no'):
    model_file.load('s3://bucket/no.safetensors')


def test_images_that_a_model_cannot_take(small, tmp_path):
  _, model = small
  bad = tmp_path / 'bad.jpg'
  bad.write_bytes(b'\xff\xd8\xff')
  for image, message in ((bad, f'{bad} cannot be read'),
                         (tmp_path / 'none.png', 'No such file'),
                         (np.zeros((2, 2, 7), np.uint8), 'an image')):
    with runs.refused(message):
      model.preprocess([image])
  with runs.refused('let model.preprocess|Let model.preprocess'):
    model.predict(np.zeros((1, 32, 32, 3), np.float32))
  with runs.refused('A batch of 0'):
    model.predict(np.zeros((1, 32, 32, 3), np.uint8), batch_size=0)


# Released files.


def released(tmp_path, layout, size, image_size, num_classes=7, **fields):
  """A file with synthetic weights; returns (path, module, variables)."""
  model = models.create(size=size, num_classes=num_classes, **fields)
  shapes = jax.eval_shape(
      lambda key: model.init(key, np.zeros(
          (1, image_size, image_size, 3), np.float32), train=False),
      jax.random.key(0))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.uniform(
      -.3, 1, x.shape).astype(np.float32) ** 2, dict(shapes))
  arrays = writers.arrays(variables['params'], layout,
                          variables.get('batch_stats'))
  torch = pretrained.layouts.LAYOUTS[layout].torch
  path = str(tmp_path / f'a.{"safetensors" if torch else "npz"}')
  (files.write_safetensors if torch else files.write_npz)(path, arrays)
  return path, model, variables


@pytest.mark.parametrize('layout, size, image_size, fields, pp', [
    ('augreg', 'micro', 64, dict(stem='patchify', gelu='tanh'),
     'decode|resize(64)'),
    ('timm', 'micro', 32, dict(stem='patchify', pool='map'),
     "decode|resize_small(36, 'bicubic_antialias')|central_crop(32)"),
    ('big_vision', 'micro', 64, dict(
        stem='patchify', pool='gap', gelu='tanh', pre_logits=True),
     'decode|resize_small(73)|central_crop(64)'),
    ('pycls', 'micro', 32, dict(stem='conv'),
     "decode|resize_small(37, 'bilinear_antialias')|central_crop(32)"),
    ('mixer', 'Mixer-micro', 32, dict(gelu='tanh'), 'decode|resize(32)'),
    ('bit', 'BiT-micro', 480, {}, 'decode|resize(480)'),
])
def test_convert_finds_the_model(
    layout, size, image_size, fields, pp, tmp_path, capsys):
  path, module, variables = released(
      tmp_path, layout, size, image_size, **fields)
  assert command_line.main(
      ['convert', '--checkpoint', path, '--out', str(tmp_path / 'new')]) == 0
  out = capsys.readouterr().out
  assert f'size={size}' in out and pp in out and '7: 0, 1, 2, ...' in out
  model = model_file.load(tmp_path / 'new')
  assert model.preprocessing['eval_pp'] == pp
  if size != 'BiT-micro':  # 480 pixels take seconds
    images = np.random.default_rng(1).integers(
        0, 256, (2, image_size, image_size, 3), np.uint8)
    # pycls reads blue first.
    pixels = model.normalize(images)
    expected = jax.jit(lambda x: module.apply(variables, x, train=False))(
        pixels[..., ::-1] if layout == 'pycls' else pixels)
    np.testing.assert_allclose(model.logits(images), expected, rtol=1e-4)


def test_convert_is_told(tmp_path, capsys):
  path, _, _ = released(tmp_path, 'timm', 'micro', 32, stem='patchify')
  names = tmp_path / 'names.txt'
  names.write_text('crane\nb\nc\nd\ne\nf\ncrane\n')
  assert command_line.main([
      'convert', '--checkpoint', path, '--out', str(tmp_path / 'm.safetensors'),
      '--gelu', 'tanh', '--resolution', '64', '--normalize', 'imagenet',
      '--classes', str(names)]) == 0
  assert 'pos_embedding 4x4 -> 8x8' in capsys.readouterr().out
  model = model_file.load(tmp_path / 'm.safetensors')
  assert model.class_names[::6] == ('crane (0)', 'crane (6)')
  assert model.image_shape == (64, 64, 3) and model.config['gelu'] == 'tanh'
  assert model.preprocessing['mean'] == [0.485, 0.456, 0.406]


def test_convert_of_a_run(finished, tmp_path):
  """From a workdir as it was before there were model files."""
  workdir, _ = finished
  model, new = model_file.load(workdir), convert.of_run(workdir)
  jax.tree.map(np.testing.assert_array_equal, new.variables, model.variables)
  assert new.preprocessing == model.preprocessing
  assert new.class_names == model.class_names
  assert new.facts['weights'] == 'ema' and new.facts['step'] == 4


def test_convert_with_bad_input(tmp_path, finished, small, capsys):
  path, _, _ = released(tmp_path, 'timm', 'micro', 32, stem='patchify')
  headless = {k: v.load() for k, v in files.open_file(path).items()
              if 'head' not in k}
  files.write_safetensors(str(tmp_path / 'b.safetensors'), headless)
  out = ['--out', str(tmp_path / 'c')]
  for flags, message in [
      ([], 'either --checkpoint'),
      (['--checkpoint', path, '--run', 'x'], 'either --checkpoint'),
      (['--checkpoint', str(tmp_path / 'b.safetensors')], 'has no head'),
      (['--checkpoint', small[0]], 'a model file of ours already'),
      (['--checkpoint', path, '--size', 'S/16'], 'looks like micro'),
      (['--checkpoint', path, '--classes', 'none.txt'], 'none.txt'),
      (['--checkpoint', path, '--classes', path], 'cannot be read as text'),
      (['--checkpoint', path, '--resolution', '4'], 'smaller than one patch'),
      (['--run', str(tmp_path)], 'no checkpoints/ folder'),
  ]:
    assert command_line.main(['convert', *flags, *out]) == 2, flags
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 2, error


def test_every_release_has_its_preprocessing():
  ours = {'ours', 'our_mixer', 'our_bit'}
  assert guess.RELEASES.keys() | ours == pretrained.layouts.LAYOUTS.keys()
