"""Trains P members of one config at once, which differ in rate, decay, seed.

  from vit_jax import population
  members = [dict(lr=lr, seed=0) for lr in (1e-3, 2e-3, 4e-3)]
  results = population.train(config, members, 'runs/rates')

States and hypers have a leading member axis, and one program steps all
members. A member computes what a run of the config with its three numbers
computes, up to rounding, which training amplifies: gradients of a step agree to
1e-5, trained weights do not. Nothing reduces over members, so one that diverges
leaves the bits of the others as they are.

For small models. Members are not saved, stopped or resumed.
"""
from collections.abc import Callable
import contextlib
import dataclasses
import json
import math
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from vit_jax import choices
from vit_jax import config as config_lib
from vit_jax import devices
from vit_jax import experiment
from vit_jax import metric_writer
from vit_jax import pace
from vit_jax import param_paths
from vit_jax import ranges
from vit_jax import sharding
from vit_jax import train_step
from vit_jax import workdir as workdir_lib
from vit_jax.metric_writer import say

DRIVERS = ('vmap', 'map')
# What a member may set; for the rest of these it takes the config's.
KEYS = ('lr', 'weight_decay', 'seed')
# Keys that would change what is computed or recorded, and the only values of
# them that a population obeys.
ONLY = {'mesh.fsdp': 1, 'mesh.tensor': 1, 'accumulation_steps': 1,
        'precise_bn.examples': 0, 'init_from.run': '',
        'init_from.checkpoint': '', 'augment_on': 'device', 'wandb.project': ''}
# Keys without effect on a population: it loads and saves no weights.
UNUSED = ('checkpoint.keep_last', 'checkpoint.keep_best', 'init_from.weights',
          'init_from.resize', 'init_from.channels', 'init_from.paths',
          'init_from.reset', 'wandb.mode')


def over_members(function, driver, mesh, axes):
  """Returns `function` over a leading member axis of its arguments.

  Each device takes its share of the members; their number divides by that of
  the devices. Devices exchange nothing.

  Args:
    function: of arrays, in trees; traceable.
    driver: 'vmap': one program of larger ops. 'map': a loop over members.
    mesh: see `sharding`.
    axes: for each argument 0, or None where all members have the same.
  """

  def of_device(*args):
    if driver == 'vmap':
      return jax.vmap(function, axes)(*args)
    own = [x for x, axis in zip(args, axes, strict=True) if axis == 0]

    def of_member(own):
      own = iter(own)
      return function(*(x if axis is None else next(own)
                        for x, axis in zip(args, axes, strict=True)))

    return jax.lax.map(of_member, own)

  whole, shares = sharding.replicated(mesh).spec, sharding.batch(mesh).spec
  # Unchecked: the branches of an op's switch may depend on the member or not.
  return jax.shard_map(
      of_device, mesh=mesh, out_specs=shares, check_vma=False,
      in_specs=tuple(whole if axis is None else shares for axis in axes))


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
  """P members; `create` makes one.

  Arrays have R >= P rows: so many that each device has as many as the others.
  Those beyond P repeat the last member.

  Attributes:
    members: P dicts with KEYS.
    run: `experiment.Experiment` of what they have in common.
    driver: of DRIVERS.
    hypers: of `train_step.make`, [R].
    batches: `batches()` iterates over host batches: one for all members, or
      arrays [R, B, ...] where their data seeds differ.
    batch_sharding: of those.
    step: jitted `step(states, batch, hypers) -> (states, metrics)`, which
      takes the memory of `states`; metrics: [R].
  """
  members: list[dict]
  run: experiment.Experiment
  driver: str
  hypers: dict
  batches: Callable
  batch_sharding: jax.sharding.Sharding
  step: Callable

  def init(self):
    """Returns states at step 0, [R], the bits of which are single runs'."""
    whole = sharding.replicated(self.run.mesh)
    keys = self.hypers['key']
    return _stack([
        jax.device_get(self.run.init_fn(sharding.put(keys[i], whole)))
        for i in range(len(keys))], self.run.mesh)

  def evaluate(self, states):
    """Returns P rows of `evaluators.Suite.run`, member by member."""
    whole = sharding.replicated(self.run.mesh)
    states = jax.device_get(states.replace(opt_state=()))
    return [self.run.evals.evaluate(
        jax.tree.map(lambda x, i=i: sharding.put(x[i], whole), states))
        for i in range(len(self.members))]


