"""Features of images, from any layer, as arrays.

  vit-jax embed MODEL IMAGE_OR_FOLDER... --out features.npz [--layer pooled]

The file has `features` float32 [N, ...] and `paths` [N] in the same order:
that of the arguments, folders sorted with all below them. Images that cannot
be read are named on stderr and left out.

Flags:
  --out FILE     .npz, for numpy.load
  --layer NAME   pooled: what the head reads [D]; cls: the class token [D];
                 tokens: the others behind the encoder [N, D], rows of the image
                 one after the other; block_00, block_01, ...: all tokens behind
                 a block, class token first
  --batch N      images computed at once (32)
"""
import argparse

import numpy as np

from vit_jax import choices
from vit_jax import features
from vit_jax import image_files
from vit_jax import model_file


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax embed', allow_abbrev=False)
  parser.add_argument('model')
  parser.add_argument('images', nargs='+')
  parser.add_argument('--out', required=True)
  parser.add_argument('--layer', default='pooled')
  parser.add_argument('--batch', type=int, default=model_file.BATCH_SIZE)
  args = parser.parse_args(argv)
  model = model_file.load(args.model)
  layers = features.Features(model)
  choices.check({'layer': (args.layer, layers.shapes)})
  reader = image_files.Reader(model, image_files.find(args.images), args.batch)
  names, found = [], []
  for paths, images in reader:
    names += paths
    found.append(layers.layer(args.layer, images, args.batch))
  try:
    with open(args.out, 'wb') as f:
      np.savez(f, features=np.concatenate(found), paths=np.array(names))
  except OSError as e:
    raise ValueError(f'Cannot write {args.out}: {e.strerror}.\n'
                     'Name another file with --out.') from None
  shape = (len(names), *layers.shapes[args.layer])
  print(f'wrote {args.layer} {shape} of {reader.summary()} to {args.out}')
  return 0
