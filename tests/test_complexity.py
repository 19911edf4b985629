"""Parameters, flops and activations against the papers' tables.

Sources: "paper" is arXiv 2106.14881; "pycls" is its authors' code, whose
formulae (pycls main, bias adds counted, activations of convolutions and
matmuls) give the integers for the models of the paper's Table 1. P-18GF's
parameters are also torchvision's for vit_b_16.
"""
import time

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from vit_jax import complexity
from vit_jax.models import vit


def _of(size, stem, image_size=224, **kw):
  return complexity.of(
      vit.create(size=size, stem=stem, num_classes=1000, **kw), image_size)


# (size, stem): params, flops, activations.  pycls complexity
TABLE_1 = {
    ('1GF', 'patchify'): (4_830_376, 1_083_059_944, 5_520_748),
    ('4GF', 'patchify'): (18_507_112, 3_909_048_808, 11_040_496),
    ('18GF', 'patchify'): (86_567_656, 17_580_319_720, 23_895_544),
    ('36GF', 'patchify'): (178_364_392, 35_997_187_048, 37_136_840),
    ('1GF', 'conv'): (4_567_936, 1_079_227_240, 5_628_385),
    ('4GF', 'conv'): (17_754_136, 3_965_674_216, 11_255_770),
    ('18GF', 'conv'): (81_573_160, 17_726_621_416, 24_024_268),
    ('36GF', 'conv'): (167_796_008, 35_025_829_864, 36_606_008),
}


@pytest.mark.parametrize('size, stem', TABLE_1)
def test_table_1(size, stem):
  c = _of(size, stem, scan=True)  # one block to trace in place of 14
  assert (c.params, c.flops, c.activations) == TABLE_1[size, stem]
  assert c.macs == pytest.approx(c.flops, rel=0.005)


@pytest.mark.parametrize('scan, remat', [
    (False, 'none'), (False, 'full'), (True, 'full'), (True, 'dots')])
def test_scan_and_remat_count_the_same(scan, remat):
  c = _of('4GF', 'conv', scan=scan, remat=remat)
  assert (c.params, c.flops, c.activations) == TABLE_1['4GF', 'conv']


# (flops, params, activations) in millions.  paper Table 3; its 0.8 million
# activations of the patchify stem are a slip: 14 * 14 * 384 = 75,264.
TABLE_3 = {
    'patchify': (58, 0.3, 0.1),
    'conv': (435, 1.0, 1.2),
    'S1': (422, 0.8, 1.3),
    'S2': (422, 0.7, 1.1),
    'S3': (458, 0.7, 1.6),
    'S4': (407, 0.6, 2.9),
}


@pytest.mark.parametrize('stem', TABLE_3)
def test_stems_of_table_3(stem):
  c = _of('4GF', stem, scan=True)
  rows = [row for row in c.rows if row.path.startswith('stem/')]
  millions = [
      sum(getattr(row, name) for row in rows) / 1e6
      for name in ('macs', 'params', 'activations')]
  flops, params, activations = TABLE_3[stem]
  assert round(millions[0]) == flops
  assert round(millions[1], 1) == params
  assert round(millions[2], 1) == activations


def test_the_deep_variant():
  """paper Figure 8 and Appendix B: 71.8M and 71.0M parameters, 15.5 GF."""
  patchify = _of('16GF', 'patchify', scan=True)
  conv = _of('16GF', 'conv', scan=True)
  assert (patchify.params, conv.params) == (71_757_160, 71_004_184)
  assert round(patchify.flops / 1e9, 1) == 15.5
  assert round(conv.flops / 1e9, 1) == 15.5


def test_patchify_bn_adds_a_scale_per_channel():
  """The norm's bias takes the place of the convolution's."""
  assert _of('4GF', 'patchify_bn', scan=True).params == 18_507_112 + 384


def test_micro_stems_cost_the_same():
  """Like the paper's S1 to S4; multiply-adds by hand, see variants.py."""
  def macs(stem):
    c = _of('micro', stem, 32)
    return sum(r.macs for r in c.rows if r.path.startswith('stem/'))
  assert {s: macs(s) for s in ('conv', 'S1', 'S2', 'S3')} == {
      'conv': 765_952, 'S1': 763_904, 'S2': 775_680, 'S3': 757_760}


def test_images_that_are_not_square():
  model = vit.create(size='micro', stem='conv', num_classes=10)
  macs = lambda size: {
      row.path: row.macs for row in complexity.of(model, size).rows}
  square, wide = macs((32, 32)), macs((32, 64))
  assert square == macs(32) and wide == macs((64, 32))
  assert wide['stem/conv_0'] == 2 * square['stem/conv_0']


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_rows_are_named_like_parameters(scan, remat):
  model = vit.create(
      size='micro', stem='conv', num_classes=10, scan=scan, remat=remat)
  c = complexity.of(model, 32, channels=1)
  paths = {row.path for row in c.rows}
  params = jax.eval_shape(
      lambda k: model.init(k, jnp.zeros((1, 32, 32, 1)), train=False),
      jax.random.key(0))['params']
  modules = {
      '/'.join(k.key for k in (path[:-1] or path))
      for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  blocks = ['blocks'] if scan else ['block_00', 'block_01', 'block_02']
  assert paths - modules == {f'encoder/{b}/attention' for b in blocks}
  assert modules <= paths
  (attention,) = (
      r for r in c.rows if r.path == f'encoder/{blocks[0]}/attention')
  # q k^T and attention times v: 17 tokens, 4 heads of 16, 1 or 3 blocks.
  assert attention.macs == (3 if scan else 1) * 2 * 17 * 17 * 64
  assert attention.flops == attention.macs


def test_the_largest_model_takes_seconds():
  start = time.perf_counter()
  c = _of('G/14', 'patchify', pool='gap', scan=True)
  assert time.perf_counter() - start < 20
  assert c.params == 1_844_437_352  # G/16 of big_vision less its larger patch
  assert c.flops == pytest.approx(482.0e9, rel=1e-3)


# The counter itself, on functions whose cost is known by hand.

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def _totals(fn, *args):
  rows = complexity.count(fn, *args)
  return sum(r.macs for r in rows), sum(r.activations for r in rows)


def test_count_of_a_scan_is_its_length_times_its_body():
  def fn(x, w):
    return lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
  assert _totals(fn, X, W) == (5 * 4 * 8 * 8, 5 * 4 * 8)


def test_count_of_a_cond_is_its_dearest_branch():
  def fn(x, w):
    return lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
  assert _totals(fn, X, W) == (2 * 4 * 8 * 8, 2 * 4 * 8)


def test_count_of_remat_is_one_forward_pass_until_differentiated():
  def fn(x, w):
    return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum()
  one = 4 * 8 * 8
  assert _totals(fn, X, W)[0] == 2 * one
  # Forward 2, again 2, and 2 for the gradient towards x.
  assert _totals(jax.grad(fn), X, W)[0] == 6 * one


def test_a_while_loop_with_matmuls_is_refused():
  def fn(x, w):
    return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)
  with pytest.raises(ValueError, match='while loop with matmuls'):
    complexity.count(fn, X, W)


def test_grouped_convolutions_see_a_part_of_the_channels():
  def fn(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', feature_group_count=4,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  x = jax.ShapeDtypeStruct((1, 6, 6, 8), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 2, 8), jnp.float32)
  assert _totals(fn, x, kernel) == (6 * 6 * 8 * 3 * 3 * 2, 6 * 6 * 8)
