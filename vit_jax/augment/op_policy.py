"""Policies: which ops an image gets, how they are drawn and carried out.

A policy is a table of candidates, axes [choices, layers, levels, signs], of
which each image draws one a layer. RandAugment and AutoAugment are such tables.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import sharding
from vit_jax.augment import op_forms

_CHANCE_BITS = 24
# What the random bits of a layer are for, by column.
_CHOICE, _LEVEL, _SIGN, _CHANCE, _ROW, _COLUMN = range(6)


class Candidate(NamedTuple):
  """What may happen to an image in a layer."""
  title: str  # for people, such as 'Rotate(-30)'
  op: op_forms.Op
  probability: float = 1.0  # that it is carried out once it is drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
  """A table of candidates, flattened to rows; the last row does nothing.

  Attributes:
    rows: int32 [choices, layers, levels, 2], where they are in the following.
    once: whether the choice is drawn once for all layers.
    titles: of the rows.
    thresholds: int32 [R], probability in 2**-24.
    ops: op_forms.Op of arrays [R, ...]; `form` is an index into `forms`.
    forms: keys of op_forms.FORMS.
    fill: uint8 [C], of pixels from outside the image.
  """
  rows: np.ndarray
  once: bool
  titles: tuple[str, ...]
  thresholds: np.ndarray
  ops: op_forms.Op
  forms: tuple[str, ...]
  fill: np.ndarray


def create(candidates, layers, fill, once=False):
  """Returns a Policy.

  Args:
    candidates: nested lists [choices][1 or layers][levels][2] of Candidate; the
      last axis is a sign, drawn with equal chances.
    layers: how many ops an image gets one after the other.
    fill: uint8 [C].
    once: see `Policy`.
  """
  shape = (len(candidates), len(candidates[0]), len(candidates[0][0]), 2)
  flat = [c for choice in candidates for layer in choice for level in layer
          for c in level]
  rows = np.arange(len(flat), dtype=np.int32).reshape(shape)
  rows = np.broadcast_to(rows, (shape[0], layers, *shape[2:]))
  flat.append(Candidate('', op_forms.Op('identity')))
  forms = tuple(f for f in op_forms.FORMS if any(c.op.form == f for c in flat))
  ops = [c.op._replace(form=np.int32(forms.index(c.op.form))) for c in flat]
  ops = jax.tree.map(lambda *values: np.stack(values), *ops)
  thresholds = [round(c.probability * 2**_CHANCE_BITS) for c in flat]
  return Policy(rows, once, tuple(c.title for c in flat),
                np.array(thresholds, np.int32), ops, forms, fill)


def draw(policy, key, height, width):
  """Draws for one image.

  Args:
    policy: Policy.
    key: of the image.
    height, width: of the image.

  Returns:
    (int32 [layers] rows of the policy's tables, int32 [layers, 2] row and
    column of a pixel).
  """
  choices, layers, levels, _ = policy.rows.shape
  # One call, and integers only: cheap to compile, the same bits anywhere.
  bits = jax.random.bits(key, (layers, 6), jnp.uint32)
  below = lambda column, n: (bits[:, column] % jnp.uint32(n)).astype(jnp.int32)
  choice = below(_CHOICE, choices)
  if policy.once:
    choice = jnp.broadcast_to(choice[:1], (layers,))
  row = jnp.asarray(policy.rows)[
      choice, jnp.arange(layers), below(_LEVEL, levels), below(_SIGN, 2)]
  chance = (bits[:, _CHANCE] >> (32 - _CHANCE_BITS)).astype(jnp.int32)
  row = jnp.where(chance < jnp.asarray(policy.thresholds)[row], row,
                  len(policy.titles) - 1)
  center = jnp.stack([below(_ROW, height), below(_COLUMN, width)], axis=1)
  return row, center


def drawn_ops(policy, keys, height, width):
  """The ops of a batch: op_forms.Op of arrays [B, layers, ...].

  Args:
    policy: Policy.
    keys: [B], of the images.
    height, width: of the images.
  """
  row, center = jax.vmap(lambda key: draw(policy, key, height, width))(keys)
  ops = jax.tree.map(lambda x: jnp.asarray(x)[row], policy.ops)
  return ops._replace(numbers=ops.numbers.at[..., op_forms.CENTER].set(center))


def loop(policy, images, ops):
  """Image by image, running only what was drawn: the form for CPUs.

  Args:
    policy: Policy.
    images: uint8 [B, H, W, C].
    ops: of `drawn_ops`.
  """
  def layer(image, op):
    return op_forms.apply_one(image, op, policy.forms, policy.fill), None
  return jax.lax.map(
      lambda pair: jax.lax.scan(layer, *pair)[0], (images, ops))


def batched(policy, images, ops, histogram=op_forms.histogram_by_comparison):
  """All images at once, all forms: for accelerators. Bits equal to `loop`'s."""
  one = jax.vmap(lambda image, op, table: op_forms.apply_all(
      image, op, policy.forms, policy.fill, table))
  for layer in range(policy.rows.shape[1]):
    op = jax.tree.map(lambda x, layer=layer: x[:, layer], ops)
    table = _equalize_tables(policy, images, op, histogram)
    images = one(images, op, table)
  return images


def _equalize_tables(policy, images, op, histogram):
  """Tables of Equalize, uint8 [B, C, 256], of those images that drew it.

  A histogram costs more than everything else; few images need one.
  """
  count, height, width, channels = images.shape
  # Any will do where it is not drawn.
  tables = jnp.broadcast_to(op.table[:, None], (count, channels, 256))
  if 'equalize' not in policy.forms:
    return tables
  size = -(-count // 8)  # images at a time
  drawn = op.form == policy.forms.index('equalize')
  found, = jnp.nonzero(drawn, size=count, fill_value=0)

  def some(i, tables):
    rows = jax.lax.dynamic_slice(found, (i * size,), (size,))
    counts = jax.vmap(histogram)(images[rows])
    new = jax.vmap(lambda c: op_forms.equalized(c, height * width))(counts)
    return tables.at[rows].set(new)

  batches = (jnp.sum(drawn, dtype=jnp.int32) + size - 1) // size
  return jax.lax.fori_loop(0, batches, some, tables)


def switched(policy, images, ops):
  """A switch under vmap, which runs every op for every image: to compare."""
  def one(image, ops):
    for layer in range(policy.rows.shape[1]):
      op = jax.tree.map(lambda x, layer=layer: x[layer], ops)
      image = op_forms.apply_one(image, op, policy.forms, policy.fill)
    return image
  return jax.vmap(one)(images, ops)


DRIVERS = {'loop': loop, 'batched': batched}


def apply(policy, driver, images, keys, mesh=None):
  """Augments a batch.

  Args:
    policy: Policy.
    driver: a key of DRIVERS.
    images: uint8 [B, H, W, C].
    keys: [B].
    mesh: over whose data axis the batch is divided; None: it is not.

  Returns:
    uint8 [B, H, W, C].
  """
  ops = drawn_ops(policy, keys, *images.shape[1:3])
  def run(images, ops):
    return DRIVERS[driver](policy, images, ops)
  if mesh is None:
    return run(images, ops)
  # Each device walks over its own images.
  spec = sharding.batch(mesh).spec
  return jax.shard_map(
      run, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(images, ops)
