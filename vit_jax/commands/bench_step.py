"""Times the training step of a config: images/s, MFU, memory, what takes it.

  vit-jax bench step --config configs/augreg.py:model=B/16
  vit-jax bench step --config configs/digits.py --versus plain
  vit-jax bench step --config configs/augreg.py:model=S/16 --versus timm

On a batch of noise of the config's shape, on all devices; the data need not be
here. Prints the time of a step (median, and 10th to 90th percentile), images/s,
the time to compile, peak memory, MFU and the ten most expensive ops. MFU, the
share of the devices' FLOP/s that the model's own take (forward once, backward
twice, 2 a multiply-add; nothing for rematerialisation), is given against a
matmul that is timed in the same turns (8192^3 in bfloat16; on CPUs 2048^3 in
float32) and against the data sheet, where `chips` has it.

--versus also times, in turns with ours, and prints how many times as fast ours
is, as the median of the ratios within a turn:
  loop    the training loop, with the input pipeline and its data beside the
          step, without evaluation and checkpoints; 40 steps a turn unless
          --steps says otherwise: two batches wait when a turn begins
  plain   the same model with optax.adamw in a step of the fewest lines, on one
          device, without mesh, augmentation and averages
  timm    timm's VisionTransformer of the same shape and torch's fused AdamW, on
          one device: on CPUs eager in float32 and with bfloat16 autocast; on
          GPUs in bfloat16 eager, channels_last and torch.compile, all with
          scaled_dot_product_attention

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --versus NAME,...  loop, plain, timm
  --batch N          examples, over all devices; 0: the config's (0)
  --rounds N         turns that count; one more warms up (10)
  --steps N          steps of a turn; 0: 1 on a CPU, else 10 (0)
"""
import os
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import input_pipeline
from vit_jax import chips
from vit_jax import choices
from vit_jax import complexity
from vit_jax import config as config_lib
from vit_jax import devices
from vit_jax import experiment
from vit_jax import pace
from vit_jax import profiler
from vit_jax import program as program_lib
from vit_jax import sharding

_OURS, _MATMUL = 'ours', 'matmul'


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax bench step', *argv])
  if 'timm' in args.versus:
    # Else JAX takes three quarters of a GPU's memory, and torch finds none.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    # Nor are torch's threads to spin while it is the others' turn: on a busy
    # machine they made it 7 times as slow as it is.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
  print(devices.summary(), flush=True)
  made = create(args.config, args.batch)
  others = lambda: {k: f for name in args.versus
                    for k, f in VERSUS[name](args.config, made).items()}
  steps = args.steps or (40 if 'loop' in args.versus else 0)
  print('\n'.join(report(made, others, args.rounds, steps)))
  return 0


def _parse(argv):
  def define(values):
    flags.DEFINE_list('versus', '', 'Names.', flag_values=values)
    for name, default, low in (('batch', 0, 0), ('rounds', 10, 1),
                               ('steps', 0, 0)):
      flags.DEFINE_integer(
          name, default, name, lower_bound=low, flag_values=values)

  args = config_lib.parse_flags(argv, define)
  for name in args.versus:
    choices.pick(VERSUS, name, '--versus')
  return args


def create(config, batch_size=0):
  """Returns the `Program` of a config, on this machine's devices.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    batch_size: examples a step; 0: the config's.

  Raises:
    ValueError: bad config.
  """
  devices.check()
  if batch_size:
    config.global_batch_size = batch_size
  num_train, num_classes, image_shape, _ = experiment.data_sizes(config)
  return program_lib.create(config, num_train, num_classes, image_shape,
                            sharding.create_mesh(config.mesh))


