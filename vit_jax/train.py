"""Trains a model as a config says; the same command again resumes.

  python vit_jax/train.py --config configs/digits.py --workdir runs/digits

Flags:
  --config FILE[:arg=value,...]  what to run; the file's docstring lists its
                                 arguments
  --config.a.b=value             overrides one key
  --workdir DIR                  checkpoints, metrics.jsonl, events, curves.png
  --fork NEWDIR                  go on from the newest checkpoint in --workdir
                                 in a new folder, with changed settings
  --overfit_batch                sanity check: train on one batch only
  --profile 5                    traces so many steps after the 10th into
                                 WORKDIR/profile, for XProf and Perfetto, and
                                 prints the ten most expensive ops
  --traceback                    show where an error came from

Several processes, which share the workdir and are started with the same command
(TPU VMs of several hosts and tasks of srun need none of these flags, the pods
of a Kubernetes indexed Job --num_processes only):
  --coordinator HOST:PORT        the host of process 0, a free port on it
  --num_processes N
  --process_id I                 0 to N - 1
  --peer_timeout_seconds 120     a process that does not come or falls silent
                                 for so long is named, and ends the others

Exit codes: 0 finished; 1 a fault in the program (traceback); 2 bad input, one
line of cause and one of remedy, or too little memory, and three settings that
need less; 3 the loss was not finite; 4 the last
checkpoint could not be written (a full disk); 69 another process is missing or
died; 75 stopped by SIGTERM or Ctrl-C (of one process is enough) after saving.
After 69 and 75 run the command again to go on.
"""
import functools
import itertools
import logging
import os
import sys
import time
import traceback

if __name__ == '__main__':
  # Run as a file, Python puts this file's folder on the path, not its parent.
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from absl import flags
import jax

import input_pipeline
import vit_jax
from vit_jax import checkpoint
from vit_jax import cluster
from vit_jax import config as config_lib
from vit_jax import devices
from vit_jax import distributed
from vit_jax import errors
from vit_jax import evaluators
from vit_jax import experiment
from vit_jax import metric_writer
from vit_jax import model_file
from vit_jax import models
from vit_jax import optimizer
from vit_jax import out_of_memory
from vit_jax import pace
from vit_jax import param_paths
from vit_jax import preemption
from vit_jax import profiler
from vit_jax import ranges
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import wandb_logger
from vit_jax import workdir as workdir_lib

NOT_FINITE, NOT_SAVED, STOPPED = 3, 4, 75


class NonFiniteLoss(RuntimeError):
  """The loss of a step was NaN or infinite."""


class Stopped(RuntimeError):
  """A signal stopped the run after its state was saved."""


def train_and_evaluate(config, workdir, fork='', overfit_batch=False,
                       profile=0):
  """Trains, evaluates, saves; resumes what `workdir` holds.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    workdir: folder of the run; made if missing.
    fork: folder of a new run that goes on from the one in `workdir`.
    overfit_batch: train on the first batch only, without evaluation.
    profile: steps to trace; see `profiler.traced`.

  Returns:
    {name: value}: the metrics of the last step's evaluation.

  Raises:
    ValueError, OSError: bad input, before anything is compiled.
    NonFiniteLoss, Stopped, checkpoint.SaveFailed: see there.
  """
  config = experiment.checked(config)
  parent, workdir = (workdir, fork) if fork else (None, workdir)
  resolved = workdir_lib.prepare(workdir, config, overfit_batch)
  run = experiment.create(config)
  data, evals, eval_due = run.data, run.evals, run.eval_due

  # Its state: the first match of the list in checkpoint.py.
  checkpoint.check_disk(workdir, run.abstract_state)
  given = checkpoint.init_from(
      config.init_from, run.variables,
      models.grid(run.model, data.image_shape))
  manager = checkpoint.Manager(
      workdir, config.checkpoint.keep_last, config.checkpoint.keep_best)
  prefetch = ranges.check('prefetch', config.prefetch, 1)
  logger = wandb_logger.Logger(config.wandb, workdir, resolved)
  evals.check_metric(config.checkpoint.keep_best, run.ema_alpha is not None)
  config_lib.check_all_read(config)
  state = checkpoint.restore(manager, parent, run.abstract_state)
  if state is None:
    state = train_state.with_variables(run.init_fn(run.hypers['key']), given)
  start = int(state.step)
  profiler.check(profile, start, run.total_steps)
  workdir_lib.record(workdir, resolved, data.class_names)
  writer = metric_writer.MetricWriter(workdir, start, run.total_steps, logger)
  trained = param_paths.size(run.trained)
  fixed = param_paths.size(run.variables['params']) - trained
  say(f'{devices.summary()}\n{workdir}: {trained:,} trained and {fixed:,} '
      f'frozen parameters, {run.units.describe(run.total_steps)}, starting '
      f'after {start}\n{optimizer.describe(config.optimizer, run.trained)}\n'
      f'augment: {config.augment or "none"}')

  begin = time.perf_counter()
  step_fn = run.compile_step()
  say(f'compiled the training step in {time.perf_counter() - begin:.1f} s')
  if profile and jax.process_index() == 0:
    step_fn = profiler.traced(step_fn, workdir, profile)
  bad_files = workdir_lib.bad_files(workdir)
  batches = input_pipeline.to_device.prefetch(
      run.train_batches(start_step=start), sharding.batch(run.mesh),
      size=prefetch)

  with preemption.Stop() as stop, data.bad.saved_to(bad_files), batches, \
      writer, manager:
    stream = batches
    if overfit_batch:
      stream = itertools.repeat(next(batches))
      evals, eval_due = evaluators.Suite({}), lambda step: False
    speed = pace.Pace(say)
    results = {}
    # Process 0 knows: others may see an older file.
    if start and eval_due(start) and distributed.from_first(
        not writer.has(start, evals.names)):
      results = evals.run(state, start, writer, stop)
      if stop.requested():
        raise Stopped(f'{stop.requested()}: step {start} had been saved')

    for step in range(start + 1, run.total_steps + 1):
      batch = speed.next(stream, state.step)
      state, metrics = step_fn(state, batch, run.hypers)

      if run.log_due(step) or step in metric_writer.EARLY:
        metrics = jax.device_get(metrics)
        check_finite(metrics, manager)
        writer.write_train(step, {**metrics, **speed.lap(run.batch_size)},
                           step / run.units.steps_per_epoch)
        data.bad.save(bad_files)

      with speed.pause():
        if eval_due(step):
          results = evals.run(state, step, writer, stop)
        stopped = stop.requested()  # once: what comes later is next step's
        if run.checkpoint_due(step) or stopped:
          writer.sync()
          manager.save(state, results if eval_due(step) else None)
      if stopped:
        manager.finish()
        raise Stopped(f'{stopped}: step {manager.latest_step()} is saved')
    manager.finish()

  metric_writer.plot_curves(writer.rows, workdir)
  evals.write_classes(workdir)
  results = results or writer.last(evals.names)
  # Process 0 knows whether a resumed run has written it before.
  if not overfit_batch and (start < run.total_steps or distributed.from_first(
      not model_file.exists(workdir))):
    model_file.export(workdir, resolved, data, run.estimate(state),
                      results)
  say(f'wrote checkpoint, metrics.jsonl, curves.png to {workdir}')
  return results


