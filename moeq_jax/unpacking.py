"""Reading a QTensor in jax, with bits as data: some columns of one expert, dequantized or as codes.

The letters are those of `qtensor.py`; a `q` here is a QTensor of one shard.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moeq_jax import planar

WIDTHS = planar.WIDTHS


def _map_blocks(q: Any, index: jax.Array, column: jax.Array, width: int,
                use: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
  """Reads some columns of one expert, K-block by K-block: the only jax code that finds the packed bytes.

  Args:
    q: weights of one shard.
    index: int32 scalar, the expert; may be traced.
    column: int32 scalar, first column, a multiple of `width`; may be traced.
    width: columns; divides the stripe.
    use: `(bits, bytes [k_block bits / 8, width] uint8, scale [G', width], zero [G', width]) -> array` with the G' scale
      groups of the K-block, bfloat16; traced for every width, run for the block's own.

  Returns:
    The results, the scales and the zeros (`[KB, G', width]`, not to be read where a block has 16 bits), and the widths
    `[KB]`, each stacked over K-blocks.
  """
  (_, k_blocks, stripes), (_, rows, stripe) = q.blocks, q.buffer.shape
  groups = 1 if q.groups == 1 else q.k_block // q.group
  missing = 0 if q.groups == 1 else k_blocks * groups - q.groups, stripes * stripe - q.N
  scale, zero = (jnp.pad(a, ((0, 0), (0, missing[0]), (0, missing[1]))) for a in (q.scale, q.zero))
  widths = [b for b in WIDTHS if q.k_block * b // 8 <= rows]

  def block(k: jax.Array) -> tuple[jax.Array, ...]:
    place = index, k, column // stripe
    group = jnp.minimum(k * groups, scale.shape[1] - groups)
    entry = [lax.dynamic_slice(a, (index, group, column), (1, groups, width))[0] for a in (scale, zero)]

    def branch(bits: int) -> jax.Array:
      raw = lax.dynamic_slice(q.buffer[0], (q.offset[place], column % stripe), (q.k_block * bits // 8, width))
      return use(bits, raw, *entry)

    choice = jnp.sum(q.bits[place] > jnp.array(widths))
    return lax.switch(choice, [functools.partial(branch, bits) for bits in widths]), *entry, q.bits[place]

  if k_blocks == 1:  # a loop of one step is not free
    return jax.tree.map(lambda a: a[None], block(jnp.int32(0)))
  return lax.map(block, jnp.arange(k_blocks))


def columns(q: Any, index: jax.Array, column: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
  """Dequantizes some columns of one expert.

  Args:
    q: weights of one shard.
    index: int32 scalar, the expert; may be traced.
    column: int32 scalar, first column, a multiple of `width`; may be traced.
    width: columns; divides the stripe.
    dtype: of the result; the arithmetic is float32.

  Returns:
    `[K, width]`; columns past N (in a last stripe that is not full) hold no weight.
  """
  def values(bits: int, raw: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    return _rounded_to(dtype, _values(raw, bits, q.k_tile, scale, zero))

  return _map_blocks(q, index, column, width, values)[0].reshape(-1, width)[: q.K]


def codes(q: Any, index: jax.Array, column: jax.Array, width: int,
          dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The codes of some columns of one expert, for products in which scales and zeros come last.

  Args:
    q, index, column, width: as for `columns`.
    dtype: bfloat16, or int8, in which 16-bit blocks are zeros.

  Returns:
    `codes [KB k_block, width]` in `dtype`, and float32 `scale` and `zero`, `[KB G', width]` with the G' scale groups of
    a K-block, such that the weights are `(codes - zero) * scale`. Codes are centred, from `-2^(bits-1)`, so that little
    cancels; in bfloat16 the codes of 16-bit blocks are the weights, with scale 1 and zero 0.
  """
  def signed(bits: int, raw: jax.Array, *_: jax.Array) -> jax.Array:
    if bits == 16:
      return planar.decode_bfloat16(raw, q.k_tile) if dtype == jnp.bfloat16 else jnp.zeros((q.k_block, width), dtype)
    found = lax.bitcast_convert_type(_block_codes(raw, bits, q.k_tile) - np.uint8(2 ** (bits - 1)), jnp.int8)
    if dtype == jnp.int8:
      return found
    words = lax.bitcast_convert_type(found.astype(jnp.float32), jnp.uint32)  # 8 bits are exact in bfloat16
    return lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)

  found, scale, zero, bits = _map_blocks(q, index, column, width, signed)
  bits, wide = bits[:, None, None], (bits == 16)[:, None, None]
  scale = jnp.where(wide, 1.0 if dtype == jnp.bfloat16 else 0.0, scale.astype(jnp.float32))
  zero = jnp.where(wide, 0.0, zero.astype(jnp.float32) - (1 << bits) // 2)
  return found.reshape(-1, width), scale.reshape(-1, width), zero.reshape(-1, width)


def _rounded_to(dtype: jnp.dtype, values: jax.Array) -> jax.Array:
  """`values.astype(dtype)` for finite float32 values (and infinities); the conversion to bfloat16 that XLA:CPU emits
  also looks for NaNs, element by element, and made a third of the time of dequantizing."""
  if values.dtype != jnp.float32 or dtype != jnp.bfloat16:
    return values.astype(dtype)
  bits = lax.bitcast_convert_type(values, jnp.uint32)
  nearest = (bits + (np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1)))) >> 16  # ties to even
  return lax.bitcast_convert_type(nearest.astype(jnp.uint16), jnp.bfloat16)


def _block_codes(raw: jax.Array, bits: int, k_tile: int) -> jax.Array:
  """Bytes of one block, `[k_block bits / 8, n]`, `bits` below 16 -> codes `[k_block, n]` uint8."""
  # A byte row of a 3-bit tile is read by many fields: without a barrier its slice is fused into every reader.
  return planar.decode(lax.optimization_barrier(raw) if bits == 3 else raw, bits, k_tile)


def _values(raw: jax.Array, bits: int, k_tile: int, scale: jax.Array, zero: jax.Array) -> jax.Array:
  """Bytes of one block, `[k_block bits / 8, n]`, and its scales `[groups, n]` -> values `[k_block, n]`."""
  if bits == 16:
    return planar.decode_bfloat16(raw, k_tile)
  grouped = _block_codes(raw, bits, k_tile).reshape(scale.shape[0], -1, raw.shape[1]).astype(jnp.float32)
  scale, zero = (a.astype(jnp.float32)[:, None] for a in (scale, zero))
  return ((grouped - zero) * scale).reshape(-1, raw.shape[1])
