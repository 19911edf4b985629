"""Optimizers: AdamW and SGD with the papers' (PyTorch) conventions.

`create` returns a function of traced numbers, (lr, weight_decay) -> optax
transform, so that another learning rate or decay compiles nothing.

Weight decay: AdamW decouples it and multiplies it by the learning rate
(optax, PyTorch); SGD adds it to the gradient before momentum (PyTorch, the
paper). big_vision's decay is absolute: its `wd` is our lr * weight_decay.
"""
import collections
import re

import jax
import numpy as np
import optax

from vit_jax import choices
from vit_jax import param_paths
from vit_jax import ranges


def adamw(config):
  """Adam, then weight decay that is not part of the gradient."""
  number = lambda key, **bounds: ranges.check(
      f'optimizer.{key}', config[key], 0, **bounds)
  adam = optax.scale_by_adam(
      number('b1', below=1), number('b2', below=1), number('eps', high=1),
      mu_dtype=_momentum_dtype(config))
  return lambda weight_decay, mask: (
      adam, optax.add_decayed_weights(weight_decay, mask))


def sgd(config):
  """Weight decay in the gradient, then momentum."""
  momentum = optax.trace(
      ranges.check('optimizer.momentum', config['momentum'], 0, below=1),
      nesterov=bool(config['nesterov']),
      accumulator_dtype=_momentum_dtype(config))
  return lambda weight_decay, mask: (
      optax.add_decayed_weights(weight_decay, mask), momentum)


def _momentum_dtype(config):
  choices.check({
      'optimizer.momentum_dtype': (config['momentum_dtype'], DTYPES)})
  return config['momentum_dtype']


# In front of the first block, and blocks; all else belongs to the head. A BiT's
# units are its blocks, a hybrid's ResNet is a stem.
_EMBEDDING = re.compile(r'(stem|conv_root)/.*|cls|pos_embedding')
_BLOCK = re.compile(r'((encoder/)?block_\d+|stage_\d+_unit_\d+)/.*')
_STACKED = re.compile(r'(encoder/)?blocks/.*')

DTYPES = ('float32', 'bfloat16')
OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}


def create(config, params):
  """Returns `make_tx(lr, weight_decay) -> optax.GradientTransformation`.

  Args:
    config: `name`; `decay` (regexes of the paths that weight decay applies
      to); `clip_norm` (bound on the gradient's global norm, 0: none);
      `layer_decay` (see `layer_scales`; 1: none); `momentum_dtype` (of DTYPES:
      how the average of gradients is stored); adamw: `b1`, `b2`, `eps`; sgd:
      `momentum`, `nesterov`.
    params: tree with the trained parameters' paths (shapes will do).

  Raises:
    ValueError: unknown name, a number out of range, or a decay pattern that
      matches nothing.
  """
  rule = choices.pick(OPTIMIZERS, config['name'], 'optimizer')(config)
  clip_norm = ranges.check('optimizer.clip_norm', config['clip_norm'], 0)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  decay = tuple(config['decay'])
  param_paths.check(param_paths.flatten(params), decay)
  mask = lambda tree: param_paths.mask(tree, decay)
  layer_decay = ranges.check(
      'optimizer.layer_decay', config['layer_decay'], 0.01, 1)
  scales = layer_scales(params, layer_decay)

  def scale(lr):
    if layer_decay == 1:
      return optax.scale(-lr)
    return optax.stateless(lambda updates, _: jax.tree.map(
        lambda u, s: -lr * s * u, updates, scales))

  def make_tx(lr, weight_decay):
    return optax.chain(clip, *rule(weight_decay, mask), scale(lr))

  return make_tx


def layer_scales(params, layer_decay):
  """What the learning rate of each parameter is multiplied with.

  The head, and what follows the last block, has 1, the last block layer_decay,
  the one before its square, and so on down to the embeddings: as in BEiT
  (arXiv 2106.08254), MAE and timm. AdamW's decay, which is times lr, shrinks
  with it. Blocks that are frozen do not count.

  Args:
    params: tree with the trained parameters' paths (shapes will do).
    layer_decay: above 0, at most 1.

  Returns:
    A tree of float32 arrays that broadcast with the parameters; those of
    stacked blocks are (depth, 1, ...).
  """
  flat = param_paths.flatten(params)
  blocks = sorted({m[1] for m in map(_BLOCK.fullmatch, flat) if m})
  depth = len(blocks) or max(
      (leaf.shape[0] for path, leaf in flat.items()
       if _STACKED.fullmatch(path)), default=0)
  # Powers of the decay: the embeddings' first, the head's last.
  powers = np.float32(layer_decay) ** np.arange(depth + 1, -1, -1)
  powers = powers.astype(np.float32)

  def scale(path, leaf):
    if _EMBEDDING.fullmatch(path):
      return powers[0]
    if match := _BLOCK.fullmatch(path):
      return powers[1 + blocks.index(match[1])]
    if _STACKED.fullmatch(path):
      return powers[1:-1].reshape(-1, *[1] * (len(leaf.shape) - 1))
    return powers[-1]

  return param_paths.unflatten(
      {path: scale(path, leaf) for path, leaf in flat.items()})


def describe(config, params):
  """What the numbers mean in other people's conventions, and by layer.

  Args:
    config, params: see `create`.
  """
  lr, wd = config['lr'], config['weight_decay']
  line = f'{config["name"]}: lr {lr:g}, weight decay {wd:g} in the gradient'
  if config['name'] == 'adamw':
    line = (f'adamw: lr {lr:g}, weight decay {wd:g} times lr '
            f"(absolute, as in big_vision: {lr * wd:g})")
  if config['layer_decay'] == 1:
    return line
  sizes = collections.Counter()
  scales = param_paths.flatten(layer_scales(params, config['layer_decay']))
  for path, leaf in param_paths.flatten(params).items():
    for scale in scales[path].flat:
      sizes[float(scale)] += leaf.size // scales[path].size
  return '\n'.join([line, *(
      f'  lr times {scale:.4f}: {n:,} parameters'
      for scale, n in sorted(sizes.items()))])
