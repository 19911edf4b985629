"""Files of named tensors, read lazily and as data only, by numpy alone.

.npz, .safetensors and, with torch installed, .pth, .pyth, .pt and .bin. Keys
and shapes are read at once, values one tensor at a time. Pickles are refused:
they can run any program.
"""
from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import re
import struct
import zipfile

import numpy as np

_SAFE_TYPES = {
    'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': '|V2', 'I64': '<i8',
    'I32': '<i4', 'I16': '<i2', 'I8': '|i1', 'U8': '|u1', 'BOOL': '|b1'}
_MAX_HEADER = 100 * 2**20
_TORCH = ('.pth', '.pyth', '.pt', '.bin')
_AGAIN = 'Download it again, or name another file.'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is still on disk; `load()` gives it as numpy."""
  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]


def open_file(path: str) -> dict[str, Tensor]:
  """Returns the tensors of a file by name; reads no values.

  Args:
    path: of the file. 'file.npz:img' takes what is below `img`, without it.

  Returns:
    {key: Tensor}. bfloat16, which numpy reads as void, becomes float32.

  Raises:
    ValueError: no such file, damaged, of another kind, or with pickled objects.
      So does `Tensor.load`, of damaged values.
  """
  path, tree = _split(path)
  suffix = os.path.splitext(path)[1].lower()
  if suffix == '.safetensors':
    tensors = _open_safetensors(path)
  elif suffix in _TORCH:
    return _open_torch(path, tree)
  else:
    tensors = _open_npz(path)
  return below(tensors, tree, path) if tree else tensors


def below(tensors, tree, path):
  """The tensors in a sub-tree, with their names in it."""
  found = {key[len(tree) + 1:]: value for key, value in tensors.items()
           if re.match(re.escape(tree) + '[/.]', key)}
  if not found:
    trees = sorted({re.split('[/.]', key)[0] for key in tensors})
    raise ValueError(f'{path} has nothing below {tree!r}.\n'
                     f'There is: {", ".join(trees[:9])}.')
  return found


def _split(path):
  """'file.npz:img' -> ('file.npz', 'img'); raises if there is no file."""
  path = os.path.expanduser(str(path))
  tree = ''
  if not os.path.exists(path) and ':' in os.path.basename(path):
    path, _, tree = path.rpartition(':')
  if not os.path.isfile(path):
    hint = ('Download it first (vit-jax zoo).' if '://' in path else
            'Give a .npz, .safetensors or torch file.')
    raise ValueError(f'There is no file {path}.\n{hint}')
  return path, tree


def _as_float(array):
  """bfloat16, read as void16 or kept as uint16, as float32."""
  if array.dtype.kind == 'V' and array.dtype.itemsize == 2:
    array = np.ascontiguousarray(array).view('<u2')
    return (array.astype(np.uint32) << 16).view(np.float32)
  return array


def _open_npz(path):
  try:
    archive = zipfile.ZipFile(path)
    members = [m for m in archive.namelist() if m.endswith('.npy')]
    headers = {m: _npy_header(archive, m) for m in members}
  except Exception as e:  # of any kind: it parses whatever bytes there are
    raise ValueError(f'{path} is truncated or no .npz file: it starts with '
                     f'{_start(path)} ({_line(e)}).\n{_AGAIN}') from None
  for member, (_, dtype) in headers.items():
    if dtype.hasobject:
      raise ValueError(
          f'{path} holds pickled objects ({member}), which could run any '
          'program.\nSave it again as plain arrays, where you trust it.')
  if not members:
    raise ValueError(f'{path} is a zip file without arrays.\n{_AGAIN}')

  @functools.lru_cache(maxsize=1)  # blocks that are stacked in one tensor
  def load(member):
    try:
      with archive.open(member) as f:
        return _as_float(np.lib.format.read_array(f, allow_pickle=False))
    except Exception as e:
      raise ValueError(f'{path} is damaged in {member} ({_line(e)}).\n'
                       f'{_AGAIN}') from None

  return {m[:-4]: Tensor(shape, functools.partial(load, m))
          for m, (shape, _) in headers.items()}


def _npy_header(archive, member):
  """(shape, dtype) that are written before an array."""
  with archive.open(member) as f:
    version = np.lib.format.read_magic(f)
    read = (np.lib.format.read_array_header_1_0 if version == (1, 0) else
            np.lib.format.read_array_header_2_0)
    shape, _, dtype = read(f)
  return shape, dtype


def metadata(path: str) -> dict[str, str]:
  """The texts that a .safetensors file holds beside its tensors."""
  texts = _safetensors_header(path)[0].get('__metadata__')
  return texts if isinstance(texts, dict) else {}


def _safetensors_header(path):
  """(header, its bytes); ValueError for a file that has none."""
  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
      (length,) = struct.unpack('<Q', f.read(8))
      if length > min(size, _MAX_HEADER):
        raise ValueError(f'a header of {length} bytes')
      header = json.loads(f.read(length))
    if not isinstance(header, dict):
      raise ValueError('a header that is no object')
    return header, length
  except Exception as e:
    raise _no_safetensors(path, e) from None


def _no_safetensors(path, error):
  return ValueError(
      f'{path} is truncated or no .safetensors file: it starts with '
      f'{_start(path)} ({_line(error)}).\n{_AGAIN}')


def _open_safetensors(path):
  header, length = _safetensors_header(path)
  size = os.path.getsize(path)
  try:
    header.pop('__metadata__', None)
    entries = {
        key: (_SAFE_TYPES[e['dtype']], tuple(e['shape']), *e['data_offsets'])
        for key, e in header.items()}
    for key, (dtype, shape, begin, end) in entries.items():
      if (end - begin != math.prod(shape) * np.dtype(dtype).itemsize
          or not 0 <= begin <= end <= size - 8 - length):
        raise ValueError(f'{key} does not lie in the file')
  except Exception as e:
    raise _no_safetensors(path, e) from None

  @functools.lru_cache(maxsize=1)  # blocks that are stacked in one tensor
  def load(dtype, shape, begin):
    array = np.fromfile(
        path, dtype, math.prod(shape), offset=8 + length + begin)
    return _as_float(array.reshape(shape))

  return {key: Tensor(shape, functools.partial(load, dtype, shape, begin))
          for key, (dtype, shape, begin, _) in entries.items()}


def _open_torch(path, tree):
  try:
    import torch
  except ImportError:
    raise ValueError(
        f'Reading {path} needs torch, which is not installed.\nInstall it (pip '
        "install '.[torch]'), or convert the file to .safetensors.") from None
  try:
    saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as e:
    raise ValueError(f'torch does not read {path} as plain weights '
                     f'({_line(e)}).\n{_AGAIN}') from None
  # What training programs put around the weights.
  for name in (tree,) if tree else ('model_state', 'state_dict', 'model'):
    if hasattr(saved, 'items') and hasattr(saved.get(name), 'items'):
      saved = saved[name]
      break
  else:
    if tree:
      raise ValueError(f'{path} has nothing below {tree!r}.\n'
                       f'There is: {", ".join(map(str, list(saved)[:9]))}.')

  def load(tensor):
    if tensor.dtype == torch.bfloat16:
      tensor = tensor.float()
    return tensor.detach().numpy()

  return {key: Tensor(tuple(value.shape), functools.partial(load, value))
          for key, value in saved.items() if isinstance(value, torch.Tensor)}


def write_npz(path: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes {key: array} as numpy does, whatever the file's name ends in."""
  with open(path, 'wb') as f:
    np.savez(f, **arrays)


def write_safetensors(path: str, arrays: dict[str, np.ndarray],
                      texts: dict[str, str] | None = None) -> None:
  """Writes {key: float32 or float16 array} as .safetensors.

  Args:
    path: of the file.
    arrays: the tensors.
    texts: what `metadata` gives back; without, that the names are torch's.
  """
  names = {np.dtype(v): k for k, v in _SAFE_TYPES.items() if k != 'BF16'}
  header, offset = {'__metadata__': texts or {'format': 'pt'}}, 0
  for key, array in arrays.items():
    header[key] = {'dtype': names[array.dtype], 'shape': list(array.shape),
                   'data_offsets': [offset, offset + array.nbytes]}
    offset += array.nbytes
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for array in arrays.values():
      f.write(np.ascontiguousarray(array).tobytes())


def _start(path):
  with open(path, 'rb') as f:
    return repr(f.read(16))[1:]


def _line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:99]
