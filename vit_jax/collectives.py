"""Exchanges between devices in a compiled program, and what they should be.

`of_program` reads a compiler's text, `of_sharding` is the algebra of data
parallelism, ZeRO-3 and Megatron.
"""
import collections
import re

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


def of_program(text):
  """Counts the collectives of a compiled program, loops as often as they run.

  Args:
    text: HLO, `compiled.as_text()`.

  Returns:
    {kind: (count, bytes)} of what each device runs in one call; bytes are those
    of the results (reduce-scatter: of the argument, as many times as there are
    devices). An all-reduce of which each device keeps its part, which TPUs fuse
    with the cut, counts as reduce-scatter.
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
        if kind == 'reduce-scatter':
          size *= _group_size(line)
        elif 'all-reduce-scatter' in name:
          kind = 'reduce-scatter'
        found[kind, 'count'] += 1
        found[kind, 'bytes'] += size
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
  return {kind: (found[kind, 'count'], found[kind, 'bytes'])
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


def of_sharding(blocks, kernels, others, sizes, activation, passes=2):
  """What a training step has to exchange, from how its arrays are divided.

  Args:
    blocks: number of blocks.
    kernels: bytes of all gradients and weights in the dtype of matmuls.
    others: bytes of the gradients of all else.
    sizes: of the mesh's axes.
    activation: bytes of [B, N, D] on a device, in the dtype of matmuls.
    passes: how often weights are gathered: forward and backward.

  Returns:
    {kind: (count, bytes)}; see `of_program`. Counts are those of arrays or
    blocks that are exchanged one by one; compilers merge some.
  """
  found = {}
  whole = (kernels + others) / sizes['tensor']
  if sizes['fsdp'] > 1:
    found['all-gather'] = passes * blocks, passes * kernels / sizes['tensor']
    found['reduce-scatter'] = blocks, kernels / sizes['tensor']
    whole = kernels / sizes['tensor'] / sizes['fsdp'] * (
        sizes['data'] > 1) + others
  reduced = whole if sizes['data'] * sizes['fsdp'] > 1 else 0
  if sizes['tensor'] > 1:
    # Behind attention and MLP, forward; in front of them, backward.
    reduced += 4 * blocks * activation
  if reduced:
    found['all-reduce'] = (
        blocks + 4 * blocks * (sizes['tensor'] > 1), reduced)
  return {kind: (count, round(size)) for kind, (count, size) in found.items()}


def seconds(found, devices, network):
  """The least time that exchanges take, nothing else running beside them.

  Rings: an all-reduce sends each byte twice, the others once.

  Args:
    found: {kind: (count, bytes)}.
    devices: that take part.
    network: bytes/s of one, in one direction.
  """
  share = (devices - 1) / devices
  return sum((2 if kind == 'all-reduce' else 1) * share * size / network
             for kind, (_, size) in found.items())


def _bytes(dtype, shape):
  bits = 8 if dtype == 'pred' or dtype.startswith('f8') else int(
      re.search(r'\d+', dtype)[0])
  sizes = [int(n) for n in shape.split(',') if n]
  return int(np.prod(sizes, dtype=np.int64)) * bits // 8


def _group_size(line):
  """Devices in a group of a collective."""
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(match[2])
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(match[1].split(','))
  return 1
