"""Precise BatchNorm: statistics estimated again for the weights as they are.

Running statistics lag behind the weights, and averages of them (EMA) are not
the statistics of averaged weights. So the paper's code, pycls, estimates both
again on 8192 training examples before every evaluation (USE_PRECISE_STATS).

The state that is trained keeps its running statistics, so that a run is the
same bit for bit however often it is evaluated or resumed; evaluation and export
are given the estimated state instead.
"""
import itertools

import jax
import numpy as np

import input_pipeline
from vit_jax import distributed
from vit_jax import sharding


def create(config, model, variables, augment, train_batches, batch_size, mesh,
           key):
  """Returns `estimate(state, should_stop) -> state`.

  It replaces the state's statistics, and those beside its averages, by the
  mean over batches of the batches' moments: the first batches of the training
  order, preprocessed and augmented as in training, but for what mixes examples,
  as in pycls. Their variance is the mean of variances,
  as in pycls, which leaves out how far the batches' means lie apart. A state
  of a model without BatchNorm, or with a frozen one, stays as it is. If
  `should_stop()` turns true between two batches, the state stays as it is, too.

  Args:
    config: `examples`: how many to estimate on, rounded up to whole batches;
      0: none, the running statistics stay.
    model: linen module with the fields of `models.stems` in `stem`.
    variables: its variables or their shapes.
    augment: see `augment.create`.
    train_batches: returns an iterator over this process's part of the training
      batches, from the first on.
    batch_size: of those, over all devices and processes.
    mesh: see `sharding`.
    key: of the run.

  Raises:
    ValueError: a negative number of examples.
  """
  examples = config['examples']
  if examples < 0:
    raise ValueError(f'precise_bn.examples={examples} is negative.\n'
                     "Give 0 for running statistics, or the paper's 8192.")
  learns = variables.get('batch_stats') and model.stem.batch_norm == 'train'
  if not examples or not learns:
    return lambda state, should_stop=None: state
  num_batches = -(-examples // batch_size)
  moments = jax.jit(
      make_moments(model, augment), out_shardings=sharding.replicated(mesh))

  def estimate(state, should_stop=lambda: False):
    nonlocal moments
    weights = [state.variables()]
    if state.ema:
      weights.append(state.ema_variables())
    total = None
    batches = input_pipeline.to_device.prefetch(
        itertools.islice(train_batches(), num_batches), sharding.batch(mesh))
    with batches, sharding.tracing(mesh):
      for i, batch in enumerate(batches):
        if should_stop():
          return state
        args = batch['image'], key, np.int32(i)
        moments = distributed.compiled(moments, weights[0], *args)
        new = [moments(v, *args) for v in weights]
        # Summed in float64, on the host: a few thousand numbers.
        new = jax.tree.map(np.float64, jax.device_get(new))
        total = new if total is None else jax.tree.map(np.add, total, new)
    mean = jax.tree.map(
        lambda x, old: sharding.put(
            np.asarray(x / num_batches, old.dtype), old.sharding),
        total, [v['batch_stats'] for v in weights])
    if not state.ema:
      return state.replace(batch_stats=mean[0])
    return state.replace(
        batch_stats=mean[0], ema={**state.ema, 'batch_stats': mean[1]})

  return estimate


def make_moments(model, augment):
  """Returns `moments(variables, images, key, step) -> batch_stats`.

  The images are uint8 [B, H, W, C], those of a training step; key: the run's.

  With momentum 0 the running statistics become the moments of the batch (with
  groups: the mean of those of its groups). Nothing else is returned, so that
  XLA drops the encoder: it costs the stem's forward pass.
  """
  probe = model.clone(stem=model.stem.clone(bn_momentum=0.0))

  def moments(variables, images, key, step):
    _, new = probe.apply(
        variables, augment.examples(images, key, step), train=True,
        mutable=['batch_stats'],
        # For the blocks, which are behind all BatchNorms: any key will do.
        rngs={'dropout': jax.random.key(0)})
    return new['batch_stats']

  return moments
