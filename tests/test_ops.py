"""The op language, the laws of the draws, and that both drivers agree."""
import io

import numpy as np
from PIL import Image
import pytest

from input_pipeline import ops
from input_pipeline import ops_numpy
from input_pipeline import pipeline
from input_pipeline import sources
from tests import runs


def _image(height, width, channels=3, seed=0):
  """Smooth with some noise, as photographs are."""
  rng = np.random.default_rng(seed)
  y, x, c = np.ogrid[:height, :width, :channels]
  waves = 128 + 60 * np.sin(x / 9 + c) + 50 * np.cos(y / 7 - c)
  return np.clip(waves + rng.normal(0, 6, (height, width, channels)), 0,
                 255).astype(np.uint8)


def _file(image, kind, **kwargs):
  file = io.BytesIO()
  Image.fromarray(image.squeeze()).save(file, kind, **kwargs)
  return file.getvalue()


def test_parse():
  parsed = ops.parse("decode|inception_crop(224, area_min=8)|flip_lr")
  assert parsed == (
      ops.Decode(), ops.InceptionCrop(224, area_min=8), ops.FlipLr())
  assert ops.parse('') == ()
  assert ops.parse('resize(3)') == ops.parse('resize(3, 3)')


@pytest.mark.parametrize('text, match', [
    ('decode|resise(3)', "Did you mean 'resize'"),
    ('nothing_like_it', 'There is: decode, resize'),
    ('resize', r"resize\(height_size, width_size, method='bilinear'\)"),
    ('inception_crop(1, 2, 3, 4)', r'inception_crop\(size, area_min=5'),
    ('central_crop(2.5)', 'central_crop: size=2.5 must be an integer'),
    ('central_crop(True)', 'must be an integer'),
    ('central_crop(0)', 'at least 1'),
    ('central_crop(10**9)', 'literals'),
    ('central_crop(99999)', '16384'),
    ('inception_crop(8, 50, 20)', 'area_min <= area_max'),
    ("central_crop(__import__('os').getpid())", 'literals'),
    ('flip_lr|decode', 'decode does not come first'),
    ('decode|', 'cannot be parsed'),
    ('decode|\0', 'cannot be parsed'),
    ('decode|"\ud800"', 'cannot be parsed'),
    ('resize(*[3])', 'literals'),
    ('"a\\nb"', 'not an op'),
    ('resize(3, depth=3)', 'depth'),
    ("resize(3, method='cubic')", 'is none of bilinear, area, bilinear_anti'),
    ('resize(3, method=1)', 'method=1 is none of'),
    ('decode(dct_scale=2)', 'dct_scale=2 is none of False, True'),
    ('random_resized_crop(8, .08, 1.5, 1)', 'method=1'),
    ('random_resized_crop(8, 0)', 'percentages'),
    ('decode + flip_lr', 'not an op'),
    ('(' * 5000, 'cannot be parsed'),
    ('-' * 5000 + 'a', 'cannot be parsed'),
    (7, 'not a string'),
])
def test_parse_errors(text, match):
  with runs.refused(match):
    ops.parse(text)


def test_crop_that_cannot_fit_is_found_without_an_image():
  with runs.refused('does not fit'):
    ops.out_size(ops.parse('central_crop(33)'), 32, 32)


def test_flip_is_fair():
  flip = ops.parse('flip_lr')
  draws = ops.draw(flip, 0, 0, np.arange(4000))
  flips = sum(ops.views(flip, 8, 8, d)[0].flip for d in draws)
  assert abs(flips - 2000) < 4 * np.sqrt(1000)


def test_pad_crop_reaches_every_place():
  crop = ops.parse('pad_crop(8, 2)')
  views = [ops.views(crop, 8, 8, d)[0]
           for d in ops.draw(crop, 0, 0, np.arange(2000))]
  places = {(v.top, v.left) for v in views}
  assert places == {(y, x) for y in range(5) for x in range(5)}
  out = ops_numpy.apply(np.ones((8, 8, 1), np.uint8), crop, [
      ops.View(0, 4, 8, 8, 8, 8, 0)])
  # The upper two rows and the right two columns are padding.
  assert out.sum() == 36 and not out[:2].any() and not out[:, 6:].any()


