"""Softmax attention in several forms, which `model.attention` chooses from.

  xla     two matmuls and what XLA makes of the softmax between them
  cudnn   NVIDIA's flash attention, through `jax.nn.dot_product_attention`; its
          backward pass adds in no fixed order, so no run repeats bit for bit
  pallas  one TPU kernel for all heads of an example: logits and weights, which
          are most of the memory traffic of a small ViT, stay on the chip

The logits are summed, and the softmax taken, in float32 in all of them.
Letters of axes: see `vit.py`; h is here the width of one head.
"""
import functools
import math

from flax import linen as nn
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

ATTENTIONS = ('xla', 'cudnn', 'pallas')
# Half of the 16 MB that a TPU's compiler gives to a kernel; the rest is for
# what the kernel computes.
_BLOCK_BYTES = 2**23
# The kernel holds some [N, N] in float32 at once; at 1025 tokens they do not
# fit, and the compiler takes a minute to say so.
MAX_TOKENS = 640


def attend(query: jax.Array, key: jax.Array, value: jax.Array,
           form: str = 'xla') -> jax.Array:
  """Softmax attention; all three and the result are [B, N, K, h].

  There may be another number of queries, which is then that of the result.

  Args:
    query, key, value: of one dtype, which is that of the result.
    form: 'xla' or 'cudnn'; the latter takes bfloat16 alone.
  """
  if form == 'cudnn':
    return jax.nn.dot_product_attention(
        query, key, value, implementation='cudnn')
  weights = attention_weights(query, key).astype(value.dtype)
  return jnp.einsum('bkqn,bnkh->bqkh', weights, value)


def attention_weights(query: jax.Array, key: jax.Array) -> jax.Array:
  """How much each query takes of each token: float32 [B, K, N, N]."""
  logits = jnp.einsum(
      'bqkh,bnkh->bkqn', query * query.shape[-1] ** -0.5, key,
      preferred_element_type=jnp.float32)  # [B, K, N, N]
  return jax.nn.softmax(logits, axis=-1)


def attend_fused(qkv: jax.Array, heads: int) -> jax.Array:
  """Self-attention by the kernel, for each device on its part of the batch.

  On a CPU the kernel is interpreted, slowly.

  Args:
    qkv: [B, N, 3 D]: queries, keys and values, heads side by side in each.
    heads: K.

  Returns:
    [B, N, D] of the same dtype.
  """
  apply = functools.partial(_attend, heads=heads)
  axes = _batch_axes()
  # The partitioner cannot look into a kernel, and would run all of the batch
  # on every device.
  if axes and qkv.shape[0] % math.prod(axes.values()) == 0:
    apply = jax.shard_map(
        apply, in_specs=P(tuple(axes)), out_specs=P(tuple(axes)),
        check_vma=False)
  return apply(qkv)


def choose(device, tokens: int, heads: int, width: int, dtype: str) -> str:
  """The form for training on a device where the config says 'auto'.

  That is the kernel on a TPU whose compiler takes it for this shape; if the
  device is here, its gradient has to agree with XLA's, too. Says in a line why
  if it does not do. Elsewhere it is 'xla': cuDNN's would have to be asked for,
  because with it runs do not repeat.

  Args:
    device: of JAX; it need not be here.
    tokens, heads, width: N, K, D.
    dtype: of the model.
  """
  if device.platform != 'tpu':
    return 'xla'
  why = refusal(device, tokens, heads, width, dtype)
  if why:
    print(f'attention: xla, not pallas, with {tokens} tokens and {heads} heads '
          f'of {width // heads}: {why}', flush=True)
  return 'xla' if why else 'pallas'


def refusal(device, tokens: int, heads: int, width: int, dtype: str) -> str:
  """Why the kernel does not do on a device, in a line; '': it does.

  Args: see `choose`.
  """
  if tokens > MAX_TOKENS:
    return f'it takes {MAX_TOKENS} tokens at most'

  def loss(form, qkv):
    out = form(qkv, heads)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  fused, plain = (jax.jit(jax.grad(functools.partial(loss, form)))
                  for form in (_attend, _attend_plainly))
  qkv = jax.ShapeDtypeStruct(
      (2, tokens, 3 * width), dtype,
      sharding=jax.sharding.SingleDeviceSharding(device))
  try:
    compiled = fused.lower(qkv).compile()
    if device.process_index != jax.process_index() or (
        device not in jax.local_devices()):
      return ''
    qkv = jax.device_put(
        np.random.default_rng(0).normal(size=qkv.shape).astype(dtype), device)
    ours, theirs = (np.asarray(f(qkv), np.float32) for f in (compiled, plain))
  except Exception as e:  # whatever a compiler may raise
    return (str(e).strip() or repr(e)).splitlines()[0][:100]
  gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
  # Two bfloat16 results: 8 bits each, after three roundings.
  return '' if gap < 0.03 else f'gradients differ by {gap:.1%}'


