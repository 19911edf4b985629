"""The one state that training carries, born sharded."""
import inspect
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import choices
from vit_jax import models
from vit_jax import param_paths
from vit_jax import sharding
from vit_jax.models import stems


class TrainState(flax.struct.PyTreeNode):
  """Everything that a checkpoint holds.

  Attributes:
    step: int32 [], updates done.
    params: nested dict, float32: what the optimizer trains.
    frozen: nested dict: parameters that are neither differentiated nor in the
      optimizer; together with `params` the model's whole tree.
    batch_stats: nested dict: BatchNorm's running statistics; {} without one.
    ema: {} or {'params', 'batch_stats'}: averages of the above.
    opt_state: the optimizer's.
    first_nonfinite_step: int32 [], first update whose loss was not finite; -1.
  """
  step: jax.Array
  params: Any
  frozen: Any
  batch_stats: Any
  ema: Any
  opt_state: Any
  first_nonfinite_step: jax.Array

  def variables(self, params=None):
    """What `model.apply` takes; `params` in place of the state's own."""
    params = self.params if params is None else params
    return {'params': param_paths.merge(params, self.frozen),
            'batch_stats': self.batch_stats}

  def ema_variables(self):
    """What `model.apply` takes, averaged."""
    return {'params': param_paths.merge(self.ema['params'], self.frozen),
            'batch_stats': self.ema['batch_stats']}


def create(variables, make_tx, frozen, with_ema):
  """Builds a state at step 0 from a model's variables; traceable.

  Args:
    variables: {'params': ..., 'batch_stats': ...}.
    make_tx: see `optimizer.create`.
    frozen: regexes of the parameters that are not trained.
    with_ema: whether to keep averages; they start as copies.
  """
  params, fixed = param_paths.split(variables['params'], frozen)
  batch_stats = variables.get('batch_stats', {})
  # The optimizer's state depends on neither number.
  opt_state = make_tx(0.0, 0.0).init(params)
  ema = {'params': params, 'batch_stats': batch_stats} if with_ema else {}
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, frozen=fixed,
      batch_stats=batch_stats, ema=ema, opt_state=opt_state,
      first_nonfinite_step=jnp.full((), -1, jnp.int32))


def model_fields(config, frozen, platform=''):
  """What `models.create` takes, from a config section.

  dtype 'auto' is bfloat16 on accelerators and float32 on CPU, where bfloat16
  is slower; conv and attention 'auto' are 'xla'. BatchNorm whose parameters are
  frozen keeps its statistics too.

  Args:
    config: the section `model`.
    frozen: regexes of the parameters that are not trained.
    platform: 'cpu', 'gpu' or 'tpu'; '': of the devices that are here.

  Raises:
    ValueError: an unknown key, size or stem, a key that this kind of model
      does not take, or `frozen` has some of BatchNorm's parameters and not the
      others.
  """
  size = config['size']
  known = _check_fields(size, config)
  fields = {key: config[key] for key in config}
  if fields['dtype'] == 'auto':
    platform = platform or jax.default_backend()
    fields['dtype'] = 'float32' if platform == 'cpu' else 'bfloat16'
  for key in ('conv', 'attention'):
    if fields.get(key) == 'auto':
      fields[key] = 'xla'
  if (frozen and 'stem' in known
      and _is_batch_norm_frozen(size, config['stem'], frozen)):
    fields['batch_norm'] = 'frozen'
  return fields


def _check_fields(size, config):
  """Raises ValueError unless a section has what a size's family takes.

  Returns:
    The names of all that it takes.
  """
  takes = {name: inspect.signature(module.create).parameters
           for name, (module, _) in models.FAMILIES.items()}
  family = models.family(size)
  known = set(takes[family]) - {'num_classes'}
  needed = {key for key in known if takes[family][key].default is
            inspect.Parameter.empty}
  remedy = ('Start it from recipes.base().' if family == 'vit' else
            f'Let the config say c.model = recipes.{family}({size!r}).')
  for key in sorted(set(config) - known):
    if any(key in other for other in takes.values()):
      raise ValueError(
          f'A model of size {size!r} takes no model.{key}.\n{remedy}')
    raise ValueError(choices.unknown(key, sorted(known), 'key of model'))
  for key in sorted(needed - set(config)):
    raise ValueError(
        f'A model of size {size!r} needs a model.{key}.\n{remedy}')
  return known


