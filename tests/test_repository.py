"""Who imports whom, and other claims about the repository as a whole."""
import ast
import glob
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import config as config_lib


def imports(path):
  """Modules that a file imports, as dotted names."""
  with open(path) as f:
    tree = ast.parse(f.read())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def files(pattern):
  found = glob.glob(os.path.join(runs.ROOT, pattern), recursive=True)
  assert found, pattern
  return found


def any_import(pattern, of):
  return [(os.path.relpath(f, runs.ROOT), m) for f in files(pattern)
          for m in imports(f) if re.fullmatch(of, m)]


def test_who_imports_whom():
  tensorflow = r'(tensorflow|tensorflow_datasets)(\..*)?'
  assert not any_import('vit_jax/**/*.py', tensorflow)
  assert not any_import('input_pipeline/*.py', r'vit_jax(\..*)?')
  own = r'(input_pipeline|configs|vit_jax(?!\.models|\.choices$|$))(\..*)?'
  assert not any_import('vit_jax/models/*.py', own + r'|ml_collections.*')
  assert {m.split('.')[0] for f in files('configs/*.py')
          for m in imports(f)} <= {'ml_collections', 'vit_jax'}
  trainers = any_import('vit_jax/**/*.py', r'vit_jax\.train')
  assert all(f.startswith('vit_jax/commands/') for f, _ in trainers), trainers
  # No other spelling: kernels, meshes that split an axis of the torus, and
  # descriptions of chips that are not here.
  assert not any_import(
      '**/*.py', r'jax\.experimental(?!$|\.pallas|\.topologies|\.mesh_utils).*')


def test_configs_know_recipes_only():
  assert {m for f in files('configs/*.py') for m in imports(f)
          if m.startswith('vit_jax.')} == {'vit_jax.recipes'}


def test_every_command_has_a_module_and_says_how_to_call_it():
  for name, (module, line) in command_line.COMMANDS.items():
    text = command_line.docstring(module)
    assert line and (f'vit-jax {name}' in text or 'train.py' in text), name


def commands_of(text):
  """(command, its arguments) of what a text's ```sh blocks and `code` run."""
  blocks = re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M)
  inline = re.findall(r'`((?:vit-jax|bench) [^`]*--[^`]*)`', text)
  for name, value in SHELL.items():
    blocks = [block.replace(f'${name}', value) for block in blocks]
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines() + inline
  for line in lines:
    line = re.sub(r'python vit_jax/train.py|vit-jax train \.\.\.',
                  'vit-jax train', line)
    for part in re.split(r'[;&]|\|\|', line.replace('\n', ' ')):
      match = re.match(r'.*?\b(vit-jax|bench) ([a-z-]+)(.*)', part)
      # Quotes that are still open are another program's.
      if match and match[3].count("'") % 2 == 0 == match[3].count('"') % 2:
        command = 'bench' if match[1] == 'bench' else match[2]
        arguments = shlex.split(match[3], comments=True)
        yield command, ([match[2]] if match[1] == 'bench' else []) + arguments


# What loops in the README's commands set.
SHELL = {'stem': 'conv', 'opt': 'adamw', 'seed': '0', 'few': 'classes=5-9',
         'aug"': '--config.augment="'}


def test_commands_of_the_readme_have_such_flags_and_keys():
  with open(os.path.join(runs.ROOT, 'README.md')) as f:
    found = list(commands_of(f.read()))
  loaded = 0
  for command, arguments in found:
    module = command_line.COMMANDS[command][0]
    help_ = command_line.docstring(
        f'{module}_{arguments[0]}'.replace('-', '_') if command == 'bench'
        else module)
    config = []
    for i, token in enumerate(arguments):
      if token.startswith('--config'):
        config += arguments[i:i + 1 + (token == '--config')]
      elif token.startswith('--'):
        assert token.split('=')[0] in help_, (command, token)
    if '--config' not in config:  # it goes on from a line before
      config = ['--config', 'configs/digits.py', *config]
    at = config.index('--config') + 1
    if config[at].startswith('configs/'):
      config[at] = os.path.join(runs.ROOT, config[at])
      config_lib.parse_flags(['x', *config], lambda values: None)
      loaded += 1
  assert len(found) > 40 and loaded > 20, (len(found), loaded)


@pytest.mark.parametrize('name', ['utils', 'lib', 'helpers', 'misc'])
def test_no_drawers(name):
  assert not glob.glob(
      os.path.join(runs.ROOT, '**', f'{name}.py'), recursive=True)


def test_help_needs_no_jax():
  code = ('import sys; sys.modules["jax"] = None\n'
          'from vit_jax import __main__ as m\n'
          'assert m.main(["--help"]) == 0\n'
          'for name in m.COMMANDS: assert m.main([name, "--help"]) == 0\n'
          'assert m.main(["trian"]) == 2\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, check=False, timeout=60)
  assert done.returncode == 0, done.stderr
  for flag in ('--workdir', '--fork', '--overfit_batch', '--traceback'):
    assert flag in done.stdout
  assert "Did you mean 'train'" in done.stderr


def test_train_stops_beside_another_package_of_its_name(tmp_path):
  package = tmp_path / 'vit_jax'
  package.mkdir()
  (package / '__init__.py').touch()
  with open(os.path.join(runs.ROOT, 'vit_jax', 'train.py')) as f:
    source = f.read()
  check = source[source.index('def check_package'):source.index('def define_')]
  code = (f'import os, vit_jax\n__file__ = {runs.TRAIN!r}\n{check}\n'
          'check_package()')
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True,
      check=False, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ''})
  assert 'finds' in done.stderr and str(package) in done.stderr