def _attend_plainly(qkv, heads):
  """`attend` of one array."""
  batch, tokens, _ = qkv.shape
  parts = qkv.reshape(batch, tokens, 3, heads, -1)
  out = attend(*(parts[:, :, i] for i in range(3)))
  return out.reshape(batch, tokens, -1)


def _batch_axes():
  """{axis: size} of the mesh that the batch is divided over, where traced."""
  if not nn.get_logical_axis_rules():
    return {}
  (names,) = nn.logical_to_mesh_axes(('batch',))
  mesh = jax.sharding.get_abstract_mesh()
  names = (names,) if isinstance(names, str) else names or ()
  return {name: mesh.shape[name] for name in names if name in mesh.shape}


# The backward pass computes the weights again: it reads qkv and the gradient,
# writes the gradient of qkv, and keeps nothing of the forward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(qkv, heads):
  width = qkv.shape[-1] // 3
  return _run(_forward, heads, (qkv,), width, matmuls=2)


def _attend_fwd(qkv, heads):
  return _attend(qkv, heads), qkv


def _attend_bwd(heads, qkv, grad):
  return (_run(_backward, heads, (qkv, grad), qkv.shape[-1], matmuls=5),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _run(kernel, heads, inputs, width, matmuls):
  """Runs a kernel over blocks of examples; the result is [B, N, width]."""
  batch, tokens, qkv_width = inputs[0].shape
  dtype = inputs[0].dtype
  row = sum(x.shape[-1] for x in inputs) + width
  # Twice: one block is computed with while the next one is fetched.
  most = _BLOCK_BYTES // (2 * tokens * row * dtype.itemsize)
  block = max(n for n in range(1, min(max(most, 1), batch) + 1)
              if batch % n == 0)
  spec = lambda features: pl.BlockSpec(
      (block, tokens, features), lambda i: (i, 0, 0))
  weights = batch * heads * tokens ** 2

  def call(*inputs, interpret):
    return pl.pallas_call(
        functools.partial(kernel, heads=heads), grid=(batch // block,),
        in_specs=[spec(x.shape[-1]) for x in inputs], out_specs=spec(width),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, width), dtype),
        interpret=interpret,
        # Cores share the examples where a chip has two.
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
        # What the kernel moves and computes, for XLA, which cannot see it.
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * weights * (qkv_width // 3 // heads),
            transcendentals=weights,
            bytes_accessed=batch * tokens * row * dtype.itemsize))(*inputs)

  return jax.lax.platform_dependent(
      *inputs, cpu=functools.partial(call, interpret=True),
      default=functools.partial(call, interpret=False))


def _forward(qkv, out, *, heads):
  """Kernel: qkv [block, N, 3 D] -> out [block, N, D]."""
  def example(i, carry):
    for j in range(heads):
      query, key, value = _head(qkv, i, j, heads)
      weights = _weights(query, key).astype(value.dtype)
      place = _place(out.shape[-1], j, heads)
      out[i, :, place] = _dot(weights, value, 1, 0).astype(out.dtype)
    return carry

  jax.lax.fori_loop(0, qkv.shape[0], example, 0)


def _backward(qkv, grad, out, *, heads):
  """Kernel: qkv, gradient of the result -> out [block, N, 3 D], qkv's."""
  width = grad.shape[-1]
  scale = (width // heads) ** -0.5

  def example(i, carry):
    for j in range(heads):
      query, key, value = _head(qkv, i, j, heads)
      place = _place(width, j, heads)
      above = grad[i, :, place]
      weights = _weights(query, key)
      d_weights = _dot(above, value, 1, 1)
      # Through the softmax.
      row = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
      d_logits = (weights * (d_weights - row)).astype(query.dtype)
      parts = (_dot(d_logits, key, 1, 0) * scale,
               _dot(d_logits, query, 0, 0),
               _dot(weights.astype(query.dtype), above, 0, 0))
      for part, value in enumerate(parts):
        place = _place(width, j, heads, part)
        out[i, :, place] = value.astype(out.dtype)
    return carry

  jax.lax.fori_loop(0, qkv.shape[0], example, 0)


def _head(qkv, example, head, heads):
  """Query, scaled, key and value of one head of one example, [N, h] each."""
  width = qkv.shape[-1] // 3
  query, key, value = (
      qkv[example, :, _place(width, head, heads, part)] for part in range(3))
  return query * (width // heads) ** -0.5, key, value


def _place(width, head, heads, part=0):
  """Where a head is in the last axis: part 0 query, 1 key, 2 value."""
  size = width // heads
  return pl.ds(part * width + head * size, size)


def _weights(query, key):
  """Softmax over the keys, float32 [N, N]."""
  logits = _dot(query, key, 1, 1)
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _dot(x, y, x_axis, y_axis):
  """Matmul that sums over an axis of each, in float32."""
  return jax.lax.dot_general(
      x, y, (((x_axis,), (y_axis,)), ((), ())),
      preferred_element_type=jnp.float32)
