"""Parameters named by path ('encoder/block_00/mlp/fc1/kernel') and by regex.

A pattern has to match the whole path, and one that matches nothing is an
error: a pattern that silently selects nothing is the likeliest of mistakes.
"""
import collections
import re

from flax import traverse_util
import jax


def flatten(tree):
  """Nested dict of arrays -> {path: array}."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat):
  """{path: array} -> nested dict of arrays."""
  return traverse_util.unflatten_dict(flat, sep='/')


def size(tree):
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def matches(path, patterns):
  """Whether any of the regexes matches the whole path."""
  return any(re.fullmatch(p, path) for p in patterns)


def split(tree, patterns):
  """Splits a tree into (leaves that match no pattern, leaves that match one).

  Raises:
    ValueError: a pattern that matches nothing; the message shows paths.
  """
  flat = flatten(tree)
  check(flat, patterns)
  rest = {k: v for k, v in flat.items() if not matches(k, patterns)}
  chosen = {k: v for k, v in flat.items() if k not in rest}
  return unflatten(rest), unflatten(chosen)


def merge(a, b):
  """Undoes `split`."""
  return unflatten({**flatten(a), **flatten(b)})


def mask(tree, patterns):
  """A tree of bools: which leaves match one of the patterns."""
  return unflatten({k: matches(k, patterns) for k in flatten(tree)})


def stack_blocks(flat, stack):
  """Parameters of blocks, as a model without scan has them -> as with scan.

  Args:
    flat: {path: anything}, with 'encoder/block_00/...' and so on.
    stack: from the list of what the blocks have to the one of 'blocks/...'.

  Returns:
    {path: anything}.
  """
  new, blocks = {}, collections.defaultdict(list)
  for path in sorted(flat):
    if match := re.fullmatch(r'(.*/)?block_\d+/(.*)', path):
      blocks[f'{match[1] or ""}blocks/{match[2]}'].append(flat[path])
    else:
      new[path] = flat[path]
  return new | {path: stack(leaves) for path, leaves in blocks.items()}


def unstack_blocks(flat, unstack):
  """Undoes `stack_blocks`; `unstack` gives a list of what the blocks have."""
  new = {}
  for path, leaf in flat.items():
    if match := re.fullmatch(r'(.*/)?blocks/(.*)', path):
      for i, one in enumerate(unstack(leaf)):
        new[f'{match[1] or ""}block_{i:02d}/{match[2]}'] = one
    else:
      new[path] = leaf
  return new


def are_stacked(paths):
  """Whether paths are those of a model with scan; None: it has no blocks."""
  for path in paths:
    if match := re.search(r'(^|/)block(s|_\d+)/', path):
      return match[2] == 's'
  return None


def check(paths, patterns):
  """Raises ValueError for a pattern that is no regex or matches no path."""
  for pattern in patterns:
    if not isinstance(pattern, str):
      raise ValueError(f'{pattern!r} is not a regular expression.\n'
                       "Patterns match whole paths, as in 'stem/.*'.")
    try:
      found = any(re.fullmatch(pattern, path) for path in paths)
    except re.error as e:
      raise ValueError(f'{pattern!r} is not a regular expression: {e}.\n'
                       "Patterns match whole paths, as in 'stem/.*'.") from None
    if not found:
      some = ', '.join(sorted(paths)[:3])
      raise ValueError(
          f'The pattern {pattern!r} matches no parameter.\n'
          f'It has to match a whole path, such as {some}.')
