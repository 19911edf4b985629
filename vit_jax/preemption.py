"""SIGTERM and the first Ctrl-C ask the run to save and stop."""
import contextlib
import signal


class Stop:
  """Context that turns the two signals into a flag that the loop polls.

  The second signal of a kind does what it always did: Ctrl-C interrupts.
  """
  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self._name = None
    self._old = {}

  def __enter__(self):
    for number in self.SIGNALS:
      # A ValueError: this is not the main thread (a notebook, a test).
      with contextlib.suppress(ValueError):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def requested(self):
    """The signal's name, or None."""
    return self._name

  def _handle(self, number, frame):
    del frame
    self._name = signal.Signals(number).name
    signal.signal(number, self._old[number])
