"""The table of AugReg's release: 51,509 fine-tuned from 759 pre-trained models.

gs://vit_models/augreg/index.csv, a row for each fine-tuned checkpoint; columns
up to `sd` are of the pre-training, `adapt_*` of the fine-tuning. Accuracies are
fractions.
"""
import csv
import math

from vit_jax import choices

RELEASE = 'gs://vit_models/augreg'
COLUMNS = (
    'name', 'ds', 'epochs', 'lr', 'aug', 'wd', 'do', 'sd', 'best_val',
    'final_val', 'final_test', 'adapt_ds', 'adapt_lr', 'adapt_steps',
    'adapt_resolution', 'adapt_final_val', 'adapt_final_test', 'params',
    'infer_samples_per_sec', 'filename', 'adapt_filename')
TEXT = ('name', 'ds', 'aug', 'adapt_ds', 'filename', 'adapt_filename')


def read(path):
  """Returns the rows as dicts; numbers are floats, NaN where there is none.

  Raises:
    ValueError: not a table with these columns, or a number that is none.
  """
  try:
    with open(path, newline='', encoding='utf-8') as f:
      reader = csv.DictReader(f)
      missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
      if missing:
        raise ValueError(f'{path} has no column {missing[0]}.\n'
                         'Give the index.csv of the release.')
      return [_row(row, reader.line_num, path) for row in reader]
  except (UnicodeDecodeError, csv.Error):
    raise ValueError(f'{path} is no table in text.\n'
                     'Give the index.csv of the release.') from None


def _row(row, line, path):
  for column in COLUMNS:
    if column not in TEXT:
      try:
        row[column] = float(row[column] or 'nan')
      except (ValueError, TypeError):
        raise ValueError(
            f'{path}, line {line}: {column}={row[column]!r} is no number.\n'
            'Delete the file to have it downloaded again.') from None
    elif row[column] is None:
      raise ValueError(f'{path} ends within line {line}.\n'
                       'Delete the file to have it downloaded again.')
  return row


def select(rows, **wanted):
  """Rows whose columns equal what is wanted; '' and None want nothing.

  Raises:
    ValueError: a value that no row has; the message lists those there are.
  """
  for column, value in wanted.items():
    if value in ('', None):
      continue
    known = sorted({row[column] for row in rows}, key=str)
    if value not in known:
      raise ValueError(choices.unknown(value, known, column))
    rows = [row for row in rows if row[column] == value]
  return rows


def pretrained_only(rows):
  """One row for each pre-trained checkpoint."""
  return list({row['filename']: row for row in rows}.values())


def sort(rows, column):
  """Largest first, rows without a number last; ValueError if no column."""
  if column not in COLUMNS:
    raise ValueError(choices.unknown(column, COLUMNS, 'column'))
  if column in TEXT:
    return sorted(rows, key=lambda row: row[column])
  return sorted(rows, key=lambda row: (
      math.isnan(row[column]), -row[column] if row[column] == row[column]
      else 0))


def recommend(rows, ds='i21k', adapt_ds='', resolution=None):
  """{model: row}: the checkpoint that the papers' rules pick.

  Of each model the pre-trained one with the best final_val on its own data
  ("How to train your ViT?", section 4.5; the rule of vision_transformer's
  train.py). With adapt_ds, of its fine-tuned ones the one with the best
  adapt_final_val.
  """
  rows = select(rows, ds=ds)
  best = {}
  for row in sort(rows, 'final_val'):
    best.setdefault(row['name'], row)
  if not adapt_ds:
    return best
  rows = select(rows, adapt_ds=adapt_ds, adapt_resolution=resolution)
  tuned = {}
  for row in sort(rows, 'adapt_final_val'):
    name = row['name']
    if row['filename'] == best[name]['filename']:
      tuned.setdefault(name, row)
  return tuned