def check_finite(metrics, manager):
  """Raises NonFiniteLoss if a step up to now had a loss that is not finite."""
  step = int(metrics.pop('first_nonfinite_step'))
  if step >= 0:
    manager.wait()
    raise NonFiniteLoss(
        f'The loss of step {step} is not finite; the newest good checkpoint is '
        f'of step {manager.latest_step()}.\nLower optimizer.lr, lengthen '
        'schedule.warmup_*, or set optimizer.clip_norm=1, and --fork from it.')


say = metric_writer.say


def main(argv=None):
  """Parses the command line, trains, and turns failures into exit codes."""
  peers = None
  argv = sys.argv if argv is None else ['vit-jax train', *argv]
  logging.basicConfig(format='%(message)s', level=logging.WARNING)
  try:
    check_package()
    args = config_lib.parse_flags(argv, define_flags)
    if not args.workdir:
      raise ValueError('--workdir is missing.\n'
                       'For example: --workdir runs/digits')
    workdir, fork = map(os.path.expanduser, (args.workdir, args.fork))
    peers = start_processes(fork or workdir, args)
    train_and_evaluate(
        args.config, workdir, fork=fork, overfit_batch=args.overfit_batch,
        profile=args.profile)
    code = 0
  except Stopped as e:
    print(e, file=sys.stderr)
    code = STOPPED
  except Exception as e:
    if peers and is_broken_exchange(e):
      peers.wait()
    code = exit_code(e)
    if code == 1 or any(a.startswith('--traceback') for a in argv):
      traceback.print_exc()
    errors.show(out_of_memory.explain(e, args.config)
                if out_of_memory.is_out_of_memory(e) else e)
  except BaseException:  # the second Ctrl-C
    if peers:
      peers.leave(1)
    raise
  if peers:
    peers.leave(None if code in (0, NOT_FINITE, STOPPED) else code)
  return code


def exit_code(error):
  """The exit code of an exception; 1 for what is no message of ours."""
  codes = {NonFiniteLoss: NOT_FINITE, checkpoint.SaveFailed: NOT_SAVED}
  bad_input = errors.is_message(error) or out_of_memory.is_out_of_memory(error)
  return codes.get(type(error), errors.BAD_INPUT if bad_input else 1)


def start_processes(workdir, args):
  """Connects this process to the others, if `cluster.find` knows any."""
  *flags_, source = cluster.find(
      args.coordinator, args.num_processes, args.process_id)
  flags_.append(args.peer_timeout_seconds)
  distributed.check_flags(*flags_)
  if source:
    print(source, flush=True)
  workdir_lib.make(workdir)
  return distributed.start(workdir, *flags_)


def is_broken_exchange(error):
  """Whether a computation of several processes failed, maybe for one's end."""
  text = str(error)
  return 'RESOURCE_EXHAUSTED' not in text and (
      isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in text)


def check_package():
  """Raises ValueError if another vit_jax than this file's is imported."""
  here = os.path.dirname(os.path.abspath(__file__))
  found = os.path.dirname(os.path.abspath(vit_jax.__file__))
  if not os.path.samefile(here, found):
    raise ValueError(f'This is {here}, but `import vit_jax` finds {found}.\n'
                     'Uninstall the other package (pip uninstall vit_jax).')


def define_flags(values):
  """Defines the flags of the docstring above, in absl FlagValues."""
  add = functools.partial(flags.DEFINE_bool, flag_values=values)
  add_string = functools.partial(flags.DEFINE_string, flag_values=values)
  add_string('workdir', '', 'Folder of the run.')
  add_string('fork', '', 'Folder of a new run to fork into.')
  add_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  add_string('coordinator', '', 'HOST:PORT of process 0.')
  add_integer('num_processes', None, 'How many processes there are.')
  add_integer('process_id', None, 'Which one this is, from 0.')
  add_integer('peer_timeout_seconds', 120, 'How long to wait for another.')
  add_integer('profile', 0, 'How many steps to trace.')
  add('overfit_batch', False, 'Train on the first batch only.')
  add('traceback', False, 'Show where an error came from.')


if __name__ == '__main__':
  sys.exit(main())
