"""Compiling for TPUs that are not here, where their compiler is."""
import importlib.util
import json
import os
import types

import pytest

from tests import runs
from vit_jax import chips as chip_table
from vit_jax import config as config_lib
from vit_jax import tpu_topology
from vit_jax.commands import bench_tpu_compile
from vit_jax.models import attention

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='no libtpu')
_CONFIG = ['--config', 'configs/digits.py:stem=patchify']


def test_without_libtpu_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=r"\nRun: pip install -e .\.\[plan"):
    tpu_topology.devices('v5p:2x2x1')


@needs_libtpu
def test_devices_of_a_topology_leave_the_environment_as_it_was():
  before = dict(os.environ)
  chips = tpu_topology.devices('v5p:2x2x1')
  assert len(chips) == 4
  assert {c.platform for c in chips} == {'tpu'}
  assert all(chip_table.of(c.device_kind) for c in chips)
  assert dict(os.environ) == before


@needs_libtpu
@pytest.mark.parametrize('name', ['v9z:2x2', 'v5p', 'v5p:3x5x7'])
def test_an_unknown_topology_is_a_message(name):
  with pytest.raises(ValueError, match='No topology') as e:
    tpu_topology.devices(name)
  assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize('key', ['model.scan=True', 'accumulation_steps=2'])
def test_loops_would_be_counted_once(key):
  with runs.refused('counts the body of a loop once'):
    bench_tpu_compile.main([*_CONFIG, f'--config.{key}'])


def test_what_the_compiler_does_not_say_is_not_given():
  compiled = types.SimpleNamespace(
      cost_analysis=lambda: {
          'flops': 2e12, 'bytes accessed': 4e9, 'optimal_seconds': -3.0},
      memory_analysis=lambda: types.SimpleNamespace(
          temp_size_in_bytes=10**9, peak_memory_in_bytes=2 * 10**9))
  row = bench_tpu_compile.figures(compiled, 'TPU v5 lite')
  assert 'estimate' not in row
  lines = bench_tpu_compile.describe(row, {'bytes accessed': 8e9}).splitlines()
  assert 'estimate          not given' in lines
  assert lines[1].endswith('4.00 GB   0.500 x')
  assert lines[-1].split()[3:] == ['10.15', 'ms']  # 2e12 / 197e12


@needs_libtpu
@pytest.mark.slow  # two compilations of half a minute
def test_a_step_is_compiled_with_the_kernel_and_moves_less(tmp_path, capsys):
  files = [str(tmp_path / name) for name in ('xla', 'pallas')]
  bench_tpu_compile.main([
      *_CONFIG, '--batch_per_chip=64', '--config.model.attention=xla',
      f'--json={files[0]}', f'--hlo={files[0]}.txt'])
  bench_tpu_compile.main([
      *_CONFIG, '--batch_per_chip=64', f'--json={files[1]}',
      f'--against={files[0]}', f'--hlo={files[1]}.txt'])
  out = capsys.readouterr().out
  assert '4 x TPU v5, 64 examples a chip' in out
  assert 'attention: xla' not in out  # no fallback
  rows, texts = [], []
  for file in files:
    with open(file) as f, open(f'{file}.txt') as g:
      rows.append(json.load(f))
      texts.append(g.read())
  assert ['tpu_custom_call' in text for text in texts] == [False, True]
  # The kernel runs on each chip's 64 examples: 256 are gathered nowhere.
  assert 'all-gather' not in texts[1]
  assert rows[1]['bytes accessed'] < rows[0]['bytes accessed']


@needs_libtpu
@pytest.mark.slow  # a minute
@pytest.mark.parametrize('tokens, heads, width', [
    (197, 3, 192), (196, 12, 768), (257, 16, 1408)])
def test_tpus_take_the_kernel_at_real_sizes(tokens, heads, width):
  for name in ('v5p:2x2x1', 'v5e:2x2'):
    chip = tpu_topology.devices(name)[0]
    assert not attention.refusal(chip, tokens, heads, width, 'bfloat16')


@needs_libtpu
@pytest.mark.slow  # two compilations of half a minute
def test_groups_of_batch_norm_are_not_copied_out():
  """To cut the activations into groups took 2.2 times the bytes here."""
  chips = tpu_topology.devices('v5p:2x2x1')

  def moved(group):
    c = config_lib.load(f'{runs.ROOT}/configs/vit_c_i1k.py:size=1GF,stem=conv')
    c.augment, c.model.scan, c.model.batch_norm_group = '', True, group
    c.input.num_train, c.input.num_classes = 1281167, 1000
    compiled, _ = bench_tpu_compile.compile_step(c, chips, 128)
    return compiled.cost_analysis()['bytes accessed']

  assert moved(64) < 1.05 * moved(0)
