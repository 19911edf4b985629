"""Averages the weights of models that started from the same weights.

  vit-jax soup MODEL MODEL... --out FILE [--data SPEC] [--split val]

The uniform soup of "Model soups" (arXiv 2203.05482): runs fine-tuned from one
checkpoint, with other learning rates or seeds. BatchNorm's statistics are not
averaged: they are estimated again on training images, augmented as in training.
Prints the accuracy of each model and of the soup.

Flags:
  --out FILE     the new model file, or a folder for it
  --data SPEC    as in `vit-jax evaluate` (the data that the first model's
                 config names)
  --split NAME   to evaluate on (as in training)
  --examples N   of the training images, for BatchNorm (8192)
  --batch N      images evaluated at once, over all devices (32)
"""
import argparse
import dataclasses
import functools

import jax
import numpy as np

import input_pipeline
from vit_jax import augment as augment_lib
from vit_jax import choices
from vit_jax import model_file
from vit_jax import param_paths
from vit_jax import precise_bn
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import workdir as workdir_lib
from vit_jax.commands import evaluate

# Fields of a model that say how it was trained, not what it computes.
_TRAINING = ('init', 'head_bias', 'dropout', 'stochastic_depth', 'batch_norm',
             'batch_norm_group', 'dtype', 'remat')


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax soup', allow_abbrev=False)
  parser.add_argument('models', nargs='+')
  parser.add_argument('--out', required=True)
  for name in ('data', 'split'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--examples', type=int, default=recipes.PRECISE_BN)
  parser.add_argument('--batch', type=int, default=model_file.BATCH_SIZE)
  args = parser.parse_args(argv)
  if len(args.models) < 2 or args.examples < 1:
    raise ValueError(f'{len(args.models)} model(s), {args.examples} examples.\n'
                     'Name two models or more, and at least 1 example.')
  models = [model_file.load(path) for path in args.models]
  check_alike(models, args.models)
  soup = average(models, args.models)
  config = training_config(models[0], args.data)
  try:
    data = input_pipeline.open_data(config['input'], 0)
  except (OSError, ValueError) as e:
    if args.data or soup.variables['batch_stats']:
      raise
    data = None
    print(f'no accuracies: {str(e).splitlines()[0]}')
  if soup.variables['batch_stats']:
    soup = with_statistics(soup, config, data, args.examples)
  if data:
    split = args.split or next(iter(data.evals))
    choices.check({'split': (split, data.evals)})
    evaluation = evaluate.Evaluation(
        soup, data, split, batch_size=args.batch)
    for name, model in zip((*args.models, 'soup'), (*models, soup),
                           strict=True):
      result, _ = evaluation.run(model)
      print(f'{name}: {evaluate.describe(result, evaluation.num_examples)}')
    soup.facts['metrics'] = {f'{split}/{k}': v for k, v in result.items()}
  print(f'wrote {model_file.save_as(args.out, soup)}')
  return 0


def check_alike(models, names):
  """Raises ValueError unless models differ in nothing but their weights."""
  first = models[0]
  fields = lambda model: {
      k: v for k, v in model.config.items() if k not in _TRAINING}
  for model, name in zip(models[1:], names[1:], strict=True):
    for what, a, b in (
        ('model', fields(first), fields(model)),
        ('class_names', first.class_names, model.class_names),
        ('preprocessing', first.preprocessing, model.preprocessing)):
      if a != b:
        raise ValueError(
            f'{names[0]} and {name} differ in {what}.\nA soup is of models '
            'that were fine-tuned alike, from the same weights.')


def average(models, names):
  """The mean of `model_file.Model`s, with the first one's statistics."""
  flat = [param_paths.flatten(m.variables['params']) for m in models]
  mean = {path: np.mean([f[path] for f in flat], axis=0, dtype=np.float64)
          .astype(np.float32) for path in flat[0]}
  facts = {key: value for key, value in models[0].facts.items()
           if key in ('config', 'seed')}
  return dataclasses.replace(
      models[0],
      variables={**models[0].variables, 'params': param_paths.unflatten(mean)},
      facts={**facts, 'soup_of': [
          {'path': name, 'metrics': model.facts.get('metrics', {})}
          for name, model in zip(names, models, strict=True)],
          'written_by': workdir_lib.environment()})


def training_config(model, spec=''):
  """A model's whole training config, as nested dicts; `spec`: other data.

  A model of unknown training has its own preprocessing and no augmentation.
  """
  base = recipes.base().to_dict()
  known = model.facts.get('config') or {'input': {
      'pp': model.preprocessing['eval_pp']}}
  config = {**base, **known, 'input': {**base['input'], **known['input'], **{
      key: model.preprocessing[key]
      for key in ('eval_pp', 'mean', 'std', 'channels')}}}
  if spec:
    config['input']['source'], config['input']['path'] = evaluate.source_of(
        spec)
  elif not model.facts.get('config'):
    raise ValueError('The first model does not know which data it was trained '
                     'on.\nName them with --data.')
  return config


def with_statistics(model, config, data, examples):
  """The model with BatchNorm's statistics estimated on training images.

  Args:
    model: `model_file.Model`.
    config: of its training; see `training_config`.
    data: `input_pipeline.open_data`'s of config['input'].
    examples: how many.
  """
  mesh = sharding.create_mesh({'data': -1})
  size, seed = config['global_batch_size'], config['seed']
  data_seed = seed if config['data_seed'] < 0 else config['data_seed']
  sharding.check_batch_size('global_batch_size', size, mesh)
  augment = augment_lib.create(
      config, data.image_shape, len(data.class_names), model.normalize, mesh)
  key = jax.random.key(seed, impl='threefry2x32')
  batches = augment.on_host(functools.partial(
      input_pipeline.train_batches, data, global_batch_size=size,
      data_seed=data_seed), key)
  estimate = precise_bn.create(
      {'examples': examples}, model.module, model.variables, augment, batches,
      size, mesh, sharding.put(key, sharding.replicated(mesh)))
  variables = jax.device_put(model.variables, sharding.replicated(mesh))
  state = train_state.TrainState(
      step=0, params=variables['params'], frozen={},
      batch_stats=variables['batch_stats'], ema={}, opt_state={},
      first_nonfinite_step=-1)
  stats = jax.device_get(estimate(state).batch_stats)
  return dataclasses.replace(
      model, variables={**model.variables, 'batch_stats': stats},
      facts={**model.facts, 'batch_stats': f'estimated on {examples} examples'})
