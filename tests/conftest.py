"""Every test sees 8 fake CPU devices, and implicit rank promotion raises."""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '')
      + ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

import pytest  # noqa: E402

from tests import runs  # noqa: E402


@pytest.fixture(scope='session', autouse=True)
def _own_cache_folder(tmp_path_factory):
  """Indices of data sets go to a folder of the session, not to the user's."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """A compilation cache for the session: equal programs compile once."""
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:  # one for all workers
    base = base.parent
  folder = base / 'xla'
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope='session')
def finished(cache, tmp_path_factory):
  """A run of 4 steps, evaluated and saved at 2 and 4: (workdir, results)."""
  from vit_jax import train
  workdir = str(tmp_path_factory.mktemp('finished'))
  results = train.train_and_evaluate(runs.short(cache), workdir)
  return workdir, results
