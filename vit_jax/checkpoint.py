"""Orbax checkpoints: asynchronous, on any mesh, the same command resumes.

Where a run's state comes from, first match wins:
  1. the newest readable checkpoint of its own workdir;
  2. with --fork, the newest readable checkpoint of the run it forks from;
  3. `init_from`: weights only, at step 0, of a run or of a released file;
  4. the initialisation.
"""
import contextlib
import functools
import logging
import math
import os
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vit_jax import param_paths
from vit_jax import pretrained
from vit_jax import sharding
from vit_jax.metric_writer import is_remote
from vit_jax.metric_writer import say
from vit_jax.pretrained import posembed

FOLDER = 'checkpoints'

# Each of Orbax's threads logs the traceback of a failed save; `Manager` says it
# once, in two lines.
logging.getLogger('absl').addFilter(
    lambda record: record.exc_info is None or 'orbax' not in record.pathname)


class SaveFailed(RuntimeError):
  """The state that a run ends with could not be written."""


class _Orbax(ocp.CheckpointManager):

  def reached_preemption(self, step):
    """Never: `preemption` asks, and counts otherwise. A signal between two
    questions with different numbers would be lost."""
    return False


class Manager:
  """Saves and restores `TrainState`s under `<workdir>/checkpoints`."""

  def __init__(self, workdir, keep_last=2, keep_best=''):
    """Opens (and makes) the folder.

    Args:
      workdir: the run's folder.
      keep_last: how many of the newest checkpoints stay.
      keep_best: name of a metric, such as 'test/top1', by which one more
        checkpoint stays; '' for none. Only checkpoints saved at a step that
        was evaluated compete.

    Raises:
      ValueError: keep_last below 1.
    """
    if keep_last < 1:
      raise ValueError(f'checkpoint.keep_last={keep_last}.\nKeep at least 1.')
    self._keep_best = keep_best
    self._folder = os.path.join(str(workdir), FOLDER)
    self._keep_last = keep_last
    self._saving, self._failure = None, ''
    self._manager = self._open()

  def _open(self):
    policies = ocp.checkpoint_managers
    keep = [policies.LatestN(self._keep_last)]
    if self._keep_best:
      keep.append(policies.BestN(
          n=1, get_metric_fn=lambda metrics: metrics[self._keep_best],
          keep_checkpoints_without_metrics=False))
    return _Orbax(
        _absolute(self._folder),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True))

  def latest_step(self):
    """The newest checkpoint's step, or None."""
    return self._manager.latest_step()

  def restore(self, abstract_state):
    """Returns the newest readable state, or None if there is no checkpoint.

    Args:
      abstract_state: tree of ShapeDtypeStructs with the shardings wanted,
        which need not be those it was saved with.

    Raises:
      ValueError: there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return self._restore(step, abstract_state)
      except Exception as e:
        logging.warning(
            'checkpoint %d cannot be read (%s); trying the one before',
            step, _first_line(e))
        self._set_aside(step)
    if steps:
      raise ValueError(
          f'None of the checkpoints {steps} in {self._folder} can be read.\n'
          'They were renamed to *.unreadable: start again in this workdir, or '
          'restore the folder from a backup.')
    return None

  def _restore(self, step, wanted):
    """Reads a state, and stacks its blocks or not as is wanted (model.scan)."""
    read = lambda abstract: self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract))
    saved = _metadata(os.path.join(_absolute(self._folder), str(step)))
    wants = _are_stacked(wanted.params)
    if wants == _are_stacked(saved['params']):
      return read(wanted)
    mesh = wanted.step.sharding.mesh
    abstract = jax.eval_shape(
        functools.partial(_restack, stacked=not wants), wanted)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract, sharding.of_state(abstract, mesh))
    restack = jax.jit(
        functools.partial(_restack, stacked=wants),
        out_shardings=jax.tree.map(lambda x: x.sharding, wanted))
    return restack(read(abstract))

  def save(self, state, metrics=None):
    """Starts saving `state`; returns before the files are written.

    If that fails (the disk is full, say) a warning says so, here or later, the
    checkpoints before it stay, and the next call tries again.

    Args:
      state: `TrainState`. One with a non-finite step is not saved.
      metrics: evaluation rows of this very step, for `keep_best`.

    Returns:
      Whether a save was started.
    """
    step = int(state.step)
    broken = int(state.first_nonfinite_step) >= 0
    if broken or step in self._manager.all_steps():
      return False
    metrics = metrics if metrics and self._keep_best in metrics else None
    self.wait()
    self._saving, self._failure = step, ''
    try:
      return self._manager.save(
          step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)
    except Exception as e:
      self._recover(e)
      return False

  def wait(self):
    """Blocks until what was started is on disk, or has failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      self._recover(e)

  def finish(self):
    """`wait` at the end of a run, where no other save will make up for it.

    Raises:
      SaveFailed: the newest save failed.
    """
    self.wait()
    if self._failure:
      raise SaveFailed(
          f'{self._failure}\nFree some space and run the same command again: '
          f'it goes on from step {self.latest_step()}.')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Finishes what is being written, also when an exception passes."""
    self.wait()
    self._manager.close()

  def _recover(self, error):
    """Warns of a failed save; makes the manager usable again."""
    self._failure = (f'The checkpoint of step {self._saving} cannot be written '
                     f'({_first_line(error)}).')
    if jax.process_count() > 1:
      # The others may have written their part: they could not agree on what
      # there is.
      raise SaveFailed(f'{self._failure}\nFree some space and run the same '
                       'command again.') from error
    # A manager that failed raises the same error again, and has forgotten the
    # checkpoints that it was about to remove. A new one also removes what is
    # left of the failed one.
    with contextlib.suppress(Exception):
      self._manager.close()
    self._manager = self._open()
    say(f'warning: {self._failure}\n  Free some space: training goes on, the '
        'next save tries again, and until then the newest is that of step '
        f'{self.latest_step()}.')

  def _set_aside(self, step):
    """Renames a damaged checkpoint, so that its step can be saved again."""
    if jax.process_index() == 0:
      path = epath.Path(self._folder) / str(step)
      aside = epath.Path(f'{path}.unreadable')
      if aside.exists():
        aside.rmtree()
      path.rename(aside)
    self._manager.reload()


def _are_stacked(params):
  return isinstance(params, dict) and param_paths.are_stacked(
      param_paths.flatten(params))


def _restack(state, stacked):
  """A `TrainState`, with the blocks of a model with scan or without."""
  def of_dict(tree):
    if not isinstance(tree, dict):
      return tree
    flat = param_paths.flatten(tree)
    return param_paths.unflatten(
        param_paths.stack_blocks(flat, jnp.stack) if stacked else
        param_paths.unstack_blocks(flat, list))
  return jax.tree.map(
      of_dict, state, is_leaf=lambda x: isinstance(x, dict))


def _metadata(folder):
  """The tree that one checkpoint holds, with metadata in place of arrays."""
  path = os.path.join(folder, 'default')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.metadata(path).item_metadata.tree


def restore(manager, parent, abstract_state):
  """Returns the state of the run, or of the one it forks from, or None.

  Args:
    manager: the run's own `Manager`.
    parent: workdir of the run that it forks from, or None.
    abstract_state: see `Manager.restore`.

  Raises:
    ValueError: no readable checkpoint where there has to be one.
  """
  state = manager.restore(abstract_state)
  if state is not None or not parent:
    return state
  if (epath.Path(parent) / FOLDER).is_dir():
    with Manager(parent) as other:
      state = other.restore(abstract_state)
  if state is None:
    raise ValueError(f'{parent} has no checkpoint to fork from.\n'
                     'Give the --workdir of a run that has saved one.')
  return state


def check_disk(workdir, abstract_state):
  """Raises ValueError where one checkpoint would not fit on the disk.

  Remote folders (gs://) are not asked.
  """
  if is_remote(workdir):
    return
  need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
  free = shutil.disk_usage(workdir).free
  if free < need:
    raise ValueError(
        f'A checkpoint needs {need / 1e9:.2f} GB and {workdir} has '
        f'{free / 1e9:.2f} GB free.\nFree some space or choose another '
        '--workdir.')


def init_from(config, variables, grid=None):
  """Reads the weights, of another run or file, that a config section asks for.

  Args:
    config: `run` (a workdir; '' for none), `weights` (ema | raw), `checkpoint`
      (a released file; '' for none), `resize` and `channels` (see
      `pretrained.load`), `paths` and `reset` (regexes of parameters and
      statistics to take, and of those among them to leave as initialised).
    variables: {'params', 'batch_stats'}: the model's shapes.
    grid: (h, w) of the model's tokens, or None.

  Returns:
    {'params': {path: array}, 'batch_stats': ...}, empty if nothing is asked.

  Raises:
    ValueError: no such run or file, both of them, a wanted leaf that it lacks
      or that has another shape, a pattern that matches nothing.
  """
  run, weights, file = config['run'], config['weights'], config['checkpoint']
  paths, reset = tuple(config['paths']), tuple(config['reset'])
  options = {key: config[key] for key in ('resize', 'channels')}
  if run and file:
    raise ValueError(f'init_from.run={run} and init_from.checkpoint={file} are '
                     'both given.\nKeep one of them.')
  if file:
    given, report = pretrained.load(
        file, variables, paths=paths, reset=reset, grid=grid, **options)
    say(f'init_from: {report}')
    return given
  if not run:
    return {}
  loaded = load_weights(run, weights)
  flat = param_paths.flatten(variables['params'])
  param_paths.check(flat, paths + reset)
  stacked = param_paths.are_stacked(flat)
  if stacked != param_paths.are_stacked(loaded['params']):
    loaded['params'] = (
        param_paths.stack_blocks(loaded['params'], np.stack) if stacked else
        param_paths.unstack_blocks(loaded['params'], list))
  given, left = {}, []
  for kind in ('params', 'batch_stats'):
    given[kind] = {}
    for path, leaf in param_paths.flatten(variables.get(kind, {})).items():
      if not param_paths.matches(path, paths):
        continue
      if param_paths.matches(path, reset):
        left.append(path)
      elif path not in loaded[kind]:
        raise ValueError(
            f'init_from.run={run} has no {path}.\n'
            'Narrow init_from.paths, or list it in init_from.reset.')
      elif path == 'pos_embedding' and (resized := _pos_embedding(
          loaded[kind][path], leaf.shape, grid, options['resize'])) is not None:
        given[kind][path] = resized
      elif loaded[kind][path].shape != leaf.shape:
        raise ValueError(
            f'{path} is {loaded[kind][path].shape} in init_from.run={run} and '
            f'{leaf.shape} here.\nList it in init_from.reset to start it '
            'afresh.')
      else:
        given[kind][path] = loaded[kind][path]
  taken = sum(len(arrays) for arrays in given.values())
  say(f'init_from: took {taken} arrays of {run}; reset: '
      f'{", ".join(left) or "none"}')
  return given


def _pos_embedding(table, shape, grid, method):
  """A run's position embedding (1, N, D) for another grid of tokens, or None.

  None: the grid is not another, or that of the run was not a square.
  """
  extra = shape[1] - math.prod(grid or (0,))  # the place of a class token
  old = posembed.square(table.shape[1] - extra)
  if (table.shape == shape or not grid or not old
      or table.shape[2] != shape[2]):
    return None
  say(f'init_from: pos_embedding {old[0]}x{old[1]} -> {grid[0]}x{grid[1]}')
  new = posembed.resize(table[0, extra:], old, grid, method)
  return np.concatenate([table[0, :extra], new])[None]


def load_weights(run, weights):
  """Reads the weights in another run's newest checkpoint, as numpy.

  Args:
    run: its workdir.
    weights: 'ema' (raw where the run kept no averages) or 'raw'.

  Returns:
    {'params': {path: array}, 'batch_stats': {path: array}, 'step': int,
    'weights': 'ema' or 'raw', which they are}.

  Raises:
    ValueError: no such run or no checkpoint in it.
  """
  folder = os.path.join(run, FOLDER)
  if not epath.Path(folder).is_dir():
    raise ValueError(f'{run} holds no {FOLDER}/ folder.\n'
                     'Give the --workdir of a run that has saved a checkpoint.')
  if weights not in ('ema', 'raw'):
    raise ValueError(f'init_from.weights={weights!r}.\nGive ema or raw.')
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(_absolute(folder), options=options) as manager:
    step = manager.latest_step()
  if step is None:
    raise ValueError(f'{run} has no complete checkpoint.\n'
                     'Let it save one first.')
  folder = os.path.join(_absolute(folder), str(step))
  saved, path = _metadata(folder), os.path.join(folder, 'default')
  # Read as the nested dicts it was saved as, on the host, whatever mesh wrote
  # them.
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    tree = reader.restore(
        path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  if not tree.get('ema'):
    weights = 'raw'
  source = tree['ema'] if weights == 'ema' else tree
  params = param_paths.merge(source['params'], tree['frozen'] or {})
  return {'params': param_paths.flatten(params), 'weights': weights,
          'batch_stats': param_paths.flatten(source['batch_stats'] or {}),
          'step': int(tree['step'])}


def _absolute(path):
  return path if is_remote(path) else os.path.abspath(path)


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
