"""Small files that spare a second scan of a data set.

They lie in $XDG_CACHE_HOME/vit_jax, by default ~/.cache/vit_jax, and may be
deleted at any time. A cached file is used only if the fingerprint in it (sizes
and times of what was scanned) is today's; a damaged one is made again.
"""
import hashlib
import os
import tempfile
import zipfile
import zlib

from absl import logging
import numpy as np


def folder():
  """The cache folder; it need not exist."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  return os.path.join(os.path.expanduser(home), 'vit_jax')


def path_of(kind, key):
  """The file for a scan of some `kind` ('tfrecord') of what `key` names."""
  digest = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
  return os.path.join(folder(), kind, digest + '.npz')


def load(path, fingerprint, names):
  """Arrays that were saved under the same fingerprint, or None.

  Args:
    path: from `path_of`.
    fingerprint: int64 array.
    names: of the arrays that must be there.

  Returns:
    {name: array} or None: no such file, another fingerprint, damaged.
  """
  try:
    # Anybody may have put the file there: data only, no code.
    with np.load(path, allow_pickle=False) as file:
      if np.array_equal(file['fingerprint'], fingerprint):
        return {name: file[name] for name in names}
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError,
          zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
    logging.warning('%s is damaged (%s): scanning again.', path, e)
  return None


def save(path, fingerprint, **arrays):
  """Writes arrays for `load`; a failure is logged, for it costs only time."""
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Another process may read or write the same file: complete, or not there.
    handle, new = tempfile.mkstemp(dir=os.path.dirname(path), suffix='.tmp')
    try:
      with os.fdopen(handle, 'wb') as f:
        np.savez(f, fingerprint=fingerprint, **arrays)
      os.replace(new, path)
    except BaseException:
      os.remove(new)
      raise
  except OSError as e:
    logging.warning('Cannot keep %s (%s).', path, e)
