"""Every test sees 8 fake CPU devices, and implicit rank promotion raises."""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '')
      + ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
