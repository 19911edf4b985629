"""Training on some classes, or on a few images of each."""
import numpy as np
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from tests import test_processes

DIGITS = dict(
    sources.TFDS_ONLY, source='digits', path='', pp='decode', eval_pp='decode',
    epoch='exact', channels=1, holdout=.2, classes='', max_bad_fraction=.001,
    repeats=1, only_classes=(), validation=0.0,
    per_class=0)

GOLDEN = ['digits #87', 'digits #397', 'digits #649', 'digits #671']


def opened(data_seed=0, **changes):
  return input_pipeline.open_data({**DIGITS, **changes}, data_seed)


def members(source):
  return {source.describe(i) for i in range(source.num_examples)}


def test_every_class_has_its_number():
  data = opened(per_class=10)
  assert set(data.train.counts().values()) == {10}
  assert data.train.num_examples == 100
  assert data.evals['test'].num_examples == 500  # as it was


def test_a_draw_belongs_to_its_seed():
  three, ten = (opened(per_class=k).train for k in (3, 10))
  assert members(three) < members(ten)
  assert members(opened(per_class=10).train) == members(ten)
  others = [members(opened(seed, per_class=10).train) for seed in range(1, 5)]
  shared = [len(members(ten) & other) for other in others]
  # 10 of about 130 a class: 8 of 100 are shared by chance.
  assert min(shared) > 0 and max(shared) < 25
  # A change of these changes every few-shot run.
  first = opened(0, per_class=1).train
  assert [first.describe(i) for i in range(4)] == GOLDEN


def test_classes_are_labelled_in_the_order_asked_for():
  whole, data = opened(), opened(only_classes=('7', '2'))
  assert data.class_names == ('7', '2')
  names = {whole.train.describe(i): whole.class_names[label]
           for i, label in enumerate(whole.train.labels)}
  for i, label in enumerate(data.train.labels):
    assert names[data.train.describe(i)] == data.class_names[label]
  assert data.train.counts() == {
      name: whole.train.counts()[name] for name in '72'}
  batch = next(input_pipeline.train_batches(
      data, global_batch_size=8, data_seed=0))
  assert set(batch['label']) == {0, 1}
  count = sum(whole.evals['test'].counts()[name] for name in '72')
  assert data.evals['test'].num_examples == count


def test_a_validation_part_never_moves():
  data, other = (opened(seed, validation=.4, per_class=20) for seed in (0, 1))
  held = data.evals['validation']
  assert held.num_examples == round(.4 * opened().train.num_examples)
  assert members(held) == members(other.evals['validation'])
  assert not members(held) & (members(data.train) | members(other.train))
  assert members(data.train) != members(other.train)
  assert data.evals['test'].num_examples == 500
  share = held.counts()['3'] / opened().train.counts()['3']
  assert abs(share - .4) < .01


@pytest.mark.parametrize('kind', range(3), ids=['digits', 'arrays', 'folder'])
def test_the_same_images_on_any_number_of_processes(kind, tmp_path):
  section = test_processes._sources(tmp_path)[kind]
  whole = input_pipeline.open_data(section, 3)
  names = whole.class_names[:2]
  data = input_pipeline.open_data(
      {**section, 'only_classes': names, 'per_class': 2}, 3)

  def batches(processes):
    streams = [input_pipeline.train_batches(
        data, global_batch_size=4, data_seed=3, process_index=i,
        process_count=processes) for i in range(processes)]
    for _ in range(3):
      parts = [next(s) for s in streams]
      yield {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

  for one, two in zip(batches(1), batches(2), strict=True):
    assert sorted(one['label']) == [0, 0, 1, 1]  # an epoch is a batch
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize('changes, match', [
    (dict(validation=1.), r'input\.validation=1\.0 is not in'),
    (dict(per_class=-1), r'input\.per_class=-1 is negative'),
    (dict(per_class=200), r"Class '0' has 128 .*per_class=200"),
    (dict(only_classes=('3',)), 'two or more distinct'),
    (dict(only_classes=('3', '3')), 'two or more distinct'),
    (dict(only_classes=('3', 'x')), "has no class 'x'"),
])
def test_what_is_refused(changes, match):
  with runs.refused(match):
    opened(**changes)
