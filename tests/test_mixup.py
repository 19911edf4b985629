"""Mixing: laws of the draws, and the mixed batch against numpy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vit_jax import losses
from vit_jax.augment import mixup

H, W = 24, 40
N = 4000


@functools.cache
def drawn(op):
  """Draws of N batches: weights [N, ., .], shares [N], as numpy."""
  keys = jax.vmap(lambda i: jax.random.fold_in(
      jax.random.key(0, impl='threefry2x32'), i))(jnp.arange(N))
  return jax.tree.map(np.asarray, jax.jit(
      jax.vmap(lambda key: op.draw(key, H, W)))(keys))


def p_value(sample, law):
  return stats.kstest(sample, law).pvalue


@pytest.mark.parametrize('alpha', [0.2, 0.8])
def test_lambda_of_mixup_is_the_larger_part_of_a_beta(alpha):
  _, share = drawn(mixup.Mixup(alpha))
  beta = stats.beta(alpha, alpha)
  # P(max(a, 1 - a) < x) = P(1 - x < a < x). Nearer to 1 than float32 can be
  # there is a part of the law; Kolmogorov-Smirnov up to there, p = 0.001.
  x = np.linspace(0.5, 0.9999, 500)
  law = beta.cdf(x) - beta.cdf(1 - x)
  found = np.searchsorted(np.sort(share), x) / N
  assert np.abs(found - law).max() < 1.95 / np.sqrt(N)
  assert share.min() >= 0.5 and p_value(share, beta.cdf) < 1e-9


def test_share_of_cutmix_is_the_area_that_stays():
  weight, share = drawn(mixup.CutMix(1.0))
  assert set(np.unique(weight)) == {0, 1}
  np.testing.assert_allclose(weight.mean(axis=(1, 2)), share, atol=1e-6)
  # The published rule, with draws of its own.
  rng = np.random.default_rng(1)
  expected, covered = [], np.zeros((H, W))
  for lam in rng.beta(1, 1, 5000):
    half_h, half_w = (int(s * np.sqrt(1 - lam)) // 2 for s in (H, W))
    y, x = rng.integers(H), rng.integers(W)
    box = [np.clip(v, 0, s) for v, s in (
        (y - half_h, H), (y + half_h, H), (x - half_w, W), (x + half_w, W))]
    covered[slice(*box[:2]), slice(*box[2:])] += 1 / 5000
    expected.append(1 - (box[1] - box[0]) * (box[3] - box[2]) / (H * W))
  assert stats.ks_2samp(share, expected).pvalue > 1e-3
  np.testing.assert_allclose(1 - weight.mean(axis=0), covered, atol=0.05)
  assert covered[H // 2, W // 2] > covered[0, 0] + 0.1


def test_one_of_the_two_is_applied_to_each_batch():
  weight, share = drawn(mixup.MixupCutMix(0.8, 1.0))
  is_mixup = (weight == weight[:, :1, :1]).all(axis=(1, 2)) & (
      weight[:, 0, 0] > 0) & (weight[:, 0, 0] < 1)
  assert abs(is_mixup.mean() - 0.5) < 4 * 0.5 / np.sqrt(N)
  # Not the larger part of the two, as in the paper's code.
  assert p_value(share[is_mixup], stats.beta(0.8, 0.8).cdf) > 1e-3
  np.testing.assert_allclose(weight.mean(axis=(1, 2)), share, atol=1e-6)


@pytest.mark.parametrize('op', [
    mixup.Mixup(0.5), mixup.CutMix(1.0), mixup.MixupCutMix(0.8, 1.0)])
def test_the_partner_is_the_example_before(op):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(8, H, W, 3)).astype(np.float32)
  labels = np.arange(8) % 5
  key = jax.random.key(3, impl='threefry2x32')
  weight, share = op.draw(key, H, W)
  one_hot = losses.smoothed(jnp.asarray(labels), 5, 0)
  mixed, soft = jax.jit(mixup.mix)(images, one_hot, weight, share)
  weight = np.broadcast_to(np.float64(weight), (H, W))[..., None]
  for i in range(8):
    expected = weight * images[i] + (1 - weight) * images[i - 1]
    np.testing.assert_allclose(mixed[i], expected, atol=1e-6)
    expected = np.zeros(5)
    expected[labels[i]] += share
    expected[labels[i - 1]] += 1 - share
    np.testing.assert_allclose(soft[i], expected, atol=1e-6)


def test_smoothing_commutes_with_mixing():
  one_hot = losses.smoothed(jnp.arange(4), 4, 0)
  smooth = losses.smoothed(jnp.arange(4), 4, 0.1)
  mix = lambda x: 0.7 * x + 0.3 * jnp.roll(x, 1, axis=0)
  np.testing.assert_allclose(
      losses.smoothed(mix(one_hot), 4, 0.1), mix(smooth), atol=1e-6)
  # on = 1 - e + e/K, off = e/K
  np.testing.assert_allclose(smooth[0], [0.925, 0.025, 0.025, 0.025], atol=1e-6)
