"""The ops in numpy and Pillow: the driver that needs no TensorFlow.

The resizes named 'bilinear' and 'area' follow TensorFlow's conventions
(half-pixel centres, float32, no antialiasing), which the released models were
trained with; the antialiased ones are Pillow's own, as in torchvision.
"""
import functools
import io

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

_JPEG = ('JPEG', 'MPO')  # what Pillow calls it, with a second image and without
# Only these decoders run on files that came from elsewhere.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP')


def open_image(content):
  """Reads the header: a Pillow image with `format` and `size` (W, H).

  Raises:
    OSError: not an image of one of FORMATS, or broken. Pillow raises others,
      too (SyntaxError, ValueError, struct.error) on crafted files.
  """
  try:
    return Image.open(io.BytesIO(content), formats=FORMATS)
  except UnidentifiedImageError:  # its text is the address of a BytesIO
    raise OSError(
        f'it is damaged, or none of {", ".join(FORMATS)}') from None
  except Image.DecompressionBombError as e:  # which is no OSError
    raise OSError(str(e)) from None


def decode(content, channels):
  """Decodes an image file, whatever its name ends in.

  What both drivers make of files that are not plain 8-bit RGB:
    grey            the same value in three channels; with channels=1 as it is
    colour, and channels=1: grey by ITU-R 601, see `to_channels`
    palette, 1-4 bits: the colours that they stand for
    alpha           dropped: the colour below it shows, nothing is blended
    CMYK, YCCK      as Pillow converts them (Adobe's inversion undone, no
                    colour profile)
    16 bits         the upper 8
    EXIF rotation   ignored, as in the released models' training
    GIF, WebP, APNG of several frames: the first
    colour profiles, gamma: ignored
    truncated       unreadable, also if only the last rows are missing
  JPEG by libjpeg's accurate integer transform, which is Pillow's default and
  bit-equal to TensorFlow's INTEGER_ACCURATE.

  Args:
    content: bytes, of any of FORMATS.
    channels: 1 or 3.

  Returns:
    uint8 [H, W, channels].
  """
  return pixels(open_image(content), channels)


def is_jpeg(image):
  """Whether `open_image` found a JPEG, which `pixels` can scale."""
  return image.format in _JPEG


def pixels(image, channels, scale=1):
  """Decodes what `open_image` returned; see `decode`.

  Args:
    image: from `open_image`.
    channels: 1 or 3.
    scale: 1, 2, 4 or 8: a JPEG is decoded at 1 / scale of its size.

  Returns:
    uint8 [ceil(H / scale), ceil(W / scale), channels].
  """
  if scale > 1:
    width, height = image.size
    image.draft(None, (width // scale, height // scale))
  if image.mode.startswith('I'):  # 16 bits, grey: Pillow would clip them
    return to_channels(
        (np.asarray(image) >> 8).astype(np.uint8)[..., None], channels)
  return to_channels(np.asarray(image.convert('RGB')), channels)


def to_channels(images, channels):
  """uint8 [..., 1 or 3] to uint8 [..., channels].

  Grey by the ITU-R 601 weights in 16-bit fixed point, as Pillow does; done
  here and not by the decoders because each of those rounds in its own way.
  """
  if images.shape[-1] == channels:
    return images
  if channels == 3:
    return np.concatenate([images] * 3, axis=-1)
  red, green, blue = np.moveaxis(images.astype(np.int32), -1, 0)
  grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
  return grey.astype(np.uint8)[..., None]


def apply(image, ops, views):
  """Carries out `ops.views` on uint8 [H, W, C]; returns uint8 [h, w, C]."""
  return apply_batch(image[None], ops, [views])[0]


def apply_batch(images, ops, views):
  """`apply` for n images of the same size, in less time than one by one.

  Args:
    images: uint8 [n, H, W, C].
    ops: from `ops.parse`.
    views: of each image, as of `ops.views`.

  Returns:
    uint8 [n, h, w, C].
  """
  for op, seen in zip(ops, zip(*views, strict=True), strict=True):
    if op.border:
      images = _pad(images, op.border)
    if op.crops or op.method or op.flips:
      images = np.stack([_cut(op, image, view) for image, view in zip(
          images, seen, strict=True)])
  return images


def _cut(op, image, view):
  if op.crops:
    image = image[view.top:view.top + view.height,
                  view.left:view.left + view.width]
  if op.method:
    image = RESIZES[op.method](image, view.out_height, view.out_width)
  return image[:, ::-1] if view.flip else image


def _pad(images, border):
  n, height, width, channels = images.shape
  padded = np.zeros(
      (n, height + 2 * border, width + 2 * border, channels), np.uint8)
  padded[:, border:border + height, border:border + width] = images
  return padded


def resize_bilinear(image, height, width):
  """`tf.image.resize(method='bilinear', antialias=False)`, truncated."""
  image = image.astype(np.float32)
  for axis, size in ((1, width), (0, height)):
    if image.shape[axis] == size:
      continue
    scale = np.float32(image.shape[axis]) / np.float32(size)
    at = (np.arange(size, dtype=np.float32) + np.float32(.5)) * scale
    at -= np.float32(.5)
    low = np.maximum(np.floor(at), 0).astype(np.int64)
    high = np.minimum(np.ceil(at), image.shape[axis] - 1).astype(np.int64)
    part = np.expand_dims(at - np.floor(at), (1, 2) if axis == 0 else (0, 2))
    first = image.take(low, axis)
    image = first + (image.take(high, axis) - first) * part
  return np.clip(image, 0, 255).astype(np.uint8)


def resize_area(image, height, width):
  """`tf.image.resize(method='area')`, truncated: means over source boxes."""
  image = image.astype(np.float32)
  for axis, size in ((1, width), (0, height)):
    if image.shape[axis] != size:
      weights = _area_weights(image.shape[axis], size)
      image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
  # Sums of float32 weights may end just below a whole number.
  return np.clip(image + np.float32(1e-4), 0, 255).astype(np.uint8)


def _area_weights(source, size):
  """float32 [size, source]: the share of each source pixel in each result."""
  edges = np.arange(size + 1) * (source / size)
  pixels = np.arange(source)
  overlap = (np.minimum(edges[1:, None], pixels + 1)
             - np.maximum(edges[:-1, None], pixels))
  return (np.maximum(overlap, 0) * (size / source)).astype(np.float32)


def resize_antialias(filter_, image, height, width):
  """Pillow's resize with one of its filters."""
  pillow = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
  resized = np.asarray(pillow.resize((width, height), filter_))
  return resized.reshape(height, width, -1)


RESIZES = {
    'bilinear': resize_bilinear,
    'area': resize_area,
    'bilinear_antialias': functools.partial(
        resize_antialias, Image.Resampling.BILINEAR),
    'bicubic_antialias': functools.partial(
        resize_antialias, Image.Resampling.BICUBIC),
}
