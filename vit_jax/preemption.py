"""SIGTERM and the first Ctrl-C ask the run to save and stop.

Of several processes it is enough that one gets the signal: all stop at the same
poll, and so at the same step.
"""
import contextlib
import os
import signal

import jax

from vit_jax import distributed


class Stop:
  """Context that turns the two signals into a flag that the loop polls.

  The second signal of a kind does what it always did: Ctrl-C interrupts.
  """

  def __init__(self):
    self._shared = jax.process_count() > 1
    self._polls = 0
    self._name = None
    self._old = {}

  def __enter__(self):
    # With several processes SIGTERM belongs to JAX, which tells the others, and
    # caught it already while this process was compiling.
    numbers = [signal.SIGINT] + [signal.SIGTERM] * (not self._shared)
    for number in numbers:
      # A ValueError: this is not the main thread (a notebook, a test).
      with contextlib.suppress(ValueError):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def requested(self):
    """What asked for it, or None.

    All processes have to ask equally often, so only what they agree on may
    decide whether one asks.
    """
    if self._shared and not self._name:
      self._polls += 1
      if distributed.stop_agreed(self._polls):
        self._name = 'SIGTERM or Ctrl-C'
    return self._name

  def _handle(self, number, frame):
    del frame
    signal.signal(number, self._old[number])
    if self._shared:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._name = signal.Signals(number).name
