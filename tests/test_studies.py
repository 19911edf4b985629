"""Sweeps and studies: the same trials whoever does them, and honest sums."""
import glob
import json
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import config as config_lib
from vit_jax import models
from vit_jax import train_state
from vit_jax.studies import analysis
from vit_jax.studies import ledger
from vit_jax.studies import plan
from vit_jax.studies import report
from vit_jax.studies import spaces
from vit_jax.studies import worker

optuna = pytest.importorskip('optuna')
CONFIGS = os.path.join(runs.ROOT, 'configs')
STUDIES = sorted(glob.glob(os.path.join(CONFIGS, 'studies', '*.py')))
NAMES = [os.path.basename(path)[:-3] for path in STUDIES]


class Diverged(RuntimeError):
  pass


@pytest.fixture
def tmp_path(tmp_path):
  """A folder without others beside it, whose results a study would take."""
  own = tmp_path / 'own'
  own.mkdir()
  return own


def train_by(errors, log):
  """A stand-in for the module `train`: errors by call, None diverges."""
  def train_and_evaluate(config, run):
    log.append((config.optimizer.lr, config.seed, run))
    error = errors[len(log) - 1]
    if error is None:
      raise Diverged
    return {'test_ema/top1': 1 - error, 'validation_ema/top1': 1 - error}
  return types.SimpleNamespace(
      train_and_evaluate=train_and_evaluate, NonFiniteLoss=Diverged)


def trials(count=4, text='edf.py:trials=4', **changes):
  study = config_lib.load(f'{CONFIGS}/studies/{text}')
  return plan.trials_of(study)[:count]


def test_points_are_shared_by_all_arms_and_log_uniform():
  adamw, sgd = (spaces.SPACES[f'vit-{name}'] for name in ('adamw', 'sgd'))
  one, other = (spaces.random_points(s, 0, 400) for s in (adamw, sgd))
  for points, space in ((one, adamw), (other, sgd)):
    for key, (low, high) in space.items():
      place = np.log([p[key] / low for p in points]) / np.log(high / low)
      assert 0 <= place.min() < 0.02 and 0.98 < place.max() < 1
      # Kolmogorov's distance from the uniform law; 1.63 / sqrt(n): 1 %.
      ranks = np.arange(len(place)) / len(place)
      assert abs(np.sort(place) - ranks).max() < 1.63 / 20 + 1 / 400
  unit = lambda p, s, k: np.log(p[k] / s[k][0]) / np.log(s[k][1] / s[k][0])
  for key in adamw:
    np.testing.assert_allclose(
        [unit(p, adamw, key) for p in one], [unit(p, sgd, key) for p in other])
  assert spaces.random_points(adamw, 0, 64) == one[:64]
  assert spaces.random_points(adamw, 1, 64) != one[:64]
  # A change of this changes every study.
  assert one[0][spaces.LR] == pytest.approx(0.00068843103, rel=1e-6)


def test_spaces_are_the_papers():
  assert spaces.SPACES['vit-adamw'] == {
      spaces.LR: (2.5e-4, 8e-3), spaces.WD: (0.02, 0.8)}
  for space in spaces.SPACES.values():
    for low, high in space.values():
      assert 30 <= high / low <= 40  # a centre times [1/8, 4]


def test_a_grid_has_the_corners():
  grid = spaces.grid_points(spaces.parse('a=1:4,b=1:100'), 9)
  assert len(grid) == 9
  assert {(p['a'], p['b']) for p in grid} >= {(1, 1), (4, 1), (1, 100), (2, 10)}


@pytest.mark.parametrize('text, match', [
    ('vit-adam', "Did you mean 'vit-adamw'"),
    ('optimizer.lr=1', 'no range'), ('optimizer.lr=0:1', 'no range'),
    ('optimizer.lr=2:1', 'no range'), ('a=1:inf', 'no range')])
def test_spaces_that_are_none(text, match):
  with runs.refused(match):
    spaces.parse(text)


