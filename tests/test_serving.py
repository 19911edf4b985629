"""Export to StableHLO, and soups."""
import dataclasses
import json
import os
import subprocess
import sys

import jax
from jax import export as jax_export
import numpy as np
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import model_file
from vit_jax import param_paths
from vit_jax import train
from vit_jax.commands import soup


def call(*flags):
  return command_line.main([str(flag) for flag in flags])


def digits(model, count):
  """uint8 images of the test digits, as the model takes them."""
  return model.preprocess(
      sources.digits('', 0, ()).evals['test'].read(np.arange(count)))


def test_export_runs_with_jax_alone(finished, tmp_path):
  """In another process, in batches of any size, with the same logits."""
  model = model_file.load(finished[0])
  images = digits(model, 5)
  np.save(tmp_path / 'images.npy', images)
  out = tmp_path / 'out'
  assert call('export', finished[0], '--out', out, '--output', 'logits') == 0
  code = (
      'import sys, json, numpy as np, jax\n'
      'from jax import export\n'
      'program = export.deserialize(open("out/model.stablehlo", "rb").read())\n'
      'images = np.load("images.npy")\n'
      'np.save("logits.npy", np.asarray(program.call(images)))\n'
      'np.save("one.npy", np.asarray(program.call(images[:1])))\n'
      'assert program.platforms == ("cpu", "cuda", "tpu")\n'
      'names = {m.split(".")[0] for m in sys.modules}\n'
      'assert not names & {"vit_jax", "input_pipeline", "flax"}\n')
  env = {**runs.environment(), 'PYTHONPATH': ''}
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  expected = model.logits(images)
  np.testing.assert_allclose(
      np.load(tmp_path / 'logits.npy'), expected, atol=1e-5)
  np.testing.assert_allclose(
      np.load(tmp_path / 'one.npy'), expected[:1], atol=1e-5)
  notes = json.loads((out / 'model.json').read_text())
  assert notes['class_names'] == list('0123456789')
  assert notes['preprocessing'] == model.preprocessing


def test_export_of_probabilities_and_of_a_stacked_model(finished, tmp_path):
  model = model_file.load(finished[0])
  assert model.config['scan']
  path = tmp_path / 'a.stablehlo'
  assert call('export', finished[0], '--out', path) == 0
  images = digits(model, 3)
  program = jax_export.deserialize(bytearray(path.read_bytes()))
  np.testing.assert_allclose(
      program.call(images), model.predict(images), atol=1e-6)
  assert sorted(os.listdir(tmp_path)) == ['a.json', 'a.stablehlo']


@pytest.fixture(scope='module')
def tuned(finished, cache, tmp_path_factory):
  """Workdirs of two runs from the weights of `finished`."""
  workdirs = []
  for seed in (1, 2):
    workdirs.append(str(tmp_path_factory.mktemp(f'tuned{seed}')))
    c = runs.short(cache, steps=2, seed=seed, init_from__run=finished[0])
    train.train_and_evaluate(c, workdirs[-1])
  return workdirs


def test_soup(tuned, tmp_path, capsys):
  out = tmp_path / 'soup.safetensors'
  assert call('soup', *tuned, '--out', out, '--examples', 128) == 0
  lines = capsys.readouterr().out.splitlines()
  for line, name in zip(lines, (*tuned, 'soup'), strict=False):
    assert line.startswith(f'{name}: top-1') and 'evaluated 500/500' in line
  mixed, *models = map(model_file.load, (out, *tuned))
  flat = [param_paths.flatten(m.variables['params']) for m in (mixed, *models)]
  for path, value in flat[0].items():
    np.testing.assert_allclose(
        value, (flat[1][path] + flat[2][path]) / 2, atol=1e-6)
  assert mixed.facts['soup_of'][1]['path'] == tuned[1]
  assert 'estimated on 128' in mixed.facts['batch_stats']
  assert mixed.facts['metrics']['test/count'] == 500


def test_statistics_of_a_soup_are_those_of_its_weights(tuned, tmp_path):
  """Of one model twice: what precise_bn gives in training, not an average."""
  model = model_file.load(tuned[0])
  config = soup.training_config(model)
  data = input_pipeline.open_data(config['input'], 0)
  found = soup.with_statistics(model, config, data, 64).variables['batch_stats']
  images = next(input_pipeline.train_batches(
      data, global_batch_size=64, data_seed=config['seed']))['image']
  probe = model.module.clone(stem=model.module.stem.clone(bn_momentum=0.0))
  _, expected = jax.jit(lambda images: probe.apply(
      model.variables, model.normalize(images), train=True,
      mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)}))(images)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      found, dict(expected['batch_stats']))


@pytest.mark.parametrize('change, flags, message', [
    (None, ['{0}'], '1 model(s)'),
    (None, ['{0}', '{1}', '--examples', '0'], '0 examples'),
    (None, ['{0}', '{1}', '--data', 'nowhere'], 'is no folder'),
    (None, ['{0}', '{1}', '--split', 'vall'], "Unknown split 'vall'"),
    (dict(class_names=tuple('9876543210')), ['{0}', '{new}'], 'class_names'),
    (dict(config={'gelu': 'tanh'}), ['{0}', '{new}'], 'differ in model'),
    (dict(facts={}), ['{new}', '{0}'], 'does not know which data'),
])
def test_soups_that_cannot_be(change, flags, message, tuned, tmp_path, capsys):
  new = tmp_path / model_file.NAME
  if change:
    model = model_file.load(tuned[0])
    if 'config' in change:
      change = {'config': {**model.config, **change['config']}}
    model_file.save(new, dataclasses.replace(model, **change))
  flags = [f.format(*tuned, new=new) for f in flags]
  assert call('soup', *flags, '--out', tmp_path / 'soup') == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 2
