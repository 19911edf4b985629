"""ViT: sizes against the released ones, and what each field does."""
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import encoder
from vit_jax.models import vit

# Parameters with a class token at C=1000, C=1000 and 384 px, C=21843.
# google-research/vision_transformer models_test.py and released checkpoints.
TOKEN = {
    'Ti/16': (5_717_416, 5_790_376, 9_740_115),
    'S/16': (22_050_664, 22_196_584, 30_075_219),
    'S/32': (22_878_952, 22_915_432, 30_903_507),
    'B/8': (86_576_872, 87_744_232, 102_605_139),
    'B/16': (86_567_656, 86_859_496, 102_595_923),
    'B/32': (88_224_232, 88_297_192, 104_252_499),
    'L/16': (304_326_632, 304_715_752, 325_690_707),
    'L/32': (306_535_400, 306_632_680, 327_899_475),
    'H/14': (632_045_800, 632_651_240, 658_745_683),
}
HYBRIDS = {
    'R+Ti/16': (6_337_704, 6_355_944, 10_360_403),
    'R26+S/32': (36_431_912, 36_468_392, 44_456_467),
    'R26+B/32': (101_383_976, 101_456_936, 117_412_243),
    'R50+L/32': (328_994_856, 329_092_136, 350_358_931),
    'R50+B/16': (98_659_112, 98_950_952, 114_687_379),
}
# Attention pooling, C=1000.  big_vision
MAP = {
    'mu/14': 85_480,
    'Ti/14': 6_138_664,
    'S/14': 23_777_896,
    'M/14': 41_927_144,
    'B/14': 93_561_064,
    'L/14': 316_796_904,
    'So400m/14': 428_833_704,
    'H/14': 651_719_400,
    'g/14': 1_037_857_384,
    'G/14': 1_882_797_416,
    'e/14': 3_875_135_720,
}
# Mean over tokens, C=1000.  big_vision models/vit.py; S/32 and B/32 released
GAP = {
    'mu/16': 76_648,
    'Ti/16': 5_717_032,
    'S/16': 22_049_896,
    'S/32': 22_878_184,
    'M/16': 38_836_712,
    'B/16': 86_566_120,
    'B/32': 88_222_696,
    'L/16': 304_324_584,
    'So400m/16': 413_733_592,
    'H/16': 632_196_840,
    'g/16': 1_012_777_576,
    'G/16': 1_844_637_032,
    'e/16': 3_807_425_768,
}


def _params(image_size=224, stem='patchify', **kw):
  # scan: the same parameters, and one block to trace in place of 56.
  model = vit.create(stem=stem, scan=True, **kw)
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  variables = jax.eval_shape(
      lambda key, x: model.init(key, x, train=False),
      jax.random.key(0), images)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize('size', TOKEN)
def test_parameters_with_a_class_token(size):
  assert TOKEN[size] == (
      _params(size=size, num_classes=1000),
      _params(384, size=size, num_classes=1000),
      _params(size=size, num_classes=21843))


@pytest.mark.parametrize('size', HYBRIDS)
def test_parameters_of_hybrids(size):
  assert HYBRIDS[size] == tuple(
      _params(image_size, 'resnet', size=size, num_classes=num_classes)
      for image_size, num_classes in ((224, 1000), (384, 1000), (224, 21843)))


@pytest.mark.parametrize('size', MAP)
def test_parameters_with_attention_pooling(size):
  assert _params(size=size, num_classes=1000, pool='map') == MAP[size]


@pytest.mark.parametrize('size', GAP)
def test_parameters_with_mean_pooling(size):
  assert _params(size=size, num_classes=1000, pool='gap') == GAP[size]


@pytest.mark.parametrize('pre_logits, count', [
    (False, 21_974_632), (True, 22_122_472)])
def test_parameters_of_big_visions_baseline(pre_logits, count):
  """S/16 without and with the hidden layer in its head."""
  assert _params(
      size='S/16', num_classes=1000, pool='gap', pos_embedding='sincos2d',
      pre_logits=pre_logits) == count


# What fields do: all on micro, at 32 pixels.

IMAGES = jax.random.normal(jax.random.key(7), (4, 32, 32, 3))


def _create(stem='patchify', **kw):
  return vit.create(size='micro', stem=stem, num_classes=10, **kw)


# XLA's optimisations take longer than these programs run.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def _shapes(model, channels=3):
  images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  return jax.eval_shape(
      lambda key, x: model.init(key, x, train=False),
      jax.random.key(0), images)


