"""Which trials of a study are taken, done, or lost with their worker.

The ledger is an Optuna study in any storage of Optuna's: a SQLite file for one
machine, PostgreSQL or MySQL where many draw from it. All trials are enqueued
before the first is taken. Twice the same index can be in the queue (two workers
began at once, or one was thought dead): the first that was taken counts.
"""
import contextlib
import csv
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
_COLUMNS = ('index', 'arm', 'point', 'test_error', 'validation_error',
            'diverged', 'steps', 'seconds', 'run')


class Ledger:
  """The trials of a study in an Optuna storage."""

  def __init__(self, name, trials, folder, storage='', sampler='', space=None):
    """Opens a study, or begins it.

    Args:
      name: of the study.
      trials: [plan.Trial]. With a sampler the last one's numbers only count.
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
    if self._space is None:
      self._enqueue()

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

  def _enqueue(self):
    there = {t.user_attrs.get(_INDEX) for t in self._study.get_trials(False)}
    for trial in self._trials:
      if trial.index not in there:
        self._study.enqueue_trial({}, user_attrs={_INDEX: trial.index})

  def claim(self):
    """Takes a trial; returns (plan.Trial, key for `finish`), or None."""
    states = self._optuna.trial.TrialState
    self._requeue_dead()
    while True:
      frozen = self._study.get_trials(False)
      if self._space is not None:
        live = [t for t in frozen if t.state != states.FAIL]
        if len(live) >= len(self._trials):
          return None
        return self._claim_sampled(len(live))
      if not any(t.state == states.WAITING for t in frozen):
        return None
      trial = self._study.ask()
      index = trial.user_attrs.get(_INDEX)
      taken = {t.user_attrs.get(_INDEX) for t in self._study.get_trials(False)
               if t.number != trial.number and (
                   t.state == states.COMPLETE
                   or (t.state == states.RUNNING
                       and t.number < trial.number))}
      if index is None or index in taken:
        self._study.tell(trial, state=states.FAIL)
        continue
      self._sign(trial)
      return self._trials[index], trial

  def _claim_sampled(self, place):
    trial = self._study.ask()
    changes = {key: trial.suggest_float(key, low, high, log=True)
               for key, (low, high) in self._space.items()}
    base = self._trials[place]
    trial.set_user_attr(_INDEX, base.index)
    self._sign(trial)
    return plan.Trial(base.index, base.arm, base.point, base.config,
                      {**base.changes, **changes}), trial

  def _sign(self, trial):
    trial.set_user_attr(_WORKER, {
        'host': platform.node(), 'pid': os.getpid(),
        'started': _start_of(os.getpid()), 'time': time.time()})

  @contextlib.contextmanager
  def signing(self, key):
    """Signs for a trial until the context ends, so that nobody takes it."""
    done = threading.Event()

    def beat():
      while not done.wait(BEAT):
        with contextlib.suppress(Exception):  # the next one may arrive
          self._sign(key)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()

  def _requeue_dead(self):
    """Puts trials of dead workers back into the queue."""
    states = self._optuna.trial.TrialState
    for trial in self._study.get_trials(False, states=(states.RUNNING,)):
      worker = trial.user_attrs.get(_WORKER, {})
      begun = trial.datetime_start.timestamp() if trial.datetime_start else 0
      if not _is_dead(worker, begun):
        continue
      # An error: another worker told of it, or did the same, meanwhile.
      with contextlib.suppress(ValueError, KeyError):
        self._study.tell(trial.number, state=states.FAIL)
        if self._space is None and _INDEX in trial.user_attrs:
          self._study.enqueue_trial(
              {}, user_attrs={_INDEX: trial.user_attrs[_INDEX]})

  def release(self, key):
    """Puts a trial that was not finished back into the queue."""
    index = key.user_attrs.get(_INDEX)
    self._study.tell(key, state=self._optuna.trial.TrialState.FAIL)
    if self._space is None:
      self._study.enqueue_trial({}, user_attrs={_INDEX: index})

  def finish(self, key, trial, result):
    """Records a result.

    Args:
      key: from `claim`.
      trial: plan.Trial, from `claim`.
      result: {'test_error', 'validation_error' (or None), 'diverged', ...},
        numbers and text.
    """
    key.set_user_attr(_RESULT, {
        **result, **trial.changes, 'config': trial.config})
    value = result['validation_error']
    value = result['test_error'] if value is None else value
    # A run that diverged has no error, but is one of those that were tried.
    self._study.tell(key, math.inf if result['diverged'] else value)

  def rows(self):
    """[{column: value}] of the finished trials, by index."""
    done = self._study.get_trials(
        False, states=(self._optuna.trial.TrialState.COMPLETE,))
    rows = {}
    for frozen in done:
      trial = self._trials[frozen.user_attrs[_INDEX]]
      rows.setdefault(trial.index, {
          'index': trial.index, 'arm': trial.arm, 'point': trial.point,
          **frozen.user_attrs[_RESULT]})
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
