"""The likeliest classes of images.

  vit-jax predict MODEL IMAGE_OR_FOLDER... [--top 5] [--format table]

  vit-jax predict runs/flowers photo.jpg holiday/ --top 3
  vit-jax predict model.safetensors photos/ --format jsonl --out photos.jsonl

MODEL is a model file or the workdir of a run. Folders are searched with all
below them, in sorted order. Images that cannot be read are named on stderr and
skipped; exit code 2 only if none can be read.

Flags:
  --top N        classes an image (5)
  --format F     table | jsonl | csv; an image a row: table is for people
  --batch N      images computed at once (32); one compilation in any case
  --out FILE     where to write (the terminal)
"""
import argparse
import contextlib
import csv
import json
import sys

import numpy as np

from vit_jax import image_files
from vit_jax import model_file

FORMATS = ('table', 'jsonl', 'csv')


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax predict', allow_abbrev=False)
  parser.add_argument('model')
  parser.add_argument('images', nargs='+')
  parser.add_argument('--top', type=int, default=5)
  parser.add_argument('--format', choices=FORMATS, default='table')
  parser.add_argument('--batch', type=int, default=model_file.BATCH_SIZE)
  parser.add_argument('--out', default='')
  args = parser.parse_args(argv)
  model = model_file.load(args.model)
  check_top(args.top, model)
  reader = image_files.Reader(model, image_files.find(args.images), args.batch)
  with opened(args.out) as file:
    write = WRITERS[args.format](file, args.top)
    for paths, images in reader:
      probabilities = model.predict(images, args.batch)
      for path, row in zip(paths, probabilities, strict=True):
        write(path, top(row, model.class_names, args.top))
  print(f'predicted {reader.summary()}', file=sys.stderr)
  return 0


def check_top(number, model):
  """Raises ValueError unless that many classes can be named."""
  classes = len(model.class_names)
  if not 1 <= number <= classes:
    raise ValueError(f'--top {number}, and the model has {classes} classes.\n'
                     f'Give 1 to {classes}.')


def top(probabilities, class_names, number):
  """[(class name, probability)] of the likeliest, the likeliest first."""
  # Stable: among equals the first class, as argmax has it.
  best = np.argsort(-probabilities, kind='stable')[:number]
  return [(class_names[i], float(probabilities[i])) for i in best]


@contextlib.contextmanager
def opened(path):
  """The file to write to, or the terminal where there is no path."""
  if not path:
    yield sys.stdout
    return
  try:
    file = open(  # noqa: SIM115 - closed below
        path, 'w', encoding='utf-8', newline='')
  except OSError as e:
    raise ValueError(f'Cannot write {path}: {e.strerror}.\n'
                     'Name another file with --out.') from None
  with file:
    yield file


def _table(file, number):
  del number

  def write(path, found):
    file.write(f'{path}\n' + ''.join(
        f'  {p:7.2%}  {name}\n' for name, p in found))

  return write


def _jsonl(file, number):
  del number

  def write(path, found):
    row = {'path': path, 'top': [
        {'class': name, 'probability': round(p, 6)} for name, p in found]}
    file.write(json.dumps(row, ensure_ascii=False) + '\n')

  return write


def _csv(file, number):
  writer = csv.writer(file)
  writer.writerow(['path', *(
      f'{what}_{i}' for i in range(1, number + 1)
      for what in ('class', 'probability'))])

  def write(path, found):
    writer.writerow([path, *(
        cell for name, p in found for cell in (name, f'{p:.6f}'))])

  return write


WRITERS = dict(zip(FORMATS, (_table, _jsonl, _csv), strict=True))
