"""What a config will compute and cost, before it runs.

  vit-jax plan --config configs/vit_c_i1k.py:stem=conv,size=4GF

Prints the resolved config, a table of modules, parameters, multiply-adds and
activations of one image, tokens, steps and epochs. Data that is not here is
taken at its word: input.num_train and input.num_classes. Trains nothing.

Flags:
  --config FILE[:arg=value,...]  and  --config.a.b=value
  --depth N    levels of modules in the table (2)
"""
import collections

from absl import flags

from vit_jax import complexity
from vit_jax import config as config_lib
from vit_jax import durations
from vit_jax import models
from vit_jax import train_state
from vit_jax.models import vit


def main(argv):
  """Runs the command; returns its exit code."""
  define = lambda values: flags.DEFINE_integer(
      'depth', 2, 'Levels of modules in the table.', flag_values=values)
  args = config_lib.parse_flags(['vit-jax plan', *argv], define)
  print(plan(args.config, args.depth))
  return 0


def plan(config, depth=2):
  """Returns the text that the command prints.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    depth: levels of modules in the table.

  Raises:
    ValueError: bad config; or neither data nor its expected sizes.
  """
  num_train, num_classes, image_shape, source = data_sizes(config)
  fields = train_state.model_fields(config.model, tuple(config.frozen))
  model = models.create(num_classes=num_classes, **fields)
  cost = complexity.of(model, image_shape[0], image_shape[2])
  units = durations.Units.of(
      num_train, config.global_batch_size, config.input.epoch)
  steps = durations.to_steps(config, 'total', units)
  lines = [
      '# Config', *(f'{k} = {v!r}' for k, v in sorted(
          config_lib.flatten(config.to_dict()).items())), '',
      '# Modules (one image; flops are multiply-adds, bias adds included)',
      *_table(cost, depth), '',
      '# Run',
      f'parameters    {cost.params:,}',
      f'multiply-adds {cost.macs:,} ({cost.macs / 1e9:.2f} G; '
      f'{cost.flops:,} with bias adds)',
      f'activations   {cost.activations:,} ({cost.activations / 1e6:.1f} M)',
      *_tokens(model, image_shape),
      f'data          {num_classes:,} classes ({source})',
      f'length        {units.describe(steps)}',
      f'training      {6 * cost.macs * steps * config.global_batch_size:.3g} '
      'FLOP (2 a multiply-add; forward once, backward twice)',
  ]
  return '\n'.join(lines)


def _tokens(model, image_shape):
  """Lines on the token grid, if the model has one."""
  if not hasattr(model, 'patch'):
    return []
  (h, w), cropped = vit.token_grid(model.patch, image_shape[:2])
  with_class = getattr(model, 'pool', '') == 'token'
  lines = [f'tokens        {h * w + with_class} ({h} x {w} patches of '
           f'{model.patch}{" + class token" if with_class else ""})']
  if any(cropped):
    lines.append(f'warning       {cropped[0]} rows and {cropped[1]} columns of '
                 'pixels do not fill a patch and are cropped')
  return lines


def data_sizes(config):
  """Returns (num_train, num_classes, image_shape, their origin)."""
  import input_pipeline
  try:
    data = input_pipeline.open_data(config.input, max(config.data_seed, 0))
    return (data.train.num_examples, len(data.class_names), data.image_shape,
            'as found')
  except (ValueError, OSError):
    expected = config.input.num_train, config.input.num_classes
    if not all(expected):
      raise
    shape = input_pipeline.image_shape(config.input)
    return *expected, shape, 'as the config expects; the data is not here'


def _table(cost, depth):
  """Lines of a table of modules, summed to `depth` levels of path."""
  sums = collections.OrderedDict()
  for row in cost.rows:
    path = '/'.join(row.path.split('/')[:depth])
    old = sums.get(path, (0, 0, 0))
    sums[path] = (old[0] + row.params, old[1] + row.flops,
                  old[2] + row.activations)
  sums['total'] = cost.params, cost.flops, cost.activations
  width = max(map(len, sums))
  header = f'{"module":{width}} {"parameters":>14} {"flops":>16} '
  return [header + f'{"activations":>14}'] + [
      f'{path:{width}} {p:14,} {f:16,} {a:14,}'
      for path, (p, f, a) in sums.items()]
