"""Augmentation on the accelerator, as one line: 'randaug(2, 10)|mixup(0.2)'.

The stages, in this order:
  pixels  uint8 images, one by one: randaug, autoaugment
  floats  normalised float32 images, one by one: pca_jitter, random_erasing
  mix     the batch with itself, and the labels with it: mixup, cutmix,
          mixup_cutmix; on the normalised images

Everything drawn is a function of (the run's key, step, row in the global batch,
place in the line), and the rows of (data_seed, step): nothing depends on
processes or devices, and a resumed run goes on as an unbroken one would.
Evaluation knows nothing of it. Crops and flips are the host's (`input.pp`).
"""
from collections.abc import Callable
import concurrent.futures
import contextlib
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import op_line
from vit_jax import choices
from vit_jax import losses
from vit_jax import sharding
from vit_jax.augment import autoaugment
from vit_jax.augment import mixup
from vit_jax.augment import op_forms
from vit_jax.augment import op_policy
from vit_jax.augment import pca_jitter
from vit_jax.augment import randaugment
from vit_jax.augment import random_erasing

OPS = {
    'randaug': randaugment.RandAug,
    'autoaugment': autoaugment.AutoAugment,
    'pca_jitter': pca_jitter.PcaJitter,
    'random_erasing': random_erasing.RandomErasing,
    'mixup': mixup.Mixup,
    'cutmix': mixup.CutMix,
    'mixup_cutmix': mixup.MixupCutMix,
}
STAGES = ('pixels', 'floats', 'mix')
_EXAMPLE = 'randaug(2, 10)|mixup(0.2)'
# What the run's key is folded with: beyond all steps, with which dropout does.
_STREAM = 2**32 - 1
# Instead of a row of the batch, for what is drawn once: beyond all rows.
_BATCH = 2**31


def create(config, image_shape, num_classes, normalize, mesh):
  """Returns an Augment.

  Args:
    config: `augment`, the line; `augment_driver`, how the ops on pixels are
      carried out: loop (image by image, for CPUs), batched (for accelerators)
      or auto; `augment_on`, where: device, host (on the CPU before the
      transfer) or auto: host for TPUs, which look pixels up one by one;
      `input.mean`, `input.std`. The last two hows change no bit.
    image_shape: (H, W, C) of training images.
    num_classes: of the data.
    normalize: see `train_step.normalizer`.
    mesh: see `sharding`.

  Raises:
    ValueError: a line that is wrong, or that the data or this machine cannot
      have.
  """
  line, driver, where = (
      config['augment'], config['augment_driver'], config['augment_on'])
  ops = op_line.parse(line, OPS, 'augment', _EXAMPLE)
  for key, value, known in (
      ('augment_driver', driver, ('auto', *op_policy.DRIVERS)),
      ('augment_on', where, ('auto', 'device', 'host'))):
    if value not in known:
      raise ValueError(choices.unknown(value, known, key))
  _check(ops, line, image_shape, num_classes)
  policies = {place: op.policy(image_shape, config['input']['mean'])
              for place, op in enumerate(ops) if op.stage == 'pixels'}
  if where == 'auto':
    on_tpu = mesh.devices.flat[0].platform == 'tpu'
    where = 'host' if policies and on_tpu else 'device'
  if where == 'host':
    _check_host(policies, line)
  platform = 'cpu' if where == 'host' else mesh.devices.flat[0].platform
  if driver == 'auto':
    driver = 'loop' if platform == 'cpu' else 'batched'
  std = np.broadcast_to(np.float32(config['input']['std']), image_shape[-1])
  return Augment(
      normalize, ops, policies, driver, where, num_classes, std, mesh)


def _check(ops, line, image_shape, num_classes):
  """Raises ValueError for ops that do not go together, or not with the data."""
  height, width, channels = image_shape
  stages = [STAGES.index(op.stage) for op in ops]
  if stages != sorted(stages):
    order = ', then '.join(
        '/'.join(n for n, op in OPS.items() if op.stage == s) for s in STAGES)
    raise ValueError(f'augment={line!r} is not in the order of its stages.\n'
                     f'First {order}.')
  names = {name for name, kind in OPS.items()
           if any(isinstance(op, kind) for op in ops)}
  if 'pca_jitter' in names and channels != 3:
    raise ValueError(f'augment: pca_jitter needs colour, and images have '
                     f'{channels} channel.\nLeave it out of the line.')
  if 'pixels' in (op.stage for op in ops) and not (
      3 <= min(height, width) <= max(height, width) <= op_forms.MAX_SIDE):
    raise ValueError(
        f'augment={line!r} is for images of 3 to {op_forms.MAX_SIDE} pixels a '
        f'side, not {height} x {width}.\nResize in input.pp.')
  if 'mix' in (op.stage for op in ops) and num_classes < 2:
    raise ValueError(
        f'augment={line!r} mixes labels, and the data has {num_classes} class.'
        '\nLeave mixup and cutmix out of the line.')


