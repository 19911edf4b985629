"""Lists AugReg's released checkpoints, names the recommended, downloads.

  vit-jax zoo --model S/16 --aug light1
  vit-jax zoo --recommended
  vit-jax zoo --recommended --adapt_ds imagenet2012 --resolution 384
  vit-jax zoo --download S/16
  vit-jax zoo --download gs://vit_models/sam/ViT-B_16.npz

The last lines of a download are the file's path and how to train from it.

Flags:
  --model, --ds, --aug, --adapt_ds, --resolution   filters, as in the table;
                     --adapt_ds lists fine-tuned checkpoints, otherwise
                     pre-trained ones are listed
  --sort COLUMN      a column of index.csv, largest first (accuracy)
  --limit N          rows printed (20)
  --recommended      one row for each model, by the papers' rule: best
                     final_val; of its fine-tuned ones best adapt_final_val
  --download NAME    a model (its recommended checkpoint), a file name of the
                     table, a gs:// or https:// address, or a local path
  --index PATH       the table (gs://vit_models/augreg/index.csv)
  --cache DIR        where files are kept (~/.cache/vit_jax/zoo)
  --offline          use what is in the cache only

Lengths, and the md5 that the server sends, are checked; the sha256 is recorded
at the first download and checked after. What could not be verified says so.
"""
import argparse
import os

from input_pipeline import cache
from vit_jax import choices
from vit_jax.pretrained import download
from vit_jax.pretrained import index

NOTE = ('i21k contains the images of i1k: the paper chose among these on '
        'ImageNetV2, which is not in this table')


def main(argv):
  """Runs the command; returns its exit code."""
  run(_parse(argv), print)
  return 0


def _parse(argv):
  parser = argparse.ArgumentParser(prog='vit-jax zoo', allow_abbrev=False)
  for name in ('model', 'ds', 'aug', 'adapt_ds', 'sort', 'download', 'cache'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--index', default=f'{index.RELEASE}/index.csv')
  parser.add_argument('--resolution', type=int)
  parser.add_argument('--limit', type=int, default=20)
  for name in ('recommended', 'offline'):
    parser.add_argument(f'--{name}', action='store_true')
  return parser.parse_args(argv)


def run(args, say):
  """Lists or downloads; `say` is called with lines. Raises ValueError."""
  folder = args.cache or os.path.join(cache.folder(), 'zoo')

  def fetch(source):
    return download.fetch(source, folder, offline=args.offline, say=say)

  if '://' in args.download or os.path.isfile(args.download):
    say(_how_to_train(fetch(args.download)))
    return
  rows = index.read(fetch(args.index))
  if args.download:
    name = find(rows, args.download, args)
    base = args.index.rpartition('/')[0] or '.'
    say(_how_to_train(fetch(f'{base}/{name}.npz')))
    return
  rows = index.select(rows, name=args.model, aug=args.aug)
  if args.recommended:
    found = list(index.recommend(
        rows, args.ds or 'i21k', args.adapt_ds, args.resolution).values())
  else:
    found = index.select(rows, ds=args.ds, adapt_ds=args.adapt_ds,
                         adapt_resolution=args.resolution)
    if not args.adapt_ds:
      found = index.pretrained_only(found)
  accuracy = 'adapt_final_val' if args.adapt_ds else 'final_val'
  found = index.sort(found, args.sort or accuracy)
  for line in table(found[:args.limit], bool(args.adapt_ds)):
    say(line)
  say(f'{min(args.limit, len(found))} of {len(found):,} checkpoints')
  if args.recommended and args.adapt_ds == 'imagenet2012':
    say(f'note: {NOTE}')


def find(rows, name, args):
  """The file name, without .npz, of a model or of a file in the table.

  Raises:
    ValueError: neither.
  """
  name = name.removesuffix('.npz')
  models = {row['name'] for row in rows}
  if name in models:
    row = index.recommend(
        index.select(rows, name=name), args.ds or 'i21k', args.adapt_ds,
        args.resolution).get(name)
    if not row:
      raise ValueError(
          f'The recommended {name} was not tuned on {args.adapt_ds}.\n'
          'Leave out --adapt_ds, or give a file name of the table.')
    return row['adapt_filename' if args.adapt_ds else 'filename']
  files = {row[c] for row in rows for c in ('filename', 'adapt_filename')}
  if name in files:
    return name
  raise ValueError(choices.unknown(name, sorted(models), 'model or file'))


def table(rows, adapted):
  """Lines of a table of checkpoints."""
  head = ['model', 'data', 'aug', 'wd/do/sd', 'val', 'images/s', 'file']
  if adapted:
    head[4:5] = ['tuned on', 'val', 'test']
  cells = [head]
  for row in rows:
    reg = '/'.join(f'{row[c]:g}' for c in ('wd', 'do', 'sd'))
    values = [_percent(row['final_val'])]
    if adapted:
      values = [f'{row["adapt_ds"]}@{row["adapt_resolution"]:.0f}',
                _percent(row['adapt_final_val']),
                _percent(row['adapt_final_test'])]
    speed = row['infer_samples_per_sec']
    cells.append([
        row['name'], f'{row["ds"]} {row["epochs"]:.0f}ep', row['aug'], reg,
        *values, '-' if speed != speed else f'{speed:,.0f}',
        row['adapt_filename' if adapted else 'filename']])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ['  '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))
          .rstrip() for line in cells]


def _percent(fraction):
  return '-' if fraction != fraction else f'{fraction:.1%}'


def _how_to_train(path):
  return (f'train from it: --config.init_from.checkpoint={path} '
          "--config.init_from.reset=\"('head/.*',)\"")