def _variables(model, channels=3):
  """Random variables: numpy's, because compiling jax's draws takes seconds.

  The head's too, whose initial zeros would hide all differences.
  """
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key in ('scale', 'var'):
      return jnp.ones(x.shape, x.dtype)
    return jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, _shapes(model, channels))


@functools.cache
def _apply(model, **kw):
  return _jit(lambda v, x, rngs: model.apply(v, x, rngs=rngs, **kw))


def _logits(model, variables, images=IMAGES, rngs=None, train=False, **kw):
  return _apply(model, train=train, **kw)(variables, images, rngs)


def _differ(a, b):
  return float(jnp.abs(a - b).max())


def test_parameter_names():
  tree = _variables(_create())['params']
  assert set(tree) == {'stem', 'cls', 'pos_embedding', 'encoder', 'head'}
  assert tree['cls'].shape == (1, 1, 64)
  assert tree['pos_embedding'].shape == (1, 17, 64)
  assert set(tree['encoder']) == {
      'block_00', 'block_01', 'block_02', 'block_03', 'norm'}
  block = tree['encoder']['block_00']
  assert set(block) == {'norm_attention', 'attention', 'norm_mlp', 'mlp'}
  assert jax.tree.map(jnp.shape, block['attention']) == {
      'query': {'kernel': (64, 4, 16), 'bias': (4, 16)},
      'key': {'kernel': (64, 4, 16), 'bias': (4, 16)},
      'value': {'kernel': (64, 4, 16), 'bias': (4, 16)},
      'out': {'kernel': (4, 16, 64), 'bias': (64,)}}
  assert jax.tree.map(jnp.shape, block['mlp']) == {
      'fc1': {'kernel': (64, 192), 'bias': (192,)},
      'fc2': {'kernel': (192, 64), 'bias': (64,)}}


def test_a_conv_stem_takes_the_place_of_one_block():
  assert (_create().depth, _create('conv').depth) == (4, 3)
  assert vit.create(size='72GF', stem='conv', num_classes=2).depth == 22


@pytest.mark.parametrize('stem', ['patchify', 'conv'])
def test_pools_and_position_embeddings(stem):
  logits = {}
  for pool, pos_embedding in (
      ('token', 'learned'), ('gap', 'learned'), ('map', 'learned'),
      ('token', 'sincos2d')):
    model = _create(stem, pool=pool, pos_embedding=pos_embedding)
    variables = _variables(model)
    assert ('cls' in variables['params']) == (pool == 'token')
    if pos_embedding == 'learned':
      assert variables['params']['pos_embedding'].shape == (
          1, 17 if pool == 'token' else 16, 64)
    else:
      assert 'pos_embedding' not in variables['params']
    logits[pool, pos_embedding] = _logits(model, variables)
  values = list(logits.values())
  assert all(x.shape == (4, 10) and x.dtype == jnp.float32 for x in values)
  assert all(_differ(values[0], x) > 1e-2 for x in values[1:])


def test_sincos2d_tells_rows_from_columns():
  table = vit.sincos2d(3, 5, 64).reshape(3, 5, 64)
  assert np.array_equal(table[0, 2, :32], table[2, 2, :32])  # the same x
  assert np.array_equal(table[2, 0, 32:], table[2, 4, 32:])  # the same y
  np.testing.assert_allclose(table[0, 2, 0], np.sin(2.0), rtol=1e-6)
  np.testing.assert_allclose(table[2, 0, 48], np.cos(2.0), rtol=1e-6)
  assert len(np.unique(table.reshape(15, 64).round(4), axis=0)) == 15


def test_pre_logits_are_a_tanh_before_the_head():
  model = _create(pre_logits=True)
  variables = _variables(model)
  params = dict(variables['params'])
  kernel = params['pre_logits']['kernel']
  assert kernel.shape == (64, 64)
  # A large bias makes all hidden units 1, whatever the image.
  params['pre_logits'] = {'kernel': kernel, 'bias': jnp.full(64, 1e3)}
  logits = _logits(model, {'params': params})
  expected = params['head']['kernel'].sum(axis=0) + params['head']['bias']
  np.testing.assert_allclose(
      logits, np.broadcast_to(expected, (4, 10)), rtol=1e-5, atol=1e-5)


def test_gelu_matters():
  variables = _variables(_create())
  erf = _logits(_create(gelu='erf'), variables)
  tanh = _logits(_create(gelu='tanh'), variables)
  assert 1e-6 < _differ(erf, tanh) < 1e-1


