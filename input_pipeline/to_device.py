"""Host batches to global arrays, ahead of the step that needs them."""
import queue
import threading
import weakref

import jax


def prefetch(iterator, sharding, size=2):
  """Puts the next batches on the devices while the current one is used.

  Args:
    iterator: of dicts of numpy arrays, this process's part of each batch.
    sharding: a jax.sharding.Sharding for every array, over its leading axis,
      or a function from array to sharding.
    size: how many batches wait, at most; one more is in the making.

  Returns:
    Prefetch, an iterator of dicts of global jax.Array. An exception of
    `iterator` is raised by `next`, after the batches before it.
  """
  return Prefetch(iterator, sharding, size)


class Prefetch:
  """See `prefetch`. Also a context manager that ends with `close()`."""

  def __init__(self, iterator, sharding, size):
    if size < 1:
      raise ValueError(f'There are to be {size} batches ahead.\n'
                       'Make it 1 or more; 2 is enough in most cases.')
    self._queue = queue.Queue(size)
    stop = threading.Event()
    # The thread does not know this object: if the consumer forgets it, or the
    # interpreter exits, the finalizer ends the thread.
    thread = threading.Thread(
        target=_work, args=(iterator, sharding, self._queue, stop),
        name='prefetch', daemon=True)
    self.close = weakref.finalize(self, _close, thread, self._queue, stop)
    thread.start()

  def __iter__(self):
    return self

  def __next__(self):
    if not self.close.alive:
      raise StopIteration
    batch, error = self._queue.get()
    if batch is None:
      self.close()
      raise error
    return batch

  def ready(self):
    """Whether a batch, or the end, is there to take."""
    return not self._queue.empty()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def _work(iterator, sharding, batches, stop):
  """Fills the queue with (batch, None), at the end with (None, exception)."""

  def put(item):
    while not stop.is_set():
      try:
        return batches.put(item, timeout=0.1)
      except queue.Full:
        pass

  def to_global(array):
    return jax.make_array_from_process_local_data(
        sharding(array) if callable(sharding) else sharding, array)

  try:
    for batch in iterator:
      if stop.is_set():
        break
      put(({k: to_global(v) for k, v in batch.items()}, None))
    put((None, StopIteration()))
  except BaseException as e:  # whatever it is, it is the consumer's to handle
    put((None, e))
  finally:
    if hasattr(iterator, 'close'):
      iterator.close()


def _close(thread, batches, stop):
  stop.set()
  while not batches.empty():  # frees device memory
    batches.get_nowait()
  if thread is not threading.current_thread():
    # Bounded: a read that hangs must not keep the interpreter from exiting.
    thread.join(timeout=10)
