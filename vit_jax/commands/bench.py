"""Times parts of the program on this machine.

  vit-jax bench data        input, against plain tf.data; what it can feed
  vit-jax bench augment     augmentation: its forms, its share of a step

vit-jax bench PART --help says more. Figures of one run are interleaved, the
shortest of several; compare ratios, and those on an idle machine.
"""
import importlib
import sys

from vit_jax import choices

BENCHES = {'data': 'vit_jax.commands.bench_data',
           'augment': 'vit_jax.commands.bench_augment'}


def main(argv):
  """Runs a benchmark; returns its exit code."""
  name = argv[0] if argv else ''
  if name not in BENCHES:
    print('error: ' + choices.unknown(name, BENCHES, 'benchmark').replace(
        '\n', '\n  '), file=sys.stderr)
    return 2
  return importlib.import_module(BENCHES[name]).main(argv[1:])
