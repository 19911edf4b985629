"""Optimizers: AdamW and SGD with the papers' (PyTorch) conventions.

`create` returns a function of traced numbers, (lr, weight_decay) -> optax
transform, so that another learning rate or decay compiles nothing.

Weight decay: AdamW decouples it and multiplies it by the learning rate
(optax, PyTorch); SGD adds it to the gradient before momentum (PyTorch, the
paper). big_vision's decay is absolute: its `wd` is our lr * weight_decay.
"""
import optax

from vit_jax import choices
from vit_jax import param_paths
from vit_jax import ranges


def adamw(config):
  """Adam, then weight decay that is not part of the gradient."""
  number = lambda key, **bounds: ranges.check(
      f'optimizer.{key}', config[key], 0, **bounds)
  adam = optax.scale_by_adam(
      number('b1', below=1), number('b2', below=1), number('eps', high=1))
  return lambda weight_decay, mask: (
      adam, optax.add_decayed_weights(weight_decay, mask))


def sgd(config):
  """Weight decay in the gradient, then momentum."""
  momentum = optax.trace(
      ranges.check('optimizer.momentum', config['momentum'], 0, below=1),
      nesterov=bool(config['nesterov']))
  return lambda weight_decay, mask: (
      optax.add_decayed_weights(weight_decay, mask), momentum)


OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}


def create(config, params):
  """Returns `make_tx(lr, weight_decay) -> optax.GradientTransformation`.

  Args:
    config: `name`; `decay` (regexes of the paths that weight decay applies
      to); `clip_norm` (bound on the gradient's global norm, 0: none); adamw:
      `b1`, `b2`, `eps`; sgd: `momentum`, `nesterov`.
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

  def make_tx(lr, weight_decay):
    return optax.chain(clip, *rule(weight_decay, mask), optax.scale(-lr))

  return make_tx


def describe(config):
  """One line that says what the numbers mean in other people's conventions."""
  lr, wd = config['lr'], config['weight_decay']
  if config['name'] == 'adamw':
    return (f'adamw: lr {lr:g}, weight decay {wd:g} times lr '
            f"(absolute, as in big_vision: {lr * wd:g})")
  return f'{config["name"]}: lr {lr:g}, weight decay {wd:g} in the gradient'