@pytest.mark.parametrize('path', STUDIES, ids=NAMES)
@pytest.mark.parametrize('scale', ['digits', 'cifar10', 'imagenet'])
def test_every_study_builds_at_every_scale(path, scale, tmp_path):
  folder = tmp_path / NAMES[STUDIES.index(path)]
  study = config_lib.load(f'{path}:scale={scale},data=/data/a.npz')
  if study.points.kind == 'best':
    (tmp_path / 'edf').mkdir()
    (tmp_path / 'edf' / ledger.TABLE).write_text(
        'arm,diverged,validation_error,optimizer.lr,optimizer.weight_decay\n'
        + ''.join(f'{arm[0]},False,{e},{e / 10},0.1\n'
                  for arm in study.arms for e in (.5, .2, .3)))
  found = plan.trials_of(study, str(folder))
  assert len(found) == len(study.arms) * study.points.count
  assert len({t.name for t in found}) == len(found)
  arms = {t.arm: plan.evaluated(plan.build(t, os.path.dirname(path)))
          for t in found}
  for arm, config in arms.items():
    assert config.model.stem == arm.split()[0]
    models.create(num_classes=10, **train_state.model_fields(config.model, ()))
    assert 'validation' in config.evaluators and config.input.validation
    if study.points.kind == 'best':
      assert config.optimizer.lr == pytest.approx(.02)
  if study.points.kind == 'random':
    first = [t.changes[spaces.LR] for t in found if t.arm == found[0].arm]
    assert len(set(first)) == len(first)


def test_a_study_of_real_data_needs_it():
  with runs.refused('scale=cifar10 needs data'):
    config_lib.load(f'{CONFIGS}/studies/edf.py:scale=cifar10')


def test_best_needs_the_other_study(tmp_path):
  with runs.refused('no finished trials of'):
    plan.trials_of(config_lib.load(f'{CONFIGS}/studies/peak.py'),
                   str(tmp_path / 'peak'))


def test_work_is_recorded_and_not_done_twice(tmp_path):
  todo, log, said = trials(), [], []
  book = ledger.Ledger('edf', todo, str(tmp_path))
  worker.work(book, str(tmp_path), f'{CONFIGS}/studies',
              train_by([.1, None, .3, .2], log), said.append)
  assert [call[0] for call in log] == [t.changes[spaces.LR] for t in todo]
  assert len(said) == 4 and 'diverged' in said[1]
  rows = ledger.read_table(str(tmp_path))
  assert [row['test_error'] for row in rows] == pytest.approx(
      [.1, None, .3, .2])
  assert [row['diverged'] for row in rows] == [False, True, False, False]
  assert rows[2]['arm'] == 'patchify adamw'
  again = ledger.Ledger('edf', todo, str(tmp_path))
  assert again.claim() is None and len(again.rows()) == 4


def test_what_another_study_ran_is_not_run_twice(tmp_path):
  texts = {'optimizer': 'optimizer.py:seeds=1',
           'schedule_length': 'schedule_length.py:seeds=2'}
  log = []
  for name, text in texts.items():
    folder = str(tmp_path / name)
    todo = trials(16, text)
    worker.work(ledger.Ledger(name, todo, folder), folder,
                f'{CONFIGS}/studies', train_by([.1] * 16 + [.2] * 8, log),
                print)
  assert len(log) == 16 + 8  # of 16 + 16: those of seed 0 were there
  rows = ledger.read_table(str(tmp_path / 'schedule_length'))
  assert [row['test_error'] for row in rows] == pytest.approx(
      [.1] * 8 + [.2] * 8)
  assert rows[0]['run'].startswith('../optimizer/runs/')


def test_a_trial_that_was_interrupted_is_done_again(tmp_path):
  todo, log = trials(2), []
  book = ledger.Ledger('edf', todo, str(tmp_path))
  stop = types.SimpleNamespace(
      train_and_evaluate=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
      NonFiniteLoss=Diverged)
  with pytest.raises(KeyboardInterrupt):
    worker.work(book, str(tmp_path), f'{CONFIGS}/studies', stop, print)
  worker.work(book, str(tmp_path), f'{CONFIGS}/studies',
              train_by([.1, .2], log), print)
  assert sorted(call[0] for call in log) == sorted(
      t.changes[spaces.LR] for t in todo)


