"""What a run writes beside its checkpoints, and whether it may resume there.

The folder may be remote (gs://bucket/run): epath reaches it through TensorFlow
where that is installed, else through fsspec (pip install gcsfs).
"""
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys

from etils import epath
import jax

from vit_jax import checkpoint
from vit_jax import config as config_lib
from vit_jax import metric_writer

CONFIG = 'config.json'
CLASSES = 'classes.json'  # names in the order of the labels
LAUNCHES = 'launches.jsonl'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy',
            'ml_collections', 'clu')


def as_json(config):
  """A ConfigDict as what json gives back: nested dicts, lists for tuples."""
  try:
    return json.loads(json.dumps(config.to_dict()))
  except (TypeError, ValueError) as e:
    raise ValueError(f'The config cannot be kept as JSON: {e}.\n'
                     'Let its values be numbers, text or tuples of them.'
                     ) from None


def prepare(workdir, config, overfit_batch=False):
  """Makes the folder, or checks that this config may resume what is in it.

  Args:
    workdir: the run's folder.
    config: ConfigDict.
    overfit_batch: whether it is a sanity check, which no run may resume.

  Returns:
    The resolved config as nested dicts, for `record`.

  Raises:
    ValueError: not writable, or a checkpoint of another experiment in it: the
      message names what differs.
  """
  make(workdir)
  path = epath.Path(workdir) / CONFIG
  new = as_json(config)
  if overfit_batch:
    new['overfit_batch'] = True
  if path.exists() and _has_checkpoint(workdir):
    what, how = config_lib.differences(json.loads(path.read_text()), new)
    if what:
      raise ValueError(
          f'{workdir} holds a run of another config ({"; ".join(what)}).\n'
          'Choose another --workdir, or --fork NEWDIR to go on from its '
          'checkpoint with the new settings.')
    for line in how:
      metric_writer.say(f'resuming with another {line}')
  return new


def bad_files(workdir):
  """Path of the list of unreadable images; other processes have their own."""
  process = jax.process_index()
  return os.path.join(
      workdir, f'bad_files_{process}.json' if process else 'bad_files.json')


def make(workdir):
  """Makes the folder, which several processes may do at once.

  Raises:
    ValueError: it cannot be made or written to.
  """
  # Its own name, so that no process removes the file of another.
  name = f'.write_test_{platform.node()}_{os.getpid()}'
  try:
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('')
    (folder / name).unlink()
  except Exception as e:
    # A remote file system fails with errors of its own.
    if isinstance(e, OSError) or metric_writer.is_remote(workdir):
      reason = getattr(e, 'strerror', None) or ' '.join(str(e).split())[:200]
      raise ValueError(f'Cannot write to the workdir {workdir}: {reason}.\n'
                       'Choose another --workdir.') from None
    raise


def record(workdir, resolved, class_names):
  """Writes config.json and classes.json, and a line about this launch."""
  if jax.process_index():
    return
  folder = epath.Path(workdir)
  for name, content in ((CONFIG, resolved), (CLASSES, list(class_names))):
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / name).write_text(text + '\n')
  # Written whole: remote files cannot be appended to.
  path = folder / LAUNCHES
  old = path.read_text() if path.exists() else ''
  launch = {'command': command_line(), **environment()}
  path.write_text(old + json.dumps(launch) + '\n')


def command_line():
  """The command as it was typed."""
  return shlex.join(sys.argv)


def environment():
  """Versions, devices and the source's revision, as a flat dict."""
  devices = jax.devices()
  return {
      'time': datetime.datetime.now(datetime.UTC).isoformat(
          timespec='seconds'),
      'python': platform.python_version(),
      **{name: version(name) for name in PACKAGES},
      'backend': jax.default_backend(),
      'device_kind': devices[0].device_kind,
      'device_count': len(devices),
      'process_count': jax.process_count(),
      'git': git_revision(),
  }


def version(package):
  """The installed version, or None."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def git_revision():
  """The source's commit, '+' if the tree differs from it; None outside git."""
  here = os.path.dirname(os.path.abspath(__file__))
  git = lambda *args: subprocess.run(
      ['git', '-C', here, *args], capture_output=True, text=True, check=True,
      timeout=10).stdout.strip()
  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _has_checkpoint(workdir):
  folder = epath.Path(workdir) / checkpoint.FOLDER
  return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())
