"""The notebooks run; what is committed of them is what they print."""
import glob
import json
import os

import pytest

from tests import runs

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
NOTEBOOKS = sorted(glob.glob(os.path.join(runs.ROOT, 'notebooks', '*.ipynb')))
NAMES = [os.path.basename(path)[:-6] for path in NOTEBOOKS]


@pytest.mark.parametrize('path', [
    pytest.param(p, id=n, marks=() if n[0] in '12' else pytest.mark.slow)
    for p, n in zip(NOTEBOOKS, NAMES, strict=True)])
def test_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv('VIT_JAX_NOTEBOOK_SMALL', '1')
  monkeypatch.setenv('VIT_JAX_NOTEBOOK_DIR', str(tmp_path))
  monkeypatch.setenv('PYTHONPATH', runs.ROOT)
  monkeypatch.setenv('XLA_FLAGS', '')  # one device, as users have
  book = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(book, timeout=600, resources={
      'metadata': {'path': os.path.dirname(path)}}).execute()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_committed_outputs_are_there_and_whole(path):
  with open(path, encoding='utf-8') as f:
    book = json.load(f)
  cells = [c for c in book['cells'] if c['cell_type'] == 'code']
  counts = [c['execution_count'] for c in cells]
  assert counts == list(range(1, len(cells) + 1))
  outputs = [o for c in cells for o in c['outputs']]
  assert outputs and not any(o['output_type'] == 'error' for o in outputs)
  assert book['metadata']['kernelspec']['name'] == 'python3'
  text = json.dumps(book)
  assert '/tmp/' not in text and runs.ROOT not in text
