"""Mutated input of every kind: two lines, or a start. See `tests.fuzz`."""
import pytest

from tests import fuzz


@pytest.mark.slow
def test_no_input_gives_a_traceback_or_hangs():
  assert not fuzz.run(range(500))
