"""Who imports whom, and other claims about the repository as a whole."""
import ast
import glob
import os
import re
import subprocess
import sys

import pytest

from tests import runs
from vit_jax import __main__ as command_line


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
  # No other spelling: kernels, and descriptions of chips that are not here.
  assert not any_import(
      '**/*.py', r'jax\.experimental(?!$|\.pallas|\.topologies).*')


def test_configs_know_recipes_only():
  assert {m for f in files('configs/*.py') for m in imports(f)
          if m.startswith('vit_jax.')} == {'vit_jax.recipes'}


def test_every_command_has_a_module_and_says_how_to_call_it():
  for name, (module, line) in command_line.COMMANDS.items():
    text = command_line.docstring(module)
    assert line and (f'vit-jax {name}' in text or 'train.py' in text), name


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
