"""What a study consists of: its config, and the list of its trials."""
import dataclasses
import json
import os
from typing import NamedTuple

from vit_jax import choices
from vit_jax import complexity
from vit_jax import config as config_lib
from vit_jax import durations
from vit_jax import models
from vit_jax import train_state
from vit_jax.studies import spaces

TEST, VALIDATION = 'test', 'validation'


class Arm(NamedTuple):
  """What is compared: a row of a study's `arms`.

  Attributes:
    label: names it.
    config: 'FILE:args', FILE relative to the study's.
    changes: ((dotted key, value), ...), set in that config.
    space: for random points and grids, see `spaces.parse`.
  """
  label: str
  config: str
  changes: tuple
  space: str


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a study.

  Attributes:
    index: its place in the list.
    arm: label of the arm it belongs to.
    point: place of its point in the arm; trials of several arms with the same
      point are a pair: they share draws, or the seed.
    config: 'FILE:args'.
    changes: {dotted key: value}, set in that config.
  """
  index: int
  arm: str
  point: int
  config: str
  changes: dict

  @property
  def name(self):
    """Of its folder."""
    safe = ''.join(c if c.isalnum() or c in '.-' else '_' for c in self.arm)
    return f'{safe}/{self.point:04d}'


def trials_of(study, folder=''):
  """The list of trials of a study's config.

  Args:
    study: ConfigDict: `arms`, a tuple of rows as `Arm`, and `points`: {'kind':
      'seeds', 'count'}, or {'kind': 'random' | 'grid', 'count', 'seed'}, or
      {'kind': 'best', 'of': name of a study with the same arms, 'count': of
      seeds}.
    folder: of the study's results, beside which those of others lie.

  Returns:
    [Trial], by point, then by arm: what is compared is done together.

  Raises:
    ValueError: an unknown kind, no arms, or the other study is not there.
  """
  points = study.points
  if not len(study.arms) or points.count < 1:
    raise ValueError(f'The study {study.name} has no trials.\n'
                     'Give it arms, and points.count above 0.')
  kinds = {'seeds': _seeds, 'random': _random, 'grid': _grid, 'best': _best}
  make = choices.pick(kinds, points.kind, 'kind of points')
  arms = [Arm(*row) for row in study.arms]
  by_arm = [make(points, arm, folder) for arm in arms]
  trials = []
  for point in range(max(map(len, by_arm))):
    for arm, changes in zip(arms, by_arm, strict=True):
      if point < len(changes):
        trials.append(Trial(len(trials), arm.label, point, arm.config,
                            {**dict(arm.changes), **changes[point]}))
  return trials


def _seeds(points, arm, folder):
  del arm, folder
  return [{'seed': seed} for seed in range(points.count)]


def _random(points, arm, folder):
  del folder
  return spaces.random_points(
      spaces.parse(arm.space), points.seed, points.count)


def _grid(points, arm, folder):
  del folder
  return spaces.grid_points(spaces.parse(arm.space), points.count)


def _best(points, arm, folder):
  """The point with the lowest validation error of another study, by seeds."""
  from vit_jax.studies import ledger
  path = os.path.join(os.path.dirname(os.path.abspath(folder)), points.of)
  rows = [row for row in ledger.read_table(path)
          if row['arm'] == arm.label and not row['diverged']]
  if not rows:
    raise ValueError(
        f'{path} has no finished trials of {arm.label!r}, whose best setting '
        f'this study takes.\nRun configs/studies/{points.of}.py there first.')
  best = min(rows, key=lambda row: row['validation_error'])
  changes = {key: best[key] for key in (spaces.LR, spaces.WD)}
  return [{**changes, 'seed': seed} for seed in range(points.count)]


def build(trial, beside=''):
  """The config of a trial.

  Args:
    trial: Trial.
    beside: folder that its config's path is relative to.

  Raises:
    ValueError: a key that the config does not have.
  """
  path, colon, args = trial.config.partition(':')
  config = config_lib.load(os.path.join(beside, path) + colon + args)
  return changed(config, trial.changes)


def changed(config, changes):
  """Sets keys of a config, in place; durations in any unit; returns it."""
  for key, value in changes.items():
    if key.rpartition('_')[2] in durations.UNITS:
      config_lib.set_duration(config, key, value)
      continue
    *parents, leaf = key.split('.')
    section = config
    for parent in parents:
      section = section.get(parent, {})
    if leaf not in section and parents != ['evaluators']:
      flat = config_lib.flatten(config.to_dict())
      raise ValueError(choices.unknown(key, flat, 'config key'))
    with section.unlocked():
      section[leaf] = value
  return config


def evaluated(config):
  """Adds the evaluation of the part 'validation' where the config makes one."""
  if config.input.validation and VALIDATION not in config.evaluators:
    with config.evaluators.unlocked():
      config.evaluators[VALIDATION] = dict(
          name='classification', split=VALIDATION)
  return config


def fingerprint(trials):
  """What a study is, as text: two with the same one may share results."""
  return json.dumps([dataclasses.astuple(t) for t in trials], sort_keys=True)


def cost(trials, beside=''):
  """(steps, FLOP) of all trials; data that is not here counts as expected.

  Three times the forward pass, two operations a multiply-add.
  """
  import input_pipeline
  known = {}
  steps = flop = 0
  for trial in trials:
    fixed = {k: v for k, v in trial.changes.items()
             if k not in (spaces.LR, spaces.WD, 'seed')}
    key = json.dumps([trial.config, fixed], sort_keys=True)
    if key not in known:
      config = build(trial, beside)
      try:
        data = input_pipeline.open_data(config.input, max(config.data_seed, 0))
        count, classes = data.train.num_examples, len(data.class_names)
        shape = data.image_shape
      except (ValueError, OSError):
        count, classes = config.input.num_train, config.input.num_classes
        if not count or not classes:
          raise
        shape = input_pipeline.image_shape(config.input)
      units = durations.Units.of(
          count, config.global_batch_size, config.input.epoch)
      model = models.create(num_classes=classes, **train_state.model_fields(
          config.model, tuple(config.frozen)))
      length = durations.to_steps(config, 'total', units)
      macs = complexity.of(model, shape[:2], shape[2]).macs
      known[key] = length, 6 * macs * length * config.global_batch_size
    steps += known[key][0]
    flop += known[key][1]
  return steps, flop
