"""Reads a whole data set: counts, and every image that cannot be decoded.

  vit-jax check-data --config configs/vit_c_i1k.py \
    --config.input.path=/data/imagenet
  vit-jax check-data --path /data/photos

With --config it also compares with input.num_train and input.num_classes, and,
where those say ImageNet-1k (1,281,167), with its 50,000 validation images.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --path DIR     a folder of images instead of a config
  --json FILE    where to write the report as JSON
  --threads N    decoding at once; 0: as many as there are CPUs (0)

Exit code 0 if nothing is wrong, 2 otherwise.
"""
import collections
import concurrent.futures
import itertools
import json
import sys
import time

from absl import flags

from vit_jax import config as config_lib
from vit_jax import errors
from vit_jax import recipes

IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
_LISTED = 20  # unreadable files on the terminal; the JSON report has all


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax check-data', *argv])
  report = check(args.config, args.threads, progress=_progress())
  print(describe(report))
  if args.json:
    _write(args.json, report)
  return errors.BAD_INPUT if report['problems'] else 0


def _parse(argv):
  def define(values):
    flags.DEFINE_string('path', '', 'Folder of images.', flag_values=values)
    flags.DEFINE_string('json', '', 'File of the report.', flag_values=values)
    flags.DEFINE_integer('threads', 0, 'Threads.', flag_values=values)

  if any(a.startswith('--config') for a in argv):
    args = config_lib.parse_flags(argv, define)
    if args.path:
      raise ValueError('Both --config and --path name data.\nGive one of them.')
    return args
  args = flags.FlagValues()
  define(args)
  flags.DEFINE_string('config', '', 'Config file.', flag_values=args)
  try:
    rest = args(argv)
  except flags.Error as e:
    raise ValueError(
        f'{str(e).splitlines()[0].rstrip(".")}.\nSee --help.') from None
  if len(rest) > 1 or not args.path:
    raise ValueError('Neither --config nor --path names data.\n'
                     'For example: --path /data/photos.')
  config = recipes.base()
  config.input.source, config.input.path = 'folder', args.path
  config.input.pp = config.input.eval_pp = 'decode|resize(8)'
  args.config = config
  return args


def check(config, threads=0, progress=lambda *unused: None):
  """Decodes every image of every part once, without preprocessing.

  Args:
    config: ConfigDict with the keys of `recipes.base`; `input` is read.
    threads: to decode in; 0: as many as there are CPUs.
    progress: called with (part, images done, of how many).

  Returns:
    {'splits': {part: {'count', 'classes': {name: count}, 'unreadable': {path:
    reason}}}, 'problems': [str]}, for JSON.

  Raises:
    ValueError, FileNotFoundError: the data cannot be opened at all.
  """
  import input_pipeline
  data = input_pipeline.open_data(
      config.input, config.seed if config.data_seed < 0 else config.data_seed)
  splits = {
      part: _check_part(part, source, threads, progress)
      for part, source in {'train': data.train, **data.evals}.items()}
  problems = []
  for part, found in splits.items():
    if found['unreadable']:
      problems.append(f'{part}: {len(found["unreadable"]):,} images cannot be '
                      'read')
    empty = [name for name, n in found['classes'].items() if not n]
    if empty:
      problems.append(f'{part}: {len(empty):,} classes without images, such as '
                      f'{empty[0]!r}')
  expected = [('training examples', config.input.num_train,
               splits['train']['count']),
              ('classes', config.input.num_classes, len(data.class_names))]
  if config.input.num_train == IMAGENET_TRAIN and 'val' in splits:
    expected.append(
        ('validation examples', IMAGENET_VAL, splits['val']['count']))
  problems += [f'{found:,} {what}, and {wanted:,} are expected'
               for what, wanted, found in expected if wanted not in (0, found)]
  return {'splits': splits, 'problems': problems}


def _check_part(part, source, threads, progress):
  from input_pipeline import ops_numpy
  from input_pipeline import pipeline
  if not source.encoded:  # pixels in memory were checked when they were opened
    return {'count': source.num_examples, 'classes': source.counts(),
            'unreadable': {}}

  def look(index, record=None):
    """(label or None, '' or why the image cannot be read)."""
    try:
      content, label = source.load(index, record)
    except pipeline.READ_ERRORS as e:
      return None, str(e)
    try:
      ops_numpy.decode(content, 3)
    except pipeline.READ_ERRORS as e:
      return label, str(e)
    return label, ''

  if source.streamed:
    jobs = source.sequence(source.files_of(0, 1))
  else:
    jobs = zip(range(source.num_examples), itertools.repeat(None))
  labels, unreadable, done = collections.Counter(), {}, 0
  with concurrent.futures.ThreadPoolExecutor(
      threads or pipeline.cpu_count()) as pool:
    # In pieces: all results at once, or all records, would fill the memory.
    while piece := list(itertools.islice(jobs, 1024)):
      for (index, _), (label, reason) in zip(
          piece, pool.map(look, *zip(*piece, strict=True)), strict=True):
        if label is not None:
          labels[label] += 1
        if reason:
          unreadable[source.describe(index)] = reason.split('\n')[0]
      done += len(piece)
      progress(part, done, source.num_examples)
  return {'count': source.num_examples, 'unreadable': unreadable,
          'classes': {name: labels[i]
                      for i, name in enumerate(source.class_names)}}


def describe(report):
  """The text that the command prints."""
  lines = []
  for part, found in report['splits'].items():
    counts = sorted(found['classes'].items(), key=lambda item: item[1])
    lines.append(
        f'{part:6} {found["count"]:,} images, {len(counts):,} classes of '
        f'{counts[0][1]:,} ({counts[0][0]}) to {counts[-1][1]:,} '
        f'({counts[-1][0]}), {len(found["unreadable"]):,} unreadable')
    paths = list(found['unreadable'].items())
    lines += [f'  {path}: {reason}' for path, reason in paths[:_LISTED]]
    if len(paths) > _LISTED:
      lines.append(f'  and {len(paths) - _LISTED:,} more; --json lists them')
  lines += ['problem: ' + p for p in report['problems']]
  lines.append(f'{len(report["problems"])} problem(s)')
  return '\n'.join(lines)


def _progress():
  """A function that prints how far we are, every ten seconds."""
  last = begin = time.monotonic()

  def progress(part, done, total):
    nonlocal last
    if time.monotonic() - last > 10:
      last = time.monotonic()
      print(f'{part}: {done:,}/{total:,} images, after {last - begin:.0f} s',
            file=sys.stderr, flush=True)

  return progress


def _write(path, report):
  try:
    with open(path, 'w', encoding='utf-8') as f:
      json.dump(report, f, indent=1)
  except OSError as e:
    raise ValueError(f'Cannot write {path}: {e.strerror}.\n'
                     'Name another file with --json.') from None
