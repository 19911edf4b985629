"""Models: jax and flax only; they know no data, mesh or config file."""
from flax import linen as nn

from vit_jax import choices
from vit_jax.models import bit
from vit_jax.models import mixer
from vit_jax.models import variants
from vit_jax.models import vit

FAMILIES = {
    # name: (module, the sizes that it builds)
    'vit': (vit, variants.SIZES),
    'mixer': (mixer, variants.MIXERS),
    'bit': (bit, variants.BITS),
}


def create(*, size: str, num_classes: int, **fields) -> nn.Module:
  """Builds a model: `model.apply(variables, images, train=False)` is logits.

  Args:
    size: a size of any family: '4GF', 'S/16', 'R26+S/32', 'Mixer-B/16',
      'BiT-R50x1', ...
    num_classes: C of the logits, at least 1.
    **fields: what the family's own `create` takes: `vit`, `mixer`, `bit`.

  Raises:
    ValueError: unknown names, or a number out of range.
  """
  module, _ = FAMILIES[family(size)]
  return module.create(size=size, num_classes=num_classes, **fields)


def family(size: str) -> str:
  """Returns the family that has a size; ValueError for an unknown one."""
  found = {one: name for name, (_, sizes) in FAMILIES.items() for one in sizes}
  return choices.pick(found, size, 'size')


def grid(model: nn.Module, image_shape: tuple[int, ...]):
  """Returns the model's token grid (h, w) for images (H, W, ...), or None."""
  if not hasattr(model, 'patch'):
    return None
  return vit.token_grid(model.patch, tuple(image_shape[:2]))[0]
