"""Runs the input pipeline for long and says whether its memory grows.

  vit-jax soak --config configs/digits.py --examples 200000

Prints the resident memory of the process after a warm-up, at ten points, and
what it grew by in between. Trains nothing. Linux only.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --examples N   how many training examples to read (200000)
"""
import gc
import os
import time

from absl import flags

from vit_jax import config as config_lib

_WARM_UP = 0.1  # of the examples: threads and their arenas, caches, buffers


def main(argv):
  """Runs the command; returns its exit code."""
  define = lambda values: flags.DEFINE_integer(
      'examples', 200_000, 'Examples to read.', flag_values=values)
  args = config_lib.parse_flags(['vit-jax soak', *argv], define)
  growth, rate = soak(args.config, args.examples, print)
  print(f'grew by {growth / 1e6:.1f} MB over {args.examples:,} examples, '
        f'{rate:,.0f} examples/s')
  return 0


def soak(config, examples, say=lambda text: None):
  """Reads `examples` training examples on the host.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    examples: how many; the first tenth is warm-up.
    say: called with a line, eleven times.

  Returns:
    (bytes by which resident memory grew after the warm-up, examples per s).

  Raises:
    ValueError: bad config, or fewer than 20 batches.
  """
  import input_pipeline
  size = config.global_batch_size
  steps = examples // size
  if steps < 20:
    raise ValueError(
        f'{examples} examples are {steps} batches of {size}, too few to tell.\n'
        'Raise --examples, or lower global_batch_size.')
  seed = config.seed if config.data_seed < 0 else config.data_seed
  data = input_pipeline.open_data(config.input, seed)
  batches = input_pipeline.train_batches(
      data, global_batch_size=size, data_seed=seed, epoch=config.input.epoch,
      repeats=config.input.repeats)
  begin, first = time.perf_counter(), None
  for step in range(1, steps + 1):
    next(batches)
    if step == round(steps * _WARM_UP):
      gc.collect()
      first = resident()
    if step % (steps // 10) == 0:
      say(f'{step * size:,} examples: {resident() / 1e6:,.0f} MB')
  gc.collect()
  rate = steps * size / (time.perf_counter() - begin)
  return resident() - first, rate


def resident():
  """Bytes of memory that this process holds now."""
  try:
    with open('/proc/self/statm') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    raise ValueError('This system has no /proc/self/statm.\n'
                     'Run the soak test on Linux.') from None
