"""Stems: shapes, the paper's rules, and what BatchNorm does with statistics."""
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests import runs
from vit_jax.models import convolutions
from vit_jax.models import resnet
from vit_jax.models import stems
from vit_jax.models import variants


def _shapes(size, stem, image_size, channels=3):
  """(output shape, tree of parameter shapes), without computing anything."""
  module = stems.create(size=size, stem=stem)
  images = jax.ShapeDtypeStruct(
      (2, image_size, image_size, channels), jnp.float32)
  output, variables = jax.eval_shape(
      lambda key, x: module.init_with_output(key, x, train=False),
      jax.random.key(0), images)
  return output.shape, jax.tree.map(jnp.shape, variables['params'])


@pytest.mark.parametrize('size, stem, image_size, shape', [
    ('4GF', 'patchify', 224, (2, 14, 14, 384)),
    ('4GF', 'patchify_bn', 224, (2, 14, 14, 384)),
    ('1GF', 'conv', 224, (2, 14, 14, 192)),
    ('36GF', 'conv', 224, (2, 14, 14, 1024)),
    ('4GF', 'conv_ln', 224, (2, 14, 14, 384)),
    ('4GF', 'S1', 224, (2, 14, 14, 384)),
    ('4GF', 'S2', 224, (2, 14, 14, 384)),
    ('4GF', 'S3', 224, (2, 14, 14, 384)),
    ('4GF', 'S4', 224, (2, 14, 14, 384)),
    ('micro', 'patchify', 32, (2, 4, 4, 64)),
    ('micro', 'conv', 32, (2, 4, 4, 64)),
    ('micro', 'S1', 32, (2, 4, 4, 64)),
    ('micro', 'S2', 32, (2, 4, 4, 64)),
    ('micro', 'S3', 32, (2, 4, 4, 64)),
    ('S/32', 'conv', 224, (2, 7, 7, 384)),
    ('B/8', 'conv', 224, (2, 28, 28, 768)),
    ('B/16', 'conv', 384, (2, 24, 24, 768)),
    ('H/14', 'patchify', 224, (2, 16, 16, 1280)),
    ('R+Ti/16', 'resnet', 224, (2, 7, 7, 192)),
    ('R26+S/32', 'resnet', 224, (2, 7, 7, 384)),
    ('R50+B/16', 'resnet', 224, (2, 14, 14, 768)),
    ('R50+B/16', 'resnet', 384, (2, 24, 24, 768)),
])
def test_output_shape(size, stem, image_size, shape):
  assert _shapes(size, stem, image_size)[0] == shape


def test_conv_stem_is_the_papers():
  """Section 3: no bias but in the last convolution, which has no norm."""
  _, params = _shapes('4GF', 'conv', 224)
  widths = (48, 96, 192, 384)
  for i, (c, d) in enumerate(zip((3, *widths), widths, strict=False)):
    assert params.pop(f'conv_{i}') == {'kernel': (3, 3, c, d)}
    assert params.pop(f'norm_{i}') == {'scale': (d,), 'bias': (d,)}
  assert params == {'projection': {'kernel': (1, 1, 384, 384), 'bias': (384,)}}


def test_patchify_bn_has_a_norm_in_place_of_the_bias():
  assert _shapes('micro', 'patchify', 32)[1] == {
      'embedding': {'kernel': (8, 8, 3, 64), 'bias': (64,)}}
  assert _shapes('micro', 'patchify_bn', 32)[1] == {
      'embedding': {'kernel': (8, 8, 3, 64)},
      'norm': {'scale': (64,), 'bias': (64,)}}


def test_one_channel():
  assert _shapes('micro', 'conv', 32, 1)[1]['conv_0']['kernel'] == (3, 3, 1, 16)


@pytest.mark.parametrize('stem', ['conv', 'conv_ln'])
@pytest.mark.parametrize('size', variants.SIZES)
def test_every_size_has_a_conv_stem_or_says_why(size, stem):
  if size in variants.HYBRIDS:
    with runs.refused('behind a ResNet'):
      stems.create(size=size, stem=stem)
  elif size.endswith('/14'):
    with pytest.raises(ValueError, match='power of two, never to the patch 14'):
      stems.create(size=size, stem=stem)
  else:
    module = stems.create(size=size, stem=stem)
    assert np.prod(module.strides) == module.patch == variants.SIZES[size].patch


def test_conv_stems_at_other_patches():
  assert variants.conv_stem('S/32', 'conv').widths == (48, 96, 192, 384, 768)
  assert variants.conv_stem('S/8', 'conv').widths == (48, 96, 192)
  assert variants.conv_stem('B/32', 'conv').strides == (2, 2, 1, 2, 1, 2, 2)
  assert variants.conv_stem('B/8', 'conv').strides == (2, 2, 1, 2, 1)


@pytest.mark.parametrize('size', variants.SIZES)
def test_a_resnet_stem_is_that_of_a_hybrid(size):
  if size in variants.HYBRIDS:
    assert stems.create(size=size, stem='resnet').patch in (16, 32)
  else:
    with runs.refused("There is: R.Ti/16"):
      stems.create(size=size, stem='resnet')


