"""Times the input pipeline against plain tf.data, and what it feeds.

  vit-jax bench data --config configs/vit_c_i1k.py:data=/data/imagenet
  vit-jax bench data --images /data/some_photos

On a sample of the training images, copied to a temporary folder, in turns:
  decode        reading and decoding whole images; plain tf.data
  crop          the part of an Inception crop only; plain tf.data
  delivery      our batches of 'decode|inception_crop(224)|flip_lr', uint8
  packed        the same from what `vit-jax pack` makes of the images
  randaugment   crop, flip and RandAugment on the host; plain tf.data, as in
                big_vision
  end to end    our delivery, augmentation as `augment` says and a step that
                does nothing else, all on JAX's devices
Prints medians over rounds, also of the ratios within a round, for neighbours
in time saw the same machine; trust them on an idle one only. CPU time is that
of all threads of the process. Trains nothing.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --images DIR   image files anywhere below, instead of the config's
  --sample N     images at most (1000)
  --batch N      images a batch (64)
  --batches N    batches that are timed in a round (16)
  --rounds N     rounds (5)
  --short_side N, --quality N    of the packed images (256, 90)
  --augment LINE for end to end ('randaug(2, 10)')
  --consumer X   images/s to be fed; 0: what the config's model would take on
                 a GPU of 790 TFLOP/s used at 55 %, an estimate (0)
"""
import collections
import contextlib
import os
import tempfile
import time

from absl import flags
import numpy as np

from vit_jax import config as config_lib
from vit_jax import recipes
from vit_jax.commands import soak

# Of an H200, measured on matmuls of 8192^3 in bfloat16; and a good use of it.
_FLOPS, _USED = 790e12, 0.55
_REFERENCE = 'crop'
# Batches that a stream makes while others are timed. On a busy machine it may
# make as many again before the clock starts: time several times that number.
_WAITING = 4


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax bench data', *argv])
  with tempfile.TemporaryDirectory() as folder:
    paths = sample(args.config, args.images, args.sample, folder)
    print(f'{len(paths):,} images of '
          f'{np.mean(list(map(os.path.getsize, paths))) / 1e3:.1f} kB on '
          f'{_cpus()} CPUs, batches of {args.batch}', flush=True)
    with contextlib.ExitStack() as stack:
      streams = open_streams(args, paths, folder, stack)
      times = measure(streams, args.batch, args.batches, args.rounds)
      print(describe(times))
      print(f'resident memory {soak.resident() / 1e6:,.0f} MB; '
            f'{packed_size(folder) / 1e3:.1f} kB an image packed')
  consumer, source = args.consumer, 'given'
  if not consumer:
    consumer, source = estimate(args.config), 'estimated'
  print(feeding(times, consumer, source))
  return 0


def _parse(argv):
  def define(values):
    for name, default in (('images', ''), ('augment', 'randaug(2, 10)')):
      flags.DEFINE_string(name, default, name, flag_values=values)
    for name, default in (('sample', 1000), ('batch', 64), ('batches', 16),
                          ('rounds', 5), ('short_side', 256), ('quality', 90)):
      flags.DEFINE_integer(
          name, default, name, lower_bound=1, flag_values=values)
    flags.DEFINE_float('consumer', 0, '/s', lower_bound=0, flag_values=values)

  if any(a.startswith('--config') for a in argv):
    return config_lib.parse_flags(argv, define)
  args = flags.FlagValues()
  define(args)
  flags.DEFINE_string('config', '', 'Config file.', flag_values=args)
  try:
    rest = args(argv)
  except flags.Error as e:
    raise ValueError(
        f'{str(e).splitlines()[0].rstrip(".")}.\nSee --help.') from None
  if len(rest) > 1 or not args.images:
    raise ValueError('Neither --config nor --images names data.\n'
                     'For example: --images /data/photos.')
  args.config = recipes.base()
  return args


def sample(config, images, most, folder):
  """Copies images into folder/photos; returns the paths of those to train on.

  Args:
    config: ConfigDict with the keys of `recipes.base`; `input` is read.
    images: folder of image files to take in place of the config's data.
    most: how many.
    folder: to write to.

  Raises:
    ValueError, FileNotFoundError: there are none that are JPEG files.
  """
  import input_pipeline
  if images:
    found = sorted(os.path.join(top, name)
                   for top, _, names in os.walk(images) for name in names)
    count, read = len(found), lambda i: _contents(found[i])
  else:
    train = input_pipeline.open_data(config.input, 0).train
    if not train.encoded or train.streamed:
      raise ValueError('The training images are no files that can be sampled.\n'
                       'Name a folder of JPEG files with --images.')
    count, read = train.num_examples, lambda i: train.load(i)[0]
  paths = []
  for i in sorted({*np.linspace(0, count - 1, min(most, count)).astype(int)}):
    content = read(int(i))
    if content.startswith(b'\xff\xd8\xff'):
      # Two classes, and an image of each to evaluate, which nobody reads.
      for part in ('val', 'train')[len(paths) >= 2:]:
        name = os.path.join(folder, 'photos', part, 'ab'[len(paths) % 2])
        os.makedirs(name, exist_ok=True)
        path = os.path.join(name, f'{i}.jpg')
        with open(path, 'wb') as f:
          f.write(content)
      paths.append(path)
  if len(paths) < 4:
    raise ValueError(f'{len(paths)} JPEG files are too few to time.\n'
                     'Name a folder that holds some with --images.')
  return paths


