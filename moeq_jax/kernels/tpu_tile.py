"""One K-tile of packed weights times some rows, inside a TPU kernel: the arithmetic, without copies and loops.

Scales after the dot: `sum_k x_k (c_k - z) s = s (sum_k x_k c_k - z sum_k x_k)`, per group; exact codes meet the rows,
and the work of scaling is in proportion to the rows. Scales before the dot: work in proportion to the weights, whatever
the number of rows, and what is dequantized can be used again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from moeq_jax.kernels import tpu_unpack

PASS = 256  # rows of K that are multiplied at a time; the depth of the matrix unit of v6e, twice that of v5e


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` in float32; all of float32's digits if that is what `a` has."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def passes(a: jax.Array, b: jax.Array) -> list[jax.Array]:
  """The products of `dot(a, b)` over `PASS` rows of `b` at a time, whose sum it is."""
  return [dot(a[:, k : k + PASS], b[k : k + PASS]) for k in range(0, b.shape[0], PASS)]


def scaled_after(rows: jax.Array, words: jax.Array, grid: jax.Array, bits: int, group: int) -> jax.Array:
  """The product, scaled after each group's dot.

  Args:
    rows: `[rows, k_tile]` float32 or bfloat16.
    words: `[blocks, 8, n]` uint32, see `tpu_unpack.unpack`.
    grid: `[groups, n]` uint32, scale and zero (`tpu_view.View.grid`).
    bits: width.
    group: rows of K that share a scale.

  Returns:
    `[rows, n]` float32.
  """
  codes = tpu_unpack.unpack(words, bits).astype(rows.dtype)
  if bits == 16:
    return dot(rows, codes)
  scale, zero = _scale_and_zero(grid)
  if rows.dtype == jnp.float32:  # x * 128 would cost a float32 sum two of its digits
    codes -= tpu_unpack.bias(bits)
  else:
    zero += tpu_unpack.bias(bits)
  products = []
  for index in range(grid.shape[0]):
    part = rows[:, index * group : (index + 1) * group]
    total = jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True)
    product = dot(part, codes[index * group : (index + 1) * group])
    products.append(scale[index : index + 1] * (product - total * zero[index : index + 1]))
  return functools.reduce(jnp.add, products)


def dequantized(words: jax.Array, grid: jax.Array, bits: int, group: int, dtype: jnp.dtype) -> jax.Array:
  """`[k_tile, n]` weights in `dtype`; arguments as in `scaled_after`.

  The arithmetic is float32, but bfloat16 where the vector unit has it (v6e and later) and `dtype` is that; codes are
  exact there, the difference to the zero and the product are each rounded once.
  """
  codes = tpu_unpack.unpack(words, bits)
  if bits == 16:
    return codes.astype(dtype)
  short = dtype == jnp.bfloat16 and pltpu.get_tpu_info().generation >= 6
  kind = jnp.bfloat16 if short else jnp.float32
  scale, zero = _scale_and_zero(grid)
  bias = tpu_unpack.bias(bits)
  parts = []
  for index in range(grid.shape[0]):
    part = codes[index * group : (index + 1) * group].astype(kind)
    if short and bias:
      part -= jnp.bfloat16(bias)
    offset = zero[index : index + 1] + (0 if short else bias)
    parts.append(((part - offset.astype(kind)) * scale[index : index + 1].astype(kind)).astype(dtype))
  return jnp.concatenate(parts, axis=0)


def _scale_and_zero(grid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[groups, n]` float32 each."""
  scale = pltpu.bitcast(grid & jnp.uint32(0xFFFF0000), jnp.float32)
  return scale, pltpu.bitcast(grid << jnp.uint32(16), jnp.float32)
