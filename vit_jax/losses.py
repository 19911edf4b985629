"""Losses of logits against distributions, per example, in float32."""
import jax
import jax.numpy as jnp
import optax


def smoothed(labels, num_classes, label_smoothing):
  """float32 [B, C]: 1 - e + e/C on the label, e/C elsewhere (pycls, timm).

  Args:
    labels: int32 [B], or float32 [B, C] of weights that sum to 1. Smoothing
      what was mixed is the same as mixing what was smoothed, as pycls does.
    num_classes: C.
    label_smoothing: e.
  """
  if labels.ndim == 1:
    labels = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  return labels * (1 - label_smoothing) + label_smoothing / num_classes


def softmax_xent(logits, targets):
  """Cross-entropy of logits [B, C] against distributions [B, C] -> [B]."""
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid_xent(logits, targets):
  """Binary cross-entropies summed over classes: [B, C], [B, C] -> [B].

  The sum (not the mean) over classes is big_vision's and AugReg's convention.
  """
  return jnp.sum(
      optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets),
      axis=-1)


LOSSES = {'softmax_xent': softmax_xent, 'sigmoid_xent': sigmoid_xent}
