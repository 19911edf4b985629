"""The forms of attention agree, on one device and on eight."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import distributed
from vit_jax import program
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train_state
from vit_jax.models import attention
from vit_jax.models import encoder
from vit_jax.models import vit


def _qkv(tokens, heads, width, dtype='float32', batch=8, scale=1.0):
  values = np.random.default_rng(0).normal(size=(batch, tokens, 3 * width))
  return jnp.asarray(scale * values, dtype)


def _value_and_grad(form, qkv, heads):
  def loss(qkv):
    out = form(qkv, heads).astype(jnp.float32)
    return jnp.sum(jnp.sin(out)), out

  (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
  return np.asarray(out), np.asarray(grad, np.float32)


@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 2e-6), ('bfloat16', 0.02)])
@pytest.mark.parametrize('block_bytes', [2**23, 1])  # one block; one an example
def test_kernel_is_xlas_attention(dtype, tolerance, block_bytes, monkeypatch):
  monkeypatch.setattr(attention, '_BLOCK_BYTES', block_bytes)
  qkv = _qkv(17, 3, 24, dtype)
  ours = _value_and_grad(attention.attend_fused, qkv, 3)
  theirs = _value_and_grad(attention._attend_plainly, qkv, 3)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_kernel_takes_logits_beyond_exps_range():
  qkv = _qkv(9, 2, 16, scale=20.0)
  logits = attention._dot(qkv[0, :, :8], qkv[0, :, 16:24], 1, 1)
  assert np.abs(logits).max() > 8 ** 0.5 * 100  # exp(100) is no float32
  out, grad = _value_and_grad(attention.attend_fused, qkv, 2)
  assert np.isfinite(out).all() and np.isfinite(grad).all()


def test_each_device_runs_the_kernel_on_its_part_of_the_batch():
  mesh = sharding.create_mesh({'data': -1})
  qkv = jax.device_put(_qkv(9, 2, 16), sharding.batch(mesh))
  with sharding.tracing(mesh):
    fused = jax.jit(lambda x: attention.attend_fused(x, 2)).lower(qkv).compile()
  assert 'all-gather' not in fused.as_text()
  out = fused(qkv)
  assert out.sharding.spec[0] == ('data', 'fsdp')
  np.testing.assert_allclose(
      out, attention._attend_plainly(_qkv(9, 2, 16), 2), atol=1e-6)


def _encoder(form, **fields):
  return encoder.Encoder(**{
      'depth': 1, 'heads': 2, 'mlp': 32, 'gelu': 'erf', 'norm_eps': 1e-6,
      'init_name': 'paper', 'dropout': 0.0, 'stochastic_depth': 0.0,
      'scan': False, 'remat': 'none', 'dtype': 'float32', 'attention': form,
      **fields})


@pytest.mark.parametrize('fields', [
    {'remat': 'dots'}, {'scan': True, 'depth': 2, 'remat': 'full'}])
def test_an_encoder_with_the_kernel_learns_the_same(fields):
  x = _qkv(5, 2, 16)
  results = []
  for form in ('xla', 'pallas'):
    model = _encoder(form, **fields)
    variables = model.init(jax.random.key(0), x, train=False)
    loss = lambda v, m=model: jnp.sum(jnp.sin(m.apply(v, x, train=True)))
    assert ('pallas_call' in str(jax.make_jaxpr(loss)(variables))) == (
        form == 'pallas')
    results.append((variables, jax.jit(jax.grad(loss))(variables)))
  (ours, fused), (theirs, plain) = results
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-5 * max(1, np.abs(b).max())), fused, plain)


def test_weights_are_there_for_whoever_asks():
  x = _qkv(5, 2, 16)
  variables = _encoder('xla').init(jax.random.key(0), x, train=False)
  asked = lambda form: _encoder(form).apply(
      variables, x, train=False, mutable=['intermediates'])[1]
  jax.tree.map(np.testing.assert_array_equal, asked('xla'), asked('pallas'))
  block = asked('pallas')['intermediates']['block_00']
  assert block['attention']['weights'][0].shape == (8, 2, 5, 5)


def test_softmax_is_float32_for_bfloat16():
  query = jnp.ones((1, 3, 1, 4), jnp.bfloat16)
  assert attention.attention_weights(query, query).dtype == jnp.float32
  qkv = jnp.ones((1, 3, 12), jnp.bfloat16)
  jaxpr = str(jax.make_jaxpr(lambda x: attention.attend_fused(x, 1))(qkv))
  exps = [line for line in jaxpr.splitlines() if ' exp ' in line]
  assert exps and all('f32[3,3]' in line for line in exps)


class _Chip:
  platform = 'tpu'


def test_auto_is_the_kernel_on_a_tpu_and_falls_back_with_a_line(
    monkeypatch, capsys):
  cpu = jax.devices()[0]
  assert attention.choose(cpu, 197, 12, 768, 'bfloat16') == 'xla'
  monkeypatch.setattr(attention, 'refusal', lambda *_: '')
  assert attention.choose(_Chip, 197, 12, 768, 'bfloat16') == 'pallas'
  assert not capsys.readouterr().out
  monkeypatch.setattr(attention, 'refusal', lambda *_: 'out of vmem')
  assert attention.choose(_Chip, 197, 12, 768, 'bfloat16') == 'xla'
  assert capsys.readouterr().out == (
      'attention: xla, not pallas, with 197 tokens and 12 heads of 64: '
      'out of vmem\n')


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch):
  cpu = jax.devices()[0]
  assert not attention.refusal(cpu, 9, 2, 16, 'bfloat16')
  right = attention._weights
  monkeypatch.setattr(
      attention, '_weights', lambda q, k: right(q, k) * 1.1)
  assert 'gradients differ by' in attention.refusal(cpu, 9, 2, 16, 'bfloat16')
  monkeypatch.setattr(attention, '_weights', lambda q, k: 1 / 0)
  assert attention.refusal(cpu, 9, 2, 16, 'bfloat16') == 'division by zero'


def test_process_0_chooses_for_all(monkeypatch):
  model = vit.create(size='S/16', stem='patchify', num_classes=2,
                     dtype='bfloat16')
  tpu = types.SimpleNamespace(devices=np.array([_Chip]), shape={'tensor': 1})
  monkeypatch.setattr(attention, 'choose', lambda *args: 'pallas')
  choose = lambda: program._attention(model, (224, 224, 3), tpu, 'tpu')
  assert choose() == 'pallas'
  monkeypatch.setattr(distributed, 'from_first', lambda value: False)
  assert choose() == 'xla'


def test_only_vits_have_attention():
  for section in (recipes.mixer('Mixer-micro'), recipes.bit('BiT-micro')):
    with section.unlocked():
      section.attention = 'xla'
    with pytest.raises(ValueError, match=r'takes no model\.attention'):
      train_state.model_fields(section, ())
  with pytest.raises(ValueError, match='Unknown attention'):
    vit.create(
        size='micro', stem='patchify', num_classes=4, attention='flash')