def test_head_bias_and_zero_head():
  model = _create(head_bias=-6.9)
  def head(key):  # and nothing else is computed
    return model.init(key, IMAGES, train=False)['params']['head']
  head = jax.jit(head)(jax.random.key(0))
  np.testing.assert_array_equal(head['kernel'], np.zeros((64, 10)))
  np.testing.assert_allclose(head['bias'], np.full(10, -6.9), rtol=1e-6)


def test_one_channel():
  model = _create('conv')
  variables = _variables(model, channels=1)
  assert _logits(model, variables, IMAGES[..., :1]).shape == (4, 10)


@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_scan_equals_loop(remat):
  loop = _create()
  scan = _create(scan=True, remat=remat)
  variables = _variables(loop)
  params = dict(variables['params'])
  blocks = dict(params['encoder'])
  norm = blocks.pop('norm')
  stacked = jax.tree.map(
      lambda *x: jnp.stack(x), *(blocks[k] for k in sorted(blocks)))
  params['encoder'] = {'blocks': stacked, 'norm': norm}
  # The trees differ, and so would a permutation of the blocks.
  own = _shapes(scan)
  assert jax.tree.structure(own['params']) == jax.tree.structure(params)
  assert jax.tree.structure(own) != jax.tree.structure(variables)
  a = _logits(loop, variables)
  assert _differ(a, _logits(scan, {'params': params})) < 1e-4
  params['encoder'] = {
      'blocks': jax.tree.map(lambda x: x[::-1], stacked), 'norm': norm}
  assert _differ(a, _logits(scan, {'params': params})) > 1e-2


@pytest.mark.parametrize('scan', [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_through_remat(scan):
  """With random masks: the second forward pass draws the same ones."""
  def gradient(remat):
    model = _create(
        stochastic_depth=0.5, scan=scan, remat=remat).clone(depth=2)
    def loss(params):
      return model.apply(
          {'params': params}, IMAGES, train=True,
          rngs={'dropout': jax.random.key(3)}).var()
    grad = _jit(jax.grad(loss))
    params = _variables(model)['params']
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
    return grad(params), jaxpr
  plain, plain_jaxpr = gradient('none')
  remat, remat_jaxpr = gradient('full')
  assert plain_jaxpr.count('dot_general') < remat_jaxpr.count('dot_general')
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('stem', ['patchify', 'conv'])
def test_bfloat16_is_near_float32(stem):
  f32, bf16 = _create(stem), _create(stem, dtype='bfloat16')
  variables = _variables(bf16)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  a, b = _logits(f32, variables), _logits(bf16, variables)
  assert b.dtype == jnp.float32
  scale = float(jnp.abs(a).max())
  assert 1e-5 * scale < _differ(a, b) < 0.05 * scale
  # Nothing but the encoder's end computes in float32 on the way.
  text = jax.jit(lambda v, x: bf16.apply(v, x, train=False)).lower(
      variables, IMAGES).as_text()
  matmuls = [line for line in text.splitlines()
             if 'dot_general' in line or 'stablehlo.convolution' in line]
  full = [line for line in matmuls if 'bf16' not in line]
  assert len(full) == 1 and len(matmuls) > 20  # the head


# Dropout and stochastic depth.


def test_dropout_needs_train_and_a_key():
  model = _create(dropout=0.5).clone(depth=1)
  variables = _variables(model)
  plain = _logits(_create().clone(depth=1), variables)
  assert _differ(plain, _logits(model, variables)) == 0
  one, same, two = (
      _logits(model, variables, train=True, rngs={'dropout': jax.random.key(i)})
      for i in (0, 0, 1))
  assert _differ(one, same) == 0
  assert min(_differ(one, two), _differ(one, plain)) > 1e-2


def test_stochastic_depth_rates_grow_linearly():
  rates = []

  def record(call, args, kwargs, context):
    if (isinstance(context.module, encoder.Block)
        and context.method_name == '__call__'):
      rates.append(args[1])
    return call(*args, **kwargs)

  model = _create(stochastic_depth=0.3)
  with nn.intercept_methods(record):
    _shapes(model)
  np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3], rtol=1e-6)


def test_stochastic_depth_skips_whole_examples_and_rescales():
  block = encoder.Block(
      heads=1, mlp=4, gelu='erf', norm_eps=1e-6, init_name='paper',
      dropout=0.0, dtype='float32')
  y = np.asarray(block.apply(
      {}, jnp.ones((4000, 2, 3)), 0.25, True,
      rngs={'dropout': jax.random.key(0)}, method='_skip_examples'))
  assert (y == y[:, :1, :1]).all()
  kept = y[:, 0, 0] != 0
  np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)
  assert abs(kept.mean() - 0.75) < 0.03


