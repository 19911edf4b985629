"""Makes a model file of released weights, or of a run that has none.

  vit-jax convert --checkpoint B_16.npz --classes imagenet.txt --out b16
  vit-jax convert --checkpoint model.safetensors --size B/16 --gelu tanh \
    --out model.safetensors
  vit-jax convert --run runs/old --out runs/old

Size, stem, pooling, classes and resolution are found from the names and shapes
in the file; GELU, epsilon and preprocessing are those of the code that released
it (vit_jax/pretrained/guess.py), and are printed. What is given wins.

Flags:
  --checkpoint FILE   .npz, .safetensors or torch file of any known layout
  --run WORKDIR       or a run's newest checkpoint: averaged weights if it kept
                      some, with its running BatchNorm statistics
  --out PATH          the file, or a folder for model.safetensors in it
  --size, --stem, --pool, --gelu, --norm_eps   as in a config's model section
  --resolution N      pixels; position embeddings are resized to it
  --pp LINE           preprocessing, such as 'decode|resize(384)'
  --normalize N       half: (x/255 - 0.5) / 0.5; imagenet: its mean and std,
                      which DeiT and others in timm were trained with
  --classes FILE      names in the order of the logits: a list in JSON, or a
                      text file with one a line (0, 1, 2, ...)
"""
import argparse
import json
import os

from etils import epath
import jax
from jax import numpy as jnp

import input_pipeline
from input_pipeline import sources
from vit_jax import checkpoint
from vit_jax import model_file
from vit_jax import models
from vit_jax import param_paths
from vit_jax import pretrained
from vit_jax import workdir as workdir_lib
from vit_jax.pretrained import guess as guess_lib

FIELDS = ('size', 'stem', 'pool', 'gelu', 'norm_eps')


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(argv)
  if bool(args.checkpoint) == bool(args.run):
    raise ValueError('Give either --checkpoint FILE or --run WORKDIR.\n'
                     'For example: --checkpoint B_16.npz --out b16')
  model = of_run(args.run) if args.run else of_checkpoint(args)
  path = model_file.save_as(args.out, model)
  print(f'{describe(model)}\nwrote {path}')
  return 0


def _parse(argv):
  parser = argparse.ArgumentParser(prog='vit-jax convert', allow_abbrev=False)
  for name in ('checkpoint', 'run', 'size', 'stem', 'pool', 'gelu', 'pp',
               'classes'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--out', required=True)
  parser.add_argument('--norm_eps', type=float)
  parser.add_argument('--resolution', type=int)
  parser.add_argument('--normalize', default='',
                      choices=tuple(guess_lib.NORMALIZATIONS))
  return parser.parse_args(argv)


def describe(model):
  """Lines on a `model_file.Model`: what it is, what it takes."""
  names = model.class_names
  some = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
  fields = ' '.join(f'{k}={v}' for k, v in model.config.items()
                    if k in FIELDS)
  return (f'model          {fields}, {model.num_parameters:,} parameters\n'
          f'classes        {len(names):,}: {some}\n'
          f'preprocessing  {model.describe_preprocessing()}')


def of_checkpoint(args):
  """The `model_file.Model` of a released file; see the module's docstring.

  Raises:
    ValueError: the file cannot be read, or is not of such a model.
  """
  found = guess_lib.guess(args.checkpoint)
  fields = {**found.fields, **{
      key: getattr(args, key) for key in FIELDS if getattr(args, key)}}
  if 'size' not in fields:
    raise ValueError(f'{args.checkpoint} looks like {found.looks_like}, of no '
                     'size that has a name here.\nGive --size, if one fits.')
  resolution = args.resolution or found.resolution or (
      480 if fields['size'].startswith('BiT') else 224)
  model = model_file.create_module(fields)
  shape = (resolution, resolution, 3)
  variables = jax.eval_shape(
      lambda key, x: model.init(key, x, train=False), jax.random.key(0),
      jax.ShapeDtypeStruct((1, *shape), jnp.float32))
  given, report = pretrained.load(
      args.checkpoint, variables, grid=models.grid(model, shape))
  print(report)
  return model_file.Model(
      fields,
      {kind: param_paths.unflatten(flat) for kind, flat in given.items()},
      read_classes(args.classes, fields['num_classes']),
      guess_lib.preprocessing(
          found.release, resolution, args.pp, args.normalize),
      {'checkpoint': os.path.basename(args.checkpoint),
       'looks_like': found.looks_like,
       'written_by': workdir_lib.environment()})


def read_classes(path, num_classes):
  """Class names, of which there have to be as many, from JSON or lines.

  Without a path: '0', '1', ...

  Raises:
    ValueError: another number of them, or no such file.
  """
  if not path:
    return tuple(map(str, range(num_classes)))
  if path.endswith('.json'):
    names = sources.read_classes(path)
  else:
    try:
      with open(path, encoding='utf-8') as f:
        names = tuple(line.strip() for line in f if line.strip())
    except (OSError, UnicodeDecodeError) as e:
      raise ValueError(f'--classes {path} cannot be read as text ({e}).\n'
                       'Give a JSON list, or a name a line.') from None
  if len(names) != num_classes:
    raise ValueError(
        f'--classes {path} has {len(names)} names and the model {num_classes} '
        'classes.\nGive one a class, in the order of the logits.')
  # ImageNet has two cranes.
  return tuple(name if names.count(name) == 1 else f'{name} ({i})'
               for i, name in enumerate(names))


def of_run(run):
  """The `model_file.Model` of a run's newest checkpoint.

  Raises:
    ValueError: no run, or its data, which are not here, would have to say the
      size of its images.
  """
  weights = checkpoint.load_weights(run, 'ema')
  try:
    config, class_names = (
        json.loads((epath.Path(run) / name).read_text())
        for name in (workdir_lib.CONFIG, workdir_lib.CLASSES))
  except (OSError, ValueError):
    raise ValueError(
        f'{run} has no {workdir_lib.CONFIG} and {workdir_lib.CLASSES} that can '
        'be read.\nGive the --workdir of a run.') from None
  try:
    shape = input_pipeline.image_shape(config['input'])
  except ValueError:  # the data themselves have one size
    shape = input_pipeline.open_data(config['input'], 0).eval_shape
  variables = {kind: param_paths.unflatten(weights[kind])
               for kind in ('params', 'batch_stats')}
  return model_file.of_run(
      config, variables, class_names, shape, step=weights['step'],
      weights=weights['weights'], batch_stats='running')
