"""ViT with patchify and convolutional stems, and AugReg, in JAX/Flax."""
