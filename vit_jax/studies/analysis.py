"""What trials show: distributions of errors, and differences with intervals.

Errors are fractions. A trial that diverged has none (None, NaN) and stays one
of those that were tried.
"""
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_SEED = 0


class Difference(NamedTuple):
  """A paired difference of two arms.

  Attributes:
    mean: of first - second.
    low, high: bootstrap interval of it, 95 %.
    visible: the smallest true difference that this many pairs show in 80 % of
      repetitions, from their spread (2.8 standard errors).
    pairs: how many pairs both have.
    lost: pairs left out, because one of the two diverged.
  """
  mean: float
  low: float
  high: float
  visible: float
  pairs: int
  lost: int

  @property
  def resolved(self):
    """Whether the interval leaves out zero, and the difference was visible."""
    return not self.low <= 0 <= self.high and abs(self.mean) >= self.visible / 2


def edf(errors, at):
  """Share of all trials with an error up to each of `at`, float64 [len(at)]."""
  errors = finite(errors)
  return np.searchsorted(np.sort(errors), np.asarray(at), 'right') / max(
      len(errors), 1)


def finite(errors):
  """float64 array; what diverged is infinite."""
  errors = np.array([np.inf if e is None else e for e in errors], float)
  return np.where(np.isnan(errors), np.inf, errors)


def edf_band(errors, at):
  """(low, high), float64 [len(at)] each: 95 % of bootstrapped EDFs."""
  errors = finite(errors)
  if not len(errors):
    return np.zeros(len(at)), np.zeros(len(at))
  random = np.random.default_rng(_SEED)
  drawn = np.sort(random.choice(errors, (1000, len(errors))), axis=1)
  curves = [np.searchsorted(row, at, 'right') / len(errors) for row in drawn]
  return np.quantile(curves, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)


def within(errors, points):
  """Share of all trials at most that many points above the best of them.

  Args:
    errors: fractions.
    points: percentage points.
  """
  errors = finite(errors)
  best = errors.min(initial=np.inf)
  if not np.isfinite(best):
    return 0.0
  return float(np.mean(errors <= best + points / 100 + 1e-9))


def best_range(values, errors, share=0.25):
  """(low, high) of where the best value of a hyperparameter lies.

  The best of a quarter of the trials, drawn again and again, 95 % of the time
  ("On Network Design Spaces ...", arXiv 1905.13214, and pycls).
  """
  values, errors = np.asarray(values, float), finite(errors)
  random = np.random.default_rng(_SEED)
  count = max(round(share * len(errors)), 1)
  rows = random.integers(len(errors), size=(RESAMPLES, count))
  best = values[rows[np.arange(RESAMPLES), errors[rows].argmin(axis=1)]]
  return tuple(np.quantile(best, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))


def mean_interval(values):
  """(mean, low, high), a bootstrap interval of 95 %; NaN without values."""
  values = np.asarray(values, float)
  values = values[np.isfinite(values)]
  if not len(values):
    return (np.nan,) * 3
  random = np.random.default_rng(_SEED)
  means = random.choice(values, (RESAMPLES, len(values))).mean(axis=1)
  low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
  return float(values.mean()), float(low), float(high)


def paired(first, second):
  """The Difference of errors of two arms, {point: error} each.

  Points that only one of the two has are ignored.
  """
  points = sorted(set(first) & set(second))
  pairs = np.array([(first[p], second[p]) for p in points], float).reshape(
      -1, 2)
  kept = pairs[np.isfinite(pairs).all(axis=1)]
  differences = kept[:, 0] - kept[:, 1]
  mean, low, high = mean_interval(differences)
  if len(differences) < 2:  # one pair tells nothing about the spread
    low, high, visible = -np.inf, np.inf, np.inf
  else:
    visible = 2.8 * differences.std(ddof=1) / np.sqrt(len(differences))
  return Difference(mean, low, high, float(visible), len(kept),
                    len(pairs) - len(kept))


def errors_of(rows, arm, column='test_error'):
  """{point: error} of an arm; NaN where a trial diverged."""
  return {row['point']: np.nan if row['diverged'] else row[column]
          for row in rows if row['arm'] == arm}
