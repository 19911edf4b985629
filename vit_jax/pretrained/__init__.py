"""Released weights in and out: .npz, .safetensors and torch files.

`load` finds out whose names a file uses, fits it to a model and reports; it
runs nothing that a file contains. `writers` writes.
"""
import dataclasses
import functools
import re

import numpy as np

from vit_jax import param_paths
from vit_jax.models import variants
from vit_jax.pretrained import files
from vit_jax.pretrained import layouts
from vit_jax.pretrained import posembed

CHANNELS = ('auto', 'rgb', 'bgr')
FRESH = 'List it in init_from.reset to start it afresh.'
# What a model may lack of a file without being another model.
_OPTIONAL = re.compile(
    r'(.*[/.])?(head|heads|classifier|pre_logits|pooler|cls|cls_token|'
    r'class_token|num_batches_tracked)([/._].*)?')
_NUMBERED = re.compile(r'(?i).*(block|layer|stage|unit)[s_./]*\d+[/._].*')


@dataclasses.dataclass
class Report:
  """What became of a file's tensors and of a model's parameters.

  Attributes:
    path: of the file. looks_like: its model and layout.
    matched: our paths that were taken from the file.
    reset: our paths that were left as initialised, as asked for.
    missing: those of them that the file does not have.
    unexpected: the file's tensors that the model has no place for.
    reshaped: notes on position embeddings for another grid.
  """
  path: str
  looks_like: str
  matched: list[str]
  reset: list[str]
  missing: list[str]
  unexpected: list[str]
  reshaped: list[str]

  def __str__(self):
    lists = {'reset': self.reset, 'not in the file': self.missing,
             'left in the file': self.unexpected, 'resized': self.reshaped}
    notes = [f'; {name}: {_some(items)}' for name, items in lists.items()
             if items or name == 'reset']
    return (f'took {len(self.matched)} arrays of {self.path} '
            f'({self.looks_like}){"".join(notes)}')


def load(path, variables, *, paths=('.*',), reset=(), grid=None,
         resize='aligned', channels='auto'):
  """Reads what a model needs from a released file, tensor by tensor.

  Args:
    path: .npz, .safetensors, .pth, .pyth, .pt or .bin; see `files.open_file`.
    variables: {'params', 'batch_stats'}: the model's shapes.
    paths, reset: regexes of the parameters and statistics to take, and of those
      among them to leave as initialised.
    grid: (h, w) of the model's tokens, for its position embedding; None: a
      square one.
    resize: a method of `posembed.RESIZE`, where the file's grid is another.
    channels: 'auto' (bgr for pycls, else rgb), 'rgb' or 'bgr': the order in
      which the file's first convolution takes the channels of an image; the
      model takes rgb.

  Returns:
    ({'params': {path: array}, 'batch_stats': {path: array}}, Report).

  Raises:
    ValueError: a file that cannot be read, of unknown layout or for another
      model (the message says for which); a parameter that it lacks; a pattern
      that matches nothing. Cause and remedy on a line each.
  """
  if resize not in posembed.RESIZE or channels not in CHANNELS:
    raise ValueError(
        f'init_from.resize={resize!r}, init_from.channels={channels!r}.\n'
        f'There is: {", ".join(posembed.RESIZE)}; {", ".join(CHANNELS)}.')
  source = _Source(path)
  report = source.report
  wanted = {kind: param_paths.flatten(variables.get(kind, {}))
            for kind in ('params', 'batch_stats')}
  param_paths.check(wanted['params'], tuple(paths) + tuple(reset))
  if family(wanted['params']) != source.layout.family:
    raise ValueError(
        f'{path} looks like {report.looks_like}, which is no '
        f'{family(wanted["params"])}.\nSet model.size and its section to match '
        'it.')
  taken = []
  for kind, leaves in wanted.items():
    for name, leaf in leaves.items():
      found = source.find(name, leaf.shape)
      if not param_paths.matches(name, paths):
        continue
      if not param_paths.matches(name, reset):
        taken.append((kind, name, leaf.shape, found))
        continue
      report.reset.append(name)
      if not found:
        report.missing.append(name)
  source.check_left(whole=tuple(paths) == ('.*',))
  for _, name, shape, found in taken:
    source.check(name, shape, found)
  given = {'params': {}, 'batch_stats': {}}
  # By their names: blocks that are stacked in one tensor are read in a row.
  for kind, name, shape, found in sorted(
      taken, key=lambda item: item[3][0][0].key):
    if name == 'pos_embedding':
      value = source.pos_embedding(
          shape, 'cls' in wanted['params'], grid, resize)
    else:
      value = source.read(name, shape, found)
    given[kind][name] = value
    report.matched.append(name)
  if channels == 'bgr' or (channels == 'auto' and source.layout.bgr):
    _flip(given['params'])
  return given, report


