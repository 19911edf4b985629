"""Images that cannot be read: which, why, and when there are too many."""
import contextlib
import json
import os
import threading

from absl import logging

TRAIN = 'train'


class BadImages:
  """What could not be read so far, by part of the data; thread-safe.

  Each process knows those that it met itself. That an image is listed changes
  no batch: whatever asks for it would fail again, so it is not asked.
  """

  def __init__(self, max_fraction):
    """`max_fraction`: of the training images, in [0, 1); see `add`."""
    self._max_fraction = max_fraction
    self._reasons = {}  # {part: {index: reason}}
    self._paths = {}  # {part: {path: reason}}
    self._lock = threading.Lock()
    self._saved = 0

  @property
  def paths(self):
    """{part: {path: reason}}, of parts with unreadable images."""
    with self._lock:
      return {part: dict(paths) for part, paths in self._paths.items()}

  def __len__(self):
    with self._lock:
      return sum(map(len, self._reasons.values()))

  def knows(self, part, index):
    """Whether an example of a part of the data was added before."""
    return index in self._reasons.get(part, ())

  def add(self, part, source, index, reason):
    """Lists an example and logs it, once.

    Args:
      part: 'train' or a key of `Data.evals`.
      source: the sources.Source of that part.
      index: of the example.
      reason: one line without a full stop, see `messages.one_line`.

    Raises:
      ValueError: more than the allowed fraction of the training images.
    """
    with self._lock:
      known = self._reasons.setdefault(part, {})
      if index in known:
        return
      path = source.describe(index)
      known[index] = reason
      self._paths.setdefault(part, {})[path] = reason
      if part == TRAIN and (
          len(known) > self._max_fraction * source.num_examples):
        raise ValueError(
            f'{path} cannot be read: {reason}; with it {len(known):,} of '
            f'{source.num_examples:,} training images, more than '
            f'input.max_bad_fraction={self._max_fraction}.\n'
            'Repair or remove them (`vit-jax check-data` lists all; too small '
            'ones: resize before the crop), or allow more.')
    logging.warning(
        '%s cannot be read (%s): %s.', path, reason,
        'another image takes its place' if part == TRAIN else 'left out')

  def save(self, path):
    """Writes `paths` as JSON if there are new ones, with those of before.

    Args:
      path: of the file. A resumed run meets only some of the images again, so
        what the file lists stays.
    """
    number = len(self)
    if number == self._saved:
      return
    listed = {}
    with contextlib.suppress(OSError, ValueError), open(
        path, encoding='utf-8') as f:
      listed = json.load(f)
    listed = listed if isinstance(listed, dict) else {}
    for part, paths in self.paths.items():
      old = listed.get(part)
      listed[part] = {**(old if isinstance(old, dict) else {}), **paths}
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
      json.dump(listed, f, indent=1, sort_keys=True, ensure_ascii=True)
    os.replace(path + '.tmp', path)
    self._saved = number

  @contextlib.contextmanager
  def saved_to(self, path):
    """Saves at the end of the `with` block, however it ends."""
    try:
      yield self
    finally:
      self.save(path)
