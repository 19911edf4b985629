"""The other commands: plan, doctor, results, augment-sheet, bench."""
import json
import os

import numpy as np
from packaging import requirements
from PIL import Image
import pytest

from tests import runs
from tests import test_config
from vit_jax import __main__ as command_line
from vit_jax.commands import augment_sheet
from vit_jax.commands import doctor

VIT_C = os.path.join(runs.ROOT, 'configs', 'vit_c_i1k.py')


@pytest.mark.parametrize('args, expected', [
    # Parameters of the paper's Table 1, in pycls's exact count; 625 steps an
    # epoch at batch 2048 with the tail dropped.
    ('stem=conv,size=4GF', ['17,754,136', '3,965,674,216', '11,255,770',
                            '197 (14 x 14', '250,000 steps']),
    ('stem=patchify,size=1GF,epochs=50', [
        '4,830,376', '1,083,059,944', '5,520,748', '31,250 steps']),
])
def test_plan_of_the_paper(args, expected, capsys):
  assert command_line.main(['plan', '--config', f'{VIT_C}:{args}']) == 0
  out = capsys.readouterr().out
  for text in (*expected, "model.size = '" + args.split('size=')[1][:3]):
    assert text in out, text
  for module in ('stem', 'encoder/block_00', 'head', 'total'):
    assert f'\n{module}' in out


def test_plan_counts_what_is_there(capsys):
  code = command_line.main(
      ['plan', '--config', runs.DIGITS, '--config.total_steps=7', '--depth=1'])
  assert code == 0
  out = capsys.readouterr().out
  assert '10 classes (as found)' in out
  assert '1,297 training examples, 7 steps of 64' in out
  assert 'encoder/block_00' not in out


def test_plan_warns_of_cropped_pixels(capsys):
  assert command_line.main([
      'plan', '--config', f'{VIT_C}:stem=patchify', '--config.model.size=B/14',
      '--config.input.pp=decode|resize(384)']) == 0
  out = capsys.readouterr().out
  assert '27 x 27' in out and '6 rows and 6 columns' in out


@pytest.mark.parametrize('flags, message', [
    (['--config', f'{VIT_C}:stem=conv', '--config.model.size=B/14'], 'stem'),
    (['--config', f'{VIT_C}:size=5GF'], 'Did you mean'),
    (['--config', VIT_C, '--config.input.num_train=0'], 'input.path'),
    (['--config', VIT_C, '--dpeth=3'], 'Did you mean'),
])
def test_plan_with_bad_input(flags, message, capsys):
  assert command_line.main(['plan', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 2


def test_doctor(capsys, monkeypatch):
  assert command_line.main(['doctor']) == 0, capsys.readouterr().out
  out = capsys.readouterr().out
  assert 'jax ' in out and 'backend cpu' in out and '0 problem(s)' in out
  monkeypatch.setattr(doctor, 'installed', lambda: [
      (requirements.Requirement('jax>=0.10,<0.13'), '0.4.30'),
      (requirements.Requirement('flax>=0.12'), None)])
  assert command_line.main(['doctor']) == 2
  out = capsys.readouterr().out
  assert 'problem: jax: outside' in out and 'problem: flax: missing' in out


def test_results_group_seeds(finished, capsys, tmp_path):
  workdir, results = finished
  assert command_line.main(['results', workdir, workdir]) == 0
  out = capsys.readouterr().out
  top1 = f'{results["test_ema/top1"]:.2%}'
  assert f'| 2 | {top1} | 0.00% | {top1} | {top1} |' in out
  assert command_line.main(['results', str(tmp_path)]) == 2
  assert 'holds no' in capsys.readouterr().err


def test_results_of_pairs(tmp_path, capsys):
  def run(name, seed, top1):
    folder = tmp_path / f'{name}-{seed}'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'seed': seed}))
    (folder / 'metrics.jsonl').write_text(
        json.dumps({'step': 1, 'test/top1': top1}) + '\n')
    return str(folder)

  # Differences 1, 2 and 3 points: 2 +- 4.303 / sqrt(3), by Student's t.
  ours = [run('a', seed, 0.9 + (seed + 1) / 100) for seed in range(3)]
  theirs = [run('b', seed, 0.9) for seed in range(3)]
  assert command_line.main(
      ['results', *ours[::-1], '--versus', *theirs]) == 0
  out = capsys.readouterr().out
  assert '3 pairs of equal seeds: +2.00 points, 95 % interval -0.48 to +4.48.' \
      in out
  assert '| runs | 3 | 92.00% | 1.00% | 91.00% | 93.00% |' in out
  for wrong in (theirs[:2], [*theirs[:2], theirs[0]]):
    assert command_line.main(['results', *ours, '--versus', *wrong]) == 2
    assert 'The seeds are [0, 1, 2] and' in capsys.readouterr().err


