"""Which operations of a training step take its time.

A trace of `jax.profiler` names what the compiler made of the program (fusions);
the compiled program says which part of the model each came from.
"""
import collections
import glob
import os
import re
from typing import NamedTuple

import jax

from vit_jax import metric_writer

FOLDER = 'profile'
# Steps that go first: buffers are in place, queues are full.
SKIPPED = 10
_SOURCE = re.compile(
    r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.M)
# What holds other operations, whose time would count twice.
_HOLDERS = ('while', 'conditional', 'call')


class Op(NamedTuple):
  """Operations of one kind and one place in the model, over all blocks.

  Attributes:
    name: 'backward encoder/block_*/mlp/fc1/dot_general'; where the compiler
      does not say, its own name of the operation.
    share: of the time of all operations.
    seconds: a step; on a CPU of all threads together.
    count: operations a step.
  """
  name: str
  share: float
  seconds: float
  count: float


def traced(step_fn, workdir, steps, skipped=SKIPPED):
  """Wraps a compiled step: some of its calls are traced, and then reported.

  Args:
    step_fn: `jax.stages.Compiled`.
    workdir: the trace goes into its folder `profile`, for XProf
      (tensorboard --logdir) and, as *.trace.json.gz, for ui.perfetto.dev.
    steps: calls to trace.
    skipped: calls before.

  Returns:
    A function like `step_fn`.
  """
  folder = os.path.join(workdir, FOLDER)
  calls = 0

  def step(state, *args):
    nonlocal calls
    calls += 1
    if calls == skipped + 1:
      jax.block_until_ready(state)
      start(folder)
    result = step_fn(state, *args)
    if calls == skipped + steps:
      jax.block_until_ready(result)
      jax.profiler.stop_trace()
      found = ops(folder, step_fn.as_text(), steps)
      metric_writer.say(f'{describe(found)}\ntrace of {steps} steps: {folder}')
    return result

  return step


def start(folder):
  """Starts a trace, without Python's own calls, which would slow it."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(folder, profiler_options=options)


def check(steps, start_step, total_steps, skipped=SKIPPED):
  """Raises ValueError for a run that ends before the steps to trace."""
  last = start_step + skipped + steps
  if steps < 0 or (steps and last > total_steps):
    raise ValueError(
        f'--profile={steps} does not fit: it begins after {skipped} steps, and '
        f'{total_steps - start_step} are left.\nTrace fewer, or lengthen the '
        'run.')


def ops(folder, program, steps):
  """Reads the newest trace in a folder.

  Args:
    folder: of `jax.profiler.start_trace`.
    program: text of the compiled program that ran; '' names nothing.
    steps: how often it ran.

  Returns:
    List of `Op`, the most expensive first; empty if the trace has none.
  """
  sources = dict(_SOURCE.findall(program))
  module = re.match(r'HloModule ([^\s,]+)', program)
  seconds, counts = collections.Counter(), collections.Counter()
  for name, duration, of_module in _events(folder):
    other = module and of_module and of_module != module[1]  # an evaluation's
    if other or name.split('.')[0] in _HOLDERS:
      continue
    place = label(sources.get(name, ''), name)
    seconds[place] += duration
    counts[place] += 1
  total = sum(seconds.values())
  return [Op(name, s / total, s / steps, counts[name] / steps)
          for name, s in seconds.most_common()]


def _events(folder):
  """Yields (name of an operation, seconds, its program's name or None)."""
  files = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
  if not files:
    return
  data = jax.profiler.ProfileData.from_file(max(files, key=os.path.getmtime))
  planes = {plane.name: plane for plane in data.planes}
  # The devices of a process do the same: one of them will do.
  accelerators = sorted(
      n for n in planes if n.startswith(('/device:TPU', '/device:GPU')))
  plane = planes.get((*accelerators, '/host:CPU')[0])
  lines = list(plane.lines) if plane else []
  # TPUs have operations on a line of their own, whose events say no more.
  own = [line for line in lines if line.name == 'XLA Ops']
  for line in own or lines:
    for event in line.events:
      stats = dict(event.stats)
      name = stats.get('hlo_op') or (own and event.name)
      if name:
        yield (str(name).split(' = ')[0].lstrip('%'), event.duration_ns / 1e9,
               stats.get('hlo_module'))


def label(source, name=''):
  """Place and kind of an operation, from its source in the traced program.

  'jit(train_step)/transpose(jvp(ViT))/encoder/block_03/mlp/fc1/dot_general' is
  'backward encoder/block_*/mlp/fc1/dot_general'; one that has no source has the
  name of its kind, 'fusion' for 'fusion.12'.
  """
  if not source:
    return re.sub(r'[.\d]+$', '', name) or name
  parts = [p for p in source.split('/') if not re.fullmatch(
      r'(jit|jvp|transpose|vmap|remat|checkpoint|rematted_computation|while|body|'
      r'cond|closed_call|eval_jaxpr)(\(.*)?', p)]
  place = re.sub(r'block_\d+', 'block_*', '/'.join(parts)) or name
  return f'backward {place}' if 'transpose(jvp' in source else place


def describe(found, most=10):
  """A table of the most expensive operations."""
  if not found:
    return 'the trace names no operations'
  lines = [f'{min(most, len(found))} most expensive ops, of {len(found)}:',
           f'{"share":>7} {"ms a step":>10} {"count":>6}  op']
  lines += [f'{op.share:7.1%} {1e3 * op.seconds:10.3f} {op.count:6.0f}  '
            f'{op.name}' for op in found[:most]]
  return '\n'.join(lines)
