"""Which example comes when, and every random number the host draws.

Both are pure functions of (data_seed, epoch, position or index): no state, no
table, no buffer. Any step can be computed at once, on any number of processes,
with and without TensorFlow, so a resumed run continues exactly.

The order of an epoch is a keyed bijection of [0, num_examples): a Feistel
network over the smallest near-square grid that holds the range, restricted to
it by cycle walking (apply the network again until the value falls inside; a
grid leaves 1 value in sqrt(N) outside, a power of two up to half of them).
`tf.random.experimental.index_shuffle`
would be the ready-made alternative, but seeded with (seed, epoch) its
successive epochs are correlated (0.76 at 50,000 examples, 0.9999 at 65,536),
and at 2**k + 1 examples (k even) it is not a permutation.
"""
import math

import numpy as np

from input_pipeline import messages

# Rounds with independent keys. The statistics in tests/test_order.py were
# clean with four, too, for the seed tried; eight leave a margin.
_ROUNDS = 8
# Sides shorter than this allow so few round functions that a small data set
# would see only few orders. Walking out of the larger range costs nothing that
# matters at such sizes.
_MIN_SIDE = 8
EPOCHS = ('exact', 'floor')
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's increment
# Hashes for different uses start differently, so they never coincide.
_FOR_ORDER, _FOR_DRAWS = 0x6F72646572, 0x6472617773
_FOR_SUBSTITUTES = 0x7375627374
_FOR_SUBSETS = 0x73756273657473
# Orders apart from that of the examples: of streamed files, and of the records
# in a window (WINDOWS and above).
FILES, WINDOWS = 1, 2