def test_augment_sheet_of_digits(tmp_path, capsys):
  path = tmp_path / 'sheet.png'
  flags = ['augment-sheet', '--config', runs.DIGITS, '--examples=2',
           f'--out={path}']
  assert command_line.main(flags) == 0
  assert f'wrote 2 images of step 0 to {path}' in capsys.readouterr().out
  with Image.open(path) as image:
    assert image.width > 1000 and np.asarray(image.convert('L')).std() > 10


def test_augment_sheet_tells_what_was_drawn():
  c = test_config.load(runs.DIGITS)
  c.augment = "randaug(2, 15, 'fixed')|cutmix(1.0)"
  before, after, titles = augment_sheet.sheet(c, 4, 5)
  assert before.shape == after.shape == (4, 32, 32, 3)
  assert before.dtype == after.dtype == np.uint8
  share = {title.split('CutMix ')[1] for title in titles}
  assert len(share) == 1 and 0 <= float(share.pop()) <= 1
  for old, new, title in zip(before, after, titles, strict=True):
    assert (old != new).any() and ', ' in title


@pytest.mark.parametrize('flags, message', [
    (['augment-sheet', '--config', runs.DIGITS, '--examples=0'], 'examples=0'),
    (['augment-sheet', '--config', runs.DIGITS, '--config.augment=mixup(0)'],
     'mixup(alpha)'),
    (['augment-sheet', '--config', runs.DIGITS, '--examples=1',
      '--out=/no/such/folder.png'], '--out'),
    (['bench'], 'data, augment, population'),
    (['bench', 'augment', '--augment=mixup(0.2)'], 'has no op on pixels'),
    (['bench', 'augment', '--size=8'], 'See --help'),
    (['bench', 'population', '--members=0x'], 'are no numbers'),
    (['bench', 'population', '--forms=vmap'], "Did you mean 'vmap/xla'"),
])
def test_sheet_and_bench_with_bad_input(flags, message, capsys):
  assert command_line.main(flags) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 2


@pytest.mark.slow
def test_bench_augment(capsys):
  assert command_line.main(
      ['bench', 'augment', '--size=32', '--batch=2', '--repeats=1',
       '--augment=randaug(1, 10)']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == [
      'loop', 'switched', 'batched', 'scattered']


@pytest.mark.slow
def test_bench_augment_of_a_step(capsys):
  assert command_line.main(
      ['bench', 'augment', '--size=32', '--batch=2', '--repeats=1',
       '--step_batch=8', '--model=micro', '--augment=randaug(1, 10)']) == 0
  assert 'a share of' in capsys.readouterr().out


@pytest.mark.slow
def test_bench_population(capsys):
  assert command_line.main(
      ['bench', 'population', '--members=1,2', '--rounds=1', '--batch=8',
       '--stem=patchify', '--forms=vmap/xla,map/im2col']) == 0
  rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
  assert [(row[0], row[1]) for row in rows] == [
      ('1', 'separate'), *((p, form) for p in '12'
                           for form in ('vmap/xla', 'map/im2col'))]
  assert rows[0][-1] == '1.00' and all(float(row[-2]) > 0 for row in rows)


def test_help_of_a_benchmark(capsys):
  for flags, text in ((['bench', '--help'], 'Times parts'),
                      (['bench', 'augment', '--help'], '--step_batch')):
    assert command_line.main(flags) == 0
    assert text in capsys.readouterr().out
