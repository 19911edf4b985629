"""Mutated configs, command lines and data files: two lines or a good start.

  python -m tests.fuzz [--cases 500] [--seed 0] [--only KIND]

Each case goes through the real entry points up to just before the compile. It
fails if it gives a traceback (exit code 1), an exception that is no message of
two lines, or nothing within a minute. A case is a function of (seed, number).
"""
import argparse
import collections
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
import types
from unittest import mock

import jax
import numpy as np
from PIL import Image

import input_pipeline
from input_pipeline import folder
from tests import runs
from vit_jax import config as config_lib
from vit_jax import errors
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train

SECONDS = 60
CONFIG_VALUES = (
    'None', 'float("nan")', 'float("inf")', '-1', '-0.5', '0', '0.0', '1',
    '0.5', '2**31', '2**70', '1e300', '1e-320', '""', '"abc"', '"(" * 500',
    '()', '("abc",)', '(1, None)', '[1]', '{}', 'dict(a=1)', 'dict(name="x")',
    'True', 'b"x"', 'object()')
OVERRIDES = (
    '', 'nan', 'inf', '-inf', '-1', '0', '1', '0.5', '1e30', '-0.5', '2**3',
    '99999999999999999999', '2147483648', '1e-320', 'abc', 'None', 'True', '()',
    '(1,2)', '[]', '{}', "('a',)", "('(',)", '/', '~', '../..', 'x' * 5000,
    'ä', "'", '\\', '%s', '{0}')
CELLS = ('', 'cat', 'dog', '-1', 'nan', '"', '../x.png', '/etc/passwd', 'ä',
         'x' * 5000, 'train', 'val', 'tset', '\x00', 'cat/0.png', '.', '\ufeff')


class Reached(BaseException):
  """Everything before the compile went well."""


class Hang(BaseException):
  """A case took longer than SECONDS."""


@contextlib.contextmanager
def stopping_before_the_compile():
  """The step is traced and not compiled, the state not even initialised."""
  real = train.train_state.init

  def init(*args):
    _, abstract = real(*args)
    return lambda key: types.SimpleNamespace(step=0), abstract

  def compile_step(run):
    with sharding.tracing(run.mesh):
      jax.eval_shape(run.step, *run.abstract_args)
    raise Reached

  with mock.patch.object(train.train_state, 'init', init), \
      mock.patch.object(train.experiment.Experiment, 'compile_step',
                        compile_step):
    yield


@contextlib.contextmanager
def alarm(seconds):
  def ring(*_):
    raise Hang
  old = signal.signal(signal.SIGALRM, ring)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def fault(error):
  """What is wrong with an exception as a message, or None."""
  if isinstance(error, Reached):
    return None
  if isinstance(error, Hang):
    return f'hangs {where(error)}'
  lines = str(error).split('\n')
  if not errors.is_message(error):
    return f'{type(error).__name__} {where(error)}: {lines[0][:100]}'
  if len(lines) != 2 or not all(map(str.strip, lines)):
    return f'{len(lines)} lines {where(error)}: {lines[:3]}'
  return None


def where(error):
  """The innermost frame in our own code."""
  found = ''
  for frame in traceback.extract_tb(error.__traceback__):
    if '/vit_jax/' in frame.filename or '/input_pipeline/' in frame.filename:
      found = f'{os.path.basename(frame.filename)}:{frame.lineno}'
  return found


def start(argv):
  """Starts the program on a command line; returns what is wrong, or None."""
  raised = []
  real = train.exit_code
  def exit_code(error):
    raised.append(error)
    return real(error)
  output = io.StringIO()
  try:
    with stopping_before_the_compile(), alarm(SECONDS), \
        mock.patch.object(train, 'exit_code', exit_code), \
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
      code = train.main(argv)
  except BaseException as e:
    return fault(e)
  if raised:
    return fault(raised[0])
  return f'exit code {code}'


def first_batches(section):
  """Opens data and reads a batch of each part; returns what is wrong."""
  try:
    with alarm(SECONDS):
      data = input_pipeline.open_data(section, 0)
      next(input_pipeline.train_batches(
          data, global_batch_size=4, data_seed=0))
      for split in data.evals:
        list(input_pipeline.eval_batches(data, split, global_batch_size=4))
  except BaseException as e:
    return fault(e)


def base_flags(workdir):
  return [f'--workdir={workdir}/run', '--config.model.scan',
          '--config.compilation_cache=']


def digits(args):
  return runs.config('', args)


