"""Data sheets of the accelerators that plans and benchmarks speak of."""
from typing import NamedTuple

from vit_jax import choices


class Chip(NamedTuple):
  """One accelerator.

  Attributes:
    flops: bfloat16 FLOP/s, dense.
    memory: bytes of device memory.
    bandwidth: bytes/s of it.
    network: bytes/s to its neighbours, in one direction: half of what the data
      sheets add up. GPUs: within a node (NVLink).
    platform: JAX's, 'tpu' or 'gpu'.
  """
  flops: float
  memory: float
  bandwidth: float
  network: float
  platform: str


# cloud.google.com/tpu/docs (system architecture of each version); NVIDIA's data
# sheets of the SXM modules.
CHIPS = {
    'v4': Chip(275e12, 32e9, 1.228e12, 150e9, 'tpu'),
    'v5e': Chip(197e12, 16e9, 0.819e12, 100e9, 'tpu'),
    'v5p': Chip(459e12, 95e9, 2.765e12, 300e9, 'tpu'),
    'v6e': Chip(918e12, 32e9, 1.640e12, 224e9, 'tpu'),
    'a100': Chip(312e12, 80e9, 2.039e12, 300e9, 'gpu'),
    'h100': Chip(989e12, 80e9, 3.35e12, 450e9, 'gpu'),
    'h200': Chip(989e12, 141e9, 4.8e12, 450e9, 'gpu'),
}
# What JAX calls them, in device_kind.
_KINDS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e',
          'TPU v5': 'v5p', 'TPU v5p': 'v5p', 'TPU v6 lite': 'v6e',
          'TPU v6e': 'v6e'}


def named(name):
  """Returns the `Chip` of a name; ValueError for one that is not in CHIPS."""
  return choices.pick(CHIPS, name, 'device kind')


def of_device(kind):
  """Returns the `Chip` of a JAX device's `device_kind`, or None."""
  name = _KINDS.get(kind) or next(
      (name for name in CHIPS if name.upper() in kind.upper()), None)
  return CHIPS.get(name)