def create(config, members, driver='auto'):
  """Returns a `Population`; compiles nothing.

  Args:
    config: of `experiment.checked`; its model.conv and augment_on are set if
      they are 'auto'.
    members: dicts with some of KEYS.
    driver: of DRIVERS, or 'auto': 'map' on CPUs, where batched matmuls are
      slower, unless there are convolutions in the loop, which are yet slower.

  Raises:
    ValueError, OSError: bad input, or a config of what is not done here.
  """
  if config.augment_on == 'auto':
    config.augment_on = 'device'
  _check_supported(config)
  members = _complete(members, config)
  driver = _choose(driver, config.model)
  run = experiment.create(config)
  rows = [*members, *members[-1:] * (-len(members) % run.mesh.size)]
  hypers = [train_step.make_hypers(member, member['seed']) for member in rows]
  # A member's order and crops are those of its single run, too.
  seeds = [config.data_seed if config.data_seed >= 0 else member['seed']
           for member in rows]
  shared = len(set(seeds)) == 1

  def batches():
    streams = {seed: run.train_batches(data_seed=seed) for seed in seeds}
    while True:
      new = {seed: next(stream) for seed, stream in streams.items()}
      yield new[seeds[0]] if shared else {
          key: np.stack([new[seed][key] for seed in seeds])
          for key in ('image', 'label')}

  # A member's batch is not divided over devices.
  alone = dataclasses.replace(
      run, augment=dataclasses.replace(run.augment, mesh=None))
  step = over_members(
      alone.step, driver, run.mesh, (0, None if shared else 0, 0))
  place = sharding.replicated if shared else sharding.batch
  return Population(
      members=members, run=run, driver=driver, hypers=_stack(hypers, run.mesh),
      batches=batches, batch_sharding=place(run.mesh),
      # Named, or one device's would be another than that of `init`.
      step=jax.jit(step, donate_argnums=0,
                   out_shardings=sharding.batch(run.mesh)))


def train(config, members, workdir='', driver='auto'):
  """Trains members of a config for its length, and evaluates each.

  Nothing is saved but rows of metrics: config.checkpoint has no effect. What
  would have one elsewhere, and has none here, is refused: ONLY.

  Args:
    config: ConfigDict with the keys of `recipes.base`; stays as it is.
    members: dicts with some of KEYS: `lr`, `weight_decay`, `seed`; what they
      leave out is the config's. As in a run the seed is that of the data, too,
      unless config.data_seed is set, which saves time.
    workdir: folder for metrics.jsonl, a row for each member and logged step,
      and config.json; '': none.
    driver: see `create`.

  Returns:
    For each member {'lr', 'weight_decay', 'seed', 'metrics': {'test/top1':
    ...} of the last step, 'diverged_step': the first step whose loss was not
    finite, or None}.

  Raises:
    ValueError, OSError: see `create`; or the folder holds a run.
  """
  config = experiment.checked(config.copy_and_resolve_references())
  resolved = workdir and _prepare(workdir, config)
  population = create(config, members, driver)
  prefetch = ranges.check('prefetch', config.prefetch, 1)
  config_lib.check_all_read(config, but=(*ONLY, *UNUSED))
  run, count = population.run, len(population.members)
  if workdir:
    workdir_lib.record(workdir, {**resolved, 'members': population.members},
                       run.data.class_names)
  say(f'{devices.summary()}\n{count} members ({population.driver}) of '
      f'{param_paths.size(run.trained):,} trained parameters, '
      f'{run.units.describe(run.total_steps)}; no checkpoints')

  states = population.init()
  batches = input_pipeline.to_device.prefetch(
      population.batches(), population.batch_sharding, size=prefetch)
  with batches, contextlib.ExitStack() as stack:
    file = None
    if workdir:
      file = stack.enter_context(
          epath.Path(workdir, metric_writer.METRICS).open('w'))
      stack.enter_context(run.data.bad.saved_to(workdir_lib.bad_files(workdir)))
    speed = pace.Pace()
    for step in range(1, run.total_steps + 1):
      states, metrics = population.step(
          states, speed.next(batches), population.hypers)

      if run.log_due(step) or step in metric_writer.EARLY:
        metrics = jax.device_get(metrics)
        diverged = metrics.pop('first_nonfinite_step')[:count] >= 0
        _write(file, step, [
            {f'train/{key}': float(value[i]) for key, value in metrics.items()}
            for i in range(count)])
        rate = speed.lap(run.batch_size * count)['images_per_s']
        say(f'step {step}/{run.total_steps} loss '
            f'{_span(metrics["loss"][:count])} images_per_s {rate:.4g}'
            + (f', {diverged.sum()} diverged' if diverged.any() else ''))

      if run.eval_due(step):
        with speed.pause():
          results = population.evaluate(states)
          _write(file, step, results)
          for key in (key for key in results[0] if key.endswith('/top1')):
            say(f'step {step} {key} {_span([row[key] for row in results])}, '
                f'evaluated {results[0][key[:-4] + "count"]:,} examples each')

  first = jax.device_get(states.first_nonfinite_step)
  return [{**member, 'metrics': row,
           'diverged_step': int(bad) if bad >= 0 else None}
          for member, row, bad in zip(
              population.members, results, first[:count], strict=True)]


