"""Exchanges between devices in a compiled program, and what they should be.

`of_program` reads a compiler's text, `of_sharding` is the algebra of data
parallelism, ZeRO-3 and Megatron.
"""
import collections
import re
from typing import NamedTuple

import numpy as np

_KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
          'collective-permute')
_OP = re.compile(rf'=\s+(\(.*?\)|\S+)\s+({"|".join(_KINDS)})(-start)?\(')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_TYPE = re.compile(r'\b(pred|bf16|[suf]\d+|f8\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*->.*\{\s*$')
_CALLS = re.compile(
    r'(?:calls|body|condition|to_apply)=%?([\w.\-]+)|'
    r'branch_computations=\{([^}]*)\}')
_KNOWN_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"n":"?(\d+)')
_CONSTANT = re.compile(r'%([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)')


class Exchange(NamedTuple):
  """All collectives of a kind that a device runs in a step.

  Attributes:
    count: how many.
    bytes: of the results (reduce-scatter: of the argument, as many times as
      there are devices).
    sent: bytes that a device sends where they go round in rings: an all-reduce
      sends each byte twice, the others once, but for each device's own part.
  """
  count: int
  bytes: int
  sent: int


def of_program(text):
  """Counts the collectives of a compiled program, loops as often as they run.

  Args:
    text: HLO, `compiled.as_text()`.

  Returns:
    {kind: `Exchange`} of one call. An all-reduce of which each device keeps its
    part, which TPUs fuse with the cut, counts as reduce-scatter.
  """
  bodies, entry = _computations(text)

  def total(name, seen, channels=None):
    # `channels`: in a fusion, those of its caller's other fusions. What runs
    # beside matmuls on a TPU stands in several: where it starts, in each matmul
    # and where it is done.
    found, of_fusions = collections.Counter(), set()
    for line in bodies.get(name, ()):
      match = _OP.search(line)
      channel = channels is not None and _CHANNEL.search(line)
      if match and not (channel and channel[1] in channels):
        if channel:
          channels.add(channel[1])
        kind, sizes = match[2], [_bytes(*t) for t in _TYPE.findall(match[1])]
        # What begins, to be done later, returns its argument, too.
        size = max(sizes) if match[3] and kind != 'all-reduce' else sum(sizes)
        devices = _group_size(line)
        if kind == 'reduce-scatter':
          size *= devices or 1
        elif 'all-reduce-scatter' in name:
          kind = 'reduce-scatter'
        found[kind, 'count'] += 1
        found[kind, 'bytes'] += size
        found[kind, 'sent'] += _sent(kind, size, devices)
      loop = re.search(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)', line)
      trips = _trips(bodies, *loop.groups(), line) if loop else 1
      inner_channels = of_fusions if ' fusion(' in line else None
      for one, several in _CALLS.findall(line):
        for inner in {one} if one else set(re.findall(r'[\w.\-]+', several)):
          if inner in bodies and inner not in seen:
            for key, value in total(
                inner, seen | {inner}, inner_channels).items():
              found[key] += trips * value
    return found

  found = total(entry, {entry})
  return {kind: Exchange(*(round(found[kind, of]) for of in Exchange._fields))
          for kind in _KINDS if found[kind, 'count']}


def _computations(text):
  """Returns ({name: lines}, the name of the one that is called)."""
  bodies, entry, current = {}, '', None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = match[2]
      bodies[current] = []
      entry = current if match[1] else entry
    elif current is not None:
      bodies[current].append(line)
  return bodies, entry


def _trips(bodies, condition, body, line):
  """How often a loop runs; 1 where its end is not that of a count from 0."""
  if known := _KNOWN_TRIPS.search(line):
    return int(known[1])
  text = '\n'.join(bodies[condition])
  limit = _CONSTANT.findall(text)
  index = re.search(r'get-tuple-element\(.*\), index=(\d+)', text)
  if len(limit) != 1 or not index:
    return 1
  # The compiler may have unrolled it: it then counts in steps.
  constants = dict(_CONSTANT.findall('\n'.join(bodies[body])))
  root = next(x for x in bodies[body] if x.lstrip().startswith('ROOT'))
  names = re.findall(r'%([\w.\-]+)', root[root.index('tuple('):])
  counted = re.compile(
      rf'%{re.escape(names[int(index[1])])} = .* add\(%(\S+), %([\w.\-]+)\)')
  steps = [int(constants.get(name, 1)) for x in bodies[body]
           if (match := counted.search(x)) for name in match.groups()]
  return int(limit[0][1]) // max(steps, default=1)


def of_sharding(blocks, weights, kernels, others, sizes, activation, steps=1):
  """What a training step has to exchange, from how its arrays are divided.

  Args:
    blocks: number of blocks.
    weights: bytes of the kernels, in the dtype of matmuls.
    kernels: bytes of the gradients of those that are trained.
    others: bytes of the gradients of all else.
    sizes: of the mesh's axes.
    activation: bytes of [B, N, D] of a micro-batch on a device.
    steps: micro-batches of a batch. Each gathers the weights, forward and
      backward, and reduces its gradients: XLA has no sum that waits for it.

  Returns:
    {kind: `Exchange`}. Counts are those of arrays or blocks that are exchanged
    one by one; compilers merge some.
  """
  data, fsdp, tensor = (sizes[axis] for axis in ('data', 'fsdp', 'tensor'))
  found = collections.defaultdict(list)

  def add(kind, count, size, devices):
    if devices > 1 and size:
      found[kind].append((count, size, _sent(kind, size, devices)))

  blocks *= steps
  weights, kernels = steps * weights / tensor, steps * kernels / tensor
  add('all-gather', 2 * blocks, 2 * weights, fsdp)
  if fsdp > 1:
    add('reduce-scatter', blocks, kernels, fsdp)
    kernels /= fsdp
  add('all-reduce', blocks, kernels, data)
  add('all-reduce', steps, steps * others, data * fsdp)
  # Behind attention and MLP, forward; in front of them, backward.
  add('all-reduce', 4 * blocks, 4 * blocks * activation, tensor)
  return {kind: Exchange(*(round(sum(n)) for n in zip(*several, strict=True)))
          for kind, several in found.items()}


def seconds(found, network):
  """The least time that exchanges take, nothing else running beside them.

  Args:
    found: {kind: `Exchange`}.
    network: bytes/s of a device, in one direction.
  """
  return sum(exchange.sent for exchange in found.values()) / network


def _sent(kind, size, devices):
  """Bytes that a device sends; `devices` in its ring, None: many."""
  share = (devices - 1) / devices if devices else 1
  return (2 if kind == 'all-reduce' else 1) * share * size


def _bytes(dtype, shape):
  bits = 8 if dtype == 'pred' or dtype.startswith('f8') else int(
      re.search(r'\d+', dtype)[0])
  sizes = [int(n) for n in shape.split(',') if n]
  return int(np.prod(sizes, dtype=np.int64)) * bits // 8


def _group_size(line):
  """Devices in a group of a collective, None where that is not said."""
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(match[2])
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(match[1].split(','))
  if match := re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', line):
    sizes = dict(axis.split('=') for axis in match[1].split(','))
    return int(np.prod([int(sizes[axis]) for axis in match[2].split(',')]))
  return None
