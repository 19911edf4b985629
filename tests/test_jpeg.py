"""Headers of JPEG files: what is read without Pillow is what Pillow reads."""
import io

import numpy as np
from PIL import Image
from PIL import ImageCms
import pytest

from input_pipeline import jpeg
from tests import test_bad_images

H, W = 37, 52
RGB = test_bad_images.noise(0, H, W, 3)


def encode(pixels=RGB, mode=None, **options):
  return test_bad_images.encode(pixels, 'JPEG', mode, **options)


def exif():
  tags = Image.Exif()
  tags[0x0112] = 6
  return tags


PLAIN = {
    '4:2:0': (lambda: encode(), True),
    '4:2:2': (lambda: encode(subsampling='4:2:2'), True),
    '4:4:4': (lambda: encode(subsampling='4:4:4'), False),
    'grey': (lambda: encode(RGB[..., 0]), False),
    'progressive': (lambda: encode(progressive=True), True),
    'restarts': (lambda: encode(restart_marker_rows=1, optimize=True), True),
    'comment': (lambda: encode(comment=b'\xff\xd9 a comment'), True),
    'profile': (lambda: encode(icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile('sRGB')).tobytes()), True),
}
FOR_PILLOW = {
    'exif': lambda: encode(exif=exif()),
    'cmyk': lambda: encode(test_bad_images.noise(0, H, W, 4), 'CMYK'),
    'two images': lambda: test_bad_images.encode(
        RGB, 'MPO', save_all=True, append_images=[Image.fromarray(RGB)]),
    'no end': lambda: encode()[:-40],
    'arithmetic': lambda: encode().replace(b'\xff\xc0\x00', b'\xff\xc9\x00', 1),
    '12 bits': lambda: encode().replace(
        b'\xff\xc0\x00\x11\x08', b'\xff\xc0\x00\x11\x0c', 1),
    'no height': lambda: encode().replace(
        b'\xff\xc0\x00\x11\x08\x00\x25', b'\xff\xc0\x00\x11\x08\x00\x00', 1),
    'two frames': lambda: encode().replace(
        b'\xff\xc0', encode()[encode().index(b'\xff\xc0'):][:19] + b'\xff\xc0',
        1),
    'short header': lambda: b'\xff\xd8\xff\xe0\x00\x04ab' + encode()[2:],
    'padded': lambda: b'\xff\xd8\xff' + encode()[2:],
    'png': lambda: test_bad_images.encode(RGB, 'PNG'),
    'start only': lambda: b'\xff\xd8\xff\xd9',
    'nothing': lambda: b'',
}


@pytest.mark.parametrize('name', PLAIN)
def test_plain_files(name):
  make, subsampled = PLAIN[name]
  assert jpeg.scan(make()) == (H, W, subsampled)


@pytest.mark.parametrize('name', FOR_PILLOW)
def test_others_are_left_to_pillow(name):
  content = FOR_PILLOW[name]()
  assert content != encode() and jpeg.scan(content) is None


@pytest.mark.parametrize('name', PLAIN)
def test_what_is_scanned_is_what_pillow_sees(name):
  """Whatever is broken in the header, Pillow objects to nothing scanned."""
  content = PLAIN[name][0]()
  rng = np.random.default_rng(0)
  end = content.index(b'\xff\xda') + 20
  scanned = 0
  for _ in range(400):
    broken = bytearray(content)
    for at in rng.integers(2, end, rng.integers(1, 3)):
      broken[at] = rng.choice([0, 1, 255, rng.integers(256)])
    header = jpeg.scan(bytes(broken))
    if header:
      scanned += 1
      image = Image.open(io.BytesIO(broken))
      assert image.size == (header.width, header.height)
      assert image.format == 'JPEG' and image.mode in ('L', 'RGB')
  assert 20 < scanned < 400


def test_headers_are_kept():
  headers = jpeg.Headers(3)
  assert headers.get(1) is None
  for header in (jpeg.Header(1, 65535, True), jpeg.Header(65535, 7, False)):
    headers.put(1, header)
    assert headers.get(1) == header
  assert headers.get(0) is headers.get(2) is None