def test_standardised_kernels():
  kernel = np.random.default_rng(0).normal(3.0, 2.0, (3, 3, 8, 4))
  plain = np.asarray(resnet.standardize(jnp.asarray(kernel, jnp.float32)))
  np.testing.assert_allclose(plain.mean((0, 1, 2)), 0.0, atol=1e-6)
  np.testing.assert_allclose(plain.std((0, 1, 2)), 1.0, rtol=1e-4)
  # Without the epsilon a constant kernel would be NaN.
  assert (resnet.standardize(jnp.ones((1, 1, 8, 4))) == 0).all()


@pytest.mark.parametrize('size', [32, 33, 28])
@pytest.mark.parametrize('kernel, stride, padding', [
    (3, 1, 1), (3, 2, 1), (3, 2, 'SAME'), (1, 1, 'SAME'), (1, 2, 'VALID'),
    (8, 8, 'VALID')])
def test_im2col_is_a_convolution(kernel, stride, padding, size):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, size, size + 5, 3)), jnp.float32)
  def results(form):
    conv = nn.Conv(16, (kernel, kernel), strides=stride, padding=padding,
                   conv_general_dilated=convolutions.FORMS[form])
    variables = conv.init(jax.random.key(0), x)
    loss = lambda v, x: (conv.apply(v, x) ** 2).mean()
    return variables, conv.apply(variables, x), _jit(
        jax.grad(loss, (0, 1)))(variables, x)
  xla, im2col = results('xla'), results('im2col')
  jax.tree.map(np.testing.assert_array_equal, xla[0], im2col[0])
  assert xla[1].shape == im2col[1].shape
  for a, b in zip(*map(jax.tree.leaves, (xla, im2col)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize('size, stem', [
    ('micro', 'conv'), ('micro', 'patchify'), ('4GF', 'S1'), ('4GF', 'S4')])
def test_every_stem_has_both_forms(size, stem):
  x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  programs, outputs = [], []
  for form in convolutions.FORMS:
    module = stems.create(size=size, stem=stem, conv=form)
    run = lambda key, x, module=module: module.init_with_output(
        key, x, train=False)
    programs.append(str(jax.make_jaxpr(run)(jax.random.key(0), x)))
    outputs.append(_jit(run)(jax.random.key(0), x))
  assert ['conv_general_dilated' in p for p in programs] == [True, False]
  (a, one), (b, other) = outputs
  np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_resnet_has_one_form():
  with runs.refused("no form 'im2col'"):
    stems.create(size='R+Ti/16', stem='resnet', conv='im2col')


def test_s4_at_micro_lists_what_there_is():
  with pytest.raises(ValueError, match=r'no stem .S4.\.\n.*S3 at micro'):
    stems.create(size='micro', stem='S4')


def test_wrong_convolutions_are_errors_in_words():
  conv = stems.STEMS['conv']
  with pytest.raises(
      ValueError, match=r'\(2, 2, 2\) multiply to 8, not to the patch 16'):
    conv(patch=16, width=8, kernels=(3,) * 3, strides=(2,) * 3, widths=(4,) * 3)
  with pytest.raises(ValueError, match='3 kernels, 2 strides and 2 widths'):
    conv(patch=4, width=8, kernels=(3,) * 3, strides=(2, 2), widths=(4, 4))
  with pytest.raises(ValueError, match='Kernel 5 with stride 2'):
    conv(patch=4, width=8, kernels=(3, 5), strides=(2, 2), widths=(4, 4))


# What BatchNorm does with its statistics.


# XLA's optimisations take longer than these programs run.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def _bn_stem():
  module = stems.create(size='micro', stem='conv')
  images = 3.0 + jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
  variables = _jit(
      lambda key, x: module.init(key, x, train=False))(
          jax.random.key(0), images)
  return module, variables, images


def _train(module, variables, images):
  return _jit(lambda v, x: module.apply(
      v, x, train=True, mutable=['batch_stats']))(variables, images)


def _differ(a, b):
  return max(
      float(jnp.abs(x - y).max())
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_momentum_0_replaces_the_running_statistics():
  module, variables, images = _bn_stem()
  _, slow = _train(module, variables, images)
  _, new = _train(module.clone(bn_momentum=0.0), variables, images)
  old, slow, new = variables['batch_stats'], slow['batch_stats'], new[
      'batch_stats']
  assert _differ(old, new) > 0.1
  # Momentum 0.9 (torch's 0.1) goes a tenth of the way.
  expected = jax.tree.map(lambda o, n: 0.9 * o + 0.1 * n, old, new)
  assert _differ(slow, expected) < 1e-5


def test_frozen_uses_and_keeps_the_running_statistics():
  module, variables, images = _bn_stem()
  trained, _ = _train(module, variables, images)
  frozen, new = _train(
      module.clone(batch_norm='frozen'), variables, images)
  evaluated = _jit(
      lambda v, x: module.apply(v, x, train=False))(variables, images)
  assert _differ(trained, evaluated) > 0.1
  assert _differ(frozen, evaluated) < 1e-5
  assert _differ(new['batch_stats'], variables['batch_stats']) == 0


def test_statistics_of_a_sharded_batch_are_global():
  module, variables, images = _bn_stem()
  # Every device sees another mean, so statistics by device would differ.
  images = images + jnp.arange(16.0).reshape(16, 1, 1, 1)
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  one, one_stats = _train(module, variables, images)
  eight, eight_stats = _train(
      module, variables, jax.device_put(images, NamedSharding(mesh, P('data'))))
  assert len(eight.sharding.device_set) == 8
  assert _differ(one_stats, eight_stats) < 1e-4
  assert _differ(one, jax.device_get(eight)) < 1e-3