def test_stochastic_depth_in_a_scan():
  model = _create(stochastic_depth=0.5, scan=True)
  variables = _variables(model)
  a, b = (
      _logits(model, variables, train=True, rngs={'dropout': jax.random.key(i)})
      for i in (0, 1))
  assert _differ(a, b) > 1e-2


def test_frozen_batch_norm_leaves_statistics():
  frozen = _create('conv', batch_norm='frozen')
  variables = _variables(frozen)
  logits, new = _logits(
      frozen, variables, train=True, mutable='batch_stats')
  jax.tree.map(
      np.testing.assert_array_equal, new['batch_stats'],
      variables['batch_stats'])
  assert _differ(logits, _logits(frozen, variables)) < 1e-4
  _, new = _logits(
      _create('conv'), variables, train=True, mutable='batch_stats')
  assert _differ(
      new['batch_stats']['stem']['norm_0']['mean'],
      variables['batch_stats']['stem']['norm_0']['mean']) > 1e-4


# The token grid.


def test_token_grid():
  assert vit.token_grid(16, 224) == ((14, 14), (0, 0))
  assert vit.token_grid(14, 384) == ((27, 27), (6, 6))
  assert vit.token_grid(16, (224, 250)) == ((14, 15), (0, 10))
  with pytest.raises(ValueError, match='28x28 pixels is smaller than'):
    vit.token_grid(32, 28)


@pytest.mark.parametrize('stem', ['patchify', 'conv'])
def test_pixels_beyond_the_last_patch_are_ignored(stem):
  model = _create(stem)
  padded = jnp.pad(
      IMAGES, ((0, 0), (0, 3), (0, 7), (0, 0)), constant_values=9.0)
  a = _logits(model, _variables(model))
  assert _differ(a, _logits(model, _variables(model), padded)) < 1e-5


def test_an_image_smaller_than_a_patch():
  with pytest.raises(ValueError, match='smaller than one patch'):
    _create().init(jax.random.key(0), jnp.zeros((1, 7, 32, 3)), train=False)


# The sharding constraint at the start of every block.

RULES = (('batch', 'data'), ('tokens', None), ('embed', None))


def _lowered(model, rules=None, mesh=None):
  variables = _shapes(model)
  images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)

  def lower():
    return jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(
        variables, images).as_text()

  if mesh is None:
    return lower()
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    return lower()


def _mesh():
  return jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize('scan, blocks', [(False, 4), (True, 1)])
def test_sharding_constraint_of_every_block(scan, blocks):
  model = _create(scan=scan)
  assert 'sharding_constraint' not in _lowered(model)
  text = _lowered(model, RULES, _mesh())
  lines = [x for x in text.splitlines() if 'sdy.sharding_constraint' in x]
  assert len(lines) == blocks
  assert all('[{"data"}, {}, {}]' in line for line in lines)


def test_an_axis_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='did not match a rule'):
    _lowered(_create(), RULES[:2], _mesh())


def test_eight_devices_agree_with_one():
  model = _create('conv')
  variables = _variables(model)
  images = jnp.concatenate([IMAGES, IMAGES[::-1]])
  one = _logits(model, variables, images)
  with jax.set_mesh(_mesh()), nn.logical_axis_rules(RULES):
    eight = _jit(lambda v, x: model.apply(v, x, train=False))(
        variables, images)
  assert len(eight.sharding.device_set) == 8
  assert _differ(one, jax.device_get(eight)) < 1e-4


# Errors.


@pytest.mark.parametrize('kw, message', [
    ({'size': 'S16'}, r"Unknown size 'S16'\.\nDid you mean 'S/16'\? There is"),
    ({'size': 'Ti'}, r"Unknown size 'Ti'\.\nDid you mean 'Ti/"),
    ({'size': '5GF'}, "Unknown size '5GF'.\nDid you mean '.*GF'"),
    ({'stem': 'convs'}, "Unknown stem 'convs'.\nDid you mean 'conv'?"),
    ({'pool': 'tok'}, "Unknown pool 'tok'.\nDid you mean 'token'?"),
    ({'pos_embedding': 'rope'}, 'There is: learned, sincos2d'),
    ({'gelu': 'exact'}, 'There is: erf, tanh'),
    ({'init': 'torch'}, 'There is: paper, pycls_2022, big_vision'),
    ({'batch_norm': 'off'}, 'There is: train, frozen'),
    ({'remat': True}, 'There is: none, full, dots'),
    ({'dtype': 'float16'}, 'There is: float32, bfloat16'),
    ({'dropout': 1.0}, r'dropout is 1.0.\nIt is a probability in \[0, 1\)'),
    ({'stochastic_depth': -0.1}, 'stochastic_depth is -0.1'),
    ({'num_classes': 0}, 'num_classes is at least 1'),
    ({'size': 'H/14', 'stem': 'conv'}, 'never to the patch 14.\nTake H/16'),
])
def test_wrong_arguments(kw, message):
  with pytest.raises(ValueError, match=message):
    vit.create(**{
        'size': 'micro', 'stem': 'patchify', 'num_classes': 10, **kw})


