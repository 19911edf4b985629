"""What a trace of training says, and to whom it is refused."""
import glob
import json
import os
import re

import pytest

from tests import runs
from vit_jax import profiler
from vit_jax import train


def test_a_run_is_traced_and_its_ops_are_named(cache, tmp_path, capsys):
  config = runs.short(cache, steps=14, eval__every_steps=0,
                      checkpoint__every_steps=0)
  train.train_and_evaluate(config, str(tmp_path), profile=3)
  text = capsys.readouterr().out
  # One for Perfetto, one for XProf.
  for kind in ('trace.json.gz', 'xplane.pb'):
    assert glob.glob(f'{tmp_path}/profile/**/*.{kind}', recursive=True)
  rows = re.findall(r'^ +([\d.]+)% +([\d.]+) +(\d+)  (\S.*)$', text, re.M)
  assert len(rows) == 10
  shares = [float(share) for share, *_ in rows]
  assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.5
  # Three blocks of scan or not: the places are those of the model.
  assert any('encoder/' in name for *_, name in rows)
  assert any(name.startswith('backward ') for *_, name in rows)
  # The trace covers steps 11 to 13, and training goes on behind it.
  assert text.index('step 10/14') < text.index('most expensive') < text.index(
      'step 14/14')
  with open(tmp_path / 'metrics.jsonl') as f:
    assert json.loads(f.readlines()[-1])['step'] == 14


def test_a_run_too_short_to_trace(cache, tmp_path):
  config = runs.short(cache, steps=4)
  with runs.refused('--profile=1 does not fit'):
    train.train_and_evaluate(config, str(tmp_path), profile=1)
  assert not os.path.exists(tmp_path / 'profile')


PROGRAM = '''HloModule jit_train_step, is_scheduled=true
  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%c, metadata={op_name="jit(train_step)/jvp(ViT)/encoder/block_03/mlp/fc1/dot_general" stack_frame_id=9}
  ROOT %copy.2 = f32[2]{0} copy(%fusion.1)
  %fusion.7 = f32[2]{0} fusion(%a), kind=kLoop, calls=%c, metadata={op_name="jit(train_step)/jvp(ViT)/encoder/block_11/mlp/fc1/dot_general" stack_frame_id=9}
'''  # noqa: E501


def test_ops_are_added_up_over_blocks(monkeypatch):
  monkeypatch.setattr(profiler, '_events', lambda folder: [
      ('fusion.1', 3.0, 'jit_train_step'), ('fusion.7', 4.0, 'jit_train_step'),
      ('copy.2', 1.0, None), ('while.1', 9.0, 'jit_train_step'),
      ('fusion.1', 9.0, 'jit_predict')])  # of an evaluation in between
  assert profiler.ops('', PROGRAM, 2) == [
      ('encoder/block_*/mlp/fc1/dot_general', 7 / 8, 3.5, 1.0),
      ('copy', 1 / 8, 0.5, 0.5)]


@pytest.mark.parametrize('source, name, expected', [
    ('jit(train_step)/transpose(jvp(ViT))/stem/conv_0/conv_general_dilated',
     'fusion.3', 'backward stem/conv_0/conv_general_dilated'),
    ('jit(train_step)/mul', 'fusion', 'mul'), ('', 'fusion.12', 'fusion'),
    ('', 'copy', 'copy')])
def test_labels(source, name, expected):
  assert profiler.label(source, name) == expected
