"""Accuracy of a model on labelled images, each counted exactly once.

  vit-jax evaluate MODEL --data FOLDER|FILE.npz|tfds:NAME|digits [--split val]

  vit-jax evaluate runs/flowers --data /data/flowers
  vit-jax evaluate b16 --data tfds:imagenet_v2:3.0.0 --split test

MODEL is a model file or the workdir of a run; its preprocessing is applied.
Classes are matched by name, whatever their order; the data may have fewer than
the model, which may then still answer with any of its own.

Flags:
  --data SPEC    as in `Data` of the README; a folder may be of any layout
  --split NAME   val, test, train, ...; all: of a folder without parts every
                 image. It is the default there, unless the model was trained
                 on this folder: then what its training held out
  --map FILE     JSON {"class of the data": "class of the model"}
  --batch N      images computed at once, over all devices (32)
  --png FILE     the confusion matrix (confusion.png)
  --json FILE    all numbers
"""
import argparse
import dataclasses
import json
import os

import jax
from matplotlib import figure
import numpy as np

import input_pipeline
from input_pipeline import sources
from vit_jax import choices
from vit_jax import evaluators
from vit_jax import model_file
from vit_jax import recipes
from vit_jax import sharding

LISTED = 20  # classes on the terminal
DRAWN = 40   # classes in a confusion matrix that can still be read


