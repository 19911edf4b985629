"""What the makers' data sheets say of accelerators.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. NVIDIA: data sheets of the
A100 (80 GB SXM), H100 (SXM) and H200 (SXM), dense figures, without sparsity.
What a program can reach is less; `vit-jax bench step` measures it.
"""
from typing import NamedTuple


class Chip(NamedTuple):
  """One chip.

  Attributes:
    flops: dense bfloat16 FLOP/s.
    memory: bytes of HBM.
    bandwidth: of HBM, bytes/s.
    interconnect: bytes/s to other chips: of a TPU all links of ICI, one way; of
      a GPU NVLink, both ways, as its maker counts.
  """
  flops: float
  memory: float
  bandwidth: float
  interconnect: float


GiB = 2**30
CHIPS = {
    'v4': Chip(275e12, 32 * GiB, 1228e9, 300e9),
    'v5e': Chip(197e12, 16 * GiB, 819e9, 200e9),
    'v5p': Chip(459e12, 95 * GiB, 2765e9, 600e9),
    'v6e': Chip(918e12, 32 * GiB, 1640e9, 448e9),
    'a100': Chip(312e12, 80e9, 2039e9, 600e9),
    'h100': Chip(989e12, 80e9, 3350e9, 900e9),
    'h200': Chip(989e12, 141e9, 4800e9, 900e9),
}
# Beginnings of JAX's `device_kind`; the longer ones first.
_KINDS = {
    'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p',
    'TPU v6': 'v6e', 'NVIDIA A100-SXM4-80GB': 'a100',
    'NVIDIA H100 80GB HBM3': 'h100', 'NVIDIA H200': 'h200'}


def of(device_kind):
  """The `Chip` of a device's `device_kind`, or None for one not listed."""
  for start, name in _KINDS.items():
    if device_kind.startswith(start):
      return CHIPS[name]
  return None
