"""What a config stands for, checked, before anything is compiled.

One run and a population of runs (`train`, `population`) are made of the same
parts; this is where a config becomes these.
"""
from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax

import input_pipeline
from vit_jax import augment as augment_lib
from vit_jax import checks
from vit_jax import config as config_lib
from vit_jax import devices
from vit_jax import durations
from vit_jax import ema
from vit_jax import evaluators
from vit_jax import models
from vit_jax import optimizer
from vit_jax import param_paths
from vit_jax import precise_bn
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """The parts of a run; `create` makes one.

  Attributes:
    mesh: see `sharding`.
    data: see `input_pipeline.open_data`.
    batch_size: training examples a step, over all devices and processes.
    units: `durations.Units`.
    total_steps: length of the run.
    log_due, eval_due, checkpoint_due: step -> bool; see `durations.cadence`.
    model: linen module.
    variables: its variables' shapes.
    trained: the shapes of the parameters that are trained.
    augment: see `augment.create`.
    loss_fn: see `train_step.make_classification_loss`.
    make_tx: see `optimizer.create`.
    schedule: see `schedules.create`.
    ema_alpha: see `ema.create`; None: no averages.
    hypers: see `train_step.make_hypers`.
    train_batches: `train_batches(start_step=0)` iterates over this process's
      part of the batches.
    estimate: see `precise_bn.create`.
    evals: see `evaluators.create`.
    init_fn, abstract_state: see `train_state.init`.
  """
  mesh: jax.sharding.Mesh
  data: input_pipeline.Data
  batch_size: int
  units: durations.Units
  total_steps: int
  log_due: Callable
  eval_due: Callable
  checkpoint_due: Callable
  model: nn.Module
  variables: Any
  trained: Any
  augment: augment_lib.Augment
  loss_fn: Callable
  make_tx: Callable
  schedule: Callable
  ema_alpha: Callable | None
  hypers: dict
  train_batches: Callable
  estimate: Callable
  evals: evaluators.Suite
  init_fn: Callable
  abstract_state: train_state.TrainState

  @property
  def step(self):
    """The pure training step; see `train_step.make`."""
    return train_step.make(self.loss_fn, self.augment, self.make_tx,
                           self.schedule, self.ema_alpha)


def checked(config):
  """Checks a config's types and this machine; starts recording reads.

  Args:
    config: ConfigDict with the keys of `recipes.base`.

  Returns:
    The same, tracked: see `config.track`.

  Raises:
    ValueError: a value of another type, or a GPU that JAX does not see.
  """
  config_lib.check_types(config, recipes.base())
  config = config_lib.track(config)
  devices.check()
  devices.enable_compilation_cache(config.compilation_cache)
  return config


def create(config):
  """Returns the `Experiment` of a config.

  Args:
    config: of `checked`.

  Raises:
    ValueError, OSError: bad input. Nothing has been compiled.
  """
  # What is trained on, and for how long.
  mesh = sharding.create_mesh(config.mesh)
  batch_size = config.global_batch_size
  sharding.check_batch_size('global_batch_size', batch_size, mesh)
  data_seed = config.seed if config.data_seed < 0 else config.data_seed
  data = input_pipeline.open_data(config.input, data_seed)
  checks.check_data(config.input, data)
  num_classes = len(data.class_names)
  units = durations.Units.of(
      data.train.num_examples, batch_size, config.input.epoch)
  total_steps = durations.to_steps(config, 'total', units)
  log_due, eval_due, checkpoint_due = (
      durations.cadence(config[section], units, total_steps)
      for section in ('log', 'eval', 'checkpoint'))

  # The model, and the rule by which it learns.
  frozen = tuple(config.frozen)
  model = models.create(num_classes=num_classes, **train_state.model_fields(
      config.model, frozen))
  checks.check_model(model, data, batch_size)
  variables = train_state.abstract_variables(model, data.image_shape, mesh)
  trained, _ = param_paths.split(variables['params'], frozen)
  normalize = train_step.normalizer(
      config.input.mean, config.input.std, data.image_shape[-1])
  augment = augment_lib.create(
      config, data.image_shape, num_classes, normalize, mesh)
  loss_fn = train_step.make_classification_loss(
      model, num_classes, config.loss)
  make_tx = optimizer.create(config.optimizer, trained)
  schedule = schedules.create(config.schedule, units, total_steps)
  ema_alpha = ema.create(
      config.ema, units, total_steps,
      durations.to_steps(config.schedule, 'warmup', units, total_steps))
  hypers = train_step.make_hypers(config.optimizer, config.seed, mesh)
  train_batches = augment.on_host(functools.partial(
      input_pipeline.train_batches, data, global_batch_size=batch_size,
      data_seed=data_seed, epoch=config.input.epoch,
      repeats=config.input.repeats, process_index=jax.process_index(),
      process_count=jax.process_count()), hypers['key'])
  estimate = precise_bn.create(
      config.precise_bn, model, variables, augment, train_batches, batch_size,
      mesh, hypers['key'])
  evals = evaluators.create(
      config.evaluators, train_step.make_predict(model, normalize), data, mesh,
      config.eval.batch_size or batch_size, estimate)
  init_fn, abstract_state = train_state.init(
      model, data.image_shape, make_tx, frozen, ema_alpha is not None, mesh)
  return Experiment(
      mesh=mesh, data=data, batch_size=batch_size, units=units,
      total_steps=total_steps, log_due=log_due, eval_due=eval_due,
      checkpoint_due=checkpoint_due, model=model, variables=variables,
      trained=trained, augment=augment, loss_fn=loss_fn, make_tx=make_tx,
      schedule=schedule, ema_alpha=ema_alpha, hypers=hypers,
      train_batches=train_batches, estimate=estimate, evals=evals,
      init_fn=init_fn,
      abstract_state=abstract_state)
