"""Times parts of the program on this machine.

  vit-jax bench step        a config's training step: images/s, MFU, memory, ops
  vit-jax bench data        input, against plain tf.data; what it can feed
  vit-jax bench augment     augmentation: its forms, its share of a step
  vit-jax bench population  many small models at once, against one by one
  vit-jax bench tpu-compile what a step costs on TPUs, as their compiler says

vit-jax bench PART --help says more. What is compared is timed in turns, several
times; compare ratios, and those of an idle machine.
"""
import importlib

from vit_jax import choices

BENCHES = {'step': 'vit_jax.commands.bench_step',
           'data': 'vit_jax.commands.bench_data',
           'augment': 'vit_jax.commands.bench_augment',
           'population': 'vit_jax.commands.bench_population',
           'tpu-compile': 'vit_jax.commands.bench_tpu_compile'}


def main(argv):
  """Runs a benchmark; returns its exit code."""
  name = argv[0] if argv else ''
  if name not in BENCHES:
    raise ValueError(choices.unknown(name, BENCHES, 'benchmark'))
  return importlib.import_module(BENCHES[name]).main(argv[1:])