def test_unknown_keyword():
  with pytest.raises(TypeError, match='drop_path'):
    _create(drop_path=0.1)


# Initialisation. Numbers follow from the rows of initializers.py with D = 64,
# M = 192; 'paper' and 'pycls_2022' are pycls' init_weights_vit of 2021 and of
# March 2022, 'big_vision' is its models/vit.py, from which AugReg's own code,
# vision_transformer's models_vit.py, differs in the position embedding only.

INIT = {
    # path: {init: (law, bound or std)}
    'stem/conv_1/kernel': {  # [3, 3, 16, 32]
        'paper': ('uniform', 1 / 12),  # 1 / sqrt(9 * 16)
        'pycls_2022': ('normal', 0.25),  # sqrt(2 / 32)
        'big_vision': ('normal', 1 / 12)},
    'stem/projection/kernel': {  # [1, 1, 64, 64]
        'paper': ('normal', 0.17678),  # sqrt(2 / 64)
        'pycls_2022': ('normal', 0.125),
        'big_vision': ('normal', 0.125)},
    'encoder/block_00/attention/query/kernel': {
        'paper': ('uniform', 0.15309),  # sqrt(6 / (4 * 64))
        'pycls_2022': ('uniform', 0.15309),
        'big_vision': ('uniform', 0.21651)},  # sqrt(6 / (2 * 64))
    'encoder/block_02/attention/out/kernel': {
        'paper': ('uniform', 0.125),  # 1 / sqrt(64)
        'pycls_2022': ('uniform', 0.125),
        'big_vision': ('uniform', 0.21651)},
    'encoder/block_00/mlp/fc1/kernel': dict.fromkeys(
        ('paper', 'pycls_2022', 'big_vision'),
        ('uniform', 0.15309)),  # sqrt(6 / (64 + 192))
    'encoder/block_00/mlp/fc1/bias': dict.fromkeys(
        ('paper', 'pycls_2022', 'big_vision'), ('normal', 1e-6)),
    'pos_embedding': {
        'paper': ('normal', 0.02),
        'pycls_2022': ('normal', 0.02),
        'big_vision': ('normal', 0.125)},  # 1 / sqrt(64)
    'encoder/block_01/attention/value/bias': dict.fromkeys(
        ('paper', 'pycls_2022', 'big_vision'), ('normal', 0.0)),
    'cls': dict.fromkeys(
        ('paper', 'pycls_2022', 'big_vision'), ('normal', 0.0)),
}


for _laws in INIT.values():
  _laws['vision_transformer'] = _laws['big_vision']
INIT['pos_embedding']['vision_transformer'] = ('normal', 0.02)


@pytest.mark.parametrize('init', INIT['cls'])
def test_initial_values(init):
  model = _create('conv', init=init)

  def tested(key):  # XLA leaves out what is not asked for
    params = model.init(key, IMAGES, train=False)['params']
    return {
        path: functools.reduce(lambda tree, k: tree[k], path.split('/'), params)
        for path in INIT}

  params = _jit(tested)(jax.random.key(0))
  for path, laws in INIT.items():
    x = np.asarray(params[path], np.float64)
    law, size = laws[init]
    tolerance = 4 / math.sqrt(2 * x.size)  # four standard errors of a std
    if law == 'uniform':
      assert size * 0.99 < np.abs(x).max() <= size * (1 + 1e-6), path
      size = size / math.sqrt(3)
    assert abs(x.std() - size) <= tolerance * size, path


def test_initial_patchify_kernel():
  """Std sqrt(1 / fan_in); cut at two of them in big_vision, not in torch."""
  std = 1 / math.sqrt(3 * 8 * 8)
  for init, cut in (('paper', False), ('big_vision', True)):
    stem = _create(init=init).stem
    kernel = _jit(lambda key, stem=stem: stem.init(key, IMAGES, train=False))(
        jax.random.key(0))['params']['embedding']['kernel']
    kernel = np.asarray(kernel)
    assert abs(kernel.std() / std - 1) < 0.03
    assert (np.abs(kernel).max() < 2.3 * std) == cut
