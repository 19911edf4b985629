"""Exports a model for serving: one StableHLO program, to run with jax alone.

  vit-jax export MODEL --out DIR|FILE.stablehlo [--output probabilities]

The program takes uint8 images [b, H, W, C] of any number b and has the weights
and the normalisation of pixels inside. It runs on CPUs, NVIDIA GPUs and TPUs,
without vit_jax and without flax:

  program = jax.export.deserialize(open('model.stablehlo', 'rb').read())
  probabilities = program.call(images)

FILE.json beside it says how to prepare images, and the names of the classes.

Flags:
  --out PATH     the file, or a folder for model.stablehlo in it
  --output WHAT  probabilities | logits
"""
import argparse
import json
import os

import jax
from jax import export as jax_export
from jax import numpy as jnp

from vit_jax import model_file
from vit_jax import workdir as workdir_lib

NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
OUTPUTS = ('probabilities', 'logits')


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax export', allow_abbrev=False)
  parser.add_argument('model')
  parser.add_argument('--out', required=True)
  parser.add_argument('--output', choices=OUTPUTS, default=OUTPUTS[0])
  args = parser.parse_args(argv)
  model = model_file.load(args.model)
  path = args.out
  if not path.endswith('.stablehlo'):
    workdir_lib.make(path)
    path = os.path.join(path, NAME)
  content = program(model, args.output)
  notes = {'output': args.output, 'input': ['b', *model.image_shape],
           'preprocessing': model.preprocessing,
           'class_names': model.class_names}
  try:
    with open(path, 'wb') as f:
      f.write(content)
    with open(f'{os.path.splitext(path)[0]}.json', 'w', encoding='utf-8') as f:
      json.dump(notes, f, indent=1, ensure_ascii=False)
  except OSError as e:
    raise ValueError(f'Cannot write {path}: {e.strerror}.\n'
                     'Name another file with --out.') from None
  print(f'wrote {path} ({len(content) / 1e6:.1f} MB): uint8 '
        f'[b, {", ".join(map(str, model.image_shape))}] -> {args.output} '
        f'[b, {len(model.class_names)}], in {model.module.dtype}')
  return 0


def program(model, output):
  """Returns the serialised program of a `model_file.Model`.

  Args:
    model: `model_file.Model`.
    output: one of OUTPUTS.
  """
  forward = jax.jit(lambda images: dict(zip(
      ('logits', 'probabilities'), model.forward(model.variables, images),
      strict=True))[output])
  b, = jax_export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((b, *model.image_shape), jnp.uint8)
  exported = jax_export.export(forward, platforms=PLATFORMS)(images)
  return bytes(exported.serialize())
