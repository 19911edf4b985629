"""What to change when the devices' memory does not suffice."""
import jax

from vit_jax import config as config_lib
from vit_jax import estimate
from vit_jax import experiment


def is_out_of_memory(error):
  """Whether compiling or running a program failed for want of memory."""
  return isinstance(error, jax.errors.JaxRuntimeError) and (
      'RESOURCE_EXHAUSTED' in str(error) or 'out of memory' in str(
          error).lower())


def explain(error, config):
  """One line of cause, and a line each for three settings.

  Args:
    error: see `is_out_of_memory`.
    config: ConfigDict with the keys of `recipes.base`.
  """
  cause = next(line for line in str(error).splitlines() if line.strip())
  return (f'The memory of {jax.devices()[0].device_kind} is too small: '
          f'{cause[:160]}\n{advise(config, figures(config))}')


def figures(config, args=None, most=3):
  """What the cheapest settings would need of each device: {setting: text}.

  Those that do not help are left out, and those that the config does not
  allow, such as micro-batches that cut a group of BatchNorm. None where the
  estimate fails.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    args: the others of `estimate.of`; None: of the data and devices here.
    most: how many are wanted.
  """
  try:
    args = args or (*experiment.data_sizes(config)[:3], jax.default_backend(),
                    jax.device_count())
    now = estimate.of(config, *args).memory
  except Exception:  # of whatever kind: a failed advice is no second failure
    return None
  found = {}
  for setting, what in _settings(config, args[-1]).items():
    key, _, value = setting.partition('=')
    new = config.copy_and_resolve_references()
    old = config_lib.flatten(new.to_dict())[key]
    new.update_from_flattened_dict({key: type(old)(value)})
    try:
      memory = estimate.of(new, *args).memory
    except ValueError:
      continue
    if memory >= now:  # as parts of a small batch are
      continue
    found[setting] = (f'{memory / 1e9:.3g} GB a device by estimate in place of '
                      f'{now / 1e9:.3g}: {what}')
    if len(found) == most:
      break
  return found


def advise(config, figures=None):
  """Settings that need less memory and are not on yet, the cheapest first.

  All but the last two leave what is computed as it is, up to rounding, and to
  dropout's masks with micro-batches; those two are for a new run, or a fork.

  Args:
    config: ConfigDict with the keys of `recipes.base`.
    figures: {setting: text} of those to name; None: of all, without figures.

  Returns:
    Three lines '--config.KEY=VALUE  what it does', or fewer.
  """
  if figures is None:
    figures = _settings(config, jax.device_count())
  return '\n'.join(f'--config.{setting}  {text}'
                   for setting, text in list(figures.items())[:3])


def _settings(config, devices):
  """{setting: what it does}, for so many devices."""
  c, settings = config_lib.flatten(config.to_dict()), {}
  batch, steps = c['global_batch_size'], c['accumulation_steps']
  share = max(devices // max(c['mesh.tensor'], 1), 1)
  more = next((n for n in range(2 * steps, batch // share + 1)
               if batch % (n * share) == 0), None)
  if more:
    settings[f'accumulation_steps={more}'] = (
        f'activations of {batch // more} examples at once in place of '
        f'{batch // steps}: {steps / more:.0%} of their memory')
  remat = c.get('model.remat')
  if remat == 'none':
    settings['model.remat=dots'] = (
        'keeps results of matmuls only; a few percent slower')
  if devices > 1 and c['mesh.fsdp'] == 1:
    settings[f'mesh.fsdp={devices}'] = (
        f'1/{devices} of parameters, averages and optimizer on each device')
  if remat in ('none', 'dots'):
    settings['model.remat=full'] = (
        'keeps the inputs of blocks only; a forward more: a third slower')
  if c['optimizer.momentum_dtype'] == 'float32':
    settings['optimizer.momentum_dtype=bfloat16'] = (
        '2 bytes a parameter less; --fork if the run has begun')
  if batch > 1:
    settings[f'global_batch_size={batch // 2}'] = (
        'half the activations; adapt optimizer.lr; --fork if the run has begun')
  return settings