def report(made, others, rounds, steps=0):
  """Compiles and times a program's step; yields the lines that are printed.

  Args:
    made: `Program`.
    others: returns {name: function of a number of steps, which does them and
      waits}; called once ours is compiled and its memory is known.
    rounds: turns that count.
    steps: of a turn; 0: 1 on a CPU, else 10.
  """
  mesh, batch_size = made.mesh, made.batch_size
  steps = steps or (1 if mesh.devices.flat[0].platform == 'cpu' else 10)
  begin = time.perf_counter()
  compiled = made.compile_step()
  yield f'compiled in {time.perf_counter() - begin:.1f} s'
  run = stepper(made, compiled)
  run()
  memory, source = peak_memory(compiled, mesh)
  others = others()
  matmul, matmul_flops = _matmul(mesh)
  times = measure({_OURS: run, _MATMUL: matmul, **others}, rounds, steps)

  ours = times[_OURS]
  macs = complexity.of(
      made.model, made.image_shape[:2], made.image_shape[2]).macs
  flops = 6 * macs * batch_size / np.median(ours) / mesh.size
  ceiling = matmul_flops / np.median(times[_MATMUL])
  yield f'{batch_size} examples of {made.image_shape}, {macs:,} multiply-adds'
  yield _line(_OURS, ours, batch_size)
  yield f'peak memory  {memory / 1e9:.3f} GB a device ({source})'
  yield (f'MFU          {flops / ceiling:.1%} of a matmul '
         f'({ceiling / 1e12:.3g} TFLOP/s a device, measured)')
  chip = chips.of(mesh.devices.flat[0].device_kind)
  if chip:
    yield (f'             {flops / chip.flops:.1%} of the data sheet '
           f'({chip.flops / 1e12:.0f} TFLOP/s)')
  for name in others:
    yield (f'{_line(name, times[name], batch_size)}; ours is '
           f'{np.median(times[name] / ours):.3f} x as fast')
  timm = [name for name in others if name.startswith('timm')]
  if timm:
    best = min(timm, key=lambda name: np.median(times[name]))
    yield (f'against the best of timm ({best}): '
           f'{np.median(times[best] / ours):.3f} x')
  with tempfile.TemporaryDirectory() as folder:
    profiler.start(folder)
    for _ in range(3):
      run()
    jax.profiler.stop_trace()
    yield profiler.describe(profiler.ops(folder, compiled.as_text(), 3))


def _line(name, seconds, batch_size):
  low, middle, high = 1e3 * np.percentile(seconds, (10, 50, 90))
  return (f'{name:12} {middle:.2f} ms a step ({low:.2f} to {high:.2f}), '
          f'{1e3 * batch_size / middle:,.1f} images/s')


def measure(functions, rounds, steps):
  """Times functions in turns, each `steps` times in a row.

  Every other turn is the other way round: what a function finds in caches
  depends on the one before it.

  Returns:
    {name: float64 [rounds]}, seconds of one call.
  """
  times = {name: [] for name in functions}
  for turn in range(rounds + 1):
    for name, function in list(functions.items())[::-1 if turn % 2 else 1]:
      begin = time.perf_counter()
      function(steps)
      times[name].append((time.perf_counter() - begin) / steps)
  return {name: np.array(t[1:]) for name, t in times.items()}


def noise(image_shape, batch_size, num_classes):
  """A batch: uint8 images [B, H, W, C], int32 labels [B]."""
  rng = np.random.default_rng(0)
  return {
      'image': rng.integers(0, 256, (batch_size, *image_shape), np.uint8),
      'label': rng.integers(0, num_classes, batch_size, np.int32)}


def stepper(made, compiled):
  """Returns `run(steps=1)`, which trains on and waits for the last step."""
  hypers = sharding.put_tree(made.hypers, sharding.replicated(made.mesh))
  batch = jax.device_put(
      noise(made.image_shape, made.batch_size, _classes(made)),
      sharding.batch(made.mesh))
  return _advance(compiled, made.init_fn(hypers['key']), batch, hypers)


def _advance(step, state, *args):
  def run(steps=1):
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, *args)
    jax.block_until_ready((state, metrics))
  return run


def _classes(made):
  return made.model.num_classes


def peak_memory(compiled, mesh):
  """Returns (bytes a device, who says so)."""
  stats = mesh.local_devices[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'], 'measured'
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
          "the compiler's figure")


def _matmul(mesh):
  """Returns (`run(steps)`, its FLOP): a large matmul on one device."""
  device = mesh.local_devices[0]
  size, dtype = ((2048, jnp.float32) if device.platform == 'cpu'
                 else (8192, jnp.bfloat16))
  a = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)
  multiply = jax.jit(jnp.matmul).lower(a, a).compile()

  def run(steps=1):
    b = a
    for _ in range(steps):
      b = multiply(a, b)
    b.block_until_ready()

  return run, 2 * size ** 3


def loop(config, made):
  """{'loop': ...}: as `train` goes on between evaluations.

  Raises:
    ValueError, OSError: the data is not here, or bad.
  """
  del made  # its sizes are those of the data that is here
  run = experiment.create(experiment.checked(config))
  step, state = run.compile_step(), run.init_fn(run.hypers['key'])
  batches = input_pipeline.to_device.prefetch(
      run.train_batches(), sharding.batch(run.mesh), config.prefetch)
  speed, done = pace.Pace(), 0

  def go(steps=1):
    nonlocal state, done
    for _ in range(steps):
      state, metrics = step(state, speed.next(batches, state.step), run.hypers)
      done += 1
      if run.log_due(done):
        jax.device_get(metrics)
    jax.block_until_ready((state, metrics))

  return {'loop': go}


