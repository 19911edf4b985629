"""The mesh, and where every array lies on it. The only place that makes one.

Sharding is data: regexes of parameter paths -> PartitionSpec, and logical
names of activation axes -> mesh axes. Models know neither.
"""
import contextlib
import functools
import math

from flax import linen as nn
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

# Axis of the mesh that the batch is divided over.
DATA = 'data'
AXES = (DATA,)
MAX_BATCH = 2**24  # more is a slip
# What the logical axes in `models` (see models/vit.py) are divided over.
ACTIVATION_RULES = (('batch', DATA), ('tokens', None), ('embed', None))


def create_mesh(config, devices=None):
  """Returns the mesh that a config section such as {'data': -1} asks for.

  Args:
    config: sizes by axis; one of them may be -1: all remaining devices.
    devices: defaults to all devices of all processes.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [config[axis] for axis in AXES]
  for axis, size in zip(AXES, sizes, strict=True):
    if size < 1 and size != -1:
      raise ValueError(f'mesh.{axis}={size} is no number of devices.\n'
                       'Give 1 or more, or -1: all that are left.')
  known = 1
  for size in sizes:
    known *= size if size > 0 else 1
  free = sizes.count(-1)
  if free == 1 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  elif free or known != len(devices):
    asked = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
    raise ValueError(
        f'The mesh ({asked}) does not fit {len(devices)} device(s).\n'
        'Its axes have to multiply to the number of devices; -1 fills one in.')
  # Auto: the compiler places what we leave open. Explicit, today's default,
  # rejects linen's concatenation of the class token.
  return jax.make_mesh(
      tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices)


def replicated(mesh):
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def batch(mesh):
  """The sharding of batches: the leading axis over the data axis."""
  return NamedSharding(mesh, P(DATA))


def put(value, sharding):
  """One array or key of the host, the same in every process, as a global one.

  `jax.device_put` takes no keys to the devices of other processes, and asks
  those whether they have the same for each array.
  """
  if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
    wrap = functools.partial(
        jax.random.wrap_key_data, impl=jax.random.key_impl(value))
    data = put(jax.random.key_data(value), sharding)
    return jax.jit(wrap, out_shardings=sharding)(data)
  value = np.asarray(value)
  return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index])


def put_tree(tree, sharding):
  """`put` of every leaf of a tree."""
  return jax.tree.map(lambda leaf: put(leaf, sharding), tree)


def abstract_batch(image_shape, batch_size, mesh):
  """Shapes of a training batch: uint8 images [B, H, W, C], int32 labels [B]."""
  leaf = lambda shape, dtype: jax.ShapeDtypeStruct(
      (batch_size, *shape), dtype, sharding=batch(mesh))
  return {'image': leaf(image_shape, np.uint8), 'label': leaf((), np.int32)}


def of_state(abstract_state, mesh):
  """A tree of shardings like `abstract_state`: all replicated."""
  return jax.tree.map(lambda _: replicated(mesh), abstract_state)


@contextlib.contextmanager
def tracing(mesh):
  """Traces in this context see the mesh and the rules of logical axes.

  Without it flax drops the models' sharding constraints silently.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
    yield


def check_batch_size(name, size, mesh):
  """Raises ValueError unless a batch divides over devices and processes."""
  unit = math.lcm(mesh.shape[DATA], jax.process_count())
  if size > MAX_BATCH:
    raise ValueError(f'{name}={size} is more than {MAX_BATCH}.\n'
                     'Give the number of examples a step, over all devices.')
  if size > 0 and size % unit == 0:
    return
  below = max(size // unit, 1) * unit
  processes = (f' in {jax.process_count()} processes'
               if jax.process_count() > 1 else '')
  raise ValueError(
      f'{name}={size} does not divide over {mesh.shape[DATA]} devices'
      f'{processes}.\nThe nearest sizes that do: {below} and {below + unit}.')
