"""Configs: read-tracking, overrides, and one-line errors for every mistake."""
import glob
import importlib.util
import os

from absl import flags
from ml_collections import ConfigDict
import pytest

from vit_jax import config as config_lib
from vit_jax import recipes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS = os.path.join(ROOT, 'configs', 'digits.py')


def load(path, args=None):
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(args)


def parse(*args):
  define = lambda values: flags.DEFINE_bool(
      'overfit_batch', False, '', flag_values=values)
  return config_lib.parse_flags(['train', *args], define)


def test_every_config_builds_and_is_locked():
  for path in glob.glob(os.path.join(ROOT, 'configs', '*.py')):
    config = load(path)
    (length,) = {'total_epochs', 'total_steps'} & set(config)
    assert set(config) - {length} == set(recipes.base()) - {'total_epochs'}


def test_reads_of_every_kind_are_seen():
  config = config_lib.track(ConfigDict(
      dict(a=1, b=dict(c=2, d=dict(e=3)), f=dict(g=4, h=5), i=6, j={})))
  assert config_lib.unread(config) == [
      'a', 'b.c', 'b.d.e', 'f.g', 'f.h', 'i', 'j']
  str(config), repr(config), config.to_dict(), config.to_json()
  assert len(config_lib.unread(config)) == 7  # looking is not using
  assert config.a == 1 and config['b.c'] == 2
  assert {**config.f} == dict(g=4, h=5)
  assert config_lib.unread(config) == ['b.d.e', 'i', 'j']
  for _, value in config.b.d.items():
    assert value == 3
  assert config_lib.unread(config) == ['i', 'j']
  with pytest.raises(ValueError, match=r'Nothing reads.*i, j'):
    config_lib.check_all_read(config)


def test_overrides_and_arguments():
  config = parse(f'--config={DIGITS}:stem=patchify,optimizer=sgd,epochs=7',
                 '--config.optimizer.momentum=0.8', '--overfit-batch').config
  assert config.model.stem == 'patchify' and config.total_epochs == 7
  assert config.optimizer.name == 'sgd' and config.optimizer.momentum == 0.8


def test_a_duration_may_be_given_in_another_unit():
  values = parse('--config', DIGITS, '--config.total_steps=12',
                 '--config.schedule.warmup_percent=5')
  config = values.config
  assert config.total_steps == 12 and 'total_epochs' not in config
  assert config.schedule.warmup_percent == 5.0
  assert 'warmup_epochs' not in config.schedule
  with pytest.raises(AttributeError):
    config.unknown = 1  # still locked


@pytest.mark.parametrize('args, message', [
    (['--config.total_epochs=3'], '--config is missing'),
    ([f'--config={DIGITS}', '--config.modle.size=S/16'],
     'Did you mean --config.model.size'),
    ([f'--config={DIGITS}', '--config.model.szie=S/16'],
     'Did you mean --config.model.size'),
    ([f'--config={DIGITS}', '--config.stem=conv'],
     'Did you mean --config.model.stem'),
    ([f'--config={DIGITS}', '--config.model.stem.x=1'], 'no key'),
    ([f'--config={DIGITS}', '--config.warmup_steps=1'],
     'Did you mean --config.schedule.warmup_epochs'),
    ([f'--config={DIGITS}', '--config.total_steps=abc'], 'not a number'),
    ([f'--config={DIGITS}', '--config.seed=1e3'], 'seed'),
    ([f'--config={DIGITS}', '--config.optimizer.lr=abc'], 'lr'),
    ([f'--config={DIGITS}', '--overfit_bach'], 'Did you mean'),
    ([f'--config={DIGITS}', 'config.seed=5'], 'two dashes'),
    ([f'--config={DIGITS}:stm=conv'], "Did you mean 'stem'"),
    ([f'--config={DIGITS}:optimizer=adam'], "Did you mean 'adamw'"),
    ([f'--config={DIGITS}:epochs=many'], 'not a float'),
    ([f'--config={DIGITS}:stem'], 'has no value'),
    (['--config=nothing.py'], 'Cannot read the config file nothing.py'),
    (['--config.seed=1', f'--config={DIGITS}'], 'before'),
])
def test_mistakes_are_one_line_of_cause_and_one_of_remedy(args, message):
  with pytest.raises(ValueError, match=message) as e:
    parse(*args)
  lines = str(e.value).splitlines()
  assert len(lines) == 2 and all(lines) and 'Traceback' not in str(e.value)


def test_differences_are_told_apart():
  old = dict(optimizer=dict(lr=1.0), log=dict(every_steps=5), seed=0)
  new = dict(optimizer=dict(lr=2.0), log=dict(every_steps=6), seed=0, x=1)
  what, how = config_lib.differences(old, new)
  assert what == ['optimizer.lr: 1.0 -> 2.0', 'x: (absent) -> 1']
  assert how == ['log.every_steps: 5 -> 6']


def test_every_how_key_exists():
  paths = config_lib.flatten(recipes.base().to_dict())
  for how in config_lib.HOW:
    assert any(config_lib.is_how(p) and p.startswith(how) for p in paths), how
