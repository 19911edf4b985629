"""How much memory a traced program holds at most: an estimate.

The jaxpr is walked in its order. What compilers fuse costs nothing: elementwise
results live in their consumers, and what they are made of lives as long as
they are needed. Results of matmuls, convolutions, reductions and loops are
arrays in memory, and so are the operands of matmuls and convolutions. Layouts,
padding and the compiler's own order are not known here.
"""
import dataclasses

import numpy as np

# Whose results are computed where they are used.
_FUSED = frozenset((
    'abs', 'add', 'add_any', 'and', 'bitcast_convert_type',
    'broadcast_in_dim', 'cbrt', 'ceil', 'clamp', 'convert_element_type',
    'copy', 'cos', 'div', 'eq', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2',
    'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'iota',
    'is_finite', 'le', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul',
    'ne', 'neg', 'not', 'or', 'pad', 'pow', 'real', 'rem', 'rev',
    'round', 'rsqrt', 'select_n', 'shift_left', 'shift_right_arithmetic',
    'shift_right_logical', 'sign', 'sin', 'slice', 'sqrt', 'square',
    'stop_gradient', 'sub', 'tan', 'tanh', 'xor',
    'sharding_constraint', 'optimization_barrier', 'pvary', 'reduce_precision'))
# Whose result is its argument, seen otherwise.
_VIEWS = frozenset(('reshape', 'transpose', 'squeeze', 'expand_dims'))
_MATMULS = frozenset(('dot_general', 'conv_general_dilated'))


@dataclasses.dataclass(eq=False)
class _Value:
  """A result: an array in memory, or `parents` of which it is computed."""
  bytes: int
  parents: tuple = ()
  stored: bool = True
  begin: int = 0
  end: int = -1

  def arrays(self, seen):
    """Adds the stored values that it is computed of to the set `seen`."""
    stack = [self]
    while stack:
      value = stack.pop()
      if value in seen:
        continue
      seen.add(value)
      if not value.stored:
        stack.extend(value.parents)
    return {value for value in seen if value.stored}


def peak(jaxpr, size=None):
  """Returns the bytes that a program holds at most, beside its arguments.

  Args:
    jaxpr: a ClosedJaxpr. Its results that have the shape and dtype of an
      argument are taken to use its memory.
    size: from an abstract value and the path of its module to its bytes on a
      device; None: all of it.

  Returns:
    int.
  """
  size = size or (lambda aval, path: nbytes(aval))
  walk = _Walk(size)
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  free = [_Value(0) for _ in (*jaxpr.invars, *jaxpr.constvars)]
  env = dict(zip((*jaxpr.invars, *jaxpr.constvars), free, strict=True))
  outs = walk.run(jaxpr, env, '')
  left = [str(v.aval) for v in jaxpr.invars]
  for var, out in zip(jaxpr.outvars, outs, strict=True):
    if str(var.aval) in left:
      left.remove(str(var.aval))  # written over an argument
      walk.use(out)
    else:
      walk.store(out)
  return walk.peak()


def nbytes(aval):
  """Bytes of an abstract value; a random key has 8."""
  if not hasattr(aval, 'shape'):
    return 0
  item = getattr(aval.dtype, 'itemsize', 8)
  return int(np.prod(aval.shape, dtype=np.int64)) * item


class _Walk:
  """Visits equations in order; its clock counts those that do something."""

  def __init__(self, size):
    self._size, self._clock, self._values = size, 0, []
    self._extra = {}  # time -> bytes within a loop's body

  def peak(self):
    change = np.zeros(self._clock + 2, np.int64)
    for value in self._values:
      if value.end >= 0:
        change[value.begin] += value.bytes
        change[value.end + 1] -= value.bytes
    live = np.cumsum(change)
    for time, extra in self._extra.items():
      live[time] += extra
    return int(live.max(initial=0))

  def use(self, value):
    for array in value.arrays(set()):
      array.end = self._clock

  def store(self, value):
    """Makes an array of a value that is computed where it is used."""
    self.use(value)
    if not value.stored:
      value.stored, value.begin = True, self._clock
      value.end = self._clock
      self._values.append(value)

  def new(self, aval, path):
    value = _Value(self._size(aval, path), begin=self._clock, end=self._clock)
    self._values.append(value)
    return value

  def run(self, jaxpr, env, prefix):
    """Visits a jaxpr; `env` has its arguments. Returns its results."""
    read = lambda var: env.get(var, _NOTHING) if not hasattr(
        var, 'val') else _NOTHING
    for eqn in jaxpr.eqns:
      path = f'{prefix}/{eqn.source_info.name_stack}'
      inputs = [read(v) for v in eqn.invars]
      outs = self.visit(eqn, inputs, path)
      env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def visit(self, eqn, inputs, path):
    """Returns the values of an equation's results."""
    name = eqn.primitive.name
    inner = _called(eqn)
    if inner is not None:
      variables = (*inner.constvars, *inner.invars)
      given = [_NOTHING] * len(inner.constvars) + inputs
      return self.run(inner, dict(zip(variables, given, strict=True)), path)
    if name in _VIEWS:
      return inputs[:1]
    if name in _FUSED:
      return [_Value(self._size(v.aval, path), tuple(
          dict.fromkeys(inputs)), stored=False) for v in eqn.outvars]
    self._clock += 1
    for value in inputs:
      (self.store if name in _MATMULS or name == 'scan' else self.use)(value)
    if name in ('scan', 'while', 'cond'):
      bodies = [b for p in eqn.params.values() for b in _jaxprs(p)]
      self._extra[self._clock] = max(
          (peak_of_body(b, self._size, path) for b in bodies), default=0)
    return [self.new(v.aval, path) for v in eqn.outvars]


def peak_of_body(jaxpr, size, path):
  """Bytes that one trip of a loop holds at most, beside what goes in and out.

  Of its results those that are stacked are written where they belong.
  """
  walk = _Walk(size)
  values = {var: _Value(0) for var in (*jaxpr.invars, *jaxpr.constvars)}
  for out in walk.run(jaxpr, values, path):
    walk.use(out)
  return walk.peak()


_NOTHING = _Value(0)


def _called(eqn):
  """The jaxpr that an equation stands for, or None."""
  if eqn.primitive.name in ('scan', 'while', 'cond', *_MATMULS):
    return None
  found = [j for p in eqn.params.values() for j in _jaxprs(p)]
  if found and len(found[0].invars) == len(eqn.invars):
    return found[0]
  return None


def _jaxprs(value):
  for item in value if isinstance(value, (tuple, list)) else (value,):
    item = getattr(item, 'jaxpr', item)
    if hasattr(item, 'eqns'):
      yield item
