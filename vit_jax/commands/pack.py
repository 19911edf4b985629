"""Packs image files into few, smaller ones, which are read faster.

  vit-jax pack --config configs/vit_c_i1k.py:path=/data/imagenet --out /data/i1k
  vit-jax train --config configs/vit_c_i1k.py:path=/data/i1k \\
    --config.input.source=packed --workdir runs/packed

All parts, classes and the order of the images stay. Images whose short side is
longer than --short-side are resized to it and encoded again as JPEG, which
changes pixels; the others keep their bytes. Killed, it goes on where it was
when the same command is given again. Before it begins it compares the data
with input.num_train and input.num_classes, and what it will write with the
free disk space.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --out DIR       new folder
  --short-side N  pixels (320)
  --quality N     of the JPEG encoding, 1 to 100 (90)
  --threads N     images at once; 0: as many as there are CPUs (0)
"""
import sys

from absl import flags

from vit_jax import config as config_lib
from vit_jax import ranges


def main(argv):
  """Runs the command; returns its exit code."""
  from vit_jax import train
  try:
    args = config_lib.parse_flags(['vit-jax pack', *argv], _define)
    print(describe(pack(args.config, args.out, args.short_side, args.quality,
                        args.threads, print)))
    return 0
  except (ValueError, OSError) as e:
    if not train.is_message(e):
      raise
    print('error: ' + str(e).replace('\n', '\n  '), file=sys.stderr)
    return train.BAD_INPUT


def _define(values):
  flags.DEFINE_string('out', '', 'Folder to write.', flag_values=values)
  flags.DEFINE_integer('short_side', 320, 'Pixels.', flag_values=values)
  flags.DEFINE_integer('quality', 90, 'Of JPEG.', flag_values=values)
  flags.DEFINE_integer('threads', 0, 'At once.', flag_values=values)


def pack(config, out, short_side=320, quality=90, threads=0,
         say=lambda text: None):
  """Packs the data of a config; see `input_pipeline.packed.write`.

  Args:
    config: ConfigDict with the keys of `recipes.base`; `input` is read.
    out: folder to write.
    short_side, quality, threads, say: as in `packed.write`.

  Raises:
    ValueError, OSError: bad input, before anything is written.
  """
  import input_pipeline
  from input_pipeline import packed
  from vit_jax import checks
  if not out:
    raise ValueError('--out is missing.\nFor example: --out /data/packed.')
  ranges.check('--short-side', short_side, 1, 2**14)
  ranges.check('--quality', quality, 1, 100)
  data = input_pipeline.open_data(
      config.input, config.seed if config.data_seed < 0 else config.data_seed)
  checks.check_counts(config.input, data)
  return packed.write(data, out, short_side, quality, threads=threads, say=say)


def describe(done):
  """The text that the command prints."""
  return '\n'.join(
      f'{part:6} {count:,} images packed, {resized:,} of them resized, '
      f'{unreadable:,} unreadable, {size / 1e9:.2f} GB'
      for part, (count, resized, unreadable, size) in done.items())
