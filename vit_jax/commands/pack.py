"""Packs a folder of images for speed: smaller JPEG files, few large files.

  vit-jax pack --out /fast/pack --config configs/vit_c_i1k.py:data=/imagenet

Images whose shorter side is above --short_side are resized to it, once. Then
train with --config.input.source=packed --config.input.path=/fast/pack: same
order, labels and classes, fewer bytes to read and to decode. Stopped, the same
command goes on. Counts and disk space are checked first.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --out DIR          where to
  --short_side 256   pixels; that of the resize before the central crop
  --quality 90       of the JPEG files
  --per_shard 4096   images in a file
"""
from absl import flags

from vit_jax import config as config_lib


def main(argv):
  """Runs the command; returns its exit code."""
  def define(values):
    flags.DEFINE_string('out', '', 'Folder.', flag_values=values)
    for name, default in (
        ('short_side', 256), ('quality', 90), ('per_shard', 4096)):
      flags.DEFINE_integer(name, default, '', flag_values=values)

  args = config_lib.parse_flags(['vit-jax pack', *argv], define)
  pack(args.config, args.out, args.short_side, args.quality, args.per_shard)
  return 0


def pack(config, out, short_side, quality, per_shard):
  """Packs the data of a config.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    out: folder.
    short_side, quality, per_shard: see `packed.write`.

  Raises:
    ValueError: bad input; see `packed.write`.
  """
  import input_pipeline
  from input_pipeline import packed
  from input_pipeline import sources
  from vit_jax import checks
  if not out:
    raise ValueError('--out is missing.\nFor example: --out /fast/imagenet256')
  data = input_pipeline.open_data(config.input, max(config.data_seed, 0))
  checks.check_data(config.input, data)
  packed.write(sources.Splits(data.train, data.evals), out, short_side, quality,
               per_shard, print)
  print(f'Train with --config.input.source=packed --config.input.path={out}')
