"""vit-jax predict, evaluate and embed, on the small digits model."""
import csv
import io
import json
import os
import re
import sys

import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import sources
from tests import runs
from vit_jax import __main__ as command_line
from vit_jax import model_file
from vit_jax import recipes
from vit_jax import train
from vit_jax.commands import evaluate


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


# Preprocessing.


def _photographs(folder):
  """A folder of two classes of JPEG files of cameras' sizes."""
  rng = np.random.default_rng(0)
  for i, (height, width) in enumerate([
      (1200, 1600), (480, 640), (333, 500), (700, 375)]):
    coarse = rng.integers(0, 256, (height // 25, width // 25, 3), np.uint8)
    image = Image.fromarray(coarse).resize(
        (width, height), Image.Resampling.BICUBIC)
    path = folder / 'ab'[i % 2] / f'{i}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=(75, 90, 95, 60)[i], subsampling=(2, 0, 1, 2)[i])
  return str(folder)


@pytest.mark.parametrize('line', [
    'decode|resize(384)',
    'decode|resize_small(256)|central_crop(224)',
    "decode|resize_small(248, 'bicubic_antialias')|central_crop(224)",
    "decode|resize_small(256, 'bilinear_antialias')|central_crop(224)",
])
def test_the_preprocessing_of_training_without_tensorflow(line, tmp_path):
  pytest.importorskip('tensorflow')
  folders = [_photographs(tmp_path)]
  sample = os.path.join(runs.TEST_DATA, 'imagenet_sample')
  if os.path.isdir(sample):
    folders.append(sample)
  ops = input_pipeline.parse_eval_pp(line)
  for folder in folders:
    section = recipes.base().input
    section.source, section.path = 'folder', folder
    section.pp = section.eval_pp = line
    files = sources.folder(folder, 0, ()).train
    count = min(files.num_examples, 24)
    data = input_pipeline.open_data(
        section, 0, sources.Splits(files, {'all': files}))
    batch = next(input_pipeline.eval_batches(
        data, 'all', global_batch_size=count))['image']
    for i, image in enumerate(batch):
      with open(files.describe(i), 'rb') as f:
        same = input_pipeline.preprocess(f.read(), ops, 3)
      difference = np.abs(image.astype(int) - same.astype(int))
      assert difference.mean() < 0.25, (files.describe(i), difference.mean())


# Evaluation.


def _digits_folder(folder, names, count=30):
  """Test digits as PNG files in folders with the given names of classes."""
  test = sources.digits('', 0, ()).evals['test']
  pixels, kept = test.read(np.arange(count))[..., 0], 0
  for i, label in enumerate(test.labels[:count]):
    if label < len(names):
      path = folder / names[label] / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels[i]).save(path)
      kept += 1
  return kept


def _numbers(text):
  """{'top1': fraction, 'count': int} of the line that sums up."""
  top1, count = re.search(
      r'top-1 ([\d.]+)%.*evaluated ([\d,]+)/\2$', text, re.M).groups()
  return {'top1': float(top1) / 100, 'count': int(count.replace(',', ''))}


def test_evaluate_repeats_the_numbers_of_training(finished, capsys, tmp_path):
  workdir, results = finished
  png, out_json = tmp_path / 'c.png', tmp_path / 'c.json'
  code, out, _ = call(capsys, 'evaluate', workdir, '--data', 'digits', '--png',
                      png, '--json', out_json, '--batch', 512)
  assert code == 0
  found = json.loads(out_json.read_text())
  for key in ('top1', 'top5', 'loss', 'count'):
    assert found[key] == results[f'test_ema/{key}']
  assert _numbers(out)['count'] == 500
  assert 'decode|resize(32' in out and "classes        10 of the model's" in out
  confusion = np.array(found['confusion'])
  assert confusion.sum() == 500
  assert np.trace(confusion) == round(found['top1'] * 500)
  with Image.open(png) as image:
    assert image.width > 300 and np.asarray(image.convert('L')).std() > 10


def test_evaluate_matches_classes_by_name(
    finished, capsys, tmp_path, monkeypatch):
  """Other names in another order, and fewer of them, give the same answers."""
  model = model_file.load(finished[0])
  test = sources.digits('', 0, ()).evals['test']
  labels = test.labels[:30]
  right = model.predict(model.preprocess(test.read(np.arange(30)))).argmax(
      axis=1) == labels
  names = ['zero', 'one', 'two', 'three', 'four']  # sorted: four, one, ...
  kept = _digits_folder(tmp_path / 'data', names)
  mapped = tmp_path / 'map.json'
  mapped.write_text(json.dumps({n: str(i) for i, n in enumerate(names)}))
  flags = ('evaluate', finished[0], '--data', tmp_path / 'data', '--png',
           tmp_path / 'c.png')
  code, out, _ = call(capsys, *flags, '--map', mapped)
  assert code == 0 and "classes        5 of the model's 10" in out
  assert 'split all' in out
  numbers = _numbers(out)
  assert numbers['count'] == kept
  assert abs(numbers['top1'] - right[labels < 5].mean()) < 1e-4
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  assert _numbers(call(capsys, *flags, '--map', mapped)[1]) == numbers
  code, _, err = call(capsys, *flags)
  assert code == 2 and len(err.splitlines()) == 2
  assert "no class 'four', 'one', 'three', 'two', 'zero'" in err
  for text, message in (('{"for": "4"}', "Did you mean 'four'"),
                        ('["four"]', 'no JSON object'),
                        ('{"four": "1", "one": "1"}', 'no class')):
    mapped.write_text(text)
    code, _, err = call(capsys, *flags, '--map', mapped)
    assert code == 2 and message in err and len(err.splitlines()) == 2


def test_evaluate_on_what_training_held_out(cache, capsys, tmp_path):
  """Of a folder without parts, and on all of it if it is another one."""
  data = tmp_path / 'data'
  _digits_folder(data, list('0123456789'), 100)
  c = runs.short(cache, steps=2, input__source='folder', input__path=str(data),
                 input__holdout=0.2, input__pp='decode|pad_crop(32, 3)',
                 input__eval_pp='decode|resize(32)',
                 evaluators=dict(test=dict(name='classification', split='val')),
                 checkpoint__keep_best='', eval__batch_size=64)
  c.input.pp = 'decode|resize(32)'
  workdir = str(tmp_path / 'run')
  results = train.train_and_evaluate(c, workdir)
  flags = ('evaluate', workdir, '--png', tmp_path / 'c.png', '--data')
  code, out, _ = call(capsys, *flags, data)
  assert code == 0 and 'split val (there is: val, train)' in out
  assert _numbers(out)['count'] == results['test_ema/count'] == 20
  data.rename(tmp_path / 'other')
  code, out, _ = call(capsys, *flags, tmp_path / 'other')
  assert code == 0 and _numbers(out)['count'] == 100
  code, _, err = call(capsys, *flags, tmp_path / 'other', '--split', 'valid')
  assert code == 2 and "Unknown split 'valid'" in err
  code, _, err = call(capsys, *flags, tmp_path / 'none')
  assert code == 2 and 'is no folder, .npz file' in err


def test_confusions_of_many_classes(tmp_path):
  rng = np.random.default_rng(0)
  names = [f'class {i}, of a thousand' for i in range(1000)]
  confusion = np.diag(np.full(1000, 50))
  confusion[7, 700] = confusion[300, 8] = 9
  confusion[rng.integers(0, 1000, 99), rng.integers(0, 1000, 99)] += 1
  keep = evaluate._most_confused(confusion, evaluate.DRAWN)
  assert {7, 700, 300, 8} <= set(keep.tolist())
  assert evaluate.DRAWN <= len(keep) <= evaluate.DRAWN + 1
  evaluate.draw_confusion(confusion, names, tmp_path / 'c.png')
  with Image.open(tmp_path / 'c.png') as image:
    assert 1000 < image.width < 2500
  lines = evaluate.table(confusion, names, 1000)
  assert len(lines) == evaluate.LISTED + 2 and '980 classes' in lines[-1]
  assert 'class 700, of a thousand (9)' in '\n'.join(lines)


# Features.


def test_embed(finished, pictures, capsys, tmp_path):
  workdir, _ = finished
  folder, labels = pictures
  out_file = tmp_path / 'e.npz'
  for layer, shape in (('pooled', (64,)), ('tokens', (16, 64)),
                       ('block_02', (16, 64))):
    code, out, err = call(capsys, 'embed', workdir, folder, '--layer', layer,
                          '--out', out_file, '--batch', 4)
    assert code == 0 and 'broken.jpg' in err and '7 of 8 images' in out
    with np.load(out_file) as found:
      assert found['paths'].tolist() == sorted(labels)
      assert found['features'].shape == (7, *shape)
      last = found['features']
    if layer == 'pooled':
      pooled = last
  model = model_file.load(workdir)
  head = model.variables['params']['head']
  np.testing.assert_allclose(
      pooled @ head['kernel'] + head['bias'],
      model.logits(model.preprocess(sorted(labels))), atol=1e-5)
  code, _, err = call(capsys, 'embed', workdir, folder, '--layer', 'block_3',
                      '--out', out_file)
  assert code == 2 and len(err.splitlines()) == 2
  assert 'There is: block_00, block_01, block_02, pooled, tokens.' in err
