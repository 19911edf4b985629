"""The order is a bijection, looks random, and never changes."""
import numpy as np
import pytest

from input_pipeline import order
from tests import runs

SIZES = [1, 2, 3, 7, 8, 9, 10, 63, 64, 65, 255, 256, 257, 258, 1297, 1797,
         65535, 65536, 65537, 131073, 262145, 1048577, 1_281_167]

GOLDEN_10 = [6, 1, 0, 4, 3, 5, 2, 7, 8, 9]
GOLDEN_I1K = [645352, 162286, 680828]
GOLDEN_BATCH = [742, 117, 679, 75]
GOLDEN_UNIFORM = [[0.8821339209574005, 0.7018823727082099],
                  [0.21975805482657151, 0.29691897294107994]]


def _epoch(seed, epoch, n):
  return order.permuted(seed, epoch, np.arange(n), n)


@pytest.mark.parametrize('n', SIZES)
def test_every_example_once(n):
  assert (np.bincount(_epoch(0, 3, n), minlength=n) == 1).all()


@pytest.mark.parametrize('n', [50_000, 65_536, 1_281_167])
def test_successive_epochs_are_unrelated(n):
  first, second = _epoch(0, 0, n), _epoch(0, 1, n)
  assert abs(np.corrcoef(first, second)[0, 1]) < .02
  assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < .02
  # How often an example stays within n / 256 places; 1 is chance.
  near = (np.abs(first - second) <= n / 256).mean() / (2 / 256)
  assert .8 < near < 1.2


@pytest.mark.parametrize('n', [3, 10, 64])
@pytest.mark.parametrize('seed', [1, 5])
def test_every_example_comes_everywhere(n, seed):
  epochs = 3000
  examples = order.permuted(
      seed, np.arange(epochs)[:, None], np.arange(n)[None], n)
  counts = np.zeros((n, n))
  np.add.at(counts, (np.broadcast_to(np.arange(n), examples.shape), examples),
            1)
  mean = epochs / n
  # Rows and columns add up to `epochs`: (n - 1)**2 degrees of freedom.
  chi2 = ((counts - mean) ** 2 / mean).sum() * (n - 1) / n
  df = (n - 1) ** 2
  assert abs(chi2 - df) / np.sqrt(2 * df) < 4


def test_golden_values():
  # A change of these changes every run: resumed ones would repeat examples.
  assert _epoch(0, 0, 10).tolist() == GOLDEN_10
  assert order.permuted(
      42, [0, 1, 2], [5, 1_000_000, 0], 1_281_167).tolist() == GOLDEN_I1K
  np.testing.assert_array_equal(
      order.uniform(42, 3, [7, 8], 1, 2), GOLDEN_UNIFORM)


def test_seeds_and_streams_differ():
  orders = {tuple(_epoch(s, e, 100)) for s in range(20) for e in range(20)}
  assert len(orders) == 400
  draws = {order.uniform(s, e, i, k, 1).item()
           for s in range(4) for e in range(4) for i in range(4)
           for k in range(4)}
  assert len(draws) == 256


def test_uniform_is_uniform():
  u = order.uniform(0, 1, np.arange(100_000), 2, 2)
  assert u.min() >= 0 and u.max() < 1
  assert abs(u.mean() - .5) < .003 and abs(u.var() - 1 / 12) < .001
  assert abs(np.corrcoef(u.T)[0, 1]) < .02
  counts = np.histogram(u[:, 0], 64, (0, 1))[0]
  chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
  assert abs(chi2 - 63) / np.sqrt(2 * 63) < 4


