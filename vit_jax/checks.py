"""Whether data, model and batch go together; before anything is compiled."""
from vit_jax.metric_writer import say
from vit_jax.models import batch_norm
from vit_jax.models import vit


def check_data(config, data):
  """Raises ValueError unless the data is what the config expects.

  Args:
    config: the `input` section.
    data: see `input_pipeline.open_data`.
  """
  found = {'num_train': data.train.num_examples,
           'num_classes': len(data.class_names)}
  for key, value in found.items():
    expected = config[key]
    if expected and expected != value:
      raise ValueError(
          f'input.{key}={expected} is expected and the data has {value}.\n'
          'Give the right data, or set the key to 0 to take what is there.')
  if data.eval_shape != data.image_shape:
    raise ValueError(
        f'Training images are {data.image_shape} and evaluation images '
        f'{data.eval_shape}.\nLet input.pp and input.eval_pp end in one size.')


def check_model(model, image_shape, batch_size):
  """Raises ValueError for images or batches that the model cannot take.

  Warns of pixels that no patch covers.
  """
  if patch := getattr(model, 'patch', 0):
    _, cropped = vit.token_grid(patch, image_shape[:2])
    if any(cropped):
      say(f'warning: {cropped[0]} rows and {cropped[1]} columns of pixels do '
          f'not fill a patch of {patch} and are cropped')
  batch_norm.check_group(
      batch_norm.group(model) or 0, 'global_batch_size', batch_size)