def _contents(path):
  with open(path, 'rb') as f:
    return f.read()


def open_streams(args, paths, folder, stack):
  """{name: endless iterator of batches}, of what is listed above."""
  import input_pipeline
  from input_pipeline import packed
  from input_pipeline import probes_tf
  from input_pipeline import sources
  size = 224

  def ours(source, path):
    config = recipes.base().input
    config.update(source=source, path=path,
                  pp=f'decode|inception_crop({size})|flip_lr',
                  eval_pp=f'decode|resize({size})')
    data = input_pipeline.open_data(config, 0)
    return data, stack.enter_context(contextlib.closing(
        input_pipeline.train_batches(
            data, global_batch_size=args.batch, data_seed=0)))

  def probe(name):
    return probes_tf.batches(paths, name, args.batch, size)

  data, delivery = ours('folder', os.path.join(folder, 'photos'))
  small = os.path.join(folder, 'packed')
  packed.write(sources.Splits(data.train, data.evals), small, args.short_side,
               args.quality)
  return {
      'decode': probe('decode'), 'crop': probe('crop'), 'delivery': delivery,
      'packed': ours('packed', small)[1], 'randaugment': probe('randaugment'),
      'end to end': end_to_end(
          args, ours('folder', os.path.join(folder, 'photos'))[1], stack)}


def end_to_end(args, batches, stack):
  """Yields when a batch has passed `augment` and a step without a model."""
  import jax

  import input_pipeline
  from vit_jax import augment as augment_lib
  from vit_jax import sharding
  from vit_jax import train_step
  mesh = sharding.create_mesh({'data': 1}, jax.local_devices()[:1])
  config = recipes.base()
  config.augment = args.augment
  augment = augment_lib.create(
      config, (224, 224, 3), 2, train_step.normalizer((.5,), (.5,), 3), mesh)

  @jax.jit
  def step(batch, key, number):
    return augment(batch, key, number)['image'].mean()

  ahead = stack.enter_context(input_pipeline.to_device.prefetch(
      batches, sharding.batch(mesh)))
  key = jax.random.key(0, impl='threefry2x32')
  with sharding.tracing(mesh):
    for number, batch in enumerate(ahead):
      yield step(batch, key, np.int32(number)).block_until_ready()


def measure(streams, batch, batches, rounds):
  """Times streams in turns.

  Args:
    streams: {name: endless iterator of batches}.
    batch: images a batch.
    batches: of a measurement.
    rounds: measurements of each.

  Returns:
    {name: float64 [2, rounds]}, seconds and CPU seconds an image.
  """
  found = collections.defaultdict(list)
  for _ in range(rounds):
    for name, stream in streams.items():
      settle()
      for _ in range(_WAITING):
        next(stream)
      begin = np.array([time.perf_counter(), time.process_time()])
      for _ in range(batches):
        next(stream)
      end = np.array([time.perf_counter(), time.process_time()])
      found[name].append((end - begin) / (batch * batches))
  return {name: np.stack(rows, axis=1) for name, rows in found.items()}


def settle():
  """Waits until the threads of this process rest: their queues are full."""
  while True:
    used = time.process_time()
    time.sleep(0.03)
    if time.process_time() - used < 0.005:
      return


def describe(times):
  """The table of what `measure` returned."""
  lines = [f'{"":12} {"images/s":>9} {"per CPU":>9} {"CPU ms/image":>13} '
           f'{"x " + _REFERENCE:>7} {"by CPU":>7}']
  for name, found in times.items():
    rate, used = 1 / np.median(found[0]), np.median(found[1])
    wall, cpu = _ratios(times, name, _REFERENCE)
    lines.append(f'{name:12} {rate:9,.0f} {rate / _cpus():9,.0f} '
                 f'{1e3 * used:13.2f} {wall:7.2f} {cpu:7.2f}')
  for name, other in (('packed', 'delivery'), ('end to end', 'randaugment')):
    wall, cpu = _ratios(times, name, other)
    lines.append(f'{name}: {wall:.2f} x {other}, {cpu:.2f} x by CPU time')
  return '\n'.join(lines)


def _ratios(times, name, other):
  """(by time, by CPU time): how often `name` fits into `other`."""
  return np.median(times[other] / times[name], axis=1)


def packed_size(folder):
  """Mean bytes of the images to train on that `open_streams` packed."""
  from input_pipeline import packed
  train = packed.open_splits(os.path.join(folder, 'packed'), 0, ()).train
  return np.mean([len(train.read([i])[0]) for i in range(train.num_examples)])


def estimate(config):
  """Images/s that a config's model would take on one GPU; see _FLOPS."""
  from vit_jax import complexity
  from vit_jax import models
  from vit_jax import train_state
  model = models.create(num_classes=1000, **train_state.model_fields(
      config.model, tuple(config.frozen)))
  # Forward once, backward twice; two operations a multiply-add.
  return _USED * _FLOPS / (6 * complexity.of(model, 224).macs)


def feeding(times, consumer, source):
  """Which number of CPUs feeds a consumer, by our ways of delivery."""
  lines = [f'to feed {consumer:,.0f} images/s ({source}):']
  for name in ('delivery', 'packed'):
    cpus = consumer * np.median(times[name][0]) * _cpus()
    lines.append(f'  {name}: {cpus:.1f} CPUs')
  return '\n'.join(lines)


def _cpus():
  from input_pipeline import pipeline
  return pipeline.cpu_count()
