"""TPUs that are not here: the compiler in libtpu takes their description.

It needs no TPU, and says what a program would move, hold and compute there.
"""
import contextlib
import importlib.util
import os

_EXAMPLES = 'v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2'
_ENVIRONMENT = {
    # Neither ask Google's metadata server who we are, nor complain, at length,
    # that it did not say.
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
    # libtpu is loaded by one process at a time, for the sake of chips. We touch
    # none; and any program with JAX may hold the lock where libtpu is.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def devices(name):
  """Returns the devices of a topology, for a mesh to compile for.

  Args:
    name: chip and shape of the slice, 'v5p:2x2x1' or 'v5e:16x16'.

  Raises:
    ValueError: no libtpu, an unknown topology, or another process has libtpu to
      itself.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError('The compiler for TPUs (libtpu) is not installed.\n'
                     "Run: pip install -e '.[plan]'")
  import jax
  from jax.experimental import topologies
  try:
    with _environment():
      # JAX has one device a chip: a v4's two cores work as one.
      found = topologies.get_topology_desc(
          platform='tpu', topology_name=name,
          **({'chip_config_name': 'megacore'} if name.startswith('v4') else {}))
  except jax.errors.JaxRuntimeError as e:
    cause = str(e).splitlines()[0]
    if 'lockfile' in str(e):
      raise ValueError(
          'Another process has libtpu to itself (/tmp/libtpu_lockfile).\n'
          'Wait for it to end, or remove the file if there is none.') from None
    if 'INVALID_ARGUMENT' not in cause:
      raise
    raise ValueError(f'No topology {name!r}: {cause[:160].rstrip(".")}.\n'
                     f'Give chip and shape, such as {_EXAMPLES}.') from None
  return list(found.devices)


@contextlib.contextmanager
def _environment():
  """Variables that libtpu reads while it loads, where they are not set."""
  added = [key for key in _ENVIRONMENT if key not in os.environ]
  os.environ.update({key: _ENVIRONMENT[key] for key in added})
  try:
    yield
  finally:
    for key in added:
      del os.environ[key]
