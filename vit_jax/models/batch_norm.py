"""BatchNorm over groups of examples, in place of the whole batch.

The paper's code runs plain BatchNorm on each GPU, so its statistics are those
of 64 to 256 images. Under jit a batch that is sharded over devices is still one
array, and linen's BatchNorm takes statistics of all of it. In groups they are
the paper's on any number of devices, and those of neither a larger batch nor a
smaller machine; and normalisation needs no communication between devices.
"""
from flax import linen as nn
import jax
import jax.numpy as jnp


class GroupedBatchNorm(nn.Module):
  """Training mode of BatchNorm, over consecutive groups of examples.

  Parameters `scale`, `bias` and statistics `mean`, `var`, (D,) float32 each,
  are those of `nn.BatchNorm`, which does the rest: evaluation, and statistics
  of the whole batch.

  The running statistics move towards the mean over groups of the groups'
  moments, (1 - momentum) of the way. Their variance is linen's: biased, with
  which the group is also normalised; torch keeps the unbiased one, larger by
  m / (m - 1), m values a channel. With or without precise statistics that is no
  difference that matters: m is 64 * 14 * 14 at the least in the paper's models,
  a factor of 1.00008.

  Attributes:
    group: examples a group, at least 1; divides B.
    momentum: of the running statistics; flax's 0.9 is torch's 0.1.
    epsilon: added to the variance.
    dtype: of the result; everything before is float32.
  """
  group: int
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [B, ..., D] over the axes between, by group of B."""
    check_group(self.group, 'batch', x.shape[0])
    features = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, features)
    bias = self.param('bias', nn.initializers.zeros, features)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, features)
    running_var = self.variable('batch_stats', 'var', jnp.ones, features)

    y = x.astype(jnp.float32)
    axes = tuple(range(1, y.ndim - 1))

    def of_groups(moments):  # [B, D] -> [G, D]
      return moments.reshape(-1, self.group, *features).mean(1)

    def of_examples(values):  # [G, D] -> [B, ..., D]
      return jnp.expand_dims(jnp.repeat(values, self.group, axis=0), axes)

    # Moments of examples first: it is not the activations that are cut into
    # groups. A TPU, where B may be the fastest axis in memory, would copy them.
    # Both moments in one pass, as in linen; rounding may take their difference
    # below zero.
    mean = of_groups(y.mean(axes))
    var = of_groups(jnp.square(y).mean(axes)) - jnp.square(mean)
    var = jnp.maximum(var, 0.0)
    if not self.is_initializing():
      for running, moment in ((running_mean, mean), (running_var, var)):
        running.value = (self.momentum * running.value
                         + (1 - self.momentum) * moment.mean(0))

    inverse = jax.lax.rsqrt(var + self.epsilon) * scale[None]
    bias = bias.reshape((1,) * (y.ndim - 1) + features)
    y = (y - of_examples(mean)) * of_examples(inverse) + bias
    return y.astype(self.dtype)


def group(model: nn.Module) -> int | None:
  """Examples whose statistics a model's BatchNorms take together in training.

  0: those of the whole batch. None: it has no BatchNorm that learns.
  """
  stem = getattr(model, 'stem', None)
  if stem and (stem.norm, stem.batch_norm) == ('bn', 'train'):
    return stem.batch_norm_group
  return None


def check_group(group: int, name: str, size: int) -> None:
  """Raises ValueError unless a batch divides into groups.

  Args:
    group: examples a group; 0: one group.
    name: of the batch's size, for the message.
    size: examples in the batch.
  """
  if not group or size % group == 0:
    return
  divisors = [n for n in range(1, size + 1) if size % n == 0]
  below = [n for n in divisors if n < group][-1:]
  above = [n for n in divisors if n > group][:1]
  batch = max(size // group, 1) * group
  raise ValueError(
      f'batch_norm_group={group} does not divide {name}={size}.\n'
      f'The nearest groups that do: {" and ".join(map(str, below + above))} '
      f'(0: the whole batch); the nearest batches: {batch} and '
      f'{batch + group}.')
