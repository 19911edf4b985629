"""Top-1, top-5, loss and per-class accuracy; every example exactly once."""
import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from vit_jax import distributed
from vit_jax import losses
from vit_jax import sharding


class Classification:
  """Evaluates a split with integer sums, so that the count can be checked.

  Attributes:
    num_examples: of the split.
    by_class: {class: {'top1', 'count'}} of the last run.
  """

  def __init__(self, config, predict, data, mesh, batch_size):
    """Checks the split; compiles nothing yet.

    Args:
      config: `split`: the name of one of `data.evals`.
      predict: see `train_step.make_predict`.
      data: `input_pipeline.open_data`'s.
      mesh: see `sharding`.
      batch_size: over all devices and processes.

    Raises:
      ValueError: no such split.
    """
    split = config['split']
    if split not in data.evals:
      raise ValueError(
          f'The data has no evaluation split {split!r}.\n'
          f'It has: {", ".join(data.evals)}; set evaluators.*.split to one.')
    self.num_examples = data.evals[split].num_examples
    self.class_names = data.class_names
    self.by_class = {}
    self._mesh = mesh
    self._batches = lambda: input_pipeline.eval_batches(
        data, split, global_batch_size=batch_size,
        process_index=jax.process_index(), process_count=jax.process_count())
    self._step = jax.jit(_make_step(predict, len(data.class_names)),
                         out_shardings=sharding.replicated(mesh))

  def run(self, variables, should_stop=lambda: False, see=None):
    """Yields (name, value): top1, top5, loss (fractions, nats), counts.

    `count` examples were evaluated, `unreadable` ones had no image; together
    they are the whole split.

    Args:
      variables: what `model.apply` takes.
      should_stop: asked between batches; True ends the evaluation early, and
        nothing is yielded.
      see: called with each batch's labels, first choices and mask, as numpy;
        for a program of one process.

    Raises:
      RuntimeError: an example was not counted exactly once.
      ValueError: no image of the split can be read.
    """
    sums = None
    batches = input_pipeline.to_device.prefetch(
        self._batches(), sharding.batch(self._mesh))
    with batches, sharding.tracing(self._mesh):
      for batch in batches:
        if should_stop():
          return
        self._step = distributed.compiled(self._step, variables, batch)
        # Fetched every batch: float32 sums on the device would lose counts.
        new, chosen = jax.device_get(self._step(variables, batch))
        if see:
          see(np.asarray(batch['label']), chosen, np.asarray(batch['mask']))
        new = jax.tree.map(lambda x: x.astype(
            np.int64 if x.dtype.kind == 'i' else np.float64), new)
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    count = int(sums['class_count'].sum())
    unreadable = int(sums['unreadable'])
    if count + unreadable != self.num_examples:
      raise RuntimeError(f'evaluated {count}/{self.num_examples} examples, '
                         f'{unreadable} unreadable')
    if not count:
      raise ValueError(
          f'None of the {unreadable} images to evaluate can be read.\n'
          'Repair them; `vit-jax check-data` says what is wrong.')
    self.by_class = _by_class(sums, self.class_names)
    yield 'top1', float(sums['class_top1'].sum() / count)
    yield 'top5', float(sums['top5'] / count)
    yield 'loss', float(sums['loss'] / count)
    yield 'count', count
    yield 'unreadable', unreadable


def _by_class(sums, class_names):
  """{class: {'top1', 'count'}}."""
  columns = zip(class_names, sums['class_top1'], sums['class_count'],
                strict=True)
  return {name: {'top1': float(right / max(count, 1)), 'count': int(count)}
          for name, right, count in columns}


def _make_step(predict, num_classes):
  """Returns step(variables, batch) -> (sums over the unmasked examples, the
  class of each row's highest score)."""

  def step(variables, batch):
    logits = predict(variables, batch['image'])  # [B, C]
    label, mask = batch['label'], batch['mask']
    # The label's rank: how many classes score higher. Among equal scores the
    # lower index wins, as with argmax; a NaN score never counts as right.
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    earlier = jnp.arange(num_classes)[None, :] < label[:, None]
    better = (logits > own) | ((logits == own) & earlier) | jnp.isnan(logits)
    rank = jnp.sum(better, axis=1)
    one_hot = jax.nn.one_hot(label, num_classes, dtype=jnp.int32)
    one_hot = one_hot * mask[:, None].astype(jnp.int32)
    loss = losses.softmax_xent(logits, one_hot.astype(jnp.float32))
    return {
        'class_count': jnp.sum(one_hot, axis=0),
        'class_top1': jnp.sum(
            one_hot * (rank < 1)[:, None].astype(jnp.int32), axis=0),
        'top5': jnp.sum(mask & (rank < 5)),
        'loss': jnp.sum(jnp.where(mask, loss, 0.0)),
        'unreadable': jnp.sum(batch['unreadable']),
    }, jnp.argmax(logits, axis=1)

  return step
