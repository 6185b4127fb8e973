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


def scaled_after(
  rows: jax.Array, words: jax.Array, grid: jax.Array, bits: int, group: int, paired: bool
) -> jax.Array:
  """The product, scaled after each group's dot.

  Args:
    rows: `[rows, k_tile]` float32 or bfloat16.
    words: `[blocks, 8, n]` uint32, see `tpu_unpack.codes`.
    grid: `[groups, n]` uint32, scale and zero (`tpu_view.View.grid`).
    bits: width.
    group: rows of K that share a scale.
    paired: the order of the words.

  Returns:
    `[rows, n]` float32.
  """
  codes, bias = tpu_unpack.unpack(words, bits, paired).astype(rows.dtype), tpu_unpack.bias(bits, paired)
  if bits == 16:
    return dot(rows, codes)
  scale, zero = _scale_and_zero(grid)
  if rows.dtype == jnp.float32:  # x * 128 would cost a float32 sum two of its digits
    codes -= bias
  else:
    zero += bias
  products = []
  for index in range(grid.shape[0]):
    part = rows[:, index * group : (index + 1) * group]
    total = jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True)
    product = dot(part, codes[index * group : (index + 1) * group])
    products.append(scale[index : index + 1] * (product - total * zero[index : index + 1]))
  return functools.reduce(jnp.add, products)


def dequantized(
  words: jax.Array, grid: jax.Array, bits: int, group: int, paired: bool, dtype: jnp.dtype
) -> list[jax.Array]:
  """Weights `[k_tile, n]` in `dtype`, cut along K into the parts that are multiplied at a time.

  The arithmetic is float32, but bfloat16 where the vector unit has it (v6e and later), `dtype` is that and codes are in
  order; codes are exact there, the difference to the zero and the product are each rounded once. Arguments as in
  `scaled_after`.

  A part is converted to `dtype` last, whole: the compiler then lays it out as the matrix unit reads it (a conversion
  piece by piece costs three more operations per register). 3 and 16 bits in pairs are best multiplied a K-tile at a
  time, by the count of `bench kernels_tpu_static`.
  """
  pieces = tpu_unpack.codes(words, bits, paired)
  height = pieces[0].shape[0]
  k_tile = height * len(pieces)
  part = k_tile if paired and bits in (3, 16) else min(PASS, k_tile)
  short = dtype == jnp.bfloat16 and not paired and pltpu.get_tpu_info().generation >= 6
  kind = jnp.bfloat16 if short or bits == 16 else jnp.float32
  scale, zero = _scale_and_zero(grid)
  zero += tpu_unpack.bias(bits, paired)

  def run(start: int, stop: int) -> jax.Array:
    """Rows of one group."""
    weight = jnp.concatenate(pieces[start // height : stop // height], axis=0).astype(kind)
    at = slice(start // group, start // group + 1)
    return weight if bits == 16 else (weight - zero[at].astype(kind)) * scale[at].astype(kind)

  step = min(group, part)
  return [jnp.concatenate([run(k, k + step) for k in range(at, at + part, step)], axis=0).astype(dtype)
          for at in range(0, k_tile, part)]


def _scale_and_zero(grid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[groups, n]` float32 each."""
  scale = pltpu.bitcast(grid & jnp.uint32(0xFFFF0000), jnp.float32)
  return scale, pltpu.bitcast(grid << jnp.uint32(16), jnp.float32)
