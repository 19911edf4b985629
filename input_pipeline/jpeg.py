"""The header of a plain JPEG file, read at a tenth of what Pillow takes.

Pillow stays the judge of what is an image: `scan` answers for files in which
Pillow has nothing to object to, and leaves all others to it. Markers are those
of ITU-T T.81, table B.1.
"""
import struct
from typing import NamedTuple

import numpy as np

_SOS, _DQT = 0xDA, 0xDB
_FRAMES = (0xC0, 0xC2)  # baseline and progressive, of 8 bits, Huffman coded
_PASSED_OVER = (0xC4, 0xDD, 0xFE)  # tables that libjpeg checks, comments
# Applications' segments that Pillow takes apart, and could stumble over:
# Exif and XMP, Photoshop's; so could it over short ones of any other.
_JUDGED_BY_PILLOW = (0xE1, 0xED)
_SHORT = 14
_MOST_PIXELS = 1 << 26  # Pillow has a rule for files that would fill the memory
_END = b'\xff\xd9'
_segment = struct.Struct('>BBH').unpack_from
_frame = struct.Struct('>BHHB').unpack_from


class Header(NamedTuple):
  """Attributes: pixels, and whether colours have fewer columns than light."""
  height: int
  width: int
  subsampled: bool


def has_end(content):
  """Whether a JPEG file is complete, so far as its last bytes tell."""
  return _END in content[-64:]


def scan(content):
  """Reads the header of an image file.

  Args:
    content: bytes of the file.

  Returns:
    Header of a complete JPEG in grey or RGB that Pillow opens; or None: that
    is for Pillow to find out.
  """
  if not content.startswith(b'\xff\xd8\xff') or not has_end(content):
    return None
  at, header = 2, None
  try:
    while True:
      escape, marker, length = _segment(content, at)
      if escape != 0xFF or length < 2:
        return None
      if marker == _SOS:
        fits = at + 2 + length <= len(content)
        return header if fits and length == 6 + 2 * content[at + 4] else None
      if marker in _FRAMES:
        header = None if header else _read_frame(content, at, length)
        if not header:
          return None
      elif 0xE0 <= marker <= 0xEF:
        if (marker in _JUDGED_BY_PILLOW or length < 2 + _SHORT
            or content.startswith(b'MPF\0', at + 4)):
          return None
      elif marker == _DQT:
        if not _are_tables(content, at + 4, length - 2):
          return None
      elif marker not in _PASSED_OVER:
        return None
      at += 2 + length
  except (struct.error, IndexError):
    return None


def _read_frame(content, at, length):
  """The Header of the frame segment at a place, or None."""
  bits, height, width, components = _frame(content, at + 4)
  if (bits != 8 or components not in (1, 3) or length != 8 + 3 * components
      or not 0 < height * width <= _MOST_PIXELS):
    return None
  columns = {content[at + 11 + 3 * i] >> 4 for i in range(components)}
  return Header(height, width, len(columns) > 1)


def _are_tables(content, at, length):
  """Whether quantization tables fill a segment."""
  while length > 0:
    size = 129 if content[at] >> 4 else 65
    at, length = at + size, length - size
  return not length


class Headers:
  """Headers of files that were looked at before, in 6 bytes a file."""

  def __init__(self, count):
    self._rows = np.zeros((count, 3), np.uint16)  # sides, 1 + subsampled

  def get(self, index):
    """The Header of a file, or None."""
    height, width, known = self._rows[index].tolist()
    return Header(height, width, known == 2) if known else None

  def put(self, index, header):
    """Keeps a Header; sides are below 2**16, as in any JPEG."""
    self._rows[index] = header.height, header.width, 1 + header.subsampled