def _check_host(policies, line):
  if not policies:
    names = [n for n, op in OPS.items() if op.stage == 'pixels']
    raise ValueError(
        f"augment_on='host', and nothing of augment={line!r} can run there.\n"
        f"Use augment_on='device'; on the host run {' and '.join(names)}.")
  try:
    jax.local_devices(backend='cpu')
  except RuntimeError:
    raise ValueError(
        "augment_on='host' needs JAX's CPU backend, which is switched off.\n"
        "Set JAX_PLATFORMS=cuda,cpu (or tpu,cpu), or augment_on='device'."
    ) from None


def none(normalize):
  """An Augment that only normalises."""
  return Augment(normalize)


@dataclasses.dataclass(frozen=True, eq=False)
class Augment:
  """What `create` returns; called on a batch, in the training step.

  Attributes:
    normalize: uint8 images -> float32.
    ops: of the line.
    policies: {place in the line: Policy}, of the stage of pixels.
    driver: a key of op_policy.DRIVERS.
    where: 'device' or 'host', the stage of pixels.
    num_classes: of the labels.
    std: float32 [C], by which images were divided.
    mesh: over whose data axis batches are divided, or None.
  """
  normalize: Callable
  ops: tuple = ()
  policies: dict = dataclasses.field(default_factory=dict)
  driver: str = 'loop'
  where: str = 'device'
  num_classes: int = 0
  std: np.ndarray = None
  mesh: jax.sharding.Mesh = None

  def __call__(self, batch, key, step):
    """Augments a training batch.

    Args:
      batch: image uint8 [B, H, W, C], label int32 [B].
      key: of the run.
      step: int32, from 0.

    Returns:
      The batch with image float32 [B, H, W, C], normalised; label float32
      [B, classes], the weights of classes, if the line mixes.
    """
    images = self.examples(batch['image'], key, step)
    labels = batch['label']
    for place, op in self._of('mix'):
      if labels.ndim == 1:
        labels = losses.smoothed(labels, self.num_classes, 0)
      drawn = op.draw(batch_key(key, step, place), *images.shape[1:3])
      images, labels = mixup.mix(images, labels, *drawn)
    return {**batch, 'image': images, 'label': labels}

  def examples(self, images, key, step):
    """All but the mixing; see `__call__`: [B, H, W, C], uint8 -> float32."""
    if images.dtype != np.uint8:
      raise ValueError(f'The images of a batch are {images.dtype}.\n'
                       'Give uint8, in [0, 255]; the step scales them.')
    rows = jnp.arange(len(images), dtype=jnp.int32)
    if self.where == 'device':
      images = self._pixels(images, key, step, rows, self.mesh)
    images = self.normalize(images)
    for place, op in self._of('floats'):
      keys = self._keys(key, step, rows, place, self.mesh)
      images = jax.vmap(
          lambda image, key, op=op: op.apply(image, key, self.std))(
              images, keys)
    return images

  def on_host(self, train_batches, key):
    """Wraps what gives this process's batches, if the pixels' place is here.

    Args:
      train_batches: returns an iterator, from `start_step` (0) on.
      key: of the run.

    Returns:
      The like; its batches have passed the stage of pixels.
    """
    if self.where != 'host':
      return train_batches
    data = np.asarray(jax.random.key_data(key))
    device = jax.local_devices(backend='cpu')[0]

    @jax.jit
    def run(images, data, step, rows):
      key = jax.random.wrap_key_data(data, impl='threefry2x32')
      return self._pixels(images, key, step, rows, None)

    def augmented(start_step=0):
      pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
      with pool, contextlib.closing(train_batches(
          start_step=start_step)) as batches:
        for step, batch in enumerate(batches, start_step):
          images = batch['image']
          rows = sharding.local_rows(
              self.mesh, len(images) * jax.process_count())
          size = len(images) // _pieces(len(images), os.cpu_count())
          jobs = [pool.submit(run, *jax.device_put(
              (images[i:i + size], data, np.int32(step), rows[i:i + size]),
              device)) for i in range(0, len(images), size)]
          yield {**batch, 'image': np.concatenate(
              [np.asarray(job.result()) for job in jobs])}

    return augmented

  def _of(self, stage):
    return [(place, op) for place, op in enumerate(self.ops)
            if op.stage == stage]

  def _pixels(self, images, key, step, rows, mesh):
    """The stage of pixels: uint8 [B, H, W, C]; `rows` as `example_keys`."""
    for place, policy in self.policies.items():
      keys = self._keys(key, step, rows, place, mesh)
      images = op_policy.apply(policy, self.driver, images, keys, mesh)
    return images

  def _keys(self, key, step, rows, place, mesh):
    keys = example_keys(key, step, rows, place)
    if mesh is None:
      return keys
    return jax.lax.with_sharding_constraint(keys, sharding.batch(mesh))


def example_keys(key, step, rows, place):
  """Keys [B] of what is drawn for each example.

  Args:
    key: of the run.
    step: int32, from 0.
    rows: int32 [B], of the global batch.
    place: of the op in the line.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), step)
  fold = lambda row: jax.random.fold_in(jax.random.fold_in(key, row), place)
  return jax.vmap(fold)(rows)


def batch_key(key, step, place):
  """The key of what is drawn once for the batch; see `example_keys`."""
  return example_keys(key, step, jnp.array([_BATCH], jnp.uint32), place)[0]


def _pieces(count, most):
  """The largest divisor of `count` that is at most `most`."""
  return max(n for n in range(1, most + 1) if count % n == 0)
