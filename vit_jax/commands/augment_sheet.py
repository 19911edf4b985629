"""Draws training images before and after augmentation, with what was drawn.

  vit-jax augment-sheet --config configs/vit_c_i1k.py:data=/data/imagenet \
    --config.augment='randaug(2, 15)' --out sheet.png

The images are the first of the training order, cropped and flipped by
input.pp; left as the host gives them, right as the model sees them. Over the
right one stand the ops that were carried out; for mixup and CutMix the share
that is left of the image, the rest being of the one before it in the sheet.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --out FILE      a .png (augment_sheet.png)
  --examples N    how many (12)
  --step N        of which training step (0)
"""
import os

from absl import flags
import jax
import numpy as np

import input_pipeline
from vit_jax import augment as augment_lib
from vit_jax import config as config_lib
from vit_jax import ranges
from vit_jax import sharding
from vit_jax import train_step
from vit_jax.augment import op_policy

_COLUMNS = 3


def main(argv):
  """Runs the command; returns its exit code."""
  def define(values):
    flags.DEFINE_string(
        'out', 'augment_sheet.png', 'File.', flag_values=values)
    flags.DEFINE_integer('examples', 12, 'How many.', flag_values=values)
    flags.DEFINE_integer('step', 0, 'Training step.', flag_values=values)

  args = config_lib.parse_flags(['vit-jax augment-sheet', *argv], define)
  before, after, titles = sheet(args.config, args.examples, args.step)
  _plot(before, after, titles, args.config.augment, args.out)
  print(f'wrote {args.examples} images of step {args.step} to {args.out}')
  return 0


def sheet(config, examples, step):
  """Augments a batch of that many examples.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    examples: size of the batch, in place of the config's.
    step: of which training step.

  Returns:
    (uint8 [N, H, W, C] before, uint8 [N, H, W, C] after, N titles).

  Raises:
    ValueError: bad config, or no images asked for.
  """
  ranges.check('--examples', examples, 1, 1000)
  ranges.check('--step', step, 0, below=2**31)
  data_seed = config.seed if config.data_seed < 0 else config.data_seed
  data = input_pipeline.open_data(config.input, data_seed)
  mesh = sharding.create_mesh({'data': 1}, jax.devices()[:1])
  channels = data.image_shape[-1]
  normalize = train_step.normalizer(
      config.input.mean, config.input.std, channels)
  config.augment_on = 'device'
  augment = augment_lib.create(
      config, data.image_shape, len(data.class_names), normalize, mesh)
  batch = next(input_pipeline.train_batches(
      data, global_batch_size=examples, data_seed=data_seed, start_step=step,
      epoch=config.input.epoch, repeats=config.input.repeats))
  key = jax.random.key(config.seed, impl='threefry2x32')
  after = np.asarray(jax.jit(augment)(batch, key, np.int32(step))['image'])
  mean, std = (np.asarray(config.input[k]) for k in ('mean', 'std'))
  after = np.clip(np.round((after * std + mean) * 255), 0, 255)
  titles = _titles(augment, key, step, examples, *data.image_shape[:2])
  return batch['image'], after.astype(np.uint8), titles


def _titles(augment, key, step, count, height, width):
  """What is drawn for each example: list of str."""
  words = [[] for _ in range(count)]
  for place, op in enumerate(augment.ops):
    if op.stage == 'mix':
      weight, share = op.draw(
          augment_lib.batch_key(key, step, place), height, width)
      name = 'mixup' if 0 < np.min(weight) == np.max(weight) < 1 else 'CutMix'
      texts = [f'{name} {float(share):.2f}'] * count
    else:
      keys = augment_lib.example_keys(key, step, np.arange(count), place)
      if place in augment.policies:
        policy = augment.policies[place]
        rows, _ = jax.jit(jax.vmap(
            lambda k, policy=policy: op_policy.draw(
                policy, k, height, width)))(keys)
        texts = [', '.join(filter(None, (policy.titles[r] for r in row)))
                 for row in np.asarray(rows)]
      else:
        texts = [op.title(k, height, width) for k in keys]
    for word, text in zip(words, texts, strict=True):
      word += [text] if text else []
  return ['\n'.join(word) or 'nothing' for word in words]


def _plot(before, after, titles, line, path):
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot

  rows = -(-len(before) // _COLUMNS)
  figure, axes = pyplot.subplots(
      rows, 2 * _COLUMNS, squeeze=False, layout='constrained',
      figsize=(4.4 * _COLUMNS, 2.5 * rows + 0.4))
  figure.suptitle(line or 'no augmentation', fontsize=9)
  for axis in axes.flat:
    axis.axis('off')
  pairs = zip(before, after, titles, strict=True)
  for i, (old, new, title) in enumerate(pairs):
    row, column = divmod(i, _COLUMNS)
    for offset, image, text in ((0, old, str(i)), (1, new, title)):
      axis = axes[row, 2 * column + offset]
      axis.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
      axis.set_title(text, fontsize=7)
  try:
    # A name without an ending would get one.
    figure.savefig(path, dpi=110, format=os.path.splitext(path)[1][1:] or 'png')
  except (OSError, ValueError) as e:
    raise ValueError(
        f'Cannot write {path}: {str(e).splitlines()[0]}.\n'
        'Name a .png in a folder that exists with --out.') from None
  finally:
    pyplot.close(figure)
