"""Which trials of a study are taken, done, or lost with their worker.

The ledger is an Optuna study in any storage of Optuna's: a SQLite file for one
machine, PostgreSQL or MySQL where many draw from it. The list of trials is kept
in it when it begins, and each worker takes the first that nobody has.
"""
import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import threading
import time

from vit_jax import config as config_lib
from vit_jax.studies import plan

TABLE = 'trials.csv'
# A worker signs every so many seconds, and after so many without is dead.
BEAT, DEAD = 20, 180
_ATTEMPTS = 4
_CONFIG, _INDEX, _WORKER, _RESULT = 'config', 'index', 'worker', 'result'
RESULT = ('test_error', 'validation_error', 'diverged', 'steps', 'seconds')
_COLUMNS = ('index', 'arm', 'point', *RESULT, 'run')


class Ledger:
  """The trials of a study in an Optuna storage."""

  def __init__(self, name, trials, folder, storage='', sampler='', space=None):
    """Opens a study, or begins it.

    Args:
      name: of the study.
      trials: [plan.Trial].
      folder: of the study's results.
      storage: URL; '': a SQLite file in the folder.
      sampler: '' (the trials as they are) or 'tpe': the points of the trials
        are asked of Optuna's TPE instead.
      space: {key: (low, high)}, of the sampler.

    Raises:
      ValueError: the storage cannot be reached, or holds another study under
        that name.
    """
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    self._optuna = optuna
    self._trials = trials
    self._folder = folder
    self._space = space if sampler else None
    os.makedirs(folder, exist_ok=True)
    url = storage or f'sqlite:///{os.path.abspath(folder)}/study.db'
    made = optuna.samplers.TPESampler(
        seed=os.getpid(), constant_liar=True) if sampler else None
    self._study = self._open(url, name, made)
    self._check_same(plan.fingerprint(trials), name)

  def _open(self, url, name, sampler):
    options = {'connect_args': {'timeout': 60}} if 'sqlite' in url else {}
    for attempt in range(_ATTEMPTS):
      try:
        return self._optuna.create_study(
            storage=self._optuna.storages.RDBStorage(
                url, engine_kwargs=options),
            study_name=name, load_if_exists=True, sampler=sampler)
      except Exception as e:  # of whichever database
        # Of two that make the tables at once one fails, and finds them later.
        if attempt < _ATTEMPTS - 1:
          time.sleep(0.5 + attempt)
          continue
        reason = ' '.join(str(e).split())[:200].replace(
            url, _without_password(url))
        raise ValueError(
            f'Cannot reach the storage {_without_password(url)}: {reason}.\n'
            'Start the database server and give its URL with --storage, such '
            'as postgresql://user:password@host/db; or leave --storage out, '
            'for a SQLite file.') from None

  def _check_same(self, text, name):
    kept = self._study.user_attrs.get(_CONFIG)
    if kept is None:
      self._study.set_user_attr(_CONFIG, text)
    elif kept != text:
      old, new = (dict(enumerate(json.loads(t))) for t in (kept, text))
      what, how = config_lib.differences(_named(old), _named(new))
      lines = what + how
      raise ValueError(
          f'The study {name!r} is there with other trials: '
          + '; '.join(lines[:3]) + (
              f' and {len(lines) - 3} more' if len(lines) > 3 else '')
          + '.\nGive another --dir or --study, or the same config as before.')

  def _live(self):
    """Trials that run, or are done, in the order in which they were taken."""
    states = self._optuna.trial.TrialState
    found = self._study.get_trials(False, states=(
        states.RUNNING, states.COMPLETE))
    return sorted(found, key=lambda t: t._trial_id)  # no public name

  def claim(self, arm=''):
    """Takes a trial.

    Args:
      arm: '' or the label of the arm that it has to belong to.

    Returns:
      (plan.Trial, key for `signing`, `finish` and `release`), or None if each
      is taken.
    """
    self._free_dead()
    while True:
      live = self._live()
      taken = {t.user_attrs.get(_INDEX) for t in live}
      left = [t for t in self._trials
              if t.index not in taken and arm in ('', t.arm)]
      if not left:
        return None
      index = left[0].index
      trial, key = (self._begin_sampled(left[0]) if self._space else
                    self._begin(left[0]))
      # Several may have begun it at once: the first one has it.
      if next(t.number for t in self._live()
              if t.user_attrs.get(_INDEX) == index) == key.number:
        return trial, key
      self.release(key)

  def _begin(self, trial):
    # In one transaction; a queue of Optuna's is not, in SQLite: two workers
    # can be given the same trial.
    number = len(self._study.get_trials(False))
    self._study.add_trial(self._optuna.trial.create_trial(
        state=self._optuna.trial.TrialState.RUNNING,
        user_attrs={_INDEX: trial.index, _WORKER: _signature()}))
    own = next(t for t in self._study.get_trials(False)[number:]
               if t.user_attrs.get(_WORKER, {}).get('pid') == os.getpid()
               and t.user_attrs[_INDEX] == trial.index)
    return trial, self._optuna.trial.Trial(self._study, own._trial_id)

  def _begin_sampled(self, base):
    key = self._study.ask()
    key.set_user_attr(_WORKER, _signature())
    changes = {name: key.suggest_float(name, low, high, log=True)
               for name, (low, high) in self._space.items()}
    key.set_user_attr(_INDEX, base.index)
    return dataclasses.replace(
        base, changes={**base.changes, **changes}), key

  @contextlib.contextmanager
  def signing(self, key):
    """Signs for a trial until the context ends, so that nobody takes it."""
    done = threading.Event()

    def beat():
      while not done.wait(BEAT):
        with contextlib.suppress(Exception):  # the next one may arrive
          key.set_user_attr(_WORKER, _signature())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()

  def _free_dead(self):
    """Frees the trials of dead workers."""
    states = self._optuna.trial.TrialState
    for trial in self._study.get_trials(False, states=(states.RUNNING,)):
      begun = trial.datetime_start.timestamp() if trial.datetime_start else 0
      if _is_dead(trial.user_attrs.get(_WORKER, {}), begun):
        with self._unless_told():
          self._study.tell(trial.number, state=states.FAIL)

  def release(self, key):
    """Frees a trial that was not finished."""
    with self._unless_told():
      self._study.tell(key, state=self._optuna.trial.TrialState.FAIL)

  def _unless_told(self):
    """A context for telling of a trial, of which another may have told."""
    return contextlib.suppress(
        ValueError, self._optuna.exceptions.OptunaError)

  def finish(self, key, trial, result):
    """Records a result; whoever was thought dead meanwhile records nothing.

    Args:
      key: from `claim`.
      trial: plan.Trial, from `claim`.
      result: {'test_error', 'validation_error' (or None), 'diverged', ...},
        numbers and text.
    """
    value = result['validation_error']
    value = result['test_error'] if value is None else value
    # A run that diverged has no error, but is one of those that were tried.
    value = math.inf if result['diverged'] else value
    with self._unless_told():
      key.set_user_attr(_RESULT, {
          'arm': trial.arm, 'point': trial.point, **result, **trial.changes,
          'config': trial.config})
      self._study.tell(key, value)

  def rows(self):
    """[{column: value}] of the finished trials, by index."""
    rows = {}
    for trial in self._live():
      if _RESULT in trial.user_attrs:
        index = trial.user_attrs[_INDEX]
        rows.setdefault(index, {'index': index, **trial.user_attrs[_RESULT]})
    return [rows[index] for index in sorted(rows)]

  def write_table(self):
    """Writes the finished trials to trials.csv; returns them."""
    rows = self.rows()
    keys = sorted({k for row in rows for k in row} - set(_COLUMNS))
    new = os.path.join(self._folder, f'.{TABLE}.{os.getpid()}')
    with open(new, 'w', newline='', encoding='utf-8') as f:
      writer = csv.DictWriter(f, [*_COLUMNS, *keys], lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)
    os.replace(new, os.path.join(self._folder, TABLE))
    return rows


