"""Files from the web into a cache: resumed, checked, used without a network.

Beside FILE lie FILE.json (url, length, md5, sha256), written when it is whole,
and FILE.part with FILE.part.json while it is not.
"""
import base64
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request

_ATTEMPTS = 3
_BLOCK = 2**20
NOT_VERIFIED = 'not verified: the server sent no checksum'


def fetch(source, folder, *, offline=False, say=print, timeout=60.0):
  """Returns the local path of a file, downloaded if need be.

  What was cached is compared with the sha256 recorded when it came; what comes
  with its length and, if the server sends one (Content-MD5, x-goog-hash), with
  its md5. A download that breaks off goes on where it stopped.

  Args:
    source: gs://bucket/object, http(s)://..., or a local path, which is
      returned as it is.
    folder: of the cache.
    offline: whether to use the cache only.
    say: called with a line about what was done and verified.
    timeout: seconds that the server may be silent.

  Raises:
    ValueError: no such file, no network, a cache that cannot be written, or
      content that is not what was announced. Cause and remedy on a line each.
  """
  if '://' not in source:
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
      raise ValueError(f'There is no file {path}.\n'
                       'Give a path, or a gs:// or https:// address.')
    say(f'{path}: a local file, not verified')
    return path
  url = as_https(source)
  path = cached_path(url, folder)
  try:
    if os.path.isfile(path):
      _check_cached(path, say)
      return path
    if offline:
      raise ValueError(f'{source} is not in the cache {folder}.\n'
                       'Run the same command once without --offline.')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for attempt in range(_ATTEMPTS):
      try:
        _download(url, path, timeout)
        break
      except (http.client.HTTPException, ConnectionError, TimeoutError) as e:
        if attempt == _ATTEMPTS - 1:
          raise ValueError(
              f'{url} broke off at {_size(path + ".part"):,} bytes '
              f'({_line(e)}).\nRun the same command again: it goes on from '
              'there.') from None
        time.sleep(0.2 * 4**attempt)
    _finish(url, path, say)
    return path
  except urllib.error.HTTPError as e:
    raise ValueError(f'{url} answers {e.code} {e.reason}.\n'
                     'Check the name (vit-jax zoo lists them).') from None
  except urllib.error.URLError as e:
    raise ValueError(
        f'{url} cannot be reached ({_line(e.reason)}).\nCheck the network, or '
        'put the file on this machine and give its path.') from None
  except OSError as e:
    raise ValueError(f'Cannot write the cache {folder} ({e.strerror}).\n'
                     'Name another folder with --cache.') from None


def as_https(source):
  """gs://bucket/object -> https://storage.googleapis.com/bucket/object."""
  match = re.fullmatch(r'gs://([^/]+)/(.+)', source)
  if match:
    return ('https://storage.googleapis.com/'
            f'{match[1]}/{urllib.parse.quote(match[2])}')
  if not re.match(r'https?://[^/]+/.', source):
    raise ValueError(f'{source} is no address of a file.\n'
                     'Give a path, or a gs:// or https:// address.')
  return source


def cached_path(url, folder):
  """Where a URL lies in the cache, by host and path; never outside of it."""
  parts = urllib.parse.urlsplit(url)
  names = [re.sub(r'[^\w.+=-]', '_', urllib.parse.unquote(n))
           for n in (parts.netloc, *parts.path.split('/'))]
  names = [n for n in names if n.strip('.')]
  return os.path.join(os.path.expanduser(str(folder)), *names)


def _download(url, path, timeout):
  """Appends to FILE.part until it has the announced length."""
  part = path + '.part'
  known = _read_json(part + '.json')
  have = _size(part) if known else 0
  request = urllib.request.Request(url)
  if have:
    request.add_header('Range', f'bytes={have}-')
    if known.get('etag'):  # another version starts from its beginning
      request.add_header('If-Range', known['etag'])
  try:
    response = urllib.request.urlopen(request, timeout=timeout)
  except urllib.error.HTTPError as e:
    if e.code == 416 and have == known.get('length'):
      return
    raise
  with response:
    headers = response.headers
    span = re.match(r'bytes (\d+)-\d+/(\d+)', headers.get('Content-Range', ''))
    if response.status == 206:
      if not span or int(span[1]) != have:
        os.remove(part)
        raise http.client.HTTPException('it sent another part than asked for')
      mode, length = 'ab', int(span[2])
    else:
      mode, length = 'wb', headers.get('Content-Length')
      length = None if length is None else int(length)
      with open(part + '.json', 'w') as f:
        json.dump({'etag': headers.get('ETag', ''), 'length': length,
                   'md5': _md5_of(headers)}, f)
    with open(part, mode) as f:
      while block := response.read(_BLOCK):
        f.write(block)
  if length is not None and _size(part) != length:
    raise http.client.IncompleteRead(b'', length - _size(part))


def _finish(url, path, say):
  """Verifies FILE.part and makes it FILE."""
  part = path + '.part'
  known = _read_json(part + '.json')
  digests = _digests(part)
  md5 = known.get('md5')
  if md5 and md5 != digests['md5']:
    os.remove(part)
    os.remove(part + '.json')
    raise ValueError(
        f'{url} came with another md5 than the server announced ({md5}).\n'
        'It was removed: run the same command again.')
  with open(path + '.json', 'w') as f:
    json.dump({'url': url, 'length': _size(part), **digests}, f)
  os.replace(part, path)
  os.remove(part + '.json')
  how = f'verified: md5 {md5}' if md5 else NOT_VERIFIED
  say(f'{path}: {_size(path):,} bytes, {how}; sha256 {digests["sha256"]}')


def _check_cached(path, say):
  """Compares a cached file with what was recorded when it came."""
  known = _read_json(path + '.json')
  if not known.get('sha256'):
    say(f'{path}: in the cache, not verified: no sha256 was recorded')
    return
  if _digests(path)['sha256'] != known['sha256']:
    raise ValueError(f'{path} has changed since it was downloaded.\n'
                     'Delete it and run the same command again.')
  say(f'{path}: in the cache, sha256 {known["sha256"]} as downloaded')


def _md5_of(headers):
  """The md5 that a server sends, in hex, or ''."""
  found = re.search(r'md5=([\w+/=]+)', ','.join(
      headers.get_all('x-goog-hash', [])))
  text = headers.get('Content-MD5') or (found and found[1]) or ''
  # A compressed transfer is another content than the one announced.
  if headers.get('Content-Encoding'):
    return ''
  return base64.b64decode(text).hex()


def _digests(path):
  md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
  with open(path, 'rb') as f:
    while block := f.read(_BLOCK):
      md5.update(block)
      sha256.update(block)
  return {'md5': md5.hexdigest(), 'sha256': sha256.hexdigest()}


def _read_json(path):
  try:
    with open(path) as f:
      return json.load(f)
  except (FileNotFoundError, ValueError):
    return {}


def _size(path):
  return os.path.getsize(path) if os.path.exists(path) else 0


def _line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:99]
