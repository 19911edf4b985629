"""Times the forms of augmentation, and their share of a training step.

  vit-jax bench augment
  vit-jax bench augment --model=4GF --step_batch=256

Prints images/s of the ops on pixels in the forms of `op_policy`: loop (a
loop over images with a switch), switched (the same switch under vmap, which
runs every op), batched, and batched with histograms by scattered additions; on
one device, on noise. With --step_batch also the
time of a ViT_C training step with and without the whole line. Needs neither
data nor TensorFlow.

Flags:
  --augment LINE    'randaug(2, 15)|mixup(0.2)'
  --batch N         images for the forms; 0: 16 on a CPU, else 256 (0)
  --size N          pixels a side (224)
  --repeats N       of which the shortest counts (5)
  --step_batch N    examples of the training step; 0: none (0)
  --model SIZE      of that step (4GF)
"""
import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import augment as augment_lib
from vit_jax import devices
from vit_jax import program
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_step
from vit_jax.augment import op_forms
from vit_jax.augment import op_policy

FORMS = {
    'loop': op_policy.loop,
    'switched': op_policy.switched,
    'batched': op_policy.batched,
    # With the histograms of the loop.
    'scattered': functools.partial(
        op_policy.batched, histogram=op_forms.histogram),
}
_CLASSES = 1000


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax bench augment', *argv])
  print(devices.summary())
  on_cpu = jax.default_backend() == 'cpu'
  batch = args.batch or (16 if on_cpu else 256)
  rates = forms(args.augment, batch, args.size, args.repeats)
  for name, rate in rates.items():
    print(f'{name:9} {rate:10,.0f} images/s, {1e6 / rate:8,.1f} us an image, '
          f'{rate / rates["switched"]:.2f} x switched')
  if args.step_batch:
    plain, whole = step(args.augment, args.model, args.step_batch, args.size,
                        args.repeats)
    print(f'step of ViT_C-{args.model}, batch {args.step_batch}: '
          f'{1e3 * plain:.2f} ms, with {args.augment} {1e3 * whole:.2f} ms: '
          f'a share of {1 - plain / whole:.1%}')
  return 0


def _parse(argv):
  args = flags.FlagValues()
  flags.DEFINE_string(
      'augment', 'randaug(2, 15)|mixup(0.2)', 'Line.', flag_values=args)
  flags.DEFINE_string('model', '4GF', 'Size.', flag_values=args)
  for name, default, low in (('batch', 0, 0), ('size', 224, 32),
                             ('repeats', 5, 1), ('step_batch', 0, 0)):
    flags.DEFINE_integer(
        name, default, name, lower_bound=low, flag_values=args)
  try:
    rest = args(argv)
  except flags.Error as e:
    raise ValueError(
        f'{str(e).splitlines()[0].rstrip(".")}.\nSee --help.') from None
  if len(rest) > 1:
    raise ValueError(f'Unexpected argument {rest[1]!r}.\nSee --help.')
  return args


def forms(line, batch, size, repeats):
  """Times the ops on pixels of a line, on one device.

  Args:
    line: of `augment`.
    batch: images at once.
    size: pixels a side.
    repeats: of which the shortest counts.

  Returns:
    {name of FORMS: images/s}.

  Raises:
    ValueError: a line without such ops, or the forms disagree.
  """
  made = _augment(line, size, sharding.create_mesh(
      {'data': 1}, jax.devices()[:1]))
  if not made.policies:
    raise ValueError(f'augment={line!r} has no op on pixels.\n'
                     "Time one such as 'randaug(2, 15)'.")
  images = jnp.asarray(_images(batch, size))
  key = jax.random.key(0, impl='threefry2x32')

  def run(form, images):
    for place, policy in made.policies.items():
      keys = augment_lib.example_keys(key, 0, jnp.arange(batch), place)
      ops = op_policy.drawn_ops(policy, keys, size, size)
      images = form(policy, images, ops)
    return images

  compiled = {
      name: jax.jit(functools.partial(run, form)).lower(images).compile()
      for name, form in FORMS.items()}
  results = {name: np.asarray(f(images)) for name, f in compiled.items()}
  for name, result in results.items():
    if not np.array_equal(result, results['loop']):
      raise ValueError(f'{name} gives other images than loop.\n'
                       'Report this, with the output of vit-jax doctor.')
  times = _shortest(
      {name: functools.partial(f, images) for name, f in compiled.items()},
      repeats)
  return {name: batch / t for name, t in times.items()}


def step(line, model_size, batch, size, repeats):
  """Seconds of a ViT_C training step without and with a line.

  All devices; bfloat16 where it is the default; AdamW and running BatchNorm.

  Args:
    line: of `augment`.
    model_size: of the model.
    batch: examples, over all devices.
    size: pixels a side.
    repeats: of which the shortest counts.
  """
  mesh = sharding.create_mesh({'data': -1})
  sharding.check_batch_size('--step_batch', batch, mesh)
  config = recipes.base()
  config.model.size, config.global_batch_size = model_size, batch
  config.schedule = recipes.cosine(0.0)
  data = jax.device_put(
      {'image': _images(batch, size),
       'label': np.arange(batch, dtype=np.int32) % _CLASSES},
      sharding.batch(mesh))
  runs = {}
  for text in ('', line):
    config.augment = text
    made = program.create(
        config, 100 * batch, _CLASSES, (size, size, 3), mesh)
    hypers = sharding.put_tree(made.hypers, sharding.replicated(mesh))
    state = made.init_fn(hypers['key'])
    with sharding.tracing(mesh):
      # Not `compile_step`'s, which takes the memory of its state.
      compiled = jax.jit(made.step).lower(state, data, hypers).compile()
    runs[text] = functools.partial(compiled, state, data, hypers)
  times = _shortest(runs, repeats)
  return times[''], times[line]


def _augment(line, size, mesh):
  config = recipes.base()
  config.augment = line
  return augment_lib.create(
      config, (size, size, 3), _CLASSES,
      train_step.normalizer((0.5,), (0.5,), 3), mesh)


def _images(batch, size):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (batch, size, size, 3), np.uint8)


def _shortest(functions, repeats):
  """{name: seconds}, the functions taking turns."""
  best = dict.fromkeys(functions, float('inf'))
  for _ in range(repeats + 1):  # the first warms up
    for name, function in functions.items():
      begin = time.perf_counter()
      jax.block_until_ready(function())
      best[name] = min(best[name], time.perf_counter() - begin)
  return best
