"""What a model computes on its way to the logits: tokens, blocks, attention."""
import re

import jax
from jax import numpy as jnp
import numpy as np

from vit_jax import choices
from vit_jax import model_file
from vit_jax import param_paths

_BLOCK = r'(?:encoder/)?(block(?:s|_\d+))/'


class Features:
  """Layers of a model, by name, for images.

  Attributes:
    shapes: {layer: shape for one image}:
      pooled            [D] what the head (or pre_logits) reads
      cls               [D] the class token behind the encoder, if there is one
      tokens            [N, D] the other tokens there, by rows of the image
      block_00, ...     [N, D] behind a block, class token first
    attends: whether there is attention to ask for.
  """

  def __init__(self, model):
    """`model`: `model_file.Model`."""
    self._model = model
    self._variables = jax.device_put(model.variables)
    images = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.uint8)
    found = jax.eval_shape(self._layers, model.variables, images)
    self.shapes = {name: x.shape[1:] for name, x in found.items()}
    self.attends = hasattr(model.module, 'heads')
    self._jitted = {}

  def layer(self, name, images, batch_size=model_file.BATCH_SIZE):
    """Returns a layer, float32 [N, ...], for uint8 images [N, H, W, C].

    Raises:
      ValueError: the model has no such layer; the message lists those it has.
    """
    choices.check({'layer': (name, self.shapes)})
    return self._call(name, lambda *args: self._layers(*args)[name].astype(
        jnp.float32), images, batch_size)

  def attention(self, images, batch_size=model_file.BATCH_SIZE):
    """Attention weights of images.

    Args:
      images: uint8 [B, H, W, C].
      batch_size: how many are computed at once.

    Returns:
      ([B, L, K, N, N]: of each of L blocks how much each query (the fourth
      axis) takes of each token (the last), class token first; and
      [B, K, 1, N], the same of the pooling, where that is attention, or None).

    Raises:
      ValueError: the model has no attention.
    """
    if not self.attends:
      raise ValueError(
          f'A model of size {self._model.config["size"]!r} has no attention.\n'
          'Take a ViT.')

    def weights(*args):
      flat = self._flat(*args)
      blocks = _by_block(flat, 'attention/weights')
      return (jnp.stack(list(blocks.values()), axis=1),
              flat.get('map/attention/weights'))

    return self._call('attention', weights, images, batch_size)

  def _call(self, name, function, images, batch_size):
    jitted = self._jitted.setdefault(name, jax.jit(function))
    return model_file.in_batches(
        lambda batch: jitted(self._variables, batch),
        self._model.check_images(images), batch_size)

  def _flat(self, variables, images):
    _, state = self._model.module.apply(
        variables, self._model.normalize(images), train=False,
        mutable=['intermediates'])
    return {path: values[0] for path, values in param_paths.flatten(
        state['intermediates']).items()}

  def _layers(self, variables, images):
    flat = self._flat(variables, images)
    layers = {'pooled': flat['pooled']}
    if 'tokens' in flat:
      tokens = flat['tokens']
      if getattr(self._model.module, 'pool', '') == 'token':
        layers['cls'], tokens = tokens[:, 0], tokens[:, 1:]
      layers['tokens'] = tokens
    return layers | _by_block(flat, 'output')


def _by_block(flat, name):
  """{'block_00': array}, of what all blocks have under a name."""
  found = {}
  for path, value in flat.items():
    if match := re.fullmatch(_BLOCK + name, path):
      if match[1] == 'blocks':  # stacked by the scan
        found |= {f'block_{i:02d}': x for i, x in enumerate(value)}
      else:
        found[match[1]] = value
  return dict(sorted(found.items()))


def rollout(weights, pool=None, has_class=True):
  """How much of each patch reaches the head, by attention and residuals.

  "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3:
  the product over blocks of half the mean attention over heads and half the
  identity. What is read is the class token's row; without one, the mean row
  (gap), or the rows weighted as the pooling attends to them (map).

  Args:
    weights: [L, K, N, N] of one image; see `Features.attention`.
    pool: [K, 1, N] of the pooling, or None.
    has_class: whether the first token is the class token.

  Returns:
    float64 [number of patches], with sum 1.
  """
  flow = np.eye(weights.shape[-1])
  for block in weights.mean(axis=1, dtype=np.float64):
    flow = (0.5 * block + 0.5 * np.eye(len(block))) @ flow
  if has_class:
    row = flow[0, 1:]
  elif pool is not None:
    row = pool.mean(axis=0, dtype=np.float64)[0] @ flow
  else:
    row = flow.mean(axis=0)
  return row / row.sum()