def normalize(tensors):
  """The weights among a file's tensors, under their release's own names."""
  for tree in ('opt/target', 'params', 'target'):
    if any(key.startswith(tree + '/') for key in tensors):
      # Beside the parameters our own files have statistics, with other names.
      tensors = {key.split('/', tree.count('/') + 1)[-1]: value
                 for key, value in tensors.items()
                 if key.startswith((tree + '/', 'batch_stats/'))}
  strip = re.compile(r'(module\.|model\.|_orig_mod\.|vit\.)*')
  found = {}
  for key, tensor in tensors.items():
    key = key[strip.match(key).end():]
    # Names of BiT's layers where the writer counted them.
    key = re.sub(r'(standardized_conv2d|group_norm|conv2d)_\d+', r'\1', key)
    if match := re.fullmatch(
        r'(Transformer/encoderblock|(?:encoder/)?blocks)(/.*)', key):
      for i in range(tensor.shape[0]):
        block = (f'{match[1]}_{i}' if match[1][0] == 'T' else
                 f'{match[1][:-1]}_{i:02d}')
        found[f'{block}{match[2]}'] = files.Tensor(
            tensor.shape[1:], lambda t=tensor, i=i: t.load()[i])
    else:
      found[key] = tensor
  return found


def detect(tensors, path):
  """Returns the layout whose signature a tensor has."""
  for layout in layouts.LAYOUTS.values():
    if any(re.fullmatch(layout.signature, key) for key in tensors):
      return layout
  titles = ', '.join(x.title for x in layouts.LAYOUTS.values())
  raise ValueError(
      f'{path} holds no layout that is known here; its tensors are '
      f'{_some(sorted(tensors))}.\nKnown are: {titles}.')


def family(params):
  """'vit', 'mixer' or 'bit', from parameter paths."""
  if any(path.startswith('encoder/') for path in params):
    return 'vit'
  return 'mixer' if any('mlp_tokens' in path for path in params) else 'bit'


def shape_of(tensors, layout, ours):
  """The shape that a file has for our parameter, or None."""
  for place in layout.places(ours):
    if place.key in tensors:
      return tensors[place.key].shape
  return None


def looks_like(tensors, layout):
  """The size of the model in a file, such as 'S/16', or its dimensions."""
  shape = functools.partial(shape_of, tensors, layout)

  def count(ours):
    n = 0
    while shape(ours.format(n)):
      n += 1
    return n

  if layout.family == 'bit':
    units = tuple(filter(None, (
        count(f'stage_{i}_unit_{{:02d}}/conv_1/kernel') for i in range(4))))
    width = shape('conv_root/kernel')
    width = width and width[0 if layout.torch else -1]
    return (_name(variants.BITS, (units, width))
            or f'a ResNet of {units}, width {width}')
  block = 'block_{:02d}' if layout.family == 'mixer' else 'encoder/block_{:02d}'
  last = '/mlp_channels' if layout.family == 'mixer' else '/mlp'
  depth = count(f'{block}{last}/fc1/bias')
  *_, mlp = shape(f'{block.format(0)}{last}/fc1/bias') or (0,)
  *_, width = shape('norm/scale' if layout.family == 'mixer'
                   else 'encoder/norm/scale') or (0,)
  stem = shape('stem/kernel' if layout.family == 'mixer'
               else 'stem/embedding/kernel')
  patch = stem[-1 if layout.torch else 0] if stem else None
  text = f'a {layout.family} of width {width}, depth {depth}, patch {patch}'
  if layout.family == 'mixer':
    rows = {name: (r.patch, r.width, r.depth)
            for name, r in variants.MIXERS.items()}
    return _name(rows, (patch, width, depth)) or text
  units = tuple(filter(None, (count(
      f'stem/resnet/stage_{i}_unit_{{:02d}}/conv_1/kernel') for i in range(4))))
  if shape('stem/resnet/conv_root/kernel'):
    rows = {name: (r, variants.SIZES[name].width)
            for name, (_, r) in variants.HYBRIDS.items()}
    return _name(rows, (units, width)) or text
  convolutional = shape('stem/conv_0/kernel')
  # B/16 and 18GF are one model; who released it says which name people know.
  is_papers = layout is layouts.LAYOUTS['pycls']
  for name in sorted(variants.SIZES, key=lambda n: ('/' in n) == is_papers):
    row = variants.SIZES[name]
    if name not in variants.HYBRIDS and (row.width, row.mlp) == (width, mlp):
      if convolutional and row.depth_conv == depth:
        return f'{name} with a convolutional stem'
      if (row.patch, row.depth) == (patch, depth):
        return name
  return text


def _name(rows, found):
  return next((n for n, row in rows.items() if tuple(row) == found), None)


