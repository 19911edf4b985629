"""Optimizers against PyTorch's numbers, losses against big_vision's."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import losses
from vit_jax import models
from vit_jax import optimizer
from vit_jax import param_paths
from vit_jax import recipes

# torch 2.13.0, float64, 5 steps of lr = 0.1 (t + 1) / 5 on
#   sum((tanh(x w + b) - y)^2), decay 0.3 on w and 0 on b:
#   torch.optim.AdamW(betas=(0.9, 0.999), eps=1e-8)
#   torch.optim.SGD(momentum=0.9, nesterov=True)
X = [[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]]
Y = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
W, B = [[0.5, -1.0], [2.0, 0.25]], [0.1, -0.3]
TORCH = {
    'adamw': ([[0.7472358771894977, -0.6365888181771334],
               [1.5344010278383662, 0.44528812562214515]],
              [0.3844214367775382, -0.0022082875013717668]),
    'sgd': ([[1.1539462543906616, -0.47383608784608866],
             [0.3227691795441285, -0.35581027723742265]],
            [0.7916184924725729, 1.21819797647748]),
}
KERNELS = ('layer/kernel',)
TREE = {'layer': {'kernel': W, 'bias': B}}


def params():
  return jax.tree.map(jnp.asarray, TREE,
                      is_leaf=lambda x: isinstance(x, list))


def loss(p):
  out = jnp.tanh(jnp.asarray(X) @ p['layer']['kernel']
                 + p['layer']['bias'][None])
  return jnp.sum((out - jnp.asarray(Y)) ** 2)


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_five_steps_agree_with_torch(name):
  config = getattr(recipes, name)(0.1, 0.3, decay=KERNELS)
  make_tx = optimizer.create(config, params())
  p = params()
  state = make_tx(0.0, 0.0).init(p)

  @jax.jit
  def step(p, state, lr, wd):
    updates, state = make_tx(lr, wd).update(jax.grad(loss)(p), state, p)
    return optax.apply_updates(p, updates), state

  for t in range(5):
    p, state = step(p, state, 0.1 * (t + 1) / 5, 0.3)
  assert step._cache_size() == 1  # the rate and the decay are traced
  w, b = TORCH[name]
  np.testing.assert_allclose(p['layer']['kernel'], w, rtol=2e-5)
  np.testing.assert_allclose(p['layer']['bias'], b, rtol=2e-5, atol=5e-6)


def test_clipping_bounds_the_global_norm():
  config = recipes.sgd(1.0, 0.0, decay=KERNELS)
  config.clip_norm = 1.0
  config.momentum = 0.0
  tx = optimizer.create(config, params())(1.0, 0.0)
  grads = jax.tree.map(lambda x: 100 * x, jax.grad(loss)(params()))
  updates, _ = tx.update(grads, tx.init(params()), params())
  np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-6)


def blocks(depth):
  """Shapes of a ViT, as far as layers go: (by block, stacked)."""
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  rest = {'stem': {'conv_0': {'kernel': leaf(3)}}, 'cls': leaf(1, 1, 2),
          'pos_embedding': leaf(1, 5, 2), 'head': {'bias': leaf(4)}}
  norm = {'norm': {'scale': leaf(2)}}
  by_block = {
      f'block_{i:02d}': {'kernel': leaf(2, 3)} for i in range(depth)}
  stacked = {'blocks': {'kernel': leaf(depth, 2, 3)}}
  return tuple({**rest, 'encoder': {**norm, **part}}
               for part in (by_block, stacked))


def test_layer_decay():
  by_block, stacked = (
      param_paths.flatten(optimizer.layer_scales(tree, 0.5))
      for tree in blocks(3))
  for path in ('head/bias', 'encoder/norm/scale'):
    assert by_block[path] == stacked[path] == 1
  for path in ('stem/conv_0/kernel', 'cls', 'pos_embedding'):
    assert by_block[path] == stacked[path] == 0.5 ** 4
  assert [by_block[f'encoder/block_{i:02d}/kernel'] for i in range(3)] == [
      0.125, 0.25, 0.5]
  assert stacked['encoder/blocks/kernel'].shape == (3, 1, 1)
  assert stacked['encoder/blocks/kernel'].ravel().tolist() == [0.125, 0.25, 0.5]


@pytest.mark.parametrize('size', ['Mixer-micro', 'BiT-micro', 'R+Ti/16'])
def test_layer_decay_of_every_family(size):
  stem = {'stem': 'resnet'} if size.startswith('R') else {}
  model = models.create(size=size, num_classes=3, **stem)
  params = jax.eval_shape(
      lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
      jax.random.key(0))['params']
  scales = param_paths.flatten(optimizer.layer_scales(params, 0.5))
  assert scales['head/kernel'] == 1
  deepest = min(scales, key=lambda path: scales[path])
  assert deepest.startswith(('stem', 'conv_root', 'cls', 'pos_embedding'))
  depth = {'Mixer-micro': 4, 'BiT-micro': 2, 'R+Ti/16': 12}[size]
  assert set(scales.values()) == {0.5 ** i for i in range(depth + 2)}


@pytest.mark.parametrize('make', [recipes.adamw, recipes.sgd])
def test_layer_decay_scales_updates_and_decay(make):
  config = make(0.1, 0.3, decay=('.*',))
  tree = jax.tree.map(lambda x: jnp.ones(x.shape), blocks(3)[1])
  updates = []
  for layer_decay in (1.0, 0.5):
    config.layer_decay = layer_decay
    tx = optimizer.create(config, tree)(0.1, 0.3)
    state = tx.init(tree)
    updates.append(tx.update(tree, state, tree)[0])
  scales = optimizer.layer_scales(tree, 0.5)
  jax.tree.map(lambda one, half, s: np.testing.assert_allclose(
      half, one * s, rtol=1e-6), *updates, scales)
  text = optimizer.describe(config, tree)
  assert 'lr times 0.0625: 15 parameters' in text and (
      'lr times 1.0000: 6 parameters' in text)


def test_bad_optimizers():
  config = recipes.adamw(1., 1., decay=KERNELS)
  config.layer_decay = 1.5
  with pytest.raises(ValueError, match=r'layer_decay=1\.5 is out'):
    optimizer.create(config, params())
  with pytest.raises(ValueError, match="Did you mean 'adamw'"):
    optimizer.create(dict(name='adam'), params())
  with pytest.raises(ValueError, match='matches no parameter'):
    optimizer.create(recipes.adamw(1., 1., decay=('kernel',)), params())
  with pytest.raises(ValueError, match='not a regular expression'):
    optimizer.create(recipes.adamw(1., 1., decay=('*',)), params())


def test_the_papers_decay_reaches_all_but_norms_and_biases():
  tree = {'cls': 0, 'pos_embedding': 0, 'head': {'kernel': 0, 'bias': 0},
          'stem': {'norm_0': {'scale': 0, 'bias': 0}, 'conv_0': {'kernel': 0}}}
  mask = param_paths.flatten(param_paths.mask(tree, recipes.DECAY_PAPER))
  assert {k for k, v in mask.items() if v} == {
      'cls', 'pos_embedding', 'head/kernel', 'stem/conv_0/kernel'}


def test_losses():
  logits = jnp.asarray([[1., -2., .5]])
  one_hot = losses.smoothed(jnp.asarray([0]), 3, 0.0)
  # big_vision's sigmoid_xent of the same numbers.
  np.testing.assert_allclose(
      losses.sigmoid_xent(logits, one_hot), [1.4142667], rtol=1e-6)
  p = np.exp([1., -2., .5]) / np.exp([1., -2., .5]).sum()
  np.testing.assert_allclose(
      losses.softmax_xent(logits, one_hot), [-np.log(p[0])], rtol=1e-6)
  np.testing.assert_allclose(
      losses.smoothed(jnp.asarray([1]), 4, 0.1), [[.025, .925, .025, .025]],
      rtol=1e-6)