def leaves(rng):
  """The paths of a variant of the digits config, and the variant."""
  args = rng.choice(['', 'stem=patchify,optimizer=sgd'])
  return sorted(config_lib.flatten(digits(args).to_dict())), args


def typo(rng, text):
  """Drops, doubles or swaps a character."""
  i = rng.randrange(len(text))
  return rng.choice([
      text[:i] + text[i + 1:], text[:i] + text[i] + text[i:],
      text[:i] + text[i + 1:i + 2] + text[i] + text[i + 2:], text + '.x'])


def override(rng, workdir):
  """One or two overrides of wrong type, out of range or misspelt."""
  paths, args = leaves(rng)
  argv = [f'--config={runs.DIGITS}:{args}', *base_flags(workdir)]
  for _ in range(rng.choice([1, 1, 2])):
    path = rng.choice(paths)
    if rng.random() < 0.15:
      path = typo(rng, path)
    elif rng.random() < 0.1:
      path = path.rpartition('.')[0] or path
    value = rng.choice(OVERRIDES)
    if rng.random() < 0.1:  # another unit of a duration
      path = rng.choice(['total', 'log.every', 'eval.every', 'checkpoint.every',
                         'schedule.warmup', 'schedule.cooldown', 'ema.every'])
      path += rng.choice(['_steps', '_epochs', '_examples', '_percent', '_x'])
    argv.append(f'--config.{path}={value}')
  return argv, start(argv)


def config(rng, workdir):
  """A config file with a value of any type, a key less or a key more."""
  paths, args = leaves(rng)
  lines = ['import importlib.util',
           'spec = importlib.util.spec_from_file_location(',
           f'    "digits", {runs.DIGITS!r})',
           'module = importlib.util.module_from_spec(spec)',
           'spec.loader.exec_module(module)', '',
           'def get_config(args=None):', f'  c = module.get_config({args!r})',
           '  with c.unlocked(), c.ignore_type():']
  for _ in range(rng.choice([1, 1, 2])):
    path = rng.choice(paths)
    if rng.random() < 0.2:  # whole sections, too
      path = path.rpartition('.')[0] or path
    *parents, leaf = path.split('.')
    section = 'c' + ''.join(f'[{p!r}]' for p in parents)
    lines.append('    ' + rng.choice(
        [f'{section}[{leaf!r}] = {rng.choice(CONFIG_VALUES)}'] * 8
        + [f'del {section}[{leaf!r}]', f'{section}["extra"] = 1']))
  path = os.path.join(workdir, 'mutated.py')
  with open(path, 'w') as f:
    f.write('\n'.join([*lines, '  return c', '']))
  return lines[9:], start([f'--config={path}', *base_flags(workdir)])


def section(source, path, channels=3):
  config = recipes.base().input
  config.update(dict(
      source=source, path=path, holdout=0.3, channels=channels,
      pp='decode|resize(8)', eval_pp='decode|resize(8)'))
  return config


