"""Which devices JAX sees, and whether it overlooks a GPU."""
import glob
import os

import jax


def summary():
  """One line: backend, number and kind of devices, processes."""
  devices = jax.devices()
  processes = (f', process {jax.process_index()} of {jax.process_count()}'
               if jax.process_count() > 1 else '')
  return (f'backend {jax.default_backend()}, {len(devices)} x '
          f'{devices[0].device_kind}{processes}')


def nvidia_gpus():
  """Number of NVIDIA GPUs in the machine, whether JAX sees them or not."""
  return len(glob.glob('/proc/driver/nvidia/gpus/*')) or len(
      glob.glob('/dev/nvidia[0-9]*'))


def check():
  """Raises ValueError where JAX would train on the CPU beside a GPU."""
  asked_for_cpu = 'cpu' in (os.environ.get('JAX_PLATFORMS') or '').split(',')
  if jax.default_backend() == 'cpu' and nvidia_gpus() and not asked_for_cpu:
    raise ValueError(
        f'This machine has {nvidia_gpus()} NVIDIA GPU(s) and JAX sees none.\n'
        "Run: pip install -e '.[gpu]'   (or set JAX_PLATFORMS=cpu to train on "
        'the CPU)')


def enable_compilation_cache(folder):
  """Keeps compiled programs in a folder, so that a second run starts fast.

  Args:
    folder: '~' is expanded; '' keeps none.
  """
  if not folder:
    return
  jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
  # The defaults leave out programs that compile within a second.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
