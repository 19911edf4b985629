"""Config files: parsed with one-line errors, and checked to be obeyed.

A key that nothing reads is the commonest silent bug of this kind of code, so
reads are recorded and an unread leaf stops the run before its first step.
"""
import difflib
import re

from absl import flags
from ml_collections import config_flags
from ml_collections import ConfigDict
from ml_collections import FieldReference

from vit_jax import choices
from vit_jax import durations

# HOW a run is done: may change when it is resumed. Every other key says WHAT
# is computed; a change of those is another experiment.
HOW = ('mesh', 'accumulation_steps', 'prefetch', 'log', 'eval', 'evaluators',
       'checkpoint', 'wandb', 'compilation_cache', 'model.scan', 'model.remat',
       'model.conv', 'model.attention', 'input.path', 'input.data_dir',
       'augment_driver', 'augment_on')


def is_how(path):
  """Whether the leaf at a dotted path is of the HOW kind."""
  return any(path == h or path.startswith(h + '.') for h in HOW)


def flatten(config, prefix=''):
  """Nested dicts -> {dotted path: leaf}; an empty dict is a leaf."""
  flat = {}
  for key, value in config.items():
    path = f'{prefix}{key}'
    if hasattr(value, 'items') and len(value):
      flat.update(flatten(value, path + '.'))
    else:
      flat[path] = value
  return flat


def differences(old, new):
  """Lines 'path: old -> new' of two nested dicts: (of what, of how)."""
  old, new = flatten(old), flatten(new)
  absent = '(absent)'
  what, how = [], []
  # A path says where data lies; only TFDS's says which data it is.
  sources = old.get('input.source'), new.get('input.source')
  named = {'input.path'} if 'tfds' in sources else set()
  for path in sorted(old.keys() | new.keys()):
    a, b = old.get(path, absent), new.get(path, absent)
    if a != b:
      may_change = is_how(path) and path not in named
      (how if may_change else what).append(f'{path}: {a} -> {b}')
  return what, how


class _Tracked(ConfigDict):
  """A ConfigDict that records which leaves are read.

  Every way of reading goes through `__getitem__`. Objects are retyped in place
  after the flags are parsed, so that overrides, locks and references survive.
  """

  def __getitem__(self, key):
    track = self.__dict__.get('_track')
    try:
      value = ConfigDict.__getitem__(self, key)
    except KeyError:
      if not track or str(key).startswith('_'):
        raise
      path = '.'.join((*self.__dict__['_path'], str(key)))
      raise ValueError(
          f'The config has no key {path!r}, which is needed.\nStart it from '
          'recipes.base() and the sections of recipes.') from None
    is_leaf = not (isinstance(value, ConfigDict) and len(value))
    if track and not track['paused'] and '.' not in str(key) and is_leaf:
      track['read'].add((*self.__dict__['_path'], str(key)))
    return value

  __hash__ = None


def _paused(name):
  """A method of ConfigDict that looks at everything without reading it."""
  method = getattr(ConfigDict, name)
  def call(self, *args, **kwargs):
    track = self.__dict__.get('_track')
    if track is None:
      return method(self, *args, **kwargs)
    track['paused'] += 1
    try:
      return method(self, *args, **kwargs)
    finally:
      track['paused'] -= 1
  return call


# Printing, comparing and saving a config are no uses of it.
for _name in ('to_dict', '__repr__', '__str__', '__eq__', 'to_json', 'to_yaml',
              'to_json_best_effort', 'copy_and_resolve_references', 'get_type'):
  setattr(_Tracked, _name, _paused(_name))


def track(config, path=(), _state=None):
  """Starts recording reads of `config`, in place; returns it."""
  state = {'read': set(), 'paused': 0} if _state is None else _state
  object.__setattr__(config, '__class__', _Tracked)
  object.__setattr__(config, '_path', path)
  object.__setattr__(config, '_track', state)
  for key, field in config._fields.items():
    value = field.get() if isinstance(field, FieldReference) else field
    if isinstance(value, ConfigDict):
      track(value, (*path, str(key)), state)
  return config


