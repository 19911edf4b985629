"""Compiles a training step for TPUs that are not here; says what it costs.

  vit-jax bench tpu-compile --config configs/augreg.py:model=B/16,aug=none
  vit-jax bench tpu-compile --config ... --topology v5e:4x4 --batch_per_chip 64

Needs libtpu (pip install -e '.[plan]'), no TPU and no data. Takes a minute or
two. Prints, per chip and step, what the compiler says:
  flops             2 a multiply-add; those of kernels as they declare them
  bytes accessed    by all instructions, each time they read or write: HBM's,
                    and the chip's own memory's
  temporaries       largest sum of what lives between instructions
  peak              of memory, with the state
  estimate          the compiler's optimal_seconds, a bound and no measurement;
                    v5e's compiler gives none
  at data sheet     ms that the flops take at the chip's bfloat16 rate
Figures of one version of libtpu compare with each other. A kernel's inside is
not seen: its bytes are its operands and results, its time is not estimated from
what it does between them. model.attention='xla' compiles without the kernel.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --topology NAME      chip and shape (v5p:2x2x1)
  --batch_per_chip N   0: the config's batch, divided (0)
  --json FILE          writes the figures
  --against FILE       figures that others wrote; prints ratios to them
  --hlo FILE           writes the optimised program
"""
import json
import time

from absl import flags
import jax

from vit_jax import chips as chip_table
from vit_jax import config as config_lib
from vit_jax import experiment
from vit_jax import program
from vit_jax import sharding
from vit_jax import tpu_topology

# figure: (unit, what one of it is)
_UNITS = {'flops': ('T', 1e12), 'bytes accessed': ('GB', 1e9),
          'temporaries': ('GB', 1e9), 'peak': ('GB', 1e9),
          'estimate': ('ms', 1e-3), 'at data sheet': ('ms', 1e-3)}


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax bench tpu-compile', *argv])
  against = {}
  if args.against:
    with open(args.against) as f:
      against = json.load(f)
  c = args.config
  if c.model.get('scan', False) or c.accumulation_steps > 1:
    raise ValueError(
        'The compiler counts the body of a loop once: those of model.scan and '
        'accumulation_steps.\nSet --config.model.scan=False '
        '--config.accumulation_steps=1, or ask vit-jax plan.')
  # Compiling is all that is done: a TPU that is here stays free.
  jax.config.update('jax_platforms', 'cpu')
  chips = tpu_topology.devices(args.topology)
  begin = time.perf_counter()
  compiled, batch = compile_step(c, chips, args.batch_per_chip)
  seconds = time.perf_counter() - begin
  row = figures(compiled, chips[0].device_kind)
  print(f'{args.topology}: {len(chips)} x {chips[0].device_kind}, {batch} '
        f'examples a chip, compiled in {seconds:.0f} s')
  print(describe(row, against))
  if args.json:
    with open(args.json, 'w') as f:
      json.dump(row, f, indent=1)
  if args.hlo:
    with open(args.hlo, 'w') as f:
      f.write(compiled.as_text())
  return 0


def _parse(argv):
  def define(values):
    for name, default in (('topology', 'v5p:2x2x1'), ('json', ''),
                          ('against', ''), ('hlo', '')):
      flags.DEFINE_string(name, default, name, flag_values=values)
    flags.DEFINE_integer(
        'batch_per_chip', 0, 'N.', lower_bound=0, flag_values=values)

  return config_lib.parse_flags(argv, define)


def compile_step(config, chips, batch_per_chip=0):
  """Compiles the training step of a config for chips that are not here.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    chips: see `tpu_topology.devices`.
    batch_per_chip: examples; 0: the config's.

  Returns:
    (`jax.stages.Compiled`, examples a chip).

  Raises:
    ValueError: bad config.
  """
  if batch_per_chip:
    config.global_batch_size = batch_per_chip * len(chips)
  num_train, num_classes, image_shape, _ = experiment.data_sizes(config)
  mesh = sharding.create_mesh(config.mesh, chips)
  made = program.create(config, num_train, num_classes, image_shape, mesh)
  return made.compile_step(), made.batch_size // len(chips)


def figures(compiled, kind):
  """What the compiler says of a program: {figure: number}, per chip.

  In FLOP, bytes and seconds; without those that it does not give.

  Args:
    compiled: `jax.stages.Compiled`.
    kind: of the chips; JAX's `device_kind`.
  """
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  row = {'flops': cost['flops'], 'bytes accessed': cost['bytes accessed'],
         'temporaries': memory.temp_size_in_bytes,
         'peak': memory.peak_memory_in_bytes}
  if cost.get('optimal_seconds', -1) > 0:
    row['estimate'] = cost['optimal_seconds']
  if chip := chip_table.of(kind):
    row['at data sheet'] = cost['flops'] / chip.flops
  return row


def describe(row, against=None):
  """Lines of figures, with ratios to others where there are."""
  lines = []
  for name, (unit, one) in _UNITS.items():
    line = f'{name:16} '
    line += f'{row[name] / one:10.2f} {unit}' if name in row else (
        f'{"not given":>10}')
    if name in row and (against or {}).get(name):
      line += f'{row[name] / against[name]:8.3f} x'
    lines.append(line)
  return '\n'.join(lines)