@pytest.mark.parametrize('epoch', ['exact', 'floor'])
def test_process_count_does_not_matter(epoch):
  kwargs = dict(num_examples=37, global_batch_size=12, epoch=epoch)
  for step in range(8):
    whole = order.batch_examples(1, step, **kwargs)
    parts = [order.batch_examples(
        1, step, process_index=i, process_count=3, **kwargs) for i in range(3)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize('epoch', ['exact', 'floor'])
def test_several_steps_at_once(epoch):
  kwargs = dict(num_examples=37, global_batch_size=12, epoch=epoch, repeats=2,
                process_index=1, process_count=3)
  one_by_one = [order.batch_examples(1, step, **kwargs) for step in range(3, 9)]
  np.testing.assert_array_equal(
      order.batch_examples(1, 3, steps=6, **kwargs),
      np.concatenate(one_by_one, axis=1))


@pytest.mark.parametrize('repeats', [2, 3, 7])
@pytest.mark.parametrize('n', [1, 10, 37])
def test_repeats(n, repeats):
  """Position p takes the example at p // repeats, with draws of its own."""
  kwargs = dict(num_examples=n, global_batch_size=6, repeats=repeats)
  steps = range(-(-3 * n // 6))
  epoch, index, repeat = np.concatenate(
      [order.batch_examples(5, s, **kwargs) for s in steps], axis=1)[:, :3 * n]
  assert epoch.tolist() == np.repeat([0, 1, 2], n).tolist()
  position = np.tile(np.arange(n), 3)
  np.testing.assert_array_equal(
      index, order.permuted(5, epoch, position // repeats, n))
  np.testing.assert_array_equal(repeat, position % repeats)
  for e in range(3):
    seen, counts = np.unique(index[epoch == e], return_counts=True)
    assert len(seen) == -(-n // repeats) and counts.max() <= repeats
  draws = order.uniform(5, epoch, index, 1, 2, repeat)
  assert len(np.unique(draws, axis=0)) == 3 * n
  np.testing.assert_array_equal(  # a first visit is what it is without repeats
      draws[repeat == 0], order.uniform(5, epoch, index, 1, 2)[repeat == 0])
  for s in steps:
    np.testing.assert_array_equal(
        order.batch_examples(5, s, **kwargs),
        np.concatenate([order.batch_examples(
            5, s, process_index=i, process_count=3, **kwargs)
            for i in range(3)], axis=1))


def test_no_repeats_change_nothing():
  epoch, index, repeat = order.batch_examples(
      42, 7, num_examples=1000, global_batch_size=4)
  assert (epoch.tolist(), index.tolist()) == ([0] * 4, GOLDEN_BATCH)
  assert not repeat.any()


@pytest.mark.parametrize('repeats', [0, -1, 1.5, True, 2**16, '3'])
def test_repeats_are_checked(repeats):
  with runs.refused(r'input\.repeats'):
    order.check_repeats(repeats)


def test_exact_epochs_straddle_batches():
  epoch, index, _ = np.concatenate([
      order.batch_examples(0, s, num_examples=10, global_batch_size=4)
      for s in range(5)], axis=1)
  assert epoch.tolist() == [0] * 10 + [1] * 10
  assert sorted(index[:10]) == sorted(index[10:]) == list(range(10))


def test_floor_drops_the_rest():
  epoch, position = np.concatenate([
      order.batch_positions(s, num_examples=10, global_batch_size=4,
                            epoch='floor') for s in range(4)], axis=1)
  assert epoch.tolist() == [0] * 8 + [1] * 8
  assert position.tolist() == [*range(8)] * 2


@pytest.mark.parametrize('kwargs, match', [
    (dict(num_examples=3, epoch='floor'), 'do not fill one batch'),
    (dict(num_examples=0), 'no examples'),
    (dict(num_examples=9, epoch='half'), 'There is: exact, floor'),
    (dict(num_examples=9, process_count=3), 'multiple of 3'),
])
def test_what_does_not_fit_is_an_error(kwargs, match):
  with runs.refused(match):
    order.batch_positions(0, global_batch_size=4, **kwargs)


@pytest.mark.parametrize('seed', [-1, 2**63, 1.5, True, '0'])
def test_seed_is_checked(seed):
  with runs.refused('data_seed'):
    order.check_seed(seed)
