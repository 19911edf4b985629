"""The release's table, and downloads from a server that breaks off half-way."""
import base64
import csv
import hashlib
import http.server
import math
import os
import threading

import numpy as np
import pytest

from tests import runs
from vit_jax import __main__ as command_line
from vit_jax.commands import zoo
from vit_jax.pretrained import download
from vit_jax.pretrained import index

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(http.server.ThreadingHTTPServer):
  """Serves `files`; `broken` is how many bytes come before it breaks off."""

  def __init__(self, files):
    super().__init__(('localhost', 0), Handler)
    self.files, self.broken, self.with_md5 = files, [], True
    self.resumes = True
    self.asked = []
    self.url = f'http://localhost:{self.server_port}'


class Handler(http.server.BaseHTTPRequestHandler):

  def do_GET(self):
    server, first = self.server, 0
    content = server.files.get(self.path)
    server.asked.append((self.path, self.headers.get('Range')))
    if content is None:
      self.send_error(404)
      return
    if server.resumes and (asked := self.headers.get('Range')):
      first = int(asked.removeprefix('bytes=').rstrip('-'))
      self.send_response(206)
      self.send_header('Content-Range',
                       f'bytes {first}-{len(content) - 1}/{len(content)}')
    else:
      self.send_response(200)
    self.send_header('Content-Length', str(len(content) - first))
    self.send_header('ETag', '"1"')
    if server.with_md5:
      md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
      self.send_header('x-goog-hash', 'crc32c=AAAAAA==')
      self.send_header('x-goog-hash', f'md5={md5}')
    self.end_headers()
    if server.with_md5 == 'wrong':
      content = b'x' + content[1:]
    end = server.broken.pop(0) if server.broken else len(content)
    self.wfile.write(content[first:end])
    self.close_connection = True

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with Server({'/a/b.npz': CONTENT}) as s:
    thread = threading.Thread(target=s.serve_forever, daemon=True)
    thread.start()
    yield s
    s.shutdown()


def fetch(server, folder, **options):
  said = []
  path = download.fetch(f'{server.url}/a/b.npz', folder, say=said.append,
                        timeout=5.0, **options)
  with open(path, 'rb') as f:
    assert f.read() == CONTENT
  return path, '\n'.join(said)


def test_a_download_goes_on_where_it_broke_off(server, tmp_path):
  server.broken = [100_000, 250_000]
  path, said = fetch(server, tmp_path)
  assert [r for _, r in server.asked] == [
      None, 'bytes=100000-', 'bytes=250000-']
  assert 'verified: md5' in said and 'not verified' not in said
  assert sorted(os.listdir(os.path.dirname(path))) == ['b.npz', 'b.npz.json']
  # From the cache: nothing is asked of the server.
  _, said = fetch(server, tmp_path, offline=True)
  assert len(server.asked) == 3 and 'as downloaded' in said


def test_the_next_run_goes_on(server, tmp_path):
  server.broken = [10_000] * 3
  with runs.refused(r'broke off at 10,000 bytes'):
    fetch(server, tmp_path)
  fetch(server, tmp_path)
  assert server.asked[-1][1] == 'bytes=10000-'


def test_a_server_that_cannot_resume(server, tmp_path):
  server.broken, server.resumes = [1000], False
  fetch(server, tmp_path)


def test_without_a_checksum_it_says_so(server, tmp_path):
  server.with_md5 = False
  path, said = fetch(server, tmp_path)
  assert 'not verified: the server sent no checksum' in said
  with open(path, 'r+b') as f:
    f.write(b'changed')
  with runs.refused('has changed since it was downloaded'):
    fetch(server, tmp_path)


def test_another_md5(server, tmp_path):
  server.with_md5 = 'wrong'
  with runs.refused('came with another md5'):
    fetch(server, tmp_path)
  assert not any(files for *_, files in os.walk(tmp_path))


def test_refusals(server, tmp_path):
  with runs.refused('is not in the cache'):
    fetch(server, tmp_path, offline=True)
  with runs.refused('answers 404'):
    download.fetch(f'{server.url}/none', tmp_path)
  with runs.refused('cannot be reached .*refused'):
    download.fetch(f'http://localhost:{runs.free_port()}/a', tmp_path)
  (tmp_path / 'file').touch()
  with runs.refused('Cannot write the cache .*file'):
    fetch(server, tmp_path / 'file')
  with runs.refused('There is no file /nowhere'):
    download.fetch('/nowhere', tmp_path)
  with runs.refused('is no address'):
    download.fetch('ftp://a/b', tmp_path)


def test_addresses():
  assert download.as_https('gs://vit_models/sam/ViT-B_16.npz') == (
      'https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz')
  path = download.cached_path('https://a.b/../x/%2e%2e/%2Fetc/c.npz', '/cache')
  assert path.startswith('/cache/a.b/') and '..' not in path


