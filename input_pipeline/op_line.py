"""The language of ops as one line: 'name|name(arguments)|...'.

`input.pp` and `input.eval_pp` are such lines, and so is `augment` in the
config. A table says which names there are and what they make.
"""
import ast
import inspect

from input_pipeline import messages


def parse(text, ops, key, example):
  """Parses a line into a tuple of what the entries of `ops` return.

  Args:
    text: the line; '' is no ops. Arguments are literals, nothing is evaluated.
    ops: {name: callable}; it is called with the arguments of the line and
      raises TypeError for those that it cannot take.
    key: the config key that it comes from, for messages.
    example: of a line, for messages.

  Raises:
    ValueError: not of that form, an unknown op, or wrong arguments.
  """
  if not isinstance(text, str):
    raise ValueError(f'{key}={text!r} is not a string.\n'
                     f'Write ops as one line, such as {example!r}.')
  if not text.strip():
    return ()
  try:
    node = _expression(text)
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
      calls.insert(0, node.right)
      node = node.left
    calls.insert(0, node)
    return tuple(_parse_call(c, ops) for c in calls)
  except (SyntaxError, RecursionError, MemoryError) as e:
    raise ValueError(
        f'{key}={text!r} cannot be parsed ({messages.one_line(e)}).\n'
        f'Write op|op(arguments)|..., such as {example!r}.') from None
  except ValueError as e:
    raise ValueError(f'{key}={text!r}: {e}') from None


def signature(name, op):
  """An op as one writes it, such as 'inception_crop(size, area_min=5, ...)'."""
  parameters = inspect.signature(op).parameters.values()
  return name + '(' + ', '.join(
      p.name if p.default in (p.empty, None) else f'{p.name}={p.default!r}'
      for p in parameters) + ')'


def _expression(text):
  try:
    return ast.parse(text.strip(), mode='eval').body
  except ValueError as e:  # NUL (Python 3.11) or half a surrogate pair
    raise SyntaxError(str(e)) from None


def _parse_call(node, ops):
  args, kwargs = (), {}
  try:
    if isinstance(node, ast.Call):
      args = [ast.literal_eval(a) for a in node.args]
      kwargs = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
      node = node.func
  except (ValueError, TypeError):
    raise ValueError(
        f'the arguments of {_code(node)} are not all literals.\n'
        'Write numbers; nothing is evaluated.') from None
  if not isinstance(node, ast.Name):
    raise ValueError(f'{_code(node)} is not an op.\n'
                     + messages.choices(_code(node), ops))
  if node.id not in ops:
    raise ValueError(
        f'unknown op {node.id!r}.\n' + messages.choices(node.id, ops))
  try:
    return ops[node.id](*args, **kwargs)
  except TypeError as e:
    raise ValueError(
        f'{node.id}: {messages.one_line(e).split("__init__() ")[-1]}.\n'
        f'Write it as {signature(node.id, ops[node.id])}.') from None


def _code(node):
  return messages.one_line(ast.unparse(node))
