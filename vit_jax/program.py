"""What a config computes in a training step; needs neither data nor devices.

`experiment` adds the data and runs it. `compile_step` also compiles it for
devices that are not there, as `plan` and `bench tpu-compile` do.
"""
from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from vit_jax import accumulation
from vit_jax import augment as augment_lib
from vit_jax import checks
from vit_jax import distributed
from vit_jax import durations
from vit_jax import ema
from vit_jax import models
from vit_jax import optimizer
from vit_jax import param_paths
from vit_jax import schedules
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import train_step
from vit_jax.models import attention
from vit_jax.models import batch_norm
from vit_jax.models import vit


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """The parts of a training step; `create` makes one.

  Attributes:
    mesh: see `sharding`.
    image_shape: (H, W, C).
    batch_size: training examples a step, over all devices and processes.
    units: `durations.Units`.
    total_steps: length of the run.
    model: linen module.
    variables: its variables' shapes.
    trained: the shapes of the parameters that are trained.
    normalize: see `train_step.normalizer`.
    augment: see `augment.create`.
    grad_fn: see `accumulation.grad`.
    make_tx: see `optimizer.create`.
    schedule: see `schedules.create`.
    ema_alpha: see `ema.create`; None: no averages.
    hypers: see `train_step.make_hypers`; on the host.
    init_fn, abstract_state: see `train_state.init`.
  """
  mesh: jax.sharding.Mesh
  image_shape: tuple[int, int, int]
  batch_size: int
  units: durations.Units
  total_steps: int
  model: nn.Module
  variables: Any
  trained: Any
  normalize: Callable
  augment: augment_lib.Augment
  grad_fn: Callable
  make_tx: Callable
  schedule: Callable
  ema_alpha: Callable | None
  hypers: dict
  init_fn: Callable
  abstract_state: train_state.TrainState

  @property
  def step(self):
    """The pure training step; see `train_step.make`."""
    return train_step.make(self.grad_fn, self.augment, self.make_tx,
                           self.schedule, self.ema_alpha)

  @property
  def abstract_args(self):
    """Shapes of the step's (state, batch, hypers), with their shardings."""
    whole = sharding.replicated(self.mesh)
    return (
        self.abstract_state,
        sharding.abstract_batch(self.image_shape, self.batch_size, self.mesh),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=whole), self.hypers))

  def compile_step(self):
    """Compiles the step for the mesh: (state, batch, hypers) -> the like.

    The mesh's devices need not be here; such a program does not run.

    Returns:
      `jax.stages.Compiled`; it takes the memory of its state.
    """
    state, *_ = args = self.abstract_args
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with sharding.tracing(self.mesh):
      return distributed.compiled(
          jax.jit(self.step, donate_argnums=0,
                  out_shardings=(shardings, sharding.replicated(self.mesh))),
          *args)


def create(config, num_train, num_classes, image_shape, mesh, platform=''):
  """Returns the `Program` of a config.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    num_train: training examples.
    num_classes: C.
    image_shape: (H, W, C).
    mesh: see `sharding`; its devices need not be here.
    platform: 'cpu', 'gpu' or 'tpu': whose choice is taken where the config
      says 'auto'; '': the mesh's.

  Raises:
    ValueError: bad input. Nothing has been compiled.
  """
  platform = platform or mesh.devices.flat[0].platform
  batch_size = config.global_batch_size
  sharding.check_batch_size('global_batch_size', batch_size, mesh)
  units = durations.Units.of(num_train, batch_size, config.input.epoch)
  total_steps = durations.to_steps(config, 'total', units)

  # The model, and the rule by which it learns.
  frozen = tuple(config.frozen)
  fields = train_state.model_fields(config.model, frozen, platform)
  model = models.create(num_classes=num_classes, **fields)
  checks.check_model(model, image_shape, batch_size)
  accumulation_steps, group = config.accumulation_steps, batch_norm.group(model)
  accumulation.check(accumulation_steps, batch_size, group, mesh)
  if config.model.get('attention') == 'auto':
    model = model.clone(
        attention=_attention(model, image_shape, mesh, platform))
  variables = train_state.abstract_variables(model, image_shape, mesh)
  trained, _ = param_paths.split(variables['params'], frozen)
  normalize = train_step.normalizer(
      config.input.mean, config.input.std, image_shape[-1])
  augment = augment_lib.create(
      config, image_shape, num_classes, normalize, mesh)
  grad_fn = accumulation.grad(
      train_step.make_classification_loss(model, num_classes, config.loss),
      accumulation_steps, group or 0, mesh)
  make_tx = optimizer.create(config.optimizer, trained)
  schedule = schedules.create(config.schedule, units, total_steps)
  ema_alpha = ema.create(
      config.ema, units, total_steps,
      durations.to_steps(config.schedule, 'warmup', units, total_steps))
  hypers = train_step.make_hypers(config.optimizer, config.seed)
  init_fn, abstract_state = train_state.init(
      model, image_shape, make_tx, frozen, ema_alpha is not None, mesh)
  return Program(
      mesh=mesh, image_shape=image_shape, batch_size=batch_size, units=units,
      total_steps=total_steps, model=model, variables=variables,
      trained=trained, normalize=normalize, augment=augment, grad_fn=grad_fn,
      make_tx=make_tx, schedule=schedule, ema_alpha=ema_alpha, hypers=hypers,
      init_fn=init_fn, abstract_state=abstract_state)


def _attention(model, image_shape, mesh, platform):
  """The form of attention for a ViT where the config says 'auto'."""
  (h, w), _ = vit.token_grid(model.patch, image_shape[:2])
  tokens = h * w + (model.pool == 'token')
  device = mesh.devices.flat[0]
  # The kernel would have all heads on each device.
  if platform != 'tpu' or mesh.shape['tensor'] > 1:
    return 'xla'
  if device.platform != 'tpu':  # an estimate: nothing can be tried
    return 'pallas' if tokens <= attention.MAX_TOKENS else 'xla'
  form = attention.choose(
      device, tokens, model.heads, model.stem.width, model.dtype)
  # Process 0, whose device it is, has also run the kernel.
  return 'pallas' if distributed.from_first(form == 'pallas') else 'xla'
