"""Forms of a convolution that share its kernel, for `nn.Conv`.

vmap over kernels, as in a population, makes one grouped convolution of many:
slow on CPUs, as is any convolution in a loop's body (jax-ml/jax#12868). A
matmul becomes a batched matmul and knows neither.
"""
import jax
import jax.numpy as jnp


def im2col(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding,
           **unused) -> jax.Array:
  """A convolution as strided slices and one matmul.

  The patches that the matmul reads take rows * columns / stride^2 times the
  memory of x: 2.25 times for 3x3 with stride 2.

  Args:
    x: [B, H, W, C].
    kernel: [rows, columns, C, D].
    strides: of rows and columns.
    padding: 'SAME', 'VALID', or (before, after) of rows and of columns.
    **unused: what `nn.Conv` says besides; the models here have neither
      dilations nor groups.

  Returns:
    [B, h, w, D].
  """
  del unused
  rows, columns, channels, features = kernel.shape
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
        x.shape[1:3], (rows, columns), strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  h, w = ((size - k) // s + 1 for size, k, s in zip(
      x.shape[1:3], (rows, columns), strides, strict=True))
  if (rows, columns) == tuple(strides):  # no pixel is in two patches
    x = x[:, :h * rows, :w * columns]
    x = x.reshape(-1, h, rows, w, columns, channels).transpose(0, 1, 3, 2, 4, 5)
    patches = x.reshape(-1, h, w, rows * columns * channels)
  else:
    down, right = strides
    patches = jnp.concatenate(
        [x[:, i:i + (h - 1) * down + 1:down, j:j + (w - 1) * right + 1:right]
         for i in range(rows) for j in range(columns)], axis=-1)
  return patches @ kernel.reshape(-1, features)


FORMS = {'xla': jax.lax.conv_general_dilated, 'im2col': im2col}
