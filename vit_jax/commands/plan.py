"""What a config will compute and cost, before it runs.

  vit-jax plan --config configs/vit_c_i1k.py:stem=conv,size=4GF

  vit-jax plan --config ... --topology v5e:16x16
  vit-jax plan --config ... --devices 64 --device_kind h100

Prints the resolved config, a table of modules, parameters, multiply-adds and
activations of one image, tokens, steps and epochs. Data that is not here is
taken at its word: input.num_train and input.num_classes. Trains nothing.

With --topology the training step is compiled for these TPUs by their compiler,
which needs none (pip install -e '.[plan]'), and the memory is what it says;
with --devices it is an estimate. Both say what devices exchange, the least time
that a step and the run take at the figures of the data sheet, and what to
change where it does not fit.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --depth N            levels of modules in the table (2)
  --topology NAME      v4, v5e, v5p or v6e and the shape of the slice
  --devices N          how many, and of which kind
  --device_kind NAME   a100, h100, h200 (within a node), v5p, ... or cpu
"""
import collections
import time

from absl import flags
import jax

from vit_jax import chips
from vit_jax import collectives
from vit_jax import complexity
from vit_jax import config as config_lib
from vit_jax import durations
from vit_jax import estimate
from vit_jax import experiment
from vit_jax import models
from vit_jax import out_of_memory
from vit_jax import program
from vit_jax import sharding
from vit_jax import tpu_topology
from vit_jax import train_state
from vit_jax.models import vit


def main(argv):
  """Runs the command; returns its exit code."""
  def define(values):
    flags.DEFINE_integer(
        'depth', 2, 'Levels of modules in the table.', flag_values=values)
    flags.DEFINE_string(
        'topology', '', 'TPUs to compile for.', flag_values=values)
    flags.DEFINE_integer(
        'devices', 0, 'How many devices to estimate for.', flag_values=values)
    flags.DEFINE_string(
        'device_kind', '', 'Which they are.', flag_values=values)
  args = config_lib.parse_flags(['vit-jax plan', *argv], define)
  if args.topology and args.devices:
    raise ValueError('--topology and --devices are both given.\n'
                     'Keep one: a topology says how many devices it has.')
  if bool(args.devices) != bool(args.device_kind):
    raise ValueError('--devices and --device_kind go together.\n'
                     'Give both, such as --devices 8 --device_kind h100.')
  if args.devices < 0:
    raise ValueError(f'--devices={args.devices} is no number of devices.\n'
                     'Give 1 or more.')
  if args.device_kind not in ('', 'cpu'):
    chips.named(args.device_kind)
  if args.topology:
    # Nothing runs here; and libtpu would look, at length, for a TPU.
    jax.config.update('jax_platforms', 'cpu')
  print(plan(args.config, args.depth))
  if args.topology:
    print('\n' + compiled(args.config, args.topology))
  if args.devices:
    print('\n' + estimated(args.config, args.devices, args.device_kind))
  return 0


def compiled(config, topology):
  """Returns text on a step that the TPU compiler has compiled.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    topology: see `tpu_topology.devices`.

  Raises:
    ValueError: bad config or topology, or no compiler.
  """
  devices = tpu_topology.devices(topology)
  chip = chips.named(topology.partition(':')[0])
  num_train, num_classes, image_shape, _ = experiment.data_sizes(config)
  args = (num_train, num_classes, image_shape)
  mesh = sharding.create_mesh(config.mesh, devices)
  needs = estimate.of(config, *args, 'tpu', len(devices))
  begin = time.perf_counter()
  memory, cost, exchanged, fits = needs.memory, {}, needs.exchanged, False
  try:
    step = program.create(config, *args, mesh).compile_step()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e) and 'memory' not in str(e):
      raise
    cause = str(e).strip().splitlines()[0]
    who = 'an estimate'
    note = f'the compiler gives up: {cause[:200]}'
  else:
    stats = step.memory_analysis()
    memory = getattr(stats, 'peak_memory_in_bytes', 0) or (
        stats.argument_size_in_bytes + stats.temp_size_in_bytes)
    exchanged = collectives.of_program(step.as_text())
    who, fits = 'as their compiler says', memory <= 0.95 * chip.memory
    # It counts a loop's body once.
    if not config.model.get('scan', False) and config.accumulation_steps == 1:
      cost = step.cost_analysis()
    note = (f'compiled in {time.perf_counter() - begin:.0f} s; '
            f'the estimate without it: {needs.memory / 1e9:.2f} GB')
  return _devices_text(
      config, f'{topology}: {len(devices)} devices, {who}', note, memory, fits,
      needs, cost, exchanged, chip, len(devices), args, 'tpu')


def estimated(config, devices, kind):
  """Returns text on a step as `estimate` has it.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    devices: how many.
    kind: a key of `chips.CHIPS`, or 'cpu'.
  """
  num_train, num_classes, image_shape, _ = experiment.data_sizes(config)
  args = (num_train, num_classes, image_shape)
  chip = None if kind == 'cpu' else chips.named(kind)
  platform = chip.platform if chip else 'cpu'
  needs = estimate.of(config, *args, platform, devices)
  return _devices_text(
      config, f'{devices} x {kind}, an estimate', '', needs.memory,
      not chip or needs.memory <= 0.95 * chip.memory, needs, {},
      needs.exchanged, chip, devices, args, platform)