def check_types(config, base, prefix=''):
  """Raises ValueError for a leaf or section of another type than base's.

  Keys that only one of the two has are the business of `check_all_read`, and
  of what reads them.
  """
  for key in sorted(set(config) & set(base)):
    path, value, wanted = f'{prefix}{key}', config[key], base[key]
    if isinstance(wanted, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise ValueError(f'{path}={_short(value)} is no section.\nIt has keys, '
                         f'such as {", ".join(sorted(wanted)[:3])}.')
      check_types(value, wanted, path + '.')
    elif not _is_like(value, wanted):
      raise ValueError(
          f'{path}={_short(value)} is of the wrong type.\nGive one such as '
          f'{wanted!r} ({type(wanted).__name__}).')


def _is_like(value, wanted):
  if isinstance(wanted, tuple):  # of text, unless there are numbers
    return isinstance(value, (tuple, list)) and all(
        _is_like(v, (*wanted, '')[0]) for v in value)
  if isinstance(wanted, float):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return type(value) is type(wanted)


def _short(value):
  return repr(value)[:60].split('\n')[0]


def unread(config):
  """Dotted paths of the leaves that nothing has read since `track`."""
  state = config.__dict__['_track']
  state['paused'] += 1
  try:
    leaves = flatten(config)
  finally:
    state['paused'] -= 1
  read = {'.'.join(path) for path in state['read']}
  return sorted(set(leaves) - read)


def check_all_read(config, but=()):
  """Raises ValueError if a leaf of a tracked config was read by nothing.

  Args:
    config: see `track`.
    but: dotted paths that need not be read.
  """
  paths = [path for path in unread(config) if path not in but]
  if paths:
    raise ValueError(
        f'Nothing reads the config key(s) {", ".join(paths)}.\n'
        'They would have no effect: remove them, or choose the component that '
        'they belong to (schedule.name, optimizer.name, ema.name, ...).')


def parse_flags(argv, define):
  """Parses a command line with a `--config` file flag.

  Durations may be overridden in another unit than the file's:
  --config.total_steps=100 takes the place of total_epochs.

  Args:
    argv: the program's name and its arguments.
    define: called with an `absl.flags.FlagValues`, defines the other flags.

  Returns:
    The parsed FlagValues.

  Raises:
    ValueError: anything wrong with the command line or the config file, one
      line of cause and one of remedy.
  """
  argv, moved = _take_durations([argv[0], *map(_underscored, argv[1:])])
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
      'config', None, 'Config file, file.py:arg=value,...', lock_config=True,
      flag_values=values, sys_argv=argv)
  define(values)
  spec = _config_spec(argv)
  if spec is None:
    raise ValueError('--config is missing.\n'
                     'For example: --config configs/digits.py:stem=conv')
  _check_overrides(argv, load(spec), moved)
  try:
    rest = values(argv)
  except flags.UnrecognizedFlagError as e:
    raise ValueError(choices.unknown(
        f'--{e.flagname}', [f'--{name}' for name in values], 'flag')) from None
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError,
          OSError) as e:
    raise ValueError(f'{_last_line(e)}\nSee --help.') from None
  if len(rest) > 1:
    raise ValueError(
        f'Unexpected argument {rest[1]!r}.\n'
        'Flags start with two dashes: --config.seed=1')
  for path, value in moved.items():
    set_duration(values.config, path, value)
  return values


def set_duration(config, path, value):
  """Sets a duration such as 'schedule.warmup_steps', whatever its unit was."""
  *parents, leaf = path.split('.')
  section = config
  for key in parents:
    section = section[key]
  name, unit = leaf.rsplit('_', 1)
  old, _ = durations.find(section, name)
  with config.unlocked(), section.unlocked():
    if old != unit:
      del section[f'{name}_{old}']
    section[leaf] = int(value) if unit == 'steps' else float(value)


