"""Optimizers against PyTorch's numbers, losses against big_vision's."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import losses
from vit_jax import optimizer
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


def test_bad_optimizers():
  with pytest.raises(ValueError, match="Did you mean 'adamw'"):
    optimizer.create(dict(name='adam'), params())
  with pytest.raises(ValueError, match='matches no parameter'):
    optimizer.create(recipes.adamw(1., 1., decay=('kernel',)), params())
  with pytest.raises(ValueError, match='not a regular expression'):
    optimizer.create(recipes.adamw(1., 1., decay=('*',)), params())


def test_the_papers_decay_reaches_all_but_norms_and_biases():
  tree = {'cls': 0, 'pos_embedding': 0, 'head': {'kernel': 0, 'bias': 0},
          'stem': {'norm_0': {'scale': 0, 'bias': 0}, 'conv_0': {'kernel': 0}}}
  from vit_jax import param_paths
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
