"""What `tests.fuzz` found, by name: bad input is two lines, never a traceback.

The fuzzing is a slow test; these are its finds.
"""
import io
import struct
import zlib

from ml_collections import ConfigDict
from PIL import Image
import pytest

from input_pipeline import ops_numpy
from tests import fuzz
from tests import runs
from vit_jax import config as config_lib
from vit_jax import durations
from vit_jax import ema
from vit_jax import optimizer
from vit_jax import param_paths
from vit_jax import ranges
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import sharding
from vit_jax import train
from vit_jax import train_state
from vit_jax import train_step
from vit_jax import workdir

UNITS = durations.Units.of(1000, 10, 'exact')


def base(**changes):
  """recipes.base() with values of any type; dotted with '__'."""
  c = recipes.base()
  for path, value in changes.items():
    *parents, leaf = path.split('__')
    section = c
    for parent in parents:
      section = section[parent]
    with section.ignore_type():
      section[leaf] = value
  return c


@pytest.mark.parametrize('path, value, match', [
    ('ema', 0.0, 'ema=0.0 is no section'),
    ('init_from', None, 'init_from=None is no section'),
    ('schedule', True, 'schedule=True is no section'),
    ('model__gelu', ConfigDict(dict(a=1)), 'model.gelu=a: 1'),
    ('input__mean', ('/',), 'input.mean=.* is of the wrong type'),
    ('frozen', (2147483648,), 'frozen=.* is of the wrong type'),
    ('model__norm_eps', object(), 'model.norm_eps=<object'),
    ('seed', True, 'seed=True'),
    ('prefetch', 2.5, 'prefetch=2.5'),
])
def test_a_value_of_another_type(path, value, match):
  with runs.refused(match):
    config_lib.check_types(base(**{path: value}), recipes.base())


def test_every_config_has_the_types_of_the_defaults():
  c = base(frozen=['a', 'b'], total_epochs=3, input__mean=[1, 2.0])
  config_lib.check_types(c, recipes.base())


@pytest.mark.parametrize('path', [
    'input.pp', 'init_from.weights', 'precise_bn.examples', 'optimizer.b1'])
def test_a_missing_key(path):
  c = config_lib.track(recipes.base())
  section, _, leaf = path.partition('.')
  with c.unlocked():
    del c[section][leaf]
  for read in (lambda: c[section][leaf], lambda: getattr(c[section], leaf)):
    with runs.refused(f'has no key {path!r}'):
      read()
  assert leaf not in c[section]


def test_a_key_that_the_model_does_not_take():
  c = recipes.base()
  c.model.extra = 1
  with runs.refused("Unknown key of model 'extra'"):
    train_state.model_fields(c.model, ())
  c = base(model__size='BiT-R50x1')  # with the keys of a ViT
  with runs.refused(r"takes no model.attention.\n.*recipes.bit\('BiT-R50x1'"):
    train_state.model_fields(c.model, ())
  section = recipes.mixer('S/16')
  with runs.refused("needs a model.stem.*\n.*recipes.base"):
    train_state.model_fields(section, ())


def test_a_value_that_json_cannot_hold():
  with runs.refused('cannot be kept as JSON'):
    workdir.as_json(ConfigDict(dict(momentum=object())))


@pytest.mark.parametrize('decay', [(1e30,), (None,), ('(',)])
def test_a_pattern_that_is_no_pattern(decay):
  with runs.refused('is not a regular expression'):
    param_paths.check(['a/b'], decay)


@pytest.mark.parametrize('mean, std, match', [
    ((0.5,), (1, 2), 'input.std has 2 values and the images 3 channels'),
    ((), (1,), 'input.mean has 0 values'),
    ((float('nan'),), (1,), 'input.mean=nan'),
    ((0.5,), (0.0,), 'input.std=0.0'),
])
def test_a_normalisation_that_does_not_fit(mean, std, match):
  with runs.refused(match):
    train_step.normalizer(mean, std, 3)


@pytest.mark.parametrize('value', [
    float('nan'), float('inf'), -1, True, None, 'abc'])
def test_a_number_out_of_range(value):
  with runs.refused('x=.* is out of range'):
    ranges.check('x', value, 0, below=2**63)
  assert ranges.check('x', 0, 0) == 0


@pytest.mark.parametrize('make', [
    lambda: optimizer.create(recipes.adamw(1, 1), {'kernel': 0}).__class__
    and optimizer.adamw(dict(b1=1.0, b2=0.9, eps=0.1)),
    lambda: optimizer.sgd(dict(momentum=-1, nesterov=True)),
    lambda: ema.create(dict(name='decay', decay=2), UNITS, 9, 1),
    lambda: ema.create(
        dict(name='pycls', alpha='x', every_steps=1), UNITS, 9, 1),
    lambda: schedules.create(
        recipes.cosine(1.0, final=float('nan')), UNITS, 1000),
    lambda: train_step.make_hypers(
        dict(lr=float('inf'), weight_decay=0), 0),
    lambda: train_step.make_hypers(dict(lr=0, weight_decay=0), 2**70),
    lambda: durations.to_steps(dict(total_epochs=1e300), 'total', UNITS),
    lambda: durations.to_steps(dict(total_steps=float('nan')), 'total', UNITS),
])
def test_a_number_that_would_fail_in_the_step(make):
  with runs.refused('out of range'):
    make()


@pytest.mark.parametrize('size', [0, -2])
def test_a_mesh_of_no_devices(size):
  with runs.refused(f'mesh.data={size} is no number of devices'):
    sharding.create_mesh({'data': size})


def test_a_batch_beyond_all_bounds():
  with runs.refused('is more than'):
    sharding.check_batch_size('b', 2**70, sharding.create_mesh({'data': -1}))


def test_an_epoch_of_no_batch():
  with runs.refused('drops what fills no batch'):
    durations.Units.of(5, 10, 'floor')


@pytest.mark.parametrize('line', [
    'del c["nothing"]', 'c.modle = 1', 'import nothing', '1 / 0', 'c = (',
    'c.seed = "a"'])
def test_a_config_file_that_fails(tmp_path, line):
  path = tmp_path / 'mine.py'
  path.write_text('from vit_jax import recipes\ndef get_config(args=None):\n'
                  f'  c = recipes.base().lock()\n  {line}\n  return c\n')
  with runs.refused(str(path)):
    config_lib.parse_flags(
        ['train', f'--config={path}'], train.define_flags)


def test_an_image_that_claims_to_be_huge():
  chunk = lambda kind, data: (
      struct.pack('>I', len(data)) + kind + data
      + struct.pack('>I', zlib.crc32(kind + data)))
  png = b'\x89PNG\r\n\x1a\n' + chunk(
      b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(
          b'IDAT', b'')
  with pytest.raises(Image.DecompressionBombError):
    Image.open(io.BytesIO(png))
  with pytest.raises(OSError, match='Image size'):
    ops_numpy.open_image(png)


def test_the_fuzzer_sees_faults(tmp_path, monkeypatch):
  """Its own check: a fault of the program is one, a message is none."""
  flags = [f'--config={runs.DIGITS}', *fuzz.base_flags(tmp_path)]
  assert fuzz.start([*flags, '--config.mesh.data=0']) is None
  def broken(*_):
    raise KeyError('x')
  monkeypatch.setattr(train.optimizer, 'create', broken)
  assert fuzz.start(flags).startswith('KeyError')
