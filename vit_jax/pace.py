"""How fast training goes, and how much of the time it waits for data."""
import contextlib
import time


class Pace:
  """A stopwatch over training steps that stands still in pauses."""

  def __init__(self):
    self._reset()

  def next(self, iterator):
    """Returns next(iterator), adding up the time that it takes."""
    start = time.perf_counter()
    item = next(iterator)
    self._waited += time.perf_counter() - start
    self._steps += 1
    return item

  @contextlib.contextmanager
  def pause(self):
    """Time in this context (evaluation, saving) counts as no training."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  def lap(self, batch_size):
    """Images per second and the share of waiting since the last lap."""
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    rates = {'images_per_s': self._steps * batch_size / elapsed,
             'data_wait': self._waited / elapsed}
    self._reset()
    return rates

  def _reset(self):
    self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
