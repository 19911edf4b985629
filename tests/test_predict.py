"""vit-jax predict, evaluate and embed, on the small digits model."""
import csv
import io
import json
import os
import sys

import numpy as np
from PIL import Image
import pytest

from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import model_file


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """(folder, {path: label}) of digits as PNG files, and an unreadable one."""
  folder = tmp_path_factory.mktemp('pictures')
  test = sources.digits('', 0, ()).evals['test']
  labels = {}
  for i, pixels in enumerate(test.read(np.arange(7))):
    path = folder / ('deep' if i % 2 else '') / 'er' / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0]).save(path)
    labels[str(path)] = int(test.labels[i])
  (folder / 'broken.jpg').write_bytes(b'\xff\xd8\xffno image')
  (folder / 'notes.txt').write_text('no image either')
  return str(folder), labels


def call(capsys, *flags):
  """(exit code, output, errors) of a command."""
  code = command_line.main([str(flag) for flag in flags])
  return code, *capsys.readouterr()


def test_predict_in_three_formats(finished, pictures, capsys, tmp_path):
  workdir, _ = finished
  folder, labels = pictures
  model = model_file.load(workdir)
  probabilities = model.predict(model.preprocess(sorted(labels)))
  best = probabilities.argsort(axis=1)[:, ::-1]
  code, out, err = call(
      capsys, 'predict', workdir, folder, '--format', 'jsonl', '--top', 2)
  rows = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and [r['path'] for r in rows] == sorted(labels)
  assert 'broken.jpg cannot be read' in err
  assert 'predicted 7 of 8 images; 1 cannot be read' in err
  for row, order, p in zip(rows, best, probabilities, strict=True):
    assert [t['class'] for t in row['top']] == list(map(str, order[:2]))
    assert abs(row['top'][0]['probability'] - p.max()) < 1e-5
  out_file = tmp_path / 'out.csv'
  code, out, _ = call(capsys, 'predict', workdir, folder, '--format', 'csv',
                      '--out', out_file)
  assert code == 0 and not out
  table = list(csv.DictReader(io.StringIO(out_file.read_text())))
  assert [r['class_1'] for r in table] == list(map(str, best[:, 0]))
  code, out, _ = call(capsys, 'predict', workdir, folder, '--top', 1)
  assert out.splitlines()[:2] == [
      sorted(labels)[0], f'  {probabilities[0].max():7.2%}  {best[0, 0]}']


def test_predict_compiles_once(finished, pictures, capsys, monkeypatch):
  made = []
  load = model_file.load
  monkeypatch.setattr(
      model_file, 'load', lambda path: made.append(load(path)) or made[-1])
  path = next(iter(pictures[1]))
  code, *_ = call(capsys, 'predict', finished[0], pictures[0], path, path, path,
                  '--batch', 4)  # 8 and 3 images: batches of 4, 4 and 3
  assert code == 0 and made[0]._forward._cache_size() == 1


def test_predict_without_tensorflow(finished, pictures, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  assert call(capsys, 'predict', finished[0], pictures[0])[0] == 0


@pytest.mark.parametrize('flags, message', [
    (['{broken}'], 'None of the 1 images can be read'),
    (['{empty}'], 'There are no images in'),
    (['{empty}/none.jpg'], 'There is no file or folder'),
    (['{good}', '--top', '11'], 'the model has 10 classes'),
    (['{good}', '--top', '0'], '--top 0'),
    (['{good}', '--batch', '0'], '--batch 0'),
    (['{good}', '--out', '{empty}/no/such/folder'], 'Cannot write'),
])
def test_predict_with_bad_input(
    flags, message, finished, pictures, capsys, tmp_path):
  folder, labels = pictures
  names = dict(broken=os.path.join(folder, 'broken.jpg'), empty=tmp_path,
               good=next(iter(labels)))
  code, _, err = call(capsys, 'predict', finished[0],
                      *(f.format(**names) for f in flags))
  lines = [x for x in err.splitlines() if not x.startswith('skipped: ')]
  assert code == 2 and message in err and len(lines) == 2, err


@pytest.mark.skipif(not os.path.isdir(
    os.path.join(runs.TEST_DATA, 'imagenet_sample')), reason='no photographs')
def test_predict_photographs(finished, capsys):
  folder = os.path.join(runs.TEST_DATA, 'imagenet_sample')
  code, out, err = call(capsys, 'predict', finished[0], folder, '--top', 1,
                        '--format', 'jsonl')
  assert code == 0 and f'predicted {len(out.splitlines())} images' in err