class _Source:
  """A file's tensors, asked for by our paths.

  Attributes:
    layout: whose names it uses.
    report: `Report`, filled on the way.
  """

  def __init__(self, path):
    self._path = path
    self._tensors = normalize(files.open_file(path))
    self.layout = detect(self._tensors, path)
    looks = looks_like(self._tensors, self.layout)
    self.report = Report(
        path, f'{looks}, {self.layout.title}', [], [], [], [], [])
    self._asked = set()

  def find(self, name, shape):
    """[(place, our path)] of a parameter, one for each block if stacked.

    [] if one is not in the file.
    """
    names = [name]
    if match := re.fullmatch(r'(.*/)?blocks/(.*)', name):
      names = [f'{match[1] or ""}block_{i:02d}/{match[2]}'
               for i in range(shape[0])]
    found = []
    for one in names:
      places = [p for p in self.layout.places(one) if p.key in self._tensors]
      if not places:
        return []
      found.append((places[0], one))
    self._asked |= {place.key for place, _ in found}
    return found

  def check_left(self, whole):
    """Notes what the model has no place for; raises ValueError for blocks.

    Args:
      whole: whether all of the model is to be taken.
    """
    left = self.report.unexpected = sorted(set(self._tensors) - self._asked)
    blocks = [key for key in left if _NUMBERED.fullmatch(key)
              and not _OPTIONAL.fullmatch(key)]
    if blocks and whole:
      raise ValueError(
          f'{self._path} looks like {self.report.looks_like}, and the model '
          f'has no place for {_some(blocks)}.\nSet model.size to match it, or '
          'name in init_from.paths what to take.')

  def check(self, name, shape, found):
    """Raises ValueError unless a parameter is there, in its shape."""
    looks = self.report.looks_like
    if not found:
      raise ValueError(f'{self._path} looks like {looks}, and has no {name}.\n'
                       f'Set model.size to match it, or: {FRESH}')
    if name == 'pos_embedding':
      shape = shape[-1:]
    elif len(found) > 1:
      shape = shape[1:]
    for place, one in found:
      stored = self._tensors[place.key].shape
      if name == 'pos_embedding':
        stored = stored[-1:]
      expected = self.layout.to_file(
          one, np.broadcast_to(np.float32(0), shape)).shape
      if place.part:
        expected = (expected[0] * place.part[1], *expected[1:])
      if _squeezed(stored) != _squeezed(expected):
        what = (f'has a head of {stored[-1 if not self.layout.torch else 0]} '
                'classes' if one.startswith('head/') else f'looks like {looks}')
        raise ValueError(
            f'{self._path} {what}: {place.key} is {stored} and has to be '
            f'{expected}.\n' + (
                "List 'head/.*' in init_from.reset to start it afresh."
                if one.startswith('head/') else
                f'Set model.size to match it, or: {FRESH}'))

  def read(self, name, shape, found):
    """Our array, float32."""
    if len(found) > 1 or found[0][1] != name:
      return np.stack([self._read(place, one, shape[1:])
                       for place, one in found])
    return self._read(*found[0], shape)

  def _read(self, place, name, shape):
    array = self._tensors[place.key].load()
    if place.part:
      index, of = place.part
      array = np.split(array, of)[index]
    array = self.layout.from_file(name, array, shape)
    return np.ascontiguousarray(array, np.float32)

  def pos_embedding(self, shape, has_class, grid, resize):
    """(1, N, D) for our grid, with or without the place of a class token.

    Either file may have that place or not: big_vision adds it to the token.
    """
    place = next(p for p in self.layout.places('pos_embedding')
                 if p.key in self._tensors)
    table = self._tensors[place.key].load().astype(np.float32)
    table = table.reshape(-1, shape[-1])  # pycls: (N, 1, D)
    new = tuple(grid or posembed.square(shape[1] - has_class) or ())
    old, first = posembed.square(len(table)), table[:0]
    if old is None and posembed.square(len(table) - 1):
      first, table = table[:1], table[1:]
      old = posembed.square(len(table))
    elif old is None and len(table) in (shape[1], shape[1] - 1 + has_class):
      # Not square, and as many as ours.
      old, first, table = new, table[:has_class], table[has_class:]
    if not old or not new:
      raise ValueError(
          f'{self._path} has {len(table)} position embeddings, of which no '
          f'square grid can be made.\n{FRESH}')
    if old != new:
      self.report.reshaped.append(
          f'pos_embedding {old[0]}x{old[1]} -> {new[0]}x{new[1]}')
    table = posembed.resize(table, old, new, resize)
    if has_class:
      if not len(first):
        first = np.zeros((1, table.shape[1]), np.float32)
      table = np.concatenate([first, table])
    return table[None]


def _flip(params):
  """Reverses the channels that the first convolution takes, in place."""
  for name in ('stem/conv_0/kernel', 'stem/embedding/kernel', 'stem/kernel',
               'stem/resnet/conv_root/kernel', 'conv_root/kernel'):
    if name in params and params[name].shape[2] == 3:
      params[name] = np.ascontiguousarray(params[name][:, :, ::-1])
      return


def _squeezed(shape):
  return tuple(n for n in shape if n != 1)


def _some(items):
  items = list(items)
  more = f' and {len(items) - 3} more' if len(items) > 3 else ''
  return ', '.join(items[:3]) + more if items else 'none'
