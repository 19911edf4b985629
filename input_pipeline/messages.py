"""The words of errors: one line of cause, one of remedy.

What a user's input can cause is raised as 'cause\\nremedy', no more and no
fewer lines, so that programs can print both.
"""
import difflib


def choices(name, known):
  """The remedy for a name that is not among `known`, a guess included."""
  known = [str(k) for k in known]
  close = difflib.get_close_matches(str(name), known, 1)
  hint = f'Did you mean {close[0]!r}? ' if close else ''
  return f'{hint}There is: {", ".join(known) or "nothing"}.'


def one_line(error):
  """What an exception says first, without a full stop, for use in a cause."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  return lines[0].strip().rstrip('.') if lines else type(error).__name__
