"""Models: jax and flax only; they know no data, mesh or config file."""
