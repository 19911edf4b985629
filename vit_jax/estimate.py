"""What a training step needs of each device, without a compiler's help.

Arithmetic on the traced step of one device, and on how arrays are divided: an
estimate, within 15 % of what the TPU compiler says of the memory of ViT_C-18GF,
ViT-L/16 and ViT-G/14 (tests/test_plan.py). `plan` prints it.
"""
import math
import re
import types
from typing import NamedTuple

import jax

from vit_jax import accumulation
from vit_jax import checks
from vit_jax import collectives
from vit_jax import complexity
from vit_jax import liveness
from vit_jax import models
from vit_jax import param_paths
from vit_jax import program as program_lib
from vit_jax import sharding
from vit_jax import train_state
from vit_jax.models import batch_norm

# Paths of what `sharding.TENSOR_RULES` divide.
_DIVIDED = r'attention|mlp|unit_\d+/conv_[12]'


class Needs(NamedTuple):
  """Bytes and operations of one device and one step.

  Attributes:
    params: bytes of parameters, trained or not.
    optimizer: bytes of its state.
    rest: bytes of averages, statistics and the batch.
    temporaries: bytes of activations and gradients, where they are most.
    flops: operations of matmuls and convolutions, two a multiply-add.
    exchanged: {kind: `collectives.Exchange`}.
  """
  params: int
  optimizer: int
  rest: int
  temporaries: int
  flops: int
  exchanged: dict

  @property
  def memory(self):
    """Bytes in all."""
    return self.params + self.optimizer + self.rest + self.temporaries


def of(config, num_train, num_classes, image_shape, platform, devices):
  """Returns what a step of a config `Needs`.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    num_train, num_classes, image_shape: see `program.create`.
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: how many.

  Raises:
    ValueError: bad input, such as a mesh that is not of so many devices.
  """
  sizes = sharding.mesh_sizes(config.mesh, devices)
  mesh = types.SimpleNamespace(shape=sizes)  # all that the rules ask of one
  shards = sharding.batch_shards(mesh)
  sharding.check_batch_size('global_batch_size', config.global_batch_size, mesh)
  # As a run is checked; what follows is the part of one device.
  model = models.create(num_classes=num_classes, **train_state.model_fields(
      config.model, tuple(config.frozen), platform))
  checks.check_model(model, image_shape, config.global_batch_size)
  accumulation.check(config.accumulation_steps, config.global_batch_size,
                     batch_norm.group(model), mesh)
  own = _of_one_device(config, shards)
  if sizes['tensor'] > 1 and own.model.get('attention') == 'auto':
    own.model.attention = 'xla'  # as `program` chooses on such a mesh
  one = sharding.create_mesh({}, jax.local_devices()[:1])
  program = program_lib.create(
      own, max(num_train // shards, own.global_batch_size), num_classes,
      image_shape, one, platform)
  state, batch, _ = program.abstract_args
  specs = sharding.specs_of_state(state, mesh)
  held = jax.tree.map(
      lambda leaf, spec: liveness.nbytes(leaf) // math.prod(
          sizes[axis] for axis in spec if axis), state, specs)
  total = lambda tree: sum(jax.tree.leaves(tree))

  with sharding.tracing(one):
    jaxpr = jax.make_jaxpr(program.step)(*program.abstract_args)
  shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
  # Of the parameters of a scanned model each step of the loop sees one.
  shapes |= {shape[1:] for shape in shapes}
  divide = sizes['fsdp'] * sizes['tensor']
  flops = 2 * sum(
      row.macs / (sizes['tensor'] if re.search(_DIVIDED, row.path) else 1)
      for row in complexity.of_jaxpr(jaxpr))
  item = 2 if program.model.dtype == 'bfloat16' else 4

  def size(aval, path):
    bytes_ = liveness.nbytes(aval)
    if getattr(aval, 'shape', ()) in shapes:
      return bytes_ // divide  # gradients
    if re.search(_DIVIDED, path) and not re.search(
        r'norm|(attention/out|fc2|conv_2)$', path):
      return bytes_ // sizes['tensor']
    return bytes_

  flat = param_paths.flatten(program.variables['params'])
  kernels = [leaf for leaf in flat.values() if leaf.ndim > 1]
  trained = jax.tree.leaves(program.trained)
  blocks = getattr(program.model, 'depth', 1)
  micro = own.global_batch_size // own.accumulation_steps
  tokens, width, hidden = _stream(program.model, image_shape)
  gathered = 0
  if sizes['fsdp'] > 1:
    # Two blocks' weights are whole: one in use, one on its way.
    gathered = 2 * item * sum(leaf.size for leaf in kernels) // (
        blocks * sizes['tensor'])
    if platform == 'tpu':
      # The compiler gathers piece by piece within matmuls, and does not fuse
      # those with what follows: one more [B, N, M] for each block that is kept.
      kept = 1 if own.model.remat == 'full' else blocks
      gathered += kept * micro * tokens * hidden * item // sizes['tensor']
  return Needs(
      params=total((held.params, held.frozen)), optimizer=total(held.opt_state),
      rest=total((held.ema, held.batch_stats)) + total(
          jax.tree.map(liveness.nbytes, batch)),
      temporaries=liveness.peak(jaxpr, size) + gathered,
      flops=round(flops),
      exchanged=collectives.of_sharding(
          blocks, item * sum(leaf.size for leaf in kernels),
          item * sum(leaf.size for leaf in trained if leaf.ndim > 1),
          4 * sum(leaf.size for leaf in trained if leaf.ndim <= 1),
          sizes, micro * item * tokens * width, own.accumulation_steps))


def _of_one_device(config, shards):
  """The config of the part of a step that one device does."""
  own = config.copy_and_resolve_references()
  own.mesh = dict(data=1, fsdp=1, tensor=1)
  own.global_batch_size //= shards
  if 'batch_norm_group' in own.model and own.model.batch_norm_group:
    # A group may be of several devices.
    own.model.batch_norm_group = math.gcd(
        own.model.batch_norm_group,
        own.global_batch_size // max(own.accumulation_steps, 1))
  return own


def _stream(model, image_shape):
  """(N, D, M) of a model; zeros for one without tokens."""
  if not (grid := models.grid(model, image_shape)):
    return 0, 0, 0
  width = getattr(getattr(model, 'stem', model), 'width', 0)
  hidden = getattr(model, 'mlp', getattr(model, 'channels_mlp', 0))
  return math.prod(grid), width, hidden
