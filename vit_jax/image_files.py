"""Image files that someone names, for a model: found, read, some unreadable."""
import concurrent.futures
import itertools
import os
import sys

import numpy as np

from input_pipeline import folder
from input_pipeline import pipeline


def find(names):
  """Lists image files, folders with all that is below them.

  Args:
    names: files, in any format, or folders, of which image files are taken.

  Returns:
    Paths: those of a folder sorted, in the order of `names`.

  Raises:
    ValueError: one does not exist, or there is no image in any.
  """
  found = []
  for name in names:
    if os.path.isdir(name):
      found += sorted(_below(name))
    elif os.path.isfile(name):
      found.append(name)
    else:
      raise ValueError(f'There is no file or folder {name}.\n'
                       'Name images, or folders that hold some.')
  if not found:
    raise ValueError(f'There are no images in {", ".join(names)}.\n'
                     'Name JPEG, PNG, GIF, BMP or WebP files, or folders that '
                     'hold some.')
  return found


def _below(name):
  for path, folders, _ in os.walk(name):
    folders[:] = [f for f in folders if not f.startswith('.')]
    with os.scandir(path) as entries:
      yield from (e.path for e in entries if folder.looks_like_image(e))


class Reader:
  """Reads image files in batches; iterating yields (paths, images).

  The images, uint8 [n, H, W, C] with n <= batch_size, are read ahead by
  threads. One that cannot be read is named on stderr and left out.

  Attributes:
    unreadable: how many were left out so far.
  """

  def __init__(self, model, paths, batch_size):
    """`model`: `model_file.Model`, whose preprocessing is applied."""
    if batch_size < 1:
      raise ValueError(f'--batch {batch_size} is too small.\nGive 1 or more.')
    self._model, self._paths, self._batch_size = model, paths, batch_size
    self.unreadable = 0

  def __iter__(self):
    """Raises ValueError at the end if none could be read."""
    size = self._batch_size
    chunks = [self._paths[i:i + size]
              for i in range(0, len(self._paths), size)]
    with concurrent.futures.ThreadPoolExecutor(pipeline.cpu_count()) as pool:
      # The next chunk is read while the caller works on this one.
      reading = [pool.map(self._read, chunk) for chunk in chunks[:1]]
      for chunk, following in itertools.zip_longest(chunks, chunks[1:]):
        if following:
          reading.append(pool.map(self._read, following))
        good = []
        for path, (image, why) in zip(chunk, reading.pop(0), strict=True):
          if why:
            self.unreadable += 1
            print(f'skipped: {why}', file=sys.stderr)
          else:
            good.append((path, image))
        if good:
          paths, images = zip(*good, strict=True)
          yield paths, np.stack(images)
    if self.unreadable == len(self._paths):
      raise ValueError(f'None of the {self.unreadable} images can be read.\n'
                       'The lines above say why.')

  def _read(self, path):
    """(image, '') or (None, why not)."""
    try:
      return self._model.preprocess_one(path), ''
    except ValueError as e:
      return None, str(e).split('\n')[0]

  def summary(self):
    """'3 images', or '2 of 3 images; 1 cannot be read'."""
    n = len(self._paths)
    if not self.unreadable:
      return f'{n:,} images'
    return (f'{n - self.unreadable:,} of {n:,} images; {self.unreadable:,} '
            'cannot be read')