# The table.


def row(model, aug='light1', final_val=0.4, ds='i21k', adapt_val=0.8,
        resolution=224, adapt_lr=0.01, adapt_ds='imagenet2012', speed=100.0):
  file = (f'{model.replace("/", "_")}-{ds}-300ep-lr_0.001-aug_{aug}-wd_0.1-'
          'do_0.0-sd_0.0')
  return dict(zip(index.COLUMNS, (
      model, ds, 300, 0.001, aug, 0.1, 0.0, 0.0, final_val, final_val,
      final_val, adapt_ds, adapt_lr, 20_000, resolution, adapt_val,
      adapt_val - 0.01, 22_050_664, speed, file,
      f'{file}--{adapt_ds}-steps_20k-lr_{adapt_lr}-res_{resolution}'),
      strict=True))


ROWS = [
    row('S/16', 'none', 0.41, adapt_val=0.83),
    row('S/16', 'light1', 0.43, adapt_val=0.81),
    row('S/16', 'light1', 0.43, adapt_val=0.82, adapt_lr=0.03),
    row('S/16', 'light1', 0.43, adapt_val=0.84, resolution=384),
    row('S/16', 'medium1', 0.6, ds='i1k', adapt_ds='cifar100'),
    row('B/8', 'medium2', 0.5, speed=math.nan),
]


@pytest.fixture
def table(tmp_path):
  path = tmp_path / 'index.csv'
  with open(path, 'w', newline='') as f:
    writer = csv.DictWriter(f, index.COLUMNS)
    writer.writeheader()
    writer.writerows(
        {k: '' if v != v else v for k, v in r.items()} for r in ROWS)
  return str(path)


def run(table, *flags):
  lines = []
  zoo.run(zoo._parse(['--index', table, *flags]), lines.append)
  return lines[1:]  # without the index's own


def test_lists_filters_and_sorts(table):
  lines = run(table)
  assert lines[0].split() == [
      'model', 'data', 'aug', 'wd/do/sd', 'val', 'images/s', 'file']
  assert lines[-1] == '4 of 4 checkpoints'
  assert [line.split()[0] for line in lines[1:-1]] == [
      'S/16', 'B/8', 'S/16', 'S/16']
  lines = run(table, '--model', 'S/16', '--adapt_ds', 'imagenet2012',
              '--limit', '1')
  assert 'res_384' in lines[1] and lines[-1] == '1 of 4 checkpoints'
  lines = run(table, '--sort', 'infer_samples_per_sec')
  assert lines[-2].startswith('B/8') and ' - ' in lines[-2]


def test_recommended(table):
  """By final_val on its own data; the best tuned one is another's."""
  best = index.recommend(index.read(table))
  assert {k: v['aug'] for k, v in best.items()} == {
      'S/16': 'light1', 'B/8': 'medium2'}
  tuned = index.recommend(index.read(table), 'i21k', 'imagenet2012', 224)
  assert tuned['S/16']['adapt_final_val'] == 0.82
  assert 'ImageNetV2' in run(
      table, '--recommended', '--adapt_ds', 'imagenet2012')[-1]


def test_download_by_model_from_a_mirror(table, tmp_path):
  name = ROWS[1]['filename'] + '.npz'
  (tmp_path / name).write_bytes(CONTENT)
  *_, last = run(table, '--download', 'S/16')
  assert f'init_from.checkpoint={tmp_path}/{name}' in last
  assert 'S_16-i21k' in run(table, '--download', name)[-1]


@pytest.mark.parametrize('flags, match', [
    (('--model', 'S/17'), "Unknown name 'S/17'"),
    (('--aug', 'heavy'), 'There is: light1, medium1'),
    (('--sort', 'accuracy'), "Unknown column 'accuracy'"),
    (('--download', 'S/17'), "Unknown model or file 'S/17'"),
    (('--download', 'B/8', '--ds', 'i1k'), "Unknown ds 'i1k'"),
    (('--resolution', '512'), "Unknown adapt_resolution '512'"),
])
def test_what_is_not_in_the_table(flags, match, table):
  with runs.refused(match):
    run(table, *flags)


@pytest.mark.parametrize('content, match', [
    ('a,b\n1,2\n', 'has no column name'),
    ('\x00\xff', 'has no column|is no table'),
    (','.join(index.COLUMNS) + '\nS/16,i21k,many\n', "epochs='many'"),
])
def test_another_table(content, match, tmp_path):
  path = tmp_path / 'index.csv'
  path.write_text(content, encoding='latin-1')
  with runs.refused(match):
    index.read(str(path))


def test_command_line(capsys, tmp_path):
  args = ['zoo', '--offline', '--cache', str(tmp_path)]
  assert command_line.main(args) == 2
  assert 'index.csv is not in the cache' in capsys.readouterr().err
