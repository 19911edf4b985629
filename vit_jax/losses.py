"""Losses of logits against integer labels, per example, in float32."""
import jax
import jax.numpy as jnp
import optax


def smoothed(labels, num_classes, label_smoothing):
  """One-hot [B, C]: 1 - e + e/C on the label, e/C elsewhere (pycls, timm)."""
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  return one_hot * (1 - label_smoothing) + label_smoothing / num_classes


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
