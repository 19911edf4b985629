"""Made images, for smoke tests: JPEG files of many sizes, nothing on disk."""
import io

import numpy as np
from PIL import Image

from input_pipeline import sources

_CLASSES = ('blue', 'green', 'red')
_NUM = 48
# Shorter and longer side, like ImageNet's on a small scale.
_SIDES = (90, 240)


def open_splits(path, holdout, classes):
  """48 blurred images, each tinted by its class, as JPEG files.

  Args:
    path: must be ''.
    holdout: fraction that becomes 'val'.
    classes: class names that replace blue, green, red.

  Returns:
    sources.Splits, the same ones at every call.

  Raises:
    ValueError: a path, or names that do not fit.
  """
  if path:
    raise ValueError(
        f"input.source='made' reads no file, but input.path={path!r}.\n"
        'Leave it empty, or choose another source.')
  labels = np.arange(_NUM) % len(_CLASSES)
  files = [_jpeg(i, label) for i, label in enumerate(labels)]
  return sources.from_arrays(
      {'train_jpeg': np.frombuffer(b''.join(files), np.uint8),
       'train_offsets': np.cumsum([0, *map(len, files)]),
       'train_labels': labels, 'class_names': np.array(_CLASSES)},
      holdout=holdout, classes=classes, name='made')


def _jpeg(index, label):
  rng = np.random.default_rng(index)
  coarse = rng.integers(0, 160, (5, 5, 3))
  coarse[..., 2 - label] += 95
  image = Image.fromarray(coarse.astype(np.uint8)).resize(
      tuple(rng.integers(*_SIDES, 2).tolist()), Image.Resampling.BICUBIC)
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=75)
  return file.getvalue()