def _devices_text(config, title, note, memory, fits, needs, cost, exchanged,
                  chip, devices, args, platform):
  """The section on devices.

  Args:
    config, title, note: of the section.
    memory: bytes of a device.
    fits: whether it has them.
    needs: `estimate.Needs`.
    cost: a compiler's `cost_analysis`, or {}.
    exchanged: see `collectives`.
    chip: `chips.Chip`, or None where nothing is known of it.
    devices: how many.
    args, platform: of `estimate.of`.
  """
  gb = lambda n: f'{n / 1e9:.2f} GB'
  sizes = sharding.mesh_sizes(config.mesh, devices)
  shards = sizes['data'] * sizes['fsdp']
  units = durations.Units.of(
      args[0], config.global_batch_size, config.input.epoch)
  steps = durations.to_steps(config, 'total', units)
  mesh = ' x '.join(f'{axis} {n}' for axis, n in sizes.items())
  lines = [
      f'# Devices ({title})', *([f'note          {note}'] if note else []),
      f'mesh          {mesh}; '
      f'{config.global_batch_size // shards} examples a device and step',
      f'memory        {gb(memory)}' + (f' of {gb(chip.memory)}' if chip else '')
      + f' (parameters {gb(needs.params)}, optimizer {gb(needs.optimizer)}, '
      f'averages and batch {gb(needs.rest)})']
  text = ', '.join(f'{kind} {count:,} x, {gb(size)}'
                   for kind, (count, size, _) in exchanged.items()) or 'nothing'
  if not chip:
    lines += [f'operations    {needs.flops / 1e12:.3g} TFLOP a step',
              f'exchanged     {text} a step']
    return '\n'.join(lines)
  times = {'operations': needs.flops / chip.flops,
           'exchanged': collectives.seconds(exchanged, chip.network)}
  lines.append(
      f'operations    {needs.flops / 1e12:.3g} TFLOP a step: '
      f"{1e3 * times['operations']:.3g} ms at {chip.flops / 1e12:.0f} TFLOP/s")
  if cost:
    own = cost.get('optimal_seconds', -1)
    lines.append(
        f"touched       {gb(cost['bytes accessed'])} a step, copies within the "
        'chip included' + (
            f"; the compiler's estimate {1e3 * own:.3g} ms" if own > 0 else ''))
  lines.append(
      f"exchanged     {text} a step: {1e3 * times['exchanged']:.3g} ms at "
      f'{chip.network / 1e9:.0f} GB/s'
      + (' (NVLink; nodes are slower)' if chip.platform == 'gpu' else ''))
  slowest = max(times, key=times.get)

  def hours(seconds):
    run = seconds * steps / 3600
    return f'{run:.3g} h, {run * devices:,.0f} chip-hours'

  lines += [
      f'step          {1e3 * times[slowest]:.3g} ms or more ({slowest})',
      f'run           {steps:,} steps: {hours(times[slowest])} or more; '
      f"{hours(2 * times['operations'])} at half of the chip's FLOP/s"]
  if not fits:
    lines.append('does not fit; of the changes that help each alone needs')
    found = out_of_memory.figures(config, (*args, platform, devices), most=9)
    lines += [f'  --config.{setting}  {text}'
              for setting, text in (found or {}).items()]
  return '\n'.join(lines)


def plan(config, depth=2):
  """Returns the text that the command prints.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    depth: levels of modules in the table.

  Raises:
    ValueError: bad config; or neither data nor its expected sizes.
  """
  num_train, num_classes, image_shape, source = experiment.data_sizes(config)
  fields = train_state.model_fields(config.model, tuple(config.frozen))
  model = models.create(num_classes=num_classes, **fields)
  cost = complexity.of(model, image_shape[:2], image_shape[2])
  units = durations.Units.of(
      num_train, config.global_batch_size, config.input.epoch)
  steps = durations.to_steps(config, 'total', units)
  lines = [
      '# Config', *(f'{k} = {v!r}' for k, v in sorted(
          config_lib.flatten(config.to_dict()).items())), '',
      '# Modules (one image; flops are multiply-adds, bias adds included)',
      *_table(cost, depth), '',
      '# Run',
      f'parameters    {cost.params:,}',
      f'multiply-adds {cost.macs:,} ({cost.macs / 1e9:.2f} G; '
      f'{cost.flops:,} with bias adds)',
      f'activations   {cost.activations:,} ({cost.activations / 1e6:.1f} M)',
      *_tokens(model, image_shape),
      f'data          {num_classes:,} classes ({source})',
      f'length        {units.describe(steps)}',
      f'training      {6 * cost.macs * steps * config.global_batch_size:.3g} '
      'FLOP (2 a multiply-add; forward once, backward twice)',
  ]
  return '\n'.join(lines)


def _tokens(model, image_shape):
  """Lines on the token grid, if the model has one."""
  if not hasattr(model, 'patch'):
    return []
  (h, w), cropped = vit.token_grid(model.patch, image_shape[:2])
  with_class = getattr(model, 'pool', '') == 'token'
  lines = [f'tokens        {h * w + with_class} ({h} x {w} patches of '
           f'{model.patch}{" + class token" if with_class else ""})']
  if any(cropped):
    lines.append(f'warning       {cropped[0]} rows and {cropped[1]} columns of '
                 'pixels do not fill a patch and are cropped')
  return lines


def _table(cost, depth):
  """Lines of a table of modules, summed to `depth` levels of path."""
  sums = collections.OrderedDict()
  for row in cost.rows:
    path = '/'.join(row.path.split('/')[:depth])
    old = sums.get(path, (0, 0, 0))
    sums[path] = (old[0] + row.params, old[1] + row.flops,
                  old[2] + row.activations)
  sums['total'] = cost.params, cost.flops, cost.activations
  width = max(map(len, sums))
  header = f'{"module":{width}} {"parameters":>14} {"flops":>16} '
  return [header + f'{"activations":>14}'] + [
      f'{path:{width}} {p:14,} {f:16,} {a:14,}'
      for path, (p, f, a) in sums.items()]