def images(rng, count=12):
  """Encoded images of several formats and sizes, as {name: bytes}."""
  noise = np.random.default_rng(rng.randrange(2**32))
  files = {}
  for i in range(count):
    kind = rng.choice(['jpeg', 'png', 'gif', 'bmp', 'webp'])
    pixels = noise.integers(
        0, 256, (rng.randrange(1, 20), rng.randrange(1, 20), 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    files[f'{("cat", "dog")[i % 2]}/{i}.{kind}'] = stream.getvalue()
  return files


def damaged(rng, content):
  """Bits flipped, cut off, lengthened, or of another format."""
  how = rng.choice(['flip', 'flip', 'cut', 'head', 'empty', 'junk', 'repeat'])
  if how == 'flip':
    content = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif how == 'cut':
    content = content[:rng.randrange(len(content))]
  elif how == 'head':
    magic = rng.choice([b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'GIF89a',
                        b'BM', b'RIFF\0\0\0\0WEBP', b'PK\3\4', b'II*\0'])
    content = magic + content[len(magic):]
  elif how == 'empty':
    content = b''
  elif how == 'junk':
    content = rng.randbytes(rng.randrange(1, 200))
  else:
    content = content + content
  return bytes(content)


def write(workdir, files):
  for name, content in files.items():
    path = os.path.join(workdir, 'data', name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
      f.write(content)
  return os.path.join(workdir, 'data')


def read_folder(rng, path):
  """With TensorFlow or without."""
  with mock.patch.object(folder.Files, 'in_memory', rng.random() < 0.5):
    return first_batches(section('folder', path, rng.choice([1, 3])))


def image_file(rng, workdir):
  """A folder in which some files are damaged."""
  files = images(rng)
  for name in rng.sample(sorted(files), rng.choice([1, 2, 12])):
    files[name] = damaged(rng, files[name])
  return list(files), read_folder(rng, write(workdir, files))


def labels_csv(rng, workdir):
  """A table with wrong cells, columns, quotes or bytes."""
  files = images(rng)
  header = ['path', 'label', 'split'][:rng.choice([2, 3])]
  rows = [header] + [
      [name, name[:3], 'train' if i % 3 else 'val'][:len(header)]
      for i, name in enumerate(files)]
  for _ in range(rng.choice([1, 2, 5])):
    row = rng.choice([rows[0], *rng.sample(rows, 3)])
    how = rng.choice(['cell', 'cell', 'cell', 'drop', 'add', 'clear'])
    if how == 'cell' and row:
      row[rng.randrange(len(row))] = rng.choice(CELLS)
    elif how == 'drop' and row:
      row.pop()
    elif how == 'add':
      row.append(rng.choice(CELLS))
    else:
      row.clear()
  content = '\n'.join(map(','.join, rows)).encode()
  if rng.random() < 0.2:
    content = damaged(rng, content)
  files['labels.csv'] = content
  return [content[:300]], read_folder(rng, write(workdir, files))


def npz(rng, workdir):
  """An .npz file with wrong arrays, or damaged ones."""
  noise = np.random.default_rng(rng.randrange(2**32))
  columns = dict(train_images=noise.integers(0, 256, (12, 9, 9), np.uint8),
                 train_labels=np.arange(12) % 3)
  if rng.random() < 0.5:
    encoded = list(images(rng).values())
    columns = dict(train_jpeg=np.frombuffer(b''.join(encoded), np.uint8),
                   train_offsets=np.cumsum([0, *map(len, encoded)]),
                   train_labels=np.arange(12) % 3)
  if rng.random() < 0.3:
    columns['class_names'] = np.array(['a', 'b', 'c'])
  for _ in range(rng.choice([0, 1, 2])):
    key = rng.choice(sorted(columns))
    value = columns[key]
    columns[key] = rng.choice([
        lambda v: v[:-1], lambda v: v[None], lambda v: v[:0],
        lambda v: np.zeros(()), lambda v: v.astype(object),
        lambda v: v.astype(np.float64) * np.nan if v.dtype.kind != 'U' else v,
        lambda v: v.astype(str), lambda v: -v.astype(np.int64)
        if v.dtype.kind != 'U' else v, lambda v: v[::-1],
        lambda v: np.repeat(v, 2, axis=-1) if v.ndim else v])(value)
    if rng.random() < 0.2:
      columns[rng.choice(['test_images', 'test_labels', 'train_images'])] = (
          columns.pop(key))
      if not columns:
        break
  stream = io.BytesIO()
  np.savez(stream, **columns)
  content = stream.getvalue()
  if rng.random() < 0.5:
    content = damaged(rng, content)
  path = os.path.join(write(workdir, {'x.npz': content}), 'x.npz')
  shapes = {k: (v.dtype, v.shape) for k, v in columns.items()}
  return [shapes], first_batches(section('arrays', path))


KINDS = {'override': override, 'config': config, 'image_file': image_file,
         'labels_csv': labels_csv, 'npz': npz}
# Of ten cases.
SHARES = ('override', 'config') * 3 + ('image_file', 'image_file', 'labels_csv',
                                       'npz')


def run(cases, seed=0, only=None):
  """Runs the cases; returns {number: (kind, input, what is wrong)}."""
  wrong = {}
  here = os.getcwd()
  for number in cases:
    kind = SHARES[number % len(SHARES)]
    if only and kind != only:
      continue
    rng = random.Random(f'{seed}/{number}')
    with tempfile.TemporaryDirectory() as workdir:
      os.chdir(workdir)  # a relative path of a case writes there
      try:
        given, problem = KINDS[kind](rng, workdir)
      finally:
        os.chdir(here)
    if problem:
      wrong[number] = kind, given, problem
  return wrong


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--cases', type=int, default=500)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=KINDS)
  args = parser.parse_args()
  wrong = run(range(args.first, args.first + args.cases), args.seed, args.only)
  for number, (kind, given, problem) in wrong.items():
    print(f'{number} {kind}: {problem}')
    for line in given:
      print(f'    {str(line)[:150]}')
  kinds = collections.Counter(kind for kind, _, _ in wrong.values())
  print(f'{len(wrong)} of {args.cases} cases failed: {dict(kinds)}')
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(main())
