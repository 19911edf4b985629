"""Look a name up in a visible table, or say what there is."""
import difflib


def pick(table, name, kind):
  """Returns `table[name]`.

  Args:
    table: dict from names to anything.
    name: the name asked for.
    kind: what the table holds, for the message ('optimizer').

  Raises:
    ValueError: no such name; cause and remedy on a line each.
  """
  if isinstance(name, str) and name in table:
    return table[name]
  raise ValueError(unknown(name, table, kind))


def check(asked):
  """Raises ValueError for a name that is not in its table.

  Args:
    asked: {what: (name, names)}.
  """
  for what, (name, known) in asked.items():
    if name not in known:
      raise ValueError(unknown(name, known, what))


def unknown(name, known, kind):
  """Returns the two-line message for a name that is not among `known`."""
  known = [str(k) for k in known]
  close = difflib.get_close_matches(str(name), known, 1, 0.6)
  hint = f'Did you mean {close[0]!r}? ' if close else ''
  return (f'Unknown {kind} {str(name)[:60]!r}.\n'
          f'{hint}There is: {", ".join(known) or "nothing"}.')
