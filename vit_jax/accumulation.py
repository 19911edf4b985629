"""Gradient accumulation: a step's batch in parts, for less memory.

The parts, micro-batches, are cut from the augmented batch, so that mixup pairs
are those of the whole. Gradients are their mean, and so are the statistics of
BatchNorm, which every part takes from where the step began: with groups
(`models.batch_norm`) the step is that of the whole batch, up to rounding. Masks
of dropout and stochastic depth are others. Each part reduces its gradients over
the devices.
"""
import jax
import jax.numpy as jnp

from vit_jax import sharding


def grad(loss_fn, steps, group, mesh):
  """Returns what `jax.value_and_grad(loss_fn, has_aux=True)` would.

  Args:
    loss_fn: see `train_step.make_classification_loss`.
    steps: micro-batches of a batch, at least 1; see `check`.
    group: examples whose BatchNorm statistics are taken together; 0: no
      BatchNorm learns.
    mesh: see `sharding`.

  Returns:
    `grad_fn(params, state, batch, rngs) -> ((loss, (state, metrics)), grads)`.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if steps == 1:
    return value_and_grad
  # XLA's CPU convolutions are slow in a loop's body.
  unroll = mesh.devices.flat[0].platform == 'cpu'

  def grad_fn(params, state, batch, rngs):
    place = sharding.of_state(params, mesh)

    def part(i, micro):
      keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
      (loss, (new, metrics)), grads = value_and_grad(
          params, state, micro, keys)
      return loss, metrics, new.batch_stats, grads

    def add(total, xs):
      *rest, grads = jax.tree.map(jnp.add, total, part(*xs))
      # A loop's carry is not divided unless one says so.
      return (*rest, jax.lax.with_sharding_constraint(grads, place)), None

    parts = jax.tree.map(lambda x: split(x, steps, group, mesh), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(part, 0, first))
    total, _ = jax.lax.scan(
        add, zeros, (jnp.arange(steps), parts), unroll=unroll)
    loss, metrics, batch_stats, grads = jax.tree.map(
        lambda x: x / steps, total)
    return (loss, (state.replace(batch_stats=batch_stats), metrics)), grads

  return grad_fn


def split(x, steps, group, mesh):
  """[B, ...] -> [steps, B / steps, ...], each part over all devices.

  Every device cuts its own rows where that leaves groups whole; otherwise the
  parts are consecutive rows, which move between devices.
  """
  shards = sharding.batch_shards(mesh)
  if group and len(x) // (shards * steps) % group:
    shards = 1
  parts = x.reshape(shards, steps, -1, *x.shape[1:]).swapaxes(0, 1)
  parts = parts.reshape(steps, -1, *x.shape[1:])
  rows = sharding.batch(mesh)
  return jax.lax.with_sharding_constraint(parts, jax.NamedSharding(
      mesh, jax.P(None, *rows.spec)))


def check(steps, batch_size, group, mesh):
  """Raises ValueError unless a batch can be cut.

  Args:
    steps: micro-batches of a batch.
    batch_size: over all devices and processes.
    group: examples whose BatchNorm statistics are taken together; 0: those of
      the whole batch; None: no BatchNorm learns.
    mesh: see `sharding`.
  """
  if steps == 1:
    return
  shards = sharding.batch_shards(mesh)
  if steps < 1 or batch_size % (steps * shards):
    most = batch_size // shards
    fit = [n for n in range(1, most + 1) if most % n == 0]
    near = sorted(fit, key=lambda n: abs(n - steps))[:3]
    raise ValueError(
        f'accumulation_steps={steps} does not divide the {most} examples that '
        f'each of {shards} devices has of global_batch_size={batch_size}.\n'
        f'Near it are {", ".join(map(str, sorted(near)))}.')
  micro = batch_size // steps
  if group is None or (group and micro % group == 0):
    return
  whole = (f'model.batch_norm_group={group} is cut' if group else
           f'BatchNorm has statistics of all {batch_size} examples')
  raise ValueError(
      f'{whole} by micro-batches of {micro} (accumulation_steps={steps}).\n'
      f'Set model.batch_norm_group={micro}, the largest that fits, or a '
      'divisor of it; it is part of what is computed.')
