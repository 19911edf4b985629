"""Evaluation: every example exactly once, whatever the sizes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from vit_jax import evaluators
from vit_jax import recipes
from vit_jax import sharding

CLASSES = 7


def predict(variables, images):
  """Logits [B, C] with ties, from the first pixels: no model to compile."""
  del variables
  return (images[:, 0, :CLASSES, 0] // 32).astype(jnp.float32)


def suite(num_examples, batch_size, num_devices, function=predict):
  rng = np.random.default_rng(num_examples)
  images = rng.integers(0, 256, (num_examples, 8, 8, 3)).astype(np.uint8)
  labels = rng.integers(0, CLASSES, num_examples).astype(np.int32)
  labels[:CLASSES] = np.arange(CLASSES)
  splits = sources.from_arrays({
      'train_images': images, 'train_labels': labels, 'test_images': images,
      'test_labels': labels})
  config = recipes.base().input
  config.source = 'arrays'
  data = input_pipeline.open_data(config, 0, splits=splits)
  mesh = sharding.create_mesh({'data': -1}, jax.devices()[:num_devices])
  made = evaluators.create(
      {'test': {'name': 'classification', 'split': 'test'}}, function, data,
      mesh, batch_size, lambda state, should_stop: state)
  return made, images, labels


class State:
  ema = None

  def variables(self):
    return {'params': jnp.zeros(())}


class Record:

  def write(self, step, row):
    self.row = row

  def requested(self):
    return None


@pytest.mark.parametrize('num_examples', [8, 37, 64, 65])
@pytest.mark.parametrize('batch_size, num_devices', [(1, 1), (16, 8), (64, 8)])
def test_sums_equal_those_of_numpy(num_examples, batch_size, num_devices):
  made, images, labels = suite(num_examples, batch_size, num_devices)
  row = made.run(State(), 1, Record(), Record())
  logits = (images[:, 0, :CLASSES, 0] // 32).astype(np.float64)
  # Of equal scores the lower class comes first: a stable sort of -logits.
  ranked = np.argsort(-logits, axis=1, kind='stable')
  own = logits[np.arange(num_examples), labels]
  loss = np.log(np.exp(logits).sum(1)) - own
  assert row['test/count'] == num_examples
  assert row['test/top1'] == np.mean(ranked[:, 0] == labels)
  assert row['test/top5'] == np.mean(
      (ranked[:, :5] == labels[:, None]).any(1))
  np.testing.assert_allclose(row['test/loss'], loss.mean(), rtol=1e-6)
  counts = [c['count'] for c in made.by_class['test'].values()]
  np.testing.assert_array_equal(counts, np.bincount(labels, minlength=CLASSES))


def test_nan_is_never_right():
  made, _, _ = suite(37, 8, 8, lambda v, x: predict(v, x) * jnp.nan)
  row = made.run(State(), 1, Record(), Record())
  assert row['test/top1'] == row['test/top5'] == 0 and row['test/count'] == 37


def test_a_lost_example_is_an_error(monkeypatch):
  made, _, _ = suite(37, 16, 1)
  whole = input_pipeline.eval_batches
  monkeypatch.setattr(input_pipeline, 'eval_batches',
                      lambda *a, **kw: list(whole(*a, **kw))[:-1])
  with pytest.raises(RuntimeError, match='evaluated 32/37'):
    made.run(State(), 1, Record(), Record())


def test_unknown_splits_kinds_and_metrics():
  made, _, _ = suite(8, 8, 1)
  made.check_metric('test/top1', with_ema=False)
  with runs.refused('Did you mean'):
    made.check_metric('test/top2', with_ema=False)
  with runs.refused('keep_best'):
    made.check_metric('test_ema/top1', with_ema=False)
  with runs.refused('does not divide'):
    suite(8, 12, 8)
