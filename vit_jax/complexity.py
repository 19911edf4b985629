"""What a model costs: parameters, multiply-adds, activations, by module.

Counted from the jaxpr, so whatever was traced is what is counted, in the
definitions of the paper (arXiv 2106.14881, Appendix D) and of pycls:
  macs         multiply-adds of convolutions and matmuls
  flops        macs, plus one per bias that is added to an output of those
  activations  number of outputs of convolutions and matmuls
Element-wise operations and normalisation count nothing.

`compiled.cost_analysis()` is no substitute: it counts the body of a scan once.
"""
import collections
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Row(NamedTuple):
  """Cost of one module, without that of the modules in it.

  Attributes:
    path: as in the parameter tree, 'encoder/block_00/attention/query'.
    params, flops, macs, activations: see the module's docstring. `count` knows
      no parameters: its rows have params 0 and flops equal to macs.
  """
  path: str
  params: int
  flops: int
  macs: int
  activations: int


@dataclasses.dataclass(frozen=True)
class Complexity:
  """Cost of one image: sums over `rows`."""
  params: int
  flops: int
  macs: int
  activations: int
  rows: tuple[Row, ...]


def of(model, image_size: int | tuple[int, int],
       channels: int = 3) -> Complexity:
  """Counts a model's cost for one image, in evaluation mode.

  Nothing is allocated: everything goes through shapes.

  Args:
    model: a linen module, `model.apply(variables, images, train=False)`.
    image_size: (H, W), or one number for both, pixels.
    channels: of the image.

  Returns:
    `Complexity`; its rows are the modules that have parameters, convolutions or
    matmuls, in order of execution. Running statistics are not parameters.
  """
  height, width = np.broadcast_to(image_size, 2).tolist()
  images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)

  def init(key, images):
    return model.init(key, images, train=False)

  def apply(variables, images):
    return model.apply(variables, images, train=False)

  variables = jax.eval_shape(init, jax.random.key(0), images)
  params = collections.defaultdict(int)
  biased = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    *modules, name = (key.key for key in path)
    module = '/'.join(modules) or name  # 'pos_embedding' is in no module
    params[module] += math.prod(leaf.shape)
    if name == 'bias':
      biased.add(module)

  root = type(model).__name__
  rows = []
  for row in count(apply, variables, images):
    path = row.path.removeprefix(root).removeprefix('/')
    bias_adds = row.activations if path in biased else 0
    rows.append(row._replace(
        path=path, params=params.pop(path, 0), flops=row.macs + bias_adds))
  rows += [Row(path, n, 0, 0, 0) for path, n in params.items()]
  return Complexity(
      params=sum(row.params for row in rows),
      flops=sum(row.flops for row in rows),
      macs=sum(row.macs for row in rows),
      activations=sum(row.activations for row in rows),
      rows=tuple(rows))


def count(fn: Callable, *args) -> tuple[Row, ...]:
  """Counts the multiply-adds and activations of one call, by module.

  Args:
    fn: any function that jax can trace.
    *args: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    Rows in order of execution; a path is the module's name stack, its root
    included ('ViT/stem/conv_0'), and '' outside any module.

  Raises:
    ValueError: a while loop with matmuls in it, whose number of trips is not
      known before it runs.
  """
  return of_jaxpr(jax.make_jaxpr(fn)(*args))


def of_jaxpr(jaxpr) -> tuple[Row, ...]:
  """`count` of what has been traced: of a ClosedJaxpr."""
  rows = {}
  for path, macs, activations in _costs(jaxpr.jaxpr, ''):
    old = rows.get(path, Row(path, 0, 0, 0, 0))
    macs += old.macs
    rows[path] = Row(path, 0, macs, macs, old.activations + activations)
  return tuple(rows.values())


def _costs(jaxpr, prefix: str) -> Iterator[tuple[str, int, int]]:
  """Yields (path, macs, activations) of each convolution and matmul."""
  for eqn in jaxpr.eqns:
    primitive = eqn.primitive.name
    # Relative to the equation that holds this jaxpr (scan, remat, ...).
    path = _join(prefix, str(eqn.source_info.name_stack))
    if primitive in ('dot_general', 'conv_general_dilated'):
      size = eqn.outvars[0].aval.size
      yield path, round(size * _macs_per_output(eqn)), size
      continue
    if primitive == 'pallas_call':  # a kernel, which says what it costs
      cost = eqn.params['cost_estimate']
      yield path, cost.flops // 2 if cost else 0, 0
      continue
    inner = [
        list(_costs(j, path))
        for value in eqn.params.values() for j in _jaxprs(value)]
    if primitive == 'while' and any(inner):
      raise ValueError(
          f'There is a while loop with matmuls in {path!r}: the number of its '
          'trips is not known.\nWrite it as a scan to have it counted.')
    if primitive == 'cond':
      # One branch runs: the dearest.
      inner = [max(inner, key=lambda costs: sum(c[1] for c in costs))]
    trips = eqn.params['length'] if primitive == 'scan' else 1
    for costs in inner:
      for inner_path, macs, activations in costs:
        yield inner_path, trips * macs, trips * activations


def _macs_per_output(eqn) -> float:
  """Multiply-adds for one element of a convolution's or matmul's output."""
  dimensions = eqn.params['dimension_numbers']
  lhs, rhs = (v.aval.shape for v in eqn.invars)
  if eqn.primitive.name == 'dot_general':
    (contracting, _), _ = dimensions
    return math.prod(lhs[i] for i in contracting)
  # The first entry of rhs_spec is the output's channels, the others are the
  # kernel's input channels (per group) and its extent.
  macs = math.prod(rhs[i] for i in dimensions.rhs_spec[1:])
  # The gradient of a strided one has zeros between the rows: not multiplied.
  return macs / math.prod(eqn.params['lhs_dilation'])


def _jaxprs(value) -> Iterator:
  """Yields the jaxprs in a parameter of an equation."""
  for item in value if isinstance(value, (tuple, list)) else (value,):
    item = getattr(item, 'jaxpr', item)  # a ClosedJaxpr holds one
    if hasattr(item, 'eqns'):
      yield item


def _join(prefix: str, name_stack: str) -> str:
  """Joins name stacks, without the scopes that jnp.einsum opens."""
  names = [prefix, *name_stack.split('/')]
  return '/'.join(name for name in names if name and '->' not in name)