def _mix(x):
  """SplitMix64's finalizer, a bijection of uint64 (Steele et al., 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _add_hash(x, y, key, side):
  """(x + keyed hash of y) modulo `side`, for x in [0, side)."""
  y = (y ^ key) * np.uint64(0xBF58476D1CE4E5B9)
  y = (y ^ (y >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
  x = x + ((y >> np.uint64(32)) * side >> np.uint64(32))
  return np.where(x < side, x, x - side)


def _hash(*words):
  """uint64 hash of integers or integer arrays (broadcast), order mattering."""
  state = np.zeros((), np.uint64)
  for word in words:
    word = np.asarray(word).astype(np.int64).view(np.uint64)
    state = _mix((state + np.uint64(_GOLDEN)) ^ word)
  return state


def check_seed(data_seed):
  """Returns `data_seed` as an int; ValueError unless 0 <= it < 2**63."""
  if (not isinstance(data_seed, (int, np.integer))
      or isinstance(data_seed, bool) or not 0 <= data_seed < 2**63):
    raise ValueError(
        f'data_seed={data_seed!r} is no integer in [0, 2**63).\n'
        'Take a small whole number, such as 0.')
  return int(data_seed)


@np.errstate(over='ignore')  # uint64 products are meant to wrap
def permuted(data_seed, epoch, position, num_examples, stream=0):
  """The example at each position of an epoch's order.

  Args:
    data_seed: int in [0, 2**63).
    epoch: int or int64 array >= 0, broadcast against `position`.
    position: int or int64 array in [0, num_examples).
    num_examples: N in [1, 2**60].
    stream: int that separates uses; 0 is the order of the examples.

  Returns:
    int64 array of the broadcast shape, values in [0, num_examples). For one
    epoch, all positions together give every example exactly once.
  """
  num_examples = int(num_examples)
  epoch, position = np.broadcast_arrays(
      np.asarray(epoch, np.int64), np.asarray(position, np.int64))
  if position.size and (position.min() < 0 or position.max() >= num_examples):
    raise ValueError(f'A position is not in [0, {num_examples}).\n'
                     'Take those of batch_positions.')
  width = max(math.isqrt(num_examples - 1) + 1, _MIN_SIDE)
  height = max(-(-num_examples // width), _MIN_SIDE)
  width, height, end = map(np.uint64, (width, height, num_examples))

  # A batch holds one or two epochs: hash each once.
  epochs, which = np.unique(epoch, return_inverse=True)
  rounds = np.arange(_ROUNDS)[:, None]
  use = (stream,) if stream else ()
  keys = _hash(_FOR_ORDER, data_seed, epochs, rounds, *use)  # [rounds, epochs]
  keys = keys[:, which.reshape(-1)]  # [rounds, n]

  def feistel(x, keys):
    high, low = np.divmod(x, width)
    for r in range(0, _ROUNDS, 2):
      high = _add_hash(high, low, keys[r], height)
      low = _add_hash(low, high, keys[r + 1], width)
    return high * width + low

  x = feistel(position.reshape(-1).astype(np.uint64), keys)
  outside = np.flatnonzero(x >= end)
  while outside.size:
    x[outside] = feistel(x[outside], keys[:, outside])
    outside = outside[x[outside] >= end]
  return x.astype(np.int64).reshape(position.shape)


@np.errstate(over='ignore')
def uniform(data_seed, epoch, index, stream, n, repeat=0):
  """Random numbers that belong to one example in one epoch.

  Args:
    data_seed: int in [0, 2**63).
    epoch: int or int64 array, broadcast against `index`.
    index: int or int64 array of example indices.
    stream: int that separates uses, such as the position of an op.
    n: how many numbers.
    repeat: int or int64 array in [0, 2**16), of the same example and epoch.

  Returns:
    float64 [..., n] in [0, 1): SplitMix64 started at a hash of the rest.
  """
  stream = stream + (np.asarray(repeat, np.int64) << 32)
  start = _hash(_FOR_DRAWS, data_seed, epoch, index, stream)
  counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
  bits = _mix(start[..., None] + counter)
  return (bits >> np.uint64(11)) * 2.0**-53


def substitute(data_seed, epoch, index, attempt, num_examples):
  """The example that takes the place of an unreadable one in an epoch.

  Args:
    data_seed: int in [0, 2**63).
    epoch: int.
    index: int, the unreadable example.
    attempt: int, counts further draws while those before are unreadable, too.
    num_examples: N.

  Returns:
    int in [0, N).
  """
  with np.errstate(over='ignore'):
    draw = _hash(_FOR_SUBSTITUTES, data_seed, epoch, index, attempt)
  return int(draw) % int(num_examples)


@np.errstate(over='ignore')
def subset_draws(data_seed, index):
  """uint64 draws of examples, the smallest of which make a subset.

  Args:
    data_seed: int in [0, 2**63).
    index: int64 array.
  """
  return _hash(_FOR_SUBSETS, data_seed, index)


def batch_positions(step, *, num_examples, global_batch_size, epoch='exact',
                    process_index=0, process_count=1, steps=1):
  """Where in which epoch each row of a process's batches lies.

  Args:
    step: int >= 0, the first.
    num_examples: N.
    global_batch_size: B, over all processes.
    epoch: 'exact': an epoch is N examples, batches straddle epochs. 'floor':
      an epoch is floor(N / B) * B examples, the rest of that epoch's order
      goes unused (`drop_last` in the ViT_C paper's code).
    process_index: this process takes the rows from process_index * B / count.
    process_count: divides B.
    steps: how many batches follow each other.

  Returns:
    (epoch, position), each int64 [steps * B / process_count].

  Raises:
    ValueError: B is not a multiple of process_count, an unknown `epoch`, no
      examples, or N < B with epoch='floor'.
  """
  if num_examples < 1:
    raise ValueError('There are no examples to train on.\n'
                     'Point input.path to data that holds some.')
  if global_batch_size < 1 or global_batch_size % process_count:
    raise ValueError(
        f'global_batch_size={global_batch_size} does not divide over '
        f'{process_count} processes.\n'
        f'Make it a positive multiple of {process_count}.')
  if epoch == 'exact':
    examples_per_epoch = num_examples
  elif epoch == 'floor':
    examples_per_epoch = num_examples - num_examples % global_batch_size
    if not examples_per_epoch:
      raise ValueError(
          f"input.epoch='floor' drops partial batches, but {num_examples} "
          f'examples do not fill one batch of {global_batch_size}.\n'
          "Use a smaller global_batch_size or input.epoch='exact'.")
  else:
    raise ValueError(
        f'input.epoch={epoch!r} is unknown.\n'
        + messages.choices(epoch, EPOCHS))
  rows = global_batch_size // process_count
  first = (np.arange(step, step + steps, dtype=np.int64) * global_batch_size
           + process_index * rows)
  position = (first[:, None] + np.arange(rows)).reshape(-1)
  return np.divmod(position, np.int64(examples_per_epoch))


def batch_examples(data_seed, step, *, num_examples, repeats=1, **kwargs):
  """Which example, seen for which time, is each row of a process's batches.

  With repeats (repeated augmentation: Hoffer et al., arXiv 1901.09335; DeiT
  takes 3) an epoch still has N positions, and visits N / repeats examples:
  position p takes the example at p // repeats of the order, with the draws of
  its repeat p % repeats.

  Args:
    data_seed: int in [0, 2**63).
    step: int >= 0, the first.
    num_examples: N.
    repeats: how often in a row an example comes.
    **kwargs: as in `batch_positions`.

  Returns:
    (epoch, index, repeat), each int64 [steps * B / process_count]; repeat
    counts from 0 to repeats - 1, for `uniform`.

  Raises:
    ValueError: repeats out of range, or as `batch_positions`.
  """
  check_repeats(repeats)
  epoch, position = batch_positions(step, num_examples=num_examples, **kwargs)
  position, repeat = np.divmod(position, np.int64(repeats))
  return epoch, permuted(data_seed, epoch, position, num_examples), repeat


def check_repeats(repeats):
  """Raises ValueError unless `repeats` is an int in [1, 2**16)."""
  if (not isinstance(repeats, (int, np.integer)) or isinstance(repeats, bool)
      or not 1 <= repeats < 2**16):
    raise ValueError(
        f'input.repeats={repeats!r} is no whole number from 1 on.\n'
        'Take 1 to see each example once in an epoch, or 3 as DeiT does.')


def check_not_repeated(repeats):
  """Raises ValueError for repeats of a streamed source."""
  if repeats != 1:
    raise ValueError(
        f'A streamed source has no input.repeats={repeats}.\n'
        'Use input.repeats=1, or copy the data to a local disk.')