@pytest.mark.parametrize('line', [
    'pad_crop(8, 2)|flip_lr', 'resize_small(7)|central_crop(6)',
    'inception_crop(6)|pad_crop(7, 1)|flip_lr'])
def test_a_batch_is_its_images(line):
  parsed = ops.parse(line)
  images = np.stack([_image(9, 11, 3, seed) for seed in range(5)])
  views = [ops.views(parsed, 9, 11, draws)
           for draws in ops.draw(parsed, 0, 0, np.arange(5))]
  np.testing.assert_array_equal(
      ops_numpy.apply_batch(images, parsed, views),
      [ops_numpy.apply(*rest) for rest in zip(
          images, [parsed] * 5, views, strict=True)])


def test_inception_crop_gives_up_on_extreme_images():
  crop = ops.parse('inception_crop(8, 90, 100)')
  view, = ops.views(crop, 10, 1000, ops.draw(crop, 0, 0, [0])[0])
  assert view[:4] == (0, 0, 10, 1000)


def test_draws_differ_by_epoch_and_example_only():
  line = ops.parse('decode|inception_crop(8)|flip_lr')
  a = ops.draw(line, 0, 0, np.arange(4))
  assert len({tuple(r) for r in (*a, *ops.draw(line, 0, 1, np.arange(4)))}) == 8
  np.testing.assert_array_equal(a[2:], ops.draw(line, 0, 0, np.arange(2, 4)))


def test_resize_small_rounds_sides():
  # 333 * 256 / 250 = 340.99
  assert ops.out_size(ops.parse('resize_small(256)'), 250, 333) == (256, 341)


def test_sixteen_bit_and_grey_and_alpha():
  deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
  np.testing.assert_array_equal(
      ops_numpy.decode(_file(deep, 'PNG'), 1)[..., 0], deep >> 8)
  grey = _image(9, 7, 1)
  out = ops_numpy.decode(_file(grey, 'PNG'), 3)
  np.testing.assert_array_equal(out, np.repeat(grey, 3, -1))
  np.testing.assert_array_equal(ops_numpy.to_channels(out, 1), grey)
  assert ops_numpy.decode(_file(_image(9, 7, 4), 'PNG'), 3).shape == (9, 7, 3)


def test_inception_crop_follows_the_law_of_tensorflow():
  tf = pytest.importorskip('tensorflow')
  height, width, n = 60, 90, 3000
  crop = ops.parse('inception_crop(8)')
  ours = np.array([ops.views(crop, height, width, d)[0][:4]
                   for d in ops.draw(crop, 0, 0, np.arange(n))])

  def box(i):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        [height, width, 3], tf.zeros([0, 0, 4]), seed=[i, 1],
        area_range=(.05, 1.), aspect_ratio_range=(.75, 1.33),
        min_object_covered=0., use_image_if_no_bounding_boxes=True)
    return tf.concat([begin[:2], size[:2]], 0)
  theirs = np.stack(list(
      tf.data.Dataset.range(n).map(box).as_numpy_iterator()))
  for column in range(4):
    assert _same_law(ours[:, column], theirs[:, column]), column
  area = np.prod(ours[:, 2:], axis=1) / (height * width)
  assert area.min() >= .05 and area.max() <= 1


def _same_law(a, b):
  """Two-sample Kolmogorov-Smirnov test, at p = 0.001."""
  grid = np.union1d(a, b)
  ours, theirs = (np.searchsorted(np.sort(x), grid, 'right') / len(x)
                  for x in (a, b))
  return np.abs(ours - theirs).max() < 1.95 * np.sqrt(
      1 / len(a) + 1 / len(b))