def read_table(folder):
  """The rows of a trials.csv: [{column: value}]; [] without one."""
  try:
    with open(os.path.join(folder, TABLE), encoding='utf-8') as f:
      return [{k: _value(v) for k, v in row.items()}
              for row in csv.DictReader(f)]
  except FileNotFoundError:
    return []


def _value(text):
  """What a cell stood for: None, a boolean, a number or text."""
  if text in ('', 'True', 'False'):
    return {'': None, 'True': True, 'False': False}[text]
  for kind in (int, float):
    with contextlib.suppress(ValueError):
      return kind(text)
  return text


def _named(trials):
  fields = ('index', 'arm', 'point', 'config', 'changes')
  return {f'trial {i}': dict(zip(fields, t, strict=True))
          for i, t in trials.items()}


def _signature():
  return {'host': platform.node(), 'pid': os.getpid(),
          'started': _start_of(os.getpid()), 'time': time.time()}


def _is_dead(worker, begun):
  if worker.get('host') == platform.node():
    return _start_of(worker['pid']) != worker['started']
  return time.time() - worker.get('time', begun) > DEAD


def _start_of(pid):
  """When a process of this machine began, in ticks; None if there is none."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
      return f.read().rpartition(')')[2].split()[19]
  except OSError:
    pass
  try:  # no Linux
    os.kill(pid, 0)
    return ''
  except OSError:
    return None


def _without_password(url):
  before, at, after = url.rpartition('@')
  return before.partition(':')[0] + '://...' + at + after if at else url
