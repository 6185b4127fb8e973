"""Products of rows with codes, whose scales and zeros come after: for few rows, where dequantizing costs the most.

With weights `(code - zero) * scale` per group of K,

  y = sum over groups of scale * (sum(x code) - zero sum(x)),

so what is unpacked are small integers, which are exact in bfloat16 and in int8, and the work on scales grows with the
rows and not with the weights. The groups are one batched product; their sum is written out, term by term, because one
fused loop takes a third of the time of a reduction (experiments/LOG.md).

The rows may be bfloat16; float32, as three bfloat16 parts that sum to them exactly; or 8-bit codes with a scale per
group, and then no weight ever becomes a float.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import unpacking
from moeq_jax.kernels import cpu_loop
from moeq_jax.qtensor import QTensor

TERMS = 16  # of a sum that is written out


class Rows(NamedTuple):
  """Rows that meet codes: inputs cut into A groups of `size`; a pytree.

  Attributes:
    parts: `[A, P, T, size]` bfloat16 or int8; their sum over P, times `scale`, are the rows.
    scale: `[A, T]` float32, or None for 1.
    sums: `[A, T]` float32, of the rows over each group.
  """

  parts: jax.Array
  scale: jax.Array | None
  sums: jax.Array


def grouped(x: jax.Array, q: QTensor, size: int) -> jax.Array:
  """Rows `[T, K]` -> `[A, T, size]`, K padded with zeros to whole K-blocks."""
  padding = q.blocks[1] * q.k_block - q.K
  return jnp.pad(x, ((0, 0), (0, padding))).reshape(len(x), -1, size).swapaxes(0, 1)


def exact(x: jax.Array, q: QTensor) -> Rows:
  """Float32 or bfloat16 rows `[T, K]`."""
  x = grouped(x, q, q.k_block if q.groups == 1 else q.group)
  if x.dtype == jnp.bfloat16:
    return Rows(x[:, None], None, jnp.sum(x.astype(jnp.float32), axis=-1))
  parts, rest = [], x
  for _ in range(3):
    parts.append(lax.reduce_precision(rest, 8, 7))
    rest = rest - parts[-1]
  return Rows(jnp.stack(parts, axis=1).astype(jnp.bfloat16), None, jnp.sum(x, axis=-1))


def quantized(x: jax.Array, q: QTensor, size: int) -> Rows:
  """Rows `[T, K]`, rounded to 8 bits per `size` inputs, symmetrically: `x ~ s x_q` with `s = max |x| / 127`."""
  x = grouped(x, q, size).astype(jnp.float32)
  most = jnp.max(jnp.abs(x), axis=-1)
  scale = jnp.where(most > 0, most / 127, 1.0)
  codes = jnp.round(x / scale[..., None])
  return Rows(codes.astype(jnp.int8)[:, None], scale, jnp.sum(codes, axis=-1) * scale)


def product(rows: Rows, codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
  """Rows times a tile of weights.

  Args:
    rows: R of them.
    codes, scale, zero: as `unpacking.codes` gives them in the dtype of the rows' parts, `[KB k_block, C]`, `[G', C]`.

  Returns:
    `[R, C]` float32.
  """
  groups, parts, count, size = rows.parts.shape
  kind = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
  dots = lax.dot_general(rows.parts.reshape(groups, parts * count, size), codes.reshape(groups, size, -1),
                         (((2,), (1,)), ((0,), (0,))), preferred_element_type=kind)
  dots = dots.reshape(groups, parts, count, -1)
  scale, zero = (jnp.repeat(a, groups // len(a), axis=0)[:, None] for a in (scale, zero))

  def term(mine: slice) -> jax.Array:
    dot = sum(dots[mine, part].astype(jnp.float32) for part in range(parts))
    dot = dot if rows.scale is None else dot * rows.scale[mine, :, None]
    return (dot - zero[mine] * rows.sums[mine, :, None]) * scale[mine]

  step = groups // max(n for n in range(1, TERMS + 1) if groups % n == 0)
  total = sum(term(slice(first, first + step)) for first in range(0, groups, step))
  return total[0] if step == 1 else jnp.sum(total, axis=0)


def forward(rows: Rows, weights: Sequence[QTensor], group_sizes: jax.Array, tiles: cpu_loop.Tiles, y: jax.Array,
            join: cpu_loop.Join, wide: Callable[..., jax.Array] | None = None) -> jax.Array:
  """Writes `join` of the products of `rows` with each of `weights` into `y`.

  Args:
    rows: `T` of them.
    weights: packed weights `[E, K, N]` of one layout (`cpu_loop.alike`).
    group_sizes: `[E]` int32.
    tiles: sizes.
    y: `[T, N]`, N with the padding of the last stripe.
    join: makes one of the products, `[rows, columns]` float32 each.
    wide: `(q, expert, first column, first row) -> [rows, columns]`, what 16-bit blocks add if codes cannot hold them.

  Returns:
    `y`.
  """
  def at(first: jax.Array) -> Rows:
    take = lambda a, axis: None if a is None else lax.dynamic_slice_in_dim(a, first, tiles.rows, axis)
    return Rows(take(rows.parts, 2), take(rows.scale, 1), take(rows.sums, 1))

  def unpack(index: jax.Array, column: jax.Array) -> tuple[Any, ...]:
    return index, [unpacking.codes(q, index, column, tiles.columns, rows.parts.dtype) for q in weights]

  def update(y: jax.Array, tile: tuple[Any, ...], column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
    index, unpacked = tile
    parts = [product(at(first), *codes) for codes in unpacked]
    if wide is not None:
      parts = [part + wide(q, index, column, first) for part, q in zip(parts, weights, strict=True)]
    return cpu_loop.write(y, join(*parts), column, first, keep)

  return cpu_loop.sweep(y, y.shape[1], group_sizes, tiles, unpack, update)
