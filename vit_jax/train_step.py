"""The pure training step, and the functions that evaluation calls."""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import choices
from vit_jax import ema as ema_lib
from vit_jax import losses
from vit_jax import ranges


def normalizer(mean, std, channels):
  """Returns uint8 [B, H, W, C] -> float32: (x / 255 - mean) / std.

  Args:
    mean, std: fractions of full scale, one a channel or one for all.
    channels: C.

  Raises:
    ValueError: another number of them, or one that is not finite; std: not
      above 0.
  """
  for name, values, low in (('mean', mean, -1e3), ('std', std, 1e-6)):
    if len(values) not in (1, channels):
      raise ValueError(f'input.{name} has {len(values)} values and the images '
                       f'{channels} channels.\nGive one for all or one each.')
    for value in values:
      ranges.check(f'input.{name}', value, low, 1e3)
  mean, std = (np.reshape(v, (1, 1, 1, -1)) for v in (mean, std))
  # Python floats would be weakly typed; float32 constants are not.
  mean, std = mean.astype(np.float32), std.astype(np.float32)
  return lambda x: (x.astype(jnp.float32) / 255 - mean) / std


def make_classification_loss(model, num_classes, config):
  """Returns the loss function of supervised classification.

  A loss function is `loss_fn(params, state, batch, rngs) -> (loss, (state,
  metrics))` of a batch that has passed `augment.Augment`: others (distillation,
  say) plug in here, not into the loop.

  Args:
    model: linen module.
    num_classes: C.
    config: `name` (softmax_xent | sigmoid_xent), `label_smoothing` in [0, 1).
  """
  xent = choices.pick(losses.LOSSES, config['name'], 'loss')
  smoothing = config['label_smoothing']
  if not 0 <= smoothing < 1:
    raise ValueError(f'loss.label_smoothing={smoothing} is not in [0, 1).\n'
                     'The papers use 0 or 0.1.')

  def loss_fn(params, state, batch, rngs):
    logits, new = model.apply(
        state.variables(params), batch['image'], train=True, rngs=rngs,
        mutable=['batch_stats'])
    targets = losses.smoothed(batch['label'], num_classes, smoothing)
    loss = jnp.mean(xent(logits, targets))
    stats = new.get('batch_stats', {})
    return loss, (state.replace(batch_stats=stats), {'loss': loss})

  return loss_fn


def make(grad_fn, augment, make_tx, schedule, ema_alpha):
  """Returns `train_step(state, batch, hypers) -> (state, metrics)`.

  Args:
    grad_fn: see `accumulation.grad`.
    augment: see `augment.create`.
    make_tx: see `optimizer.create`.
    schedule: see `schedules.create`.
    ema_alpha: see `ema.create`; None keeps no averages.

  `hypers` holds what changes without a compilation: float32 `lr` (base rate)
  and `weight_decay`, and the seed's `key`. `metrics` are scalars: `loss`,
  `lr`, `grad_norm` (before clipping), `first_nonfinite_step`.
  """

  def train_step(state, batch, hypers):
    batch = augment(batch, hypers['key'], state.step)
    rngs = {'dropout': jax.random.fold_in(hypers['key'], state.step)}
    (loss, (new, metrics)), grads = grad_fn(state.params, state, batch, rngs)

    lr = hypers['lr'] * schedule(state.step)
    tx = make_tx(lr, hypers['weight_decay'])
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    ema = state.ema
    if ema_alpha is not None:
      averaged = {'params': params, 'batch_stats': new.batch_stats}
      ema = ema_lib.update(ema, averaged, ema_alpha(state.step))

    step = state.step + 1
    first = state.first_nonfinite_step
    first = jnp.where((first < 0) & ~jnp.isfinite(loss), step, first)
    new = new.replace(step=step, params=params, opt_state=opt_state, ema=ema,
                      first_nonfinite_step=first)
    return new, {**metrics, 'lr': lr, 'grad_norm': optax.global_norm(grads),
                 'first_nonfinite_step': first}

  return train_step


def make_predict(model, normalize):
  """Returns `predict(variables, images uint8 [B, H, W, C]) -> [B, C]`."""
  return lambda variables, images: model.apply(
      variables, normalize(images), train=False)


def make_hypers(config, seed):
  """The traced numbers of a run, on the host; see `make`.

  Args:
    config: the optimizer's section, with `lr` and `weight_decay`.
    seed: int in [0, 2**63).

  Raises:
    ValueError: a number that is negative or not finite.
  """
  largest = float(np.finfo(np.float32).max)
  number = lambda key: np.float32(
      ranges.check(f'optimizer.{key}', config[key], 0, largest))
  ranges.check('seed', seed, 0, below=2**63)
  return {
      'lr': number('lr'),
      'weight_decay': number('weight_decay'),
      # The generator is named: others are not stable under vmap.
      'key': jax.random.key(seed, impl='threefry2x32'),
  }