def plain(config, made):
  """{'plain': ...}: what one would write by hand; see the module's text."""
  if made.mesh.size > 1:
    raise ValueError(f'--versus plain is for one device; there are '
                     f'{made.mesh.size}.\nSet CUDA_VISIBLE_DEVICES=0, say.')
  model, c = made.model, config.optimizer
  if c.name != 'adamw':
    raise ValueError(f'--versus plain has AdamW and the config {c.name}.\n'
                     'Take a config with optimizer.name=adamw.')
  tx = optax.adamw(lambda count: c.lr * made.schedule(count), c.b1, c.b2,
                   c.eps, weight_decay=c.weight_decay)
  smoothing, classes = config.loss.label_smoothing, _classes(made)

  def loss_fn(params, stats, batch, key):
    logits, new = model.apply(
        {'params': params, 'batch_stats': stats},
        made.normalize(batch['image']), train=True, rngs={'dropout': key},
        mutable=['batch_stats'])
    labels = optax.smooth_labels(
        jax.nn.one_hot(batch['label'], classes), smoothing)
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    return loss, new.get('batch_stats', {})

  @jax.jit(donate_argnums=0)
  def step(state, batch, key):
    params, stats, opt_state = state
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, stats, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), loss

  key = jax.random.key(0, impl='threefry2x32')
  variables = jax.jit(lambda key: model.init(
      key, jnp.zeros((1, *made.image_shape)), train=False))(key)
  params, stats = variables['params'], variables.get('batch_stats', {})
  batch = jax.device_put(noise(made.image_shape, made.batch_size, classes))
  state = params, stats, tx.init(params)
  return {'plain': _advance(step, state, batch, key)}


def timm(config, made):
  """{'timm ...': ...}: timm's model of the same shape; see the module's text.

  Raises:
    ValueError: timm does not import, or has no such model.
  """
  model = made.model
  if config.model.get('stem') != 'patchify' or model.pool == 'map':
    raise ValueError(
        f'timm has no model of size {config.model.size!r} with '
        f'stem={config.model.get("stem")!r}.\nCompare one with '
        "model.stem='patchify', pool token or gap.")
  try:
    from timm.models import vision_transformer
    import torch
  except (ImportError, RuntimeError) as e:
    raise ValueError(
        f'timm does not import: {str(e).splitlines()[0]}.\nRun: pip install '
        "-e '.[crosscheck]'   (torch, torchvision, timm of one kind).") from e
  on_gpu = jax.default_backend() == 'gpu'
  device = torch.device('cuda' if on_gpu else 'cpu')
  batch = noise(made.image_shape, made.batch_size, _classes(made))
  # Normalised before, which is in timm's favour.
  images = np.asarray(made.normalize(batch['image'])).transpose(0, 3, 1, 2)
  images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
  labels = torch.from_numpy(batch['label']).long().to(device)

  def form(half, memory_format=None, compiled=False):
    torch.manual_seed(0)
    net = vision_transformer.VisionTransformer(
        img_size=made.image_shape[:2], patch_size=model.stem.patch,
        in_chans=made.image_shape[2], num_classes=_classes(made),
        global_pool={'token': 'token', 'gap': 'avg'}[model.pool],
        class_token=model.pool == 'token', fc_norm=False,
        embed_dim=model.stem.width, depth=model.depth, num_heads=model.heads,
        mlp_ratio=model.mlp / model.stem.width, proj_drop_rate=model.dropout,
        drop_path_rate=model.stochastic_depth).to(device).train()
    x = images
    if memory_format:
      net, x = net.to(memory_format=memory_format), x.contiguous(
          memory_format=memory_format)
    tx = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    call = torch.compile(net) if compiled else net
    loss_fn = torch.nn.CrossEntropyLoss(
        label_smoothing=config.loss.label_smoothing)

    def run(steps=1):
      for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
          loss = loss_fn(call(x), labels)
        loss.backward()
        tx.step()
        tx.zero_grad()
      loss.item()  # waits

    return run

  if not on_gpu:
    return {'timm f32': form(False), 'timm bf16': form(True)}
  return {
      'timm': form(True),
      'timm ch.last': form(True, torch.channels_last),
      'timm compile': form(True, compiled=True),
      'timm comp.cl': form(True, torch.channels_last, compiled=True)}


VERSUS = {'loop': loop, 'plain': plain, 'timm': timm}
