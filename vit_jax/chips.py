"""What the makers' data sheets say of accelerators.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. NVIDIA: data sheets of the
A100 (80 GB SXM), H100 (SXM) and H200 (SXM), dense figures, without sparsity.
What a program can reach is less; `vit-jax bench step` measures it.
"""
from typing import NamedTuple

from vit_jax import choices


class Chip(NamedTuple):
  """One chip.

  Attributes:
    flops: dense bfloat16 FLOP/s.
    memory: bytes of device memory.
    bandwidth: of it, bytes/s.
    network: bytes/s to its neighbours in one direction, half of what the data
      sheets add up: ICI; NVLink, which ends at the node.
    platform: JAX's, 'tpu' or 'gpu'.
  """
  flops: float
  memory: float
  bandwidth: float
  network: float
  platform: str


GiB = 2**30
CHIPS = {
    'v4': Chip(275e12, 32 * GiB, 1228e9, 150e9, 'tpu'),
    'v5e': Chip(197e12, 16 * GiB, 819e9, 100e9, 'tpu'),
    'v5p': Chip(459e12, 95 * GiB, 2765e9, 300e9, 'tpu'),
    'v6e': Chip(918e12, 32 * GiB, 1640e9, 224e9, 'tpu'),
    'a100': Chip(312e12, 80e9, 2039e9, 300e9, 'gpu'),
    'h100': Chip(989e12, 80e9, 3350e9, 450e9, 'gpu'),
    'h200': Chip(989e12, 141e9, 4800e9, 450e9, 'gpu'),
}
# Beginnings of JAX's `device_kind`; the longer ones first.
_KINDS = {
    'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p',
    'TPU v6': 'v6e', 'NVIDIA A100-SXM4-80GB': 'a100',
    'NVIDIA H100 80GB HBM3': 'h100', 'NVIDIA H200': 'h200'}


def named(name):
  """Returns the `Chip` of a name; ValueError for one that is not in CHIPS."""
  return choices.pick(CHIPS, name, 'device kind')


def of(device_kind):
  """The `Chip` of a device's `device_kind`, or None for one not listed."""
  for start, name in _KINDS.items():
    if device_kind.startswith(start):
      return CHIPS[name]
  return None
