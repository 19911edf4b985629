"""The mesh, and where every array lies on it. The only place that makes one.

Axes of the mesh:
  data    replicas: each holds all parameters, and sees a part of the batch
  fsdp    as data, but for parameters, averages and the optimizer's state, which
          are divided over it and gathered where they are used (ZeRO-3)
  tensor  heads, MLPs and channels are divided over it; all of it sees the same
          examples
Sharding is data: regexes of parameter paths -> the dimension that is divided,
and logical names of activation axes -> mesh axes. Models know neither.
"""
import contextlib
import functools
import math
import re

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
# Axes that the batch is divided over.
BATCH = ('data', 'fsdp')
MAX_BATCH = 2**24  # more is a slip
# What the logical axes in `models` (see models/vit.py) are divided over.
ACTIVATION_RULES = (('batch', BATCH), ('tokens', None), ('embed', None))
# Path of a parameter -> its dimension that `tensor` divides, counted from the
# back, where a scan adds none: heads, the hidden layer of MLPs, the channels
# between a bottleneck's first convolutions. What comes after them is a sum over
# the axis (Megatron-LM, arXiv 1909.08053).
TENSOR_RULES = (
    (r'(query|key|value)/(kernel|bias)', -2),   # [D, K, h], [K, h]
    (r'attention/out/kernel', -3),              # [K, h, D]
    (r'fc1/(kernel|bias)', -1),                 # [D, M], [M]
    (r'fc2/kernel', -2),                        # [M, D]
    (r'stage_\d+_unit_\d+/conv_1/kernel', -1),  # [1, 1, 4n, n], of ResNets
    (r'stage_\d+_unit_\d+/conv_2/kernel', -2),  # [3, 3, n, n]
)
# Smaller arrays are not worth a gather of their own: norms and biases.
MIN_DIVIDED = 2**12


def create_mesh(config, devices=None):
  """Returns the mesh that a config section such as {'data': -1} asks for.

  Args:
    config: sizes by axis, 1 where there is none; one of them may be -1: all
      remaining devices.
    devices: defaults to all devices of all processes.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `tensor`
      would reach over processes.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = tuple(mesh_sizes(config, len(devices)).values())
  local = sum(d.process_index == devices[0].process_index for d in devices)
  if local % sizes[-1]:
    raise ValueError(
        f'mesh.tensor={sizes[-1]} does not divide the {local} devices of a '
        'process, which reads the examples of its devices.\nDivide further by '
        'mesh.fsdp.')
  # Auto: the compiler places what we leave open. Explicit, today's default,
  # rejects linen's concatenation of the class token.
  return jax.sharding.Mesh(
      _placed(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(devices, sizes):
  """Devices as an array [data, fsdp, tensor].

  As suits the chips' network, unless `tensor` would reach over processes, each
  of which reads the examples of its devices; several slices, which have no such
  network between them, one after the other.
  """
  of_slice = lambda d: getattr(d, 'slice_index', 0) or 0
  if len({of_slice(d) for d in devices}) == 1:
    placed = mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=True)
    owners = np.vectorize(lambda d: d.process_index)(placed)
    if (owners == owners[..., :1]).all():
      return placed
  order = sorted(devices, key=lambda d: (of_slice(d), d.process_index, d.id))
  return np.array(order).reshape(sizes)


def mesh_sizes(config, devices):
  """Returns {axis: size} of the mesh of a config section; see `create_mesh`.

  Args:
    config: see there.
    devices: how many.
  """
  sizes = [config.get(axis, 1) for axis in AXES]
  for axis, size in zip(AXES, sizes, strict=True):
    if size < 1 and size != -1:
      raise ValueError(f'mesh.{axis}={size} is no number of devices.\n'
                       'Give 1 or more, or -1: all that are left.')
  known = 1
  for size in sizes:
    known *= size if size > 0 else 1
  free = sizes.count(-1)
  if free == 1 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  elif free or known != devices:
    asked = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
    raise ValueError(
        f'The mesh ({asked}) does not fit {devices} device(s).\n'
        'Its axes have to multiply to the number of devices; -1 fills one in.')
  return dict(zip(AXES, sizes, strict=True))


def replicated(mesh):
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def batch(mesh):
  """The sharding of batches: their leading axis over the axes BATCH."""
  return NamedSharding(mesh, P(BATCH))


def local_rows(mesh, batch_size):
  """int32 [b]: which rows of a batch this process holds, in their order.

  On TPUs they need not follow each other: the mesh goes as the network does.
  """
  parts = batch(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size, dtype=np.int32)
  return np.concatenate([rows[start:start + batch_size // batch_shards(mesh)]
                         for start in sorted({p.start or 0 for (p,) in parts})])


def batch_shards(mesh):
  """How many parts a batch is divided into."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


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