def _torchvision_box(height, width, scale, rng):
  """The law in the documentation of torchvision's RandomResizedCrop."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round((area * aspect) ** .5), round((area / aspect) ** .5)
    if 0 < w <= width and 0 < h <= height:
      return (rng.integers(0, height - h, endpoint=True),
              rng.integers(0, width - w, endpoint=True), h, w)
  if width / height < 3 / 4:
    w, h = width, round(width / (3 / 4))
  elif width / height > 4 / 3:
    w, h = round(height * (4 / 3)), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize('height, width, line, scale', [
    (375, 500, 'random_resized_crop(8)', (.08, 1)),
    (500, 333, 'random_resized_crop(8, 50)', (.5, 1)),
    (60, 400, 'random_resized_crop(8, 20, 80)', (.2, .8)),  # mostly falls back
])
def test_random_resized_crop_follows_the_law_of_torchvision(
    height, width, line, scale):
  n, rng = 4000, np.random.default_rng(0)
  crop = ops.parse(line)
  ours = np.array([ops.views(crop, height, width, d)[0][:4]
                   for d in ops.draw(crop, 0, 0, np.arange(n))])
  theirs = np.array([_torchvision_box(height, width, scale, rng)
                     for _ in range(n)])
  for of in (lambda b: b[:, 0], lambda b: b[:, 1],
             lambda b: b[:, 2] * b[:, 3], lambda b: np.log(b[:, 3] / b[:, 2]),
             lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
             lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1)):
    assert _same_law(of(ours), of(theirs))
  # The law of Inception's crop is another one.
  inception = ops.parse('inception_crop(8, 8, 100)')
  other = np.array([ops.views(inception, height, width, d)[0][:4]
                    for d in ops.draw(inception, 0, 0, np.arange(n))])
  assert not _same_law(other[:, 2] * other[:, 3], theirs[:, 2] * theirs[:, 3])


def test_random_resized_crop_falls_back_to_the_centre():
  crop = ops.parse('random_resized_crop(8, 100, 100)')
  for height, width, box in ((10, 1000, (0, 493, 10, 13)),
                             (1000, 30, (480, 0, 40, 30)),
                             (30, 30, (0, 0, 30, 30))):
    view, = ops.views(crop, height, width, np.zeros(crop[0].draws))
    assert view[:6] == (*box, 8, 8)


def test_dct_scaling_keeps_the_box():
  """Scaled, a box still covers what it did, and is not smaller than asked."""
  lines = ['decode(dct_scale=True)|inception_crop(56)',
           'decode(dct_scale=True)|random_resized_crop(56, 1)',
           'decode(dct_scale=True)|resize_small(64)|central_crop(56)',
           'decode(dct_scale=True)|resize(40, 90)',
           'decode(dct_scale=True)|central_crop(56)']
  rng, seen = np.random.default_rng(0), set()
  for line in lines:
    parsed = ops.parse(line)
    for draws in ops.draw(parsed, 0, 0, np.arange(200)):
      height, width = (int(x) for x in rng.integers(56, 1200, 2))
      plain = ops.views(parsed, height, width, draws)
      decode, view, *rest = ops.views(parsed, height, width, draws, True)
      scale = decode.scale
      seen.add(scale)
      assert plain[0].scale == 1 and rest == plain[2:]
      assert decode[4:6] == (-(-height // scale), -(-width // scale))
      assert view[4:] == plain[1][4:]
      top, left, h, w = plain[1][:4]
      assert view.top * scale <= top < (view.top + 1) * scale
      assert view.left * scale <= left < (view.left + 1) * scale
      for first, extent, most, new_first, new, limit in (
          (top, h, view.out_height, view.top, view.height, decode.out_height),
          (left, w, view.out_width, view.left, view.width, decode.out_width)):
        assert scale == 1 or most <= new
        assert new_first + new <= limit
        assert (new_first + new - 1) * scale < first + extent <= (
            new_first + new) * scale
      # The largest that does so: half of that size would be too small.
      assert scale == 8 or (
          h < 2 * scale * view.out_height or w < 2 * scale * view.out_width)
  assert seen == {1, 2, 4, 8}


def _both(content, parsed, draws, channels):
  """uint8 [h, w, channels] of an image file by the numpy and by the TF ops."""
  import tensorflow as tf

  from input_pipeline import ops_tf
  source = sources.Encoded([content], [0], ('a', 'b'), 'one')
  ours, _ = pipeline.decode_example(source, parsed, draws, channels, 0)
  file = ops_tf.look(content)
  views = ops.views(parsed, file.height, file.width, draws, file.is_jpeg)
  prepared = ops_tf.prepare(content, file, views[0].scale)
  return ours, ops_tf.load(
      prepared, tf.constant(file.kind), tf.constant(file.margin),
      np.array(views, np.int32), parsed, channels).numpy()


@pytest.mark.parametrize('method', ops.METHODS)
def test_resizes_equal_the_libraries(method):
  """On sizes of 100 to 1000; TF's rules to one level, Pillow's exactly."""
  tf = pytest.importorskip('tensorflow')
  from input_pipeline import ops_tf
  rng = np.random.default_rng(1)
  for _ in range(6):
    height, width, *size = map(int, rng.integers(100, 1001, 4))
    image = _image(height, width)
    if rng.random() < .5:  # the sharpest edges there are
      image = np.where(image > 128, 255, 0).astype(np.uint8)
    ours = ops_numpy.RESIZES[method](image, *size)
    theirs = ops_tf._resize(tf.constant(image), size, method).numpy()
    if method.endswith('_antialias'):
      exact = np.asarray(Image.fromarray(image).resize(
          size[::-1], getattr(Image.Resampling, method.split('_')[0].upper())))
      np.testing.assert_array_equal(ours, exact)
      np.testing.assert_array_equal(theirs, exact)
    else:
      exact = tf.cast(tf.clip_by_value(
          tf.image.resize(image, size, method=method), 0, 255), 'uint8').numpy()
      for found in (ours, theirs):
        difference = np.abs(found.astype(int) - exact)
        # Where area averages equal pixels, TF's sums may end below them.
        assert difference.max() <= 1
        assert method == 'area' or difference.mean() < .05


@pytest.mark.parametrize('kind, image, channels', [
    ('JPEG', _image(50, 70), 3),
    ('JPEG', _image(51, 69), 1),
    ('JPEG', _image(50, 70, 1), 3),
    ('JPEG', _image(50, 70, 4), 3),  # CMYK
    ('PNG', _image(50, 70), 3),
    ('PNG', _image(50, 70, 4), 1),  # alpha
    ('GIF', _image(50, 70), 3),
    ('BMP', _image(50, 70), 3),
    ('WEBP', _image(50, 70), 3),
])
@pytest.mark.parametrize('line, mean, most', [
    ('decode|inception_crop(32)|flip_lr', .25, 1),
    ('decode|central_crop(32)|pad_crop(32, 4)|flip_lr', 0, 0),
    ('decode|resize_small(40)|central_crop(32)', .25, 1),
    ('decode|resize(90, 24)', .25, 1),
    ("decode|random_resized_crop(32, method='bicubic_antialias')", 0, 0),
    ("decode(dct_scale=True)|resize(9, method='bilinear_antialias')", 0, 0),
    ('decode(dct_scale=True)|inception_crop(7)', .25, 1),
])
def test_both_drivers_agree(kind, image, channels, line, mean, most):
  pytest.importorskip('tensorflow')
  if kind == 'JPEG' and image.shape[-1] == 4:
    file = io.BytesIO()
    Image.fromarray(image, 'CMYK').save(file, kind)
    content = file.getvalue()
  else:
    content = _file(image, kind)
  parsed = ops.parse(line)
  for draws in ops.draw(parsed, 0, 0, np.arange(2)):
    ours, theirs = _both(content, parsed, draws, channels)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() <= mean and difference.max() <= most
