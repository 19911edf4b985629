"""What a program says and returns when its input is bad."""
import os
import sys
import traceback

BAD_INPUT = 2  # exit code: one line of cause, one of remedy


def is_message(error):
  """Whether our own code raised it, as a message to whoever runs the program.

  What a library raises is a fault in this program, and keeps its traceback.
  """
  if not isinstance(error, (ValueError, OSError)):
    return False
  import input_pipeline  # here: `show` needs no jax
  import vit_jax
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  file = os.path.abspath(frame.f_code.co_filename)
  ours = (os.path.dirname(m.__file__) for m in (vit_jax, input_pipeline))
  return file.startswith(tuple(os.path.abspath(p) + os.sep for p in ours))


def show(error):
  """Prints an error; its lines after the first are indented."""
  print('error: ' + str(error).replace('\n', '\n  '), file=sys.stderr)