def test_trials_of_dead_workers_are_taken_again(tmp_path, monkeypatch):
  todo = trials(3)
  book = ledger.Ledger('edf', todo, str(tmp_path))
  claimed = [book.claim() for _ in range(3)]
  assert book.claim() is None  # all are signed for by this process
  # Another process of this machine, that is gone.
  claimed[1][1].set_user_attr('worker', {
      **claimed[1][1].user_attrs['worker'], 'pid': 2**22 - 1, 'started': '1'})
  found, _ = book.claim()
  assert found.index == 1 and book.claim() is None
  # Of another machine, silent for long.
  worker_ = claimed[2][1].user_attrs['worker']
  claimed[2][1].set_user_attr('worker', {**worker_, 'host': 'elsewhere'})
  assert book.claim() is None
  claimed[2][1].set_user_attr('worker', {
      **worker_, 'host': 'elsewhere', 'time': worker_['time'] - 1000})
  assert book.claim()[0].index == 2


def test_two_workers_free_the_same_dead_one(tmp_path, monkeypatch):
  todo = trials(1)
  one, other = (ledger.Ledger('edf', todo, str(tmp_path)) for _ in range(2))
  _, key = one.claim()
  key.set_user_attr('worker', {
      **key.user_attrs['worker'], 'pid': 2**22 - 1, 'started': '1'})

  def tell(*args, **kwargs):  # the first is quicker
    one._free_dead()
    raise optuna.exceptions.UpdateFinishedTrialError

  with monkeypatch.context() as context:
    context.setattr(other._study, 'tell', tell)
    other._free_dead()
  # Who was thought dead records nothing.
  one.finish(key, todo[0], dict(
      test_error=.1, validation_error=.1, diverged=False, steps=1))
  assert not other.rows() and other.claim()[0].index == 0


def test_two_processes_do_each_trial_once(tmp_path):
  code = textwrap.dedent(f'''
      import sys, time, types
      from tests import test_studies as t
      from vit_jax.studies import ledger, worker
      book = ledger.Ledger('edf', t.trials(64, 'edf.py:trials=16'), sys.argv[1])
      log = []
      train = t.train_by([.1] * 64, log)
      worker.work(book, sys.argv[1], {CONFIGS + "/studies"!r}, train, print)
      print(len(log))
  ''')
  children = [subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path)], cwd=runs.ROOT,
      stdout=subprocess.PIPE, text=True) for _ in range(2)]
  done = [child.communicate(timeout=300)[0].split() for child in children]
  assert [child.returncode for child in children] == [0, 0]
  assert sum(int(words[-1]) for words in done) == 64
  assert all(int(words[-1]) > 0 for words in done)
  rows = ledger.read_table(str(tmp_path))
  todo = trials(64, 'edf.py:trials=16')
  assert [row['index'] for row in rows] == list(range(64))
  assert [row[spaces.LR] for row in rows] == [
      t.changes[spaces.LR] for t in todo]


def test_another_config_under_the_same_name_is_refused(tmp_path):
  ledger.Ledger('edf', trials(), str(tmp_path))
  other = trials(4, 'edf.py:trials=4,per_class=12,scale=cifar10,data=x.npz')
  with runs.refused('edf.* is there with other trials: trial 0.changes'):
    ledger.Ledger('edf', other, str(tmp_path))


def test_a_storage_that_is_not_there(tmp_path):
  with runs.refused('Cannot reach the storage'):
    ledger.Ledger('edf', trials(), str(tmp_path), 'sqlite:////nowhere/a.db')
  with pytest.raises(ValueError) as e:
    ledger.Ledger('edf', trials(), str(tmp_path), 'mysql://me:secret@nowhere/a')
  assert 'secret' not in str(e.value)
  assert 'Start the database server' in str(e.value)