def main(argv):
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog='vit-jax evaluate', allow_abbrev=False)
  parser.add_argument('model')
  parser.add_argument('--data', required=True)
  for name in ('split', 'map', 'json'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--batch', type=int, default=model_file.BATCH_SIZE)
  parser.add_argument('--png', default='confusion.png')
  args = parser.parse_args(argv)
  model = model_file.load(args.model)
  data, split = open_data(model, args.data, args.split)
  evaluation = Evaluation(model, data, split, read_map(args.map), args.batch)
  result, confusion = evaluation.run(model)
  print(f'preprocessing  {model.describe_preprocessing()}\n'
        f'data           {args.data}, split {split} (there is: '
        f'{", ".join(data.evals)})\n'
        f'classes        {len(data.class_names):,} of the model\'s '
        f'{len(model.class_names):,}\n')
  for line in table(confusion, evaluation.names, len(data.class_names)):
    print(line)
  print(f'\n{describe(result, evaluation.num_examples)}')
  draw_confusion(confusion, evaluation.names, args.png)
  print(f'wrote {args.png}')
  if args.json:
    _write_json(args.json, {
        **result, 'split': split, 'classes': evaluation.names,
        'confusion': confusion.tolist()})
  return 0


def describe(result, num_examples):
  """'top-1 99.00%, ..., evaluated 500/500'."""
  unreadable = (f', {result["unreadable"]:,} unreadable'
                if result['unreadable'] else '')
  return (f'top-1 {result["top1"]:.2%}, top-5 {result["top5"]:.2%}, loss '
          f'{result["loss"]:.4f}, evaluated {result["count"]:,}/'
          f'{num_examples:,}{unreadable}')


def open_data(model, spec, split=''):
  """Opens data with a model's preprocessing.

  Args:
    model: `model_file.Model`.
    spec: see --data in the module's docstring.
    split: see --split there.

  Returns:
    (input_pipeline.Data, whose `evals` has every part, the split's name).

  Raises:
    ValueError, FileNotFoundError: no such data or split.
  """
  trained_on = model.facts.get('config', {}).get('input', {})
  section = recipes.base().input
  section.source, section.path = source_of(spec)
  section.pp = section.eval_pp = model.preprocessing['eval_pp']
  section.channels = model.preprocessing['channels']
  is_same = section.source == trained_on.get('source') and (
      os.path.realpath(section.path) == os.path.realpath(trained_on['path']))
  splits = None
  if is_same:
    section.holdout = trained_on['holdout']
  elif section.source in ('folder', 'arrays'):
    splits = sources.SOURCES[section.source](section.path, 0, ())
    if not splits.evals:
      splits = sources.Splits(splits.train, {'all': splits.train})
  data = input_pipeline.open_data(section, 0, splits)
  parts = {**data.evals, 'train': data.train}
  split = split or next(iter(parts))
  choices.check({'split': (split, parts)})
  return dataclasses.replace(data, evals=parts), split


def source_of(spec):
  """('folder', '/data/flowers') and the like, of --data.

  Raises:
    ValueError: it is nothing that can be read.
  """
  name, colon, path = spec.partition(':')
  if colon and name == 'tfds':
    return name, path
  if spec == 'digits':
    return spec, ''
  if os.path.isdir(spec):
    is_packed = os.path.isfile(os.path.join(spec, 'pack.json'))
    return 'packed' if is_packed else 'folder', spec
  if spec.endswith('.npz'):
    return 'arrays', spec
  raise ValueError(f'--data {spec} is no folder, .npz file, tfds:NAME or '
                   'digits.\nName data that are there.')


def read_map(path):
  """{class of the data: class of the model} from a JSON file; {} without."""
  if not path:
    return {}
  try:
    with open(path, encoding='utf-8') as f:
      names = json.load(f)
    if not isinstance(names, dict):
      raise ValueError('no object')
    return names
  except (OSError, ValueError) as e:
    raise ValueError(f'--map {path} is no JSON object that can be read ({e}).\n'
                     'Write {"class of the data": "class of the model"}.'
                     ) from None


def match(data_names, model_names, renamed):
  """For each class of the data the index of the model's class.

  Args:
    data_names, model_names: class names in the order of labels, of logits.
    renamed: {class of the data: class of the model}.

  Raises:
    ValueError: the model lacks some (the message lists them), or two are one.
  """
  for name in renamed:
    if name not in data_names:
      raise ValueError(choices.unknown(name, data_names, 'class of the data'))
  names = [renamed.get(n, n) for n in data_names]
  missing = [n for n in names if n not in set(model_names)]
  if missing:
    raise ValueError(
        f'The model has no class {_some(missing)}, which the data has.\nIt has '
        f'{_some(model_names)}; name what corresponds with --map FILE.')
  if len(set(names)) < len(names):
    twice = [n for n in set(names) if names.count(n) > 1]
    raise ValueError(f'Two classes of the data are the model\'s {twice[0]!r}.\n'
                     'Let --map name another class for each.')
  index = {name: i for i, name in enumerate(model_names)}
  return [index[n] for n in names]


class Evaluation:
  """A split of data, ready to evaluate models with the same classes on.

  Attributes:
    names: the model's classes, those of the data first, in their order.
    num_examples: of the split.
  """

  def __init__(self, model, data, split, renamed=None, batch_size=32):
    """Takes `open_data`'s result; see `match` for errors."""
    first = match(data.class_names, model.class_names, renamed or {})
    rest = sorted(set(range(len(model.class_names))) - set(first))
    # Logits in the order of the data's labels: no source has to be changed.
    order = np.array(first + rest)
    self.names = [model.class_names[i] for i in order]
    mesh = sharding.create_mesh({'data': -1})
    sharding.check_batch_size('--batch', batch_size, mesh)
    self._replicated = sharding.replicated(mesh)
    self._evaluator = evaluators.Classification(
        {'split': split},
        lambda variables, images: model.apply(variables, images)[:, order],
        dataclasses.replace(data, class_names=tuple(self.names)), mesh,
        batch_size)
    self.num_examples = self._evaluator.num_examples

  def run(self, model):
    """Returns ({name: value}, int64 [C, C]: images by class and answer)."""
    size = len(self.names)
    confusion = np.zeros((size, size), np.int64)

    def see(label, chosen, mask):
      np.add.at(confusion, (label[mask], chosen[mask]), 1)

    variables = jax.device_put(model.variables, self._replicated)
    return dict(self._evaluator.run(variables, see=see)), confusion


def table(confusion, names, num_classes):
  """Lines on the classes of the data, the lowest accuracy first."""
  rows = []
  for i in range(num_classes):
    count, right = confusion[i].sum(), confusion[i, i]
    wrong = confusion[i].copy()
    wrong[i] = 0
    taken = (f'{names[wrong.argmax()]} ({wrong.max()})' if wrong.any() else '')
    if count:
      rows.append((right / count, names[i], count, taken))
  rows.sort(key=lambda row: row[0])
  width = max(5, *(len(row[1]) for row in rows[:LISTED]))
  lines = [f'{"class":{width}} {"images":>7} {"top-1":>7}  '
           'most often taken for']
  lines += [f'{name:{width}} {count:7,} {top1:7.1%}  {taken}'.rstrip()
            for top1, name, count, taken in rows[:LISTED]]
  if len(rows) > LISTED:
    lines.append(f'and {len(rows) - LISTED:,} classes with '
                 f'{rows[LISTED][0]:.1%} and more; --json has all')
  return lines


def draw_confusion(confusion, names, path):
  """Draws rows of true and columns of predicted classes, in shares of rows.

  Of more than DRAWN classes those of the commonest confusions are drawn.

  Args:
    confusion: int [C, C].
    names: of the classes.
    path: of a PNG file.
  """
  keep = np.arange(len(names))
  title = 'images of each class, by answer'
  if len(names) > DRAWN:
    keep = _most_confused(confusion, DRAWN)
    title = (f'{len(keep)} of {len(names):,} classes, those of the commonest '
             f'confusions: {title}')
  counts = confusion[np.ix_(keep, keep)]
  share = counts / np.maximum(confusion[keep].sum(axis=1, keepdims=True), 1)
  side = 2.5 + 0.32 * len(keep)
  fig = figure.Figure(figsize=(side + 1, side), dpi=110, layout='constrained')
  ax = fig.subplots()
  image = ax.imshow(share, cmap='Blues', vmin=0, vmax=1)
  labels = [_shortened(names[i]) for i in keep]
  ax.set_xticks(range(len(keep)), labels, rotation=90, fontsize=8)
  ax.set_yticks(range(len(keep)), labels, fontsize=8)
  ax.set(xlabel='answer', ylabel='class')
  ax.set_title(title, fontsize=9)
  for i, j in zip(*np.nonzero(counts), strict=True):
    ax.text(j, i, counts[i, j], ha='center', va='center', fontsize=7,
            color='white' if share[i, j] > 0.5 else 'black')
  fig.colorbar(image, shrink=0.7, label='share of the class')
  save_figure(fig, path)


def _most_confused(confusion, number):
  """Indices of about so many classes: whole pairs, the commonest first."""
  both = np.triu(confusion + confusion.T, 1)
  keep = set()
  for flat in np.argsort(-both, axis=None, kind='stable'):
    keep |= {int(i) for i in np.unravel_index(flat, both.shape)}
    if len(keep) >= number:
      return np.array(sorted(keep))


def save_figure(fig, path):
  """Writes a PNG; ValueError where that is not possible."""
  try:
    fig.savefig(path, format='png')
  except OSError as e:
    raise ValueError(f'Cannot write {path}: {e.strerror}.\n'
                     'Name another file.') from None


def _shortened(name, length=24):
  name = name.split(',')[0]
  return name if len(name) <= length else name[:length - 1] + '…'


def _write_json(path, content):
  try:
    with open(path, 'w', encoding='utf-8') as f:
      json.dump(content, f, ensure_ascii=False)
  except OSError as e:
    raise ValueError(f'Cannot write {path}: {e.strerror}.\n'
                     'Name another file with --json.') from None


def _some(names):
  names = list(names)
  more = f' and {len(names) - 9} more' if len(names) > 9 else ''
  return ', '.join(map(repr, names[:9])) + more
