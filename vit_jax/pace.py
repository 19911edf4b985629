"""How fast training goes, and how much of the time it waits for data."""
import contextlib
import time

# A share of waiting that is worth a word, in laps of a second or more.
WAITING, SECONDS = 0.1, 1.0
REMEDY = (
    'warning: training waited for data {:.0%} of the last {} steps.\n'
    '  vit-jax bench data says what this machine can feed. Remedies: vit-jax '
    'pack (smaller copies of the images), more CPUs, augment_on=device.')


class Pace:
  """A stopwatch over training steps that stands still in pauses."""

  def __init__(self, say=None):
    """Starts it.

    Args:
      say: called with REMEDY, once, after a lap with too much waiting. The
        first lap does not count: the queues fill in it.
    """
    self._say = say
    self._laps = 0
    self._reset()

  def next(self, iterator, last=None):
    """Returns next(iterator), adding up the time that the devices wait for it.

    Args:
      iterator: with a method `ready`: whether `next` has not to wait.
      last: array that the last step computes. Steps are dispatched ahead of the
        devices; waiting costs nothing before these are done with it.
    """
    if last is not None and not getattr(iterator, 'ready', lambda: True)():
      last.block_until_ready()
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
    if (self._say and self._laps and elapsed >= SECONDS
        and rates['data_wait'] > WAITING):
      self._say(REMEDY.format(rates['data_wait'], self._steps))
      self._say = None
    self._laps += 1
    self._reset()
    return rates

  def _reset(self):
    self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