def gather(tree):
  """A tree of global arrays, on the host, whole, in every process."""
  def whole(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or (
        leaf.is_fully_replicated):
      return leaf
    # One at a time: a device holds one array whole, not all.
    return jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(
        leaf)
  return jax.tree.map(lambda leaf: jax.device_get(whole(leaf)), tree)


def abstract_batch(image_shape, batch_size, mesh):
  """Shapes of a training batch: uint8 images [B, H, W, C], int32 labels [B]."""
  leaf = lambda shape, dtype: jax.ShapeDtypeStruct(
      (batch_size, *shape), dtype, sharding=batch(mesh))
  return {'image': leaf(image_shape, np.uint8), 'label': leaf((), np.int32)}


def of_state(abstract_state, mesh):
  """Returns a tree of shardings like `abstract_state`."""
  return jax.tree.map(
      lambda spec: NamedSharding(mesh, spec),
      specs_of_state(abstract_state, mesh), is_leaf=lambda x: isinstance(x, P))


def specs_of_state(abstract_state, mesh):
  """Returns a tree of PartitionSpecs like `abstract_state`; see `spec`.

  Averages and the optimizer's moments lie where their parameters do: their
  paths end alike.
  """
  def place(keys, leaf):
    path = '/'.join(
        key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
    return spec(path, leaf.shape, mesh)
  return jax.tree_util.tree_map_with_path(place, abstract_state)


def spec(path, shape, mesh):
  """Returns the PartitionSpec of one array of the state.

  `tensor` divides what TENSOR_RULES say. `fsdp` divides the longest of the
  other dimensions that it divides evenly; not the one that a scan runs over,
  of which each step would gather what a single device holds.

  Args:
    path: of the parameter, 'encoder/block_00/mlp/fc1/kernel', or one that ends
      so.
    shape: of the array.
    mesh: see `create_mesh`.

  Raises:
    ValueError: `tensor` does not divide the dimension of its rule.
  """
  axes = [None] * len(shape)
  tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
  for pattern, dimension in TENSOR_RULES if tensor > 1 else ():
    if re.search(f'(^|/){pattern}$', path):
      if shape[dimension] % tensor:
        of = 'heads' if 'attention' in path else 'channels'
        raise ValueError(
            f'mesh.tensor={tensor} does not divide the {shape[dimension]} '
            f'{of} of {path} {tuple(shape)}.\nTake a divisor of it.')
      axes[dimension] = 'tensor'
  first = 1 if re.search('(^|/)blocks/', path) else 0
  free = [i for i in range(first, len(shape))
          if axes[i] is None and shape[i] % fsdp == 0]
  if fsdp > 1 and free and math.prod(shape[first:]) >= MIN_DIVIDED:
    axes[max(free, key=lambda i: (shape[i], i))] = 'fsdp'
  return P(*axes) if any(axes) else P()


@contextlib.contextmanager
def tracing(mesh):
  """Traces in this context see the mesh and the rules of logical axes.

  Without it flax drops the models' sharding constraints silently.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
    yield


def check_batch_size(name, size, mesh):
  """Raises ValueError unless a batch divides over devices and processes."""
  shards = batch_shards(mesh)
  unit = math.lcm(shards, jax.process_count())
  if size > MAX_BATCH:
    raise ValueError(f'{name}={size} is more than {MAX_BATCH}.\n'
                     'Give the number of examples a step, over all devices.')
  if size > 0 and size % unit == 0:
    return
  below = max(size // unit, 1) * unit
  processes = (f' in {jax.process_count()} processes'
               if jax.process_count() > 1 else '')
  raise ValueError(
      f'{name}={size} does not divide over {shards} devices{processes}.\n'
      f'The nearest sizes that do: {below} and {below + unit}.')
