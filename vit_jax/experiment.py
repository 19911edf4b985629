"""What a config stands for, checked, before anything is compiled.

One run and a population of runs (`train`, `population`) are made of the same
parts; this is where a config becomes these.
"""
from collections.abc import Callable
import dataclasses
import functools

import jax

import input_pipeline
from vit_jax import checks
from vit_jax import config as config_lib
from vit_jax import devices
from vit_jax import durations
from vit_jax import evaluators
from vit_jax import precise_bn
from vit_jax import program as program_lib
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment(program_lib.Program):
  """The parts of a run; `create` makes one.

  Attributes:
    hypers: as in `Program`, on the devices.
    data: see `input_pipeline.open_data`.
    log_due, eval_due, checkpoint_due: step -> bool; see `durations.cadence`.
    train_batches: `train_batches(start_step=0)` iterates over this process's
      part of the batches.
    estimate: see `precise_bn.create`.
    evals: see `evaluators.create`.
  """
  data: input_pipeline.Data
  log_due: Callable
  eval_due: Callable
  checkpoint_due: Callable
  train_batches: Callable
  estimate: Callable
  evals: evaluators.Suite


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


def data_sizes(config):
  """Sizes of the data, found or, where it is not here, as the config expects.

  Args:
    config: ConfigDict with the keys of `recipes.base`.

  Returns:
    (num_train, num_classes, image_shape, their origin).

  Raises:
    ValueError, OSError: the data is not here and the config expects none.
  """
  try:
    data = input_pipeline.open_data(config.input, max(config.data_seed, 0))
    return (data.train.num_examples, len(data.class_names), data.image_shape,
            'as found')
  except (ValueError, OSError):
    expected = config.input.num_train, config.input.num_classes
    if not all(expected):
      raise
    shape = input_pipeline.image_shape(config.input)
    return *expected, shape, 'as the config expects; the data is not here'


def create(config):
  """Returns the `Experiment` of a config.

  Args:
    config: of `checked`.

  Raises:
    ValueError, OSError: bad input. Nothing has been compiled.
  """
  mesh = sharding.create_mesh(config.mesh)
  batch_size = config.global_batch_size
  sharding.check_batch_size('global_batch_size', batch_size, mesh)
  data_seed = config.seed if config.data_seed < 0 else config.data_seed
  data = input_pipeline.open_data(config.input, data_seed)
  checks.check_data(config.input, data)
  program = program_lib.create(
      config, data.train.num_examples, len(data.class_names), data.image_shape,
      mesh)
  log_due, eval_due, checkpoint_due = (
      durations.cadence(config[section], program.units, program.total_steps)
      for section in ('log', 'eval', 'checkpoint'))
  hypers = sharding.put_tree(program.hypers, sharding.replicated(mesh))
  train_batches = program.augment.on_host(functools.partial(
      input_pipeline.train_batches, data, global_batch_size=batch_size,
      data_seed=data_seed, epoch=config.input.epoch,
      repeats=config.input.repeats, process_index=jax.process_index(),
      process_count=jax.process_count()), hypers['key'])
  estimate = precise_bn.create(
      config.precise_bn, program.model, program.variables, program.augment,
      train_batches, batch_size, mesh, hypers['key'])
  evals = evaluators.create(
      config.evaluators,
      train_step.make_predict(program.model, program.normalize), data, mesh,
      config.eval.batch_size or batch_size, estimate)
  return Experiment(
      **{**vars(program), 'hypers': hypers}, data=data, log_due=log_due,
      eval_due=eval_due, checkpoint_due=checkpoint_due,
      train_batches=train_batches, estimate=estimate, evals=evals)