def _is_batch_norm_frozen(size, stem, frozen):
  """Whether the regexes match every parameter of a stem's BatchNorms."""
  module = stems.create(size=size, stem=stem)
  image = jnp.zeros((1, module.patch, module.patch, 3))
  variables = jax.eval_shape(
      lambda key: module.init(key, image, train=False), jax.random.key(0))
  # A BatchNorm is a module that has statistics.
  norms = {path.rpartition('/')[0] for path in param_paths.flatten(
      variables.get('batch_stats', {}))}
  paths = [f'stem/{path}' for path in param_paths.flatten(variables['params'])
           if path.rpartition('/')[0] in norms]
  fixed = [path for path in paths if param_paths.matches(path, frozen)]
  if fixed and len(fixed) < len(paths):
    other = next(path for path in paths if path not in fixed)
    raise ValueError(
        f'frozen matches {fixed[0]} and not {other}; BatchNorm either learns '
        'and updates its statistics or does neither.\nFreeze all of '
        'stem/norm.*/(scale|bias), or none.')
  return bool(fixed)


def abstract_variables(model, image_shape, mesh):
  """The shapes of a model's variables; computes nothing."""
  with sharding.tracing(mesh):
    return jax.eval_shape(_init_variables(model, image_shape), _abstract_key())


def init(model, image_shape, make_tx, frozen, with_ema, mesh):
  """Returns (init_fn, abstract state with its shardings).

  `init_fn(key)` is jitted and each leaf is made where it will live; the key is
  an argument, so another seed compiles nothing. Inside jit the averages are
  buffers of their own, which donation needs.

  Args:
    model: linen module.
    image_shape: (H, W, C).
    make_tx, frozen, with_ema: see `create`.
    mesh: see `sharding`.
  """
  init_variables = _init_variables(model, image_shape)
  init_fn = lambda key: create(
      init_variables(key), make_tx, frozen, with_ema)
  with sharding.tracing(mesh):
    shapes = jax.eval_shape(init_fn, _abstract_key())
  shardings = sharding.of_state(shapes, mesh)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  # Each tensor's random draw is a kernel of its own; optimising them takes
  # LLVM seconds for a program that runs once.
  options = {'xla_backend_optimization_level': 0}
  jitted = jax.jit(
      init_fn, out_shardings=shardings,
      compiler_options=options if jax.default_backend() == 'cpu' else None)

  def traced_init(key):
    with sharding.tracing(mesh):
      return jitted(key)

  return traced_init, abstract


def with_variables(state, given):
  """Puts loaded arrays into a fresh state, and into its averages.

  Args:
    state: `TrainState`.
    given: {'params': {path: array}, 'batch_stats': {path: array}}.
  """
  if not given:
    return state

  def fill(tree, kind):
    flat = param_paths.flatten(tree)
    new = {path: sharding.put(given[kind][path], leaf.sharding)
           for path, leaf in flat.items() if path in given[kind]}
    return param_paths.unflatten({**flat, **new})

  ema = {kind: fill(tree, kind) for kind, tree in state.ema.items()}
  return state.replace(
      params=fill(state.params, 'params'), frozen=fill(state.frozen, 'params'),
      batch_stats=fill(state.batch_stats, 'batch_stats'), ema=ema)


def _abstract_key():
  # A real one would be made on the mesh, whose devices may not be here.
  return jax.eval_shape(jax.random.key, 0)


def _init_variables(model, image_shape):
  image = np.zeros((1, *image_shape), np.float32)
  return lambda key: model.init(key, image, train=False)
