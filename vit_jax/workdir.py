"""What a run writes beside its checkpoints, and whether it may resume there."""
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys

import jax

from vit_jax import checkpoint
from vit_jax import config as config_lib

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
  path = os.path.join(workdir, CONFIG)
  try:
    os.makedirs(workdir, exist_ok=True)
    probe = os.path.join(workdir, f'.write_test_{os.getpid()}')
    with open(probe, 'w'):
      pass
    os.remove(probe)
  except OSError as e:
    raise ValueError(f'Cannot write to the workdir {workdir}: {e.strerror}.\n'
                     'Choose another --workdir.') from None
  new = as_json(config)
  if overfit_batch:
    new['overfit_batch'] = True
  if os.path.exists(path) and _has_checkpoint(workdir):
    with open(path) as f:
      what, how = config_lib.differences(json.load(f), new)
    if what:
      raise ValueError(
          f'{workdir} holds a run of another config ({"; ".join(what)}).\n'
          'Choose another --workdir, or --fork NEWDIR to go on from its '
          'checkpoint with the new settings.')
    for line in how:
      logging.info('resuming with another %s', line)
  return new


def bad_files(workdir):
  """Path of the list of unreadable images; other processes have their own."""
  process = jax.process_index()
  return os.path.join(
      workdir, f'bad_files_{process}.json' if process else 'bad_files.json')


def record(workdir, resolved, class_names):
  """Writes config.json and classes.json, and a line about this launch."""
  if jax.process_index():
    return
  for name, content in ((CONFIG, resolved), (CLASSES, list(class_names))):
    with open(os.path.join(workdir, name), 'w') as f:
      json.dump(content, f, indent=2, ensure_ascii=False)
      f.write('\n')
  with open(os.path.join(workdir, LAUNCHES), 'a') as f:
    f.write(json.dumps({'command': command_line(), **environment()}) + '\n')


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
  folder = os.path.join(workdir, checkpoint.FOLDER)
  return os.path.isdir(folder) and any(
      name.isdigit() for name in os.listdir(folder))