def test_tpe_samples_within_the_space(tmp_path):
  space = spaces.SPACES['digits-adamw']
  todo, log = trials(6), []
  book = ledger.Ledger('t', todo, str(tmp_path), sampler='tpe', space=space)
  worker.work(book, str(tmp_path), f'{CONFIGS}/studies',
              train_by([.1, .2, None, .4, .3, .1], log), print)
  rates = [call[0] for call in log]
  assert len(set(rates)) == 6
  low, high = space[spaces.LR]
  assert all(low <= rate <= high for rate in rates)
  assert [row[spaces.LR] for row in book.rows()] == rates


def test_diverged_runs_stay_in_the_denominator():
  errors = [.1, None, .2, float('nan')]
  np.testing.assert_allclose(
      analysis.edf(errors, [.05, .1, .2, 1.]), [0, .25, .5, .5])
  assert analysis.within(errors, 4) == .25
  assert analysis.within(errors, 10) == .5
  assert analysis.within([None, None], 4) == 0
  low, high = analysis.edf_band(errors, [.1, .2])
  assert (low <= [.25, .5]).all() and (high >= [.25, .5]).all()


def test_intervals_cover_what_they_should():
  random = np.random.default_rng(1)
  hits = 0
  for _ in range(200):
    noise = random.normal(0, .05, 30)  # of the pair, cancels
    a = dict(enumerate(.3 + noise + random.normal(0, .01, 30)))
    b = dict(enumerate(.29 + noise + random.normal(0, .01, 30)))
    found = analysis.paired(a, b)
    hits += found.low <= .01 <= found.high
    assert found.pairs == 30 and found.high - found.low < .02
  assert 0.86 < hits / 200 < 0.99


def test_a_pair_of_which_one_diverged_is_left_out_and_counted():
  found = analysis.paired({0: .2, 1: np.nan, 2: .4}, {0: .1, 1: .1, 3: .2})
  assert (found.pairs, found.lost) == (1, 1)
  assert found.mean == pytest.approx(.1) and not found.resolved


def test_what_is_visible_shows_in_four_of_five():
  random = np.random.default_rng(0)
  shown = []
  for _ in range(300):
    differences = random.normal(.028 / np.sqrt(20), .01, 20)
    found = analysis.paired(dict(enumerate(.5 + differences)),
                            dict.fromkeys(range(20), .5))
    shown.append(found.low > 0)
  assert .7 < np.mean(shown) < .92


def test_the_best_range_holds_the_best():
  values = np.geomspace(1e-4, 1e-2, 64)
  errors = .1 + np.log10(values / 1e-3) ** 2 / 10
  low, high = analysis.best_range(values, errors)
  assert 5e-4 < low < 1e-3 < high < 2e-3


@pytest.mark.parametrize('name', NAMES)
def test_reports_of_unfinished_studies_say_what_is_missing(name, tmp_path):
  study = config_lib.load(f'{CONFIGS}/studies/{name}.py')
  folder = tmp_path / name
  report.describe(str(folder), ['study', 'run', 'it'], study)
  arms = [arm[0] for arm in study.arms]
  random = np.random.default_rng(0)
  rows = ['arm,point,test_error,validation_error,diverged,seconds,'
          'optimizer.lr,optimizer.weight_decay']
  for arm in arms[:-1]:
    for point in range(3):
      bad = arm == arms[0] and point == 0
      error = '' if bad else f'{random.uniform(.1, .3):.3f}'
      rows.append(f'{arm},{point},{error},{error},{bad},2.0,'
                  f'{10 ** -random.uniform(2, 4):.5f},0.1')
  (folder / ledger.TABLE).write_text('\n'.join(rows) + '\n')
  assert command_line.main(['study', 'report', str(tmp_path)]) == 0
  text = (tmp_path / 'report.md').read_text()
  total = len(arms) * study.points.count
  assert f'{len(rows) - 1} runs of {total} are done, THE REST IS' in text
  assert 'Paper' in text and 'not resolved' in text
  assert os.path.getsize(folder / f'{name}.png') > 5000
  page = (tmp_path / 'report.html').read_text()
  assert 'data:image/png;base64,' in page and 'src="edf' not in page
  assert page.count('<table>') == 2 and '|---' not in page


