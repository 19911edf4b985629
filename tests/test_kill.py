"""Runs that are killed at random moments end with the bits of unbroken ones."""
import pytest

from tests import kill


@pytest.mark.slow
@pytest.mark.parametrize('source', kill.SOURCES)
def test_kills_leave_no_trace(source, tmp_path, cache):
  assert kill.check(source, 7, 0, str(tmp_path), cache)