def _check_supported(config):
  """Raises ValueError for what a population does not do."""
  if jax.process_count() > 1:
    raise ValueError(
        f'A population is trained by one process, not {jax.process_count()}.\n'
        'Give each process some of the members, as a run of its own.')
  flat = config_lib.flatten(config.to_dict())
  for path, only in ONLY.items():
    if flat.get(path, only) != only:
      raise ValueError(
          f'{path}={flat[path]!r} is not for populations.\n'
          f'Set it to {only!r}, or train the members one by one.')


def _complete(members, config):
  """Dicts with all KEYS, from some."""
  if not members:
    raise ValueError('There are no members to train.\n'
                     'Give a list such as [dict(lr=1e-3), dict(lr=2e-3)].')
  defaults = {'lr': config.optimizer.lr,
              'weight_decay': config.optimizer.weight_decay,
              'seed': config.seed}
  for key in (key for member in members for key in member):
    choices.pick(defaults, key, 'key of a member')
  of_python = lambda x: x.item() if isinstance(x, np.generic) else x
  return [{**defaults, **jax.tree.map(of_python, member)}
          for member in members]


def _choose(driver, model):
  """The driver; sets the section's `conv` and `attention` to what suits it."""
  choices.check({'driver': (driver, ('auto', *DRIVERS))})
  on_cpu = jax.default_backend() == 'cpu'
  if on_cpu and 'conv' in model and model.stem != 'resnet' and (
      model.conv == 'auto'):
    model.conv = 'im2col'
  # The kernel divides examples over the devices, which here have members.
  if model.get('attention') == 'auto':
    model.attention = 'xla'
  if driver != 'auto':
    return driver
  return 'map' if on_cpu and model.get('conv') == 'im2col' else 'vmap'


def _stack(trees, mesh):
  """Trees of arrays -> one with a leading axis, divided over devices."""
  shares = sharding.batch(mesh)
  return jax.tree.map(lambda *x: sharding.put(jnp.stack(x), shares), *trees)


def _prepare(workdir, config):
  """`workdir.prepare` of a folder in which there was no run yet."""
  resolved = workdir_lib.prepare(workdir, config)
  if epath.Path(workdir, metric_writer.METRICS).exists():
    raise ValueError(f'{workdir} holds a run, and populations do not resume.\n'
                     'Choose another workdir.')
  return resolved


def _write(file, step, rows):
  """Writes a row for each member, null for what is not finite."""
  if not file:
    return
  now = round(time.time(), 3)
  for member, row in enumerate(rows):
    row = {k: v if math.isfinite(v) else None for k, v in row.items()}
    file.write(json.dumps(
        {'step': step, 'time': now, 'member': member, **row}) + '\n')
  file.flush()


def _span(values):
  """'0.1234 to 0.5678', of those that are finite."""
  values = np.asarray(values)[np.isfinite(values)]
  if not values.size:
    return 'nowhere finite'
  return f'{values.min():.4g} to {values.max():.4g}'