def _underscored(arg):
  """--overfit-batch -> --overfit_batch; values and config paths stay."""
  name, equals, value = arg.partition('=')
  if not name.startswith('--') or name.startswith('--config'):
    return arg
  return '--' + name[2:].replace('-', '_') + equals + value


def _config_spec(argv):
  for i, arg in enumerate(argv):
    if arg.startswith('--config='):
      return arg.partition('=')[2]
    if arg == '--config' and i + 1 < len(argv):
      return argv[i + 1]
  return None


def load(spec):
  """Loads the config of 'FILE:args' as absl will, with errors to be read.

  Raises:
    ValueError: the file is not there, or fails.
  """
  path = spec.split(':', 1)[0]
  try:
    with open(path):
      pass
  except OSError as e:
    raise ValueError(f'Cannot read the config file {path}: {e.strerror}.\n'
                     'Paths are relative to the current directory.') from None
  from ml_collections.config_flags import config_flags as internals
  try:
    return internals.ConfigFileFlagParser('config').parse(spec)
  except (TypeError, ValueError) as e:
    # The text holds the whole traceback of what get_config raised.
    message = re.split(r'^(?:Value|Type)Error: ', str(e), flags=re.M)[-1]
    message = message.strip()
    if '\n' not in message:
      message = (message.rstrip('.')
                 + '.\nThe docstring of the file lists its arguments.')
    lines = [line for line in message.split('\n') if line.strip()][:2]
    raise ValueError(f'{path}: ' + '\n'.join(lines)) from None
  except Exception as e:  # whatever a config file does wrong
    raise ValueError(
        f'{path}: {type(e).__name__}: {_first_line(e)}.\n'
        'Correct the file; --traceback shows where.') from e


def _likeness(a, b):
  """How alike two paths are, or their last parts; in [0, 1]."""
  return max(
      difflib.SequenceMatcher(None, x, y).ratio()
      for x, y in ((a, b), (a.rsplit('.', 1)[-1], b.rsplit('.', 1)[-1])))


def _check_overrides(argv, config, moved):
  """Names the nearest key for an override that does not exist."""
  flat = flatten(config.to_dict())
  known = set(flat)
  for path in flat:
    while '.' in path:
      path = path.rsplit('.', 1)[0]
      known.add(path)
  asked = [a[len('--config.'):].partition('=')[0]
           for a in argv if a.startswith('--config.')]
  for path in [*asked, *moved]:
    if path in known or (path in moved and _sibling(path, known)):
      continue
    nearest = max(sorted(known), key=lambda k, path=path: _likeness(path, k))
    hint = (f'Did you mean --config.{nearest}? '
            if _likeness(path, nearest) >= 0.6 else '')
    raise ValueError(f'The config has no key {path!r}.\n{hint}'
                     f'Top level: {", ".join(sorted(config))}.')


def _sibling(path, known):
  name = path.rsplit('_', 1)[0]
  return any(f'{name}_{u}' in known for u in durations.UNITS)


def _take_durations(argv):
  """Takes overrides that are spelled as durations out of argv."""
  moved, rest = {}, []
  for arg in argv:
    path, equals, value = arg.removeprefix('--config.').partition('=')
    unit = path.rsplit('_', 1)[-1]
    if arg.startswith('--config.') and equals and unit in durations.UNITS:
      try:
        moved[path] = int(value) if unit == 'steps' else float(value)
      except ValueError:
        raise ValueError(f'--config.{path}={value} is not a number.\n'
                         f'Give a number of {unit}.') from None
    else:
      rest.append(arg)
  return rest, moved


def _first_line(error):
  lines = str(error).strip(' \'"').replace('\\n', '\n').split('\n')
  return lines[0].strip(' \'".') or 'no message'


def _last_line(error):
  lines = [line for line in str(error).strip().splitlines() if line.strip()]
  return lines[-1].strip() if lines else type(error).__name__
