"""Draws where a ViT attends, over its images.

  vit-jax explain MODEL IMAGE_OR_FOLDER... --out DIR [--batch 32]

One PNG an image: the image as the model sees it; the attention rollout, which
follows attention and residuals through all blocks; and the heads of the last
attention. Above each stand the smallest and the largest share that a patch
has. What is drawn is the attention
  token   of the class token
  gap     of all tokens on average, as the pooling takes their mean
  map     of the pooling's probe, whose heads are the last attention
It says which patches information came from, not why a class was chosen.
"""
import argparse
import math
import os

from matplotlib import figure
import numpy as np
from PIL import Image

from vit_jax import features
from vit_jax import image_files
from vit_jax import model_file
from vit_jax import models
from vit_jax import workdir as workdir_lib
from vit_jax.commands import evaluate
from vit_jax.commands import predict

_COLUMNS = 7  # panels side by side, at most


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax explain', allow_abbrev=False)
  parser.add_argument('model')
  parser.add_argument('images', nargs='+')
  parser.add_argument('--out', required=True)
  parser.add_argument('--batch', type=int, default=model_file.BATCH_SIZE)
  args = parser.parse_args(argv)
  model = model_file.load(args.model)
  layers = features.Features(model)
  reader = image_files.Reader(model, image_files.find(args.images), args.batch)
  workdir_lib.make(args.out)
  number = 0
  for paths, images in reader:
    probabilities = model.predict(images, args.batch)
    shares = maps(model, layers, images, args.batch)
    for path, image, row, (rolled, heads) in zip(
        paths, images, probabilities, shares, strict=True):
      (name, probability), *_ = predict.top(row, model.class_names, 1)
      stem = os.path.splitext(os.path.basename(path))[0]
      # Numbered: folders may hold files of the same name.
      target = os.path.join(args.out, f'{number:05d}_{stem}.png')
      draw(image, rolled, heads, f'{os.path.basename(path)}: {name} '
           f'{probability:.1%}', target)
      number += 1
  print(f'drew {reader.summary()} to {args.out}')
  return 0


def maps(model, layers, images, batch_size=model_file.BATCH_SIZE):
  """Attention of images, as shares that the patches of each have.

  Args:
    model: `model_file.Model`.
    layers: its `features.Features`.
    images: uint8 [B, H, W, C].
    batch_size: how many are computed at once.

  Yields:
    For each image (rollout [h, w], last heads [K, h, w]); each sums to 1.

  Raises:
    ValueError: the model has no attention.
  """
  weights, pools = layers.attention(images, batch_size)
  has_class = model.module.pool == 'token'
  grid = models.grid(model.module, model.image_shape)
  for i, blocks in enumerate(weights):
    pool = None if pools is None else pools[i]
    rolled = features.rollout(blocks, pool, has_class)
    if pool is not None:
      heads = pool[:, 0]  # [K, N]
    elif has_class:
      heads = blocks[-1, :, 0, 1:]
    else:
      heads = blocks[-1].mean(axis=1)
    heads = heads / heads.sum(axis=1, keepdims=True)
    yield rolled.reshape(grid), heads.reshape(-1, *grid)


def draw(image, rolled, heads, title, path):
  """Draws one image, its rollout and its heads as a PNG.

  Args:
    image: uint8 [H, W, 1 or 3].
    rolled: [h, w].
    heads: [K, h, w].
    title: above all.
    path: of the file.
  """
  panels = [('image', None), ('rollout', rolled), *(
      (f'head {k}', head) for k, head in enumerate(heads))]
  rows = math.ceil(len(panels) / _COLUMNS)
  columns = math.ceil(len(panels) / rows)
  fig = figure.Figure(figsize=(2 * columns, 2.4 * rows + 0.4), dpi=110,
                      layout='constrained')
  axes = np.ravel(fig.subplots(rows, columns, squeeze=False))
  fig.suptitle(title, fontsize=9)
  for ax in axes:
    ax.axis('off')
  for ax, (name, share) in zip(axes, panels, strict=False):
    ax.imshow(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image)
    if share is not None:
      name += f'\n{share.min():.2%} to {share.max():.2%}'
      ax.imshow(_enlarged(share, image.shape[:2]), cmap='inferno', alpha=0.6)
    ax.set_title(name, fontsize=8)
  evaluate.save_figure(fig, path)


def _enlarged(share, shape):
  """[h, w] at the size of the image, interpolated."""
  pillow = Image.fromarray(share.astype(np.float32))
  return np.asarray(pillow.resize(shape[::-1], Image.Resampling.BILINEAR))