def test_a_report_of_nothing(tmp_path, capsys):
  assert command_line.main(['study', 'report', str(tmp_path)]) == 2
  assert 'holds no study' in capsys.readouterr().err


def test_sweep_refuses_what_is_no_number_of_the_config(tmp_path, capsys):
  argv = ['sweep', '--config', runs.DIGITS, '--dir', str(tmp_path / 's')]
  assert command_line.main([*argv, '--space', 'optimizer.lrr=1:2']) == 2
  assert "Did you mean 'optimizer.lr'" in capsys.readouterr().err
  assert command_line.main(
      [*argv, '--space', 'digits-adamw', '--trials', '0']) == 2
  assert 'has no trials' in capsys.readouterr().err


def test_the_cost_is_told_before(tmp_path, capsys):
  assert command_line.main([
      'study', 'run', f'{CONFIGS}/studies/schedule_length.py', '--dir',
      str(tmp_path), '--only_cost']) == 0
  said = capsys.readouterr().out
  # 300 images: 47, 94, 188 and 375 steps of 64, two stems, ten seeds.
  assert '80 trials in 8 arms, 14,080 steps' in said
  assert not os.listdir(tmp_path)


def test_members_of_a_population_are_of_one_arm(tmp_path, monkeypatch):
  seen = []

  def train(config, members, run):
    seen.append((config.model.stem, config.optimizer.name, members))
    with open(os.path.join(run, 'metrics.jsonl'), 'w') as f:
      f.write('{"step": 7, "time": 0, "train/loss": 1}\n')
    return [{**m, 'diverged_step': 3 if i == 1 else None, 'metrics': {
        'test_ema/top1': 1 - m['lr'], 'validation_ema/top1': .5}}
            for i, m in enumerate(members)]

  monkeypatch.setattr(worker.population, 'train', train)
  todo = trials(20, 'edf.py:trials=5')
  worker.work(ledger.Ledger('edf', todo, str(tmp_path)), str(tmp_path),
              f'{CONFIGS}/studies', None, print, together=3)
  assert [(stem, name, len(m)) for stem, name, m in seen] == [
      (stem, name, count) for stem, name in (
          ('conv', 'adamw'), ('conv', 'sgd'), ('patchify', 'adamw'),
          ('patchify', 'sgd')) for count in (3,)] + [
              (stem, name, 2) for stem, name in (
                  ('conv', 'adamw'), ('conv', 'sgd'), ('patchify', 'adamw'),
                  ('patchify', 'sgd'))]
  rows = ledger.read_table(str(tmp_path))
  assert len(rows) == 20 and sum(row['diverged'] for row in rows) == 8
  for row in rows:
    if row['diverged']:
      assert row['steps'] == 3
    else:
      assert row['test_error'] == pytest.approx(row[spaces.LR])
      assert row['steps'] == 7


def test_a_population_varies_what_its_members_may(tmp_path):
  todo = [plan.Trial(i, 'a', i, '../digits.py', {'model.dropout': .1 * i})
          for i in range(2)]
  with runs.refused('differ in model.dropout'):
    worker.several(todo, str(tmp_path / 'run'), f'{CONFIGS}/studies')


@pytest.mark.slow
def test_a_sweep_for_real(tmp_path):
  argv = ['sweep', '--config', f'{runs.DIGITS}:epochs=2', '--space',
          'digits-adamw', '--trials', '2', '--dir', str(tmp_path)]
  assert command_line.main(argv) == 0
  rows = ledger.read_table(str(tmp_path))
  assert len(rows) == 2 and all(0 < row['test_error'] < .9 for row in rows)
  run = tmp_path / rows[0]['run']
  config = json.loads((run / 'config.json').read_text())
  assert config['optimizer']['lr'] == rows[0][spaces.LR]
  assert not (run / 'checkpoints').exists()
