"""Reading a QTensor in jax, with bits as data: some columns of one expert, dequantized or as codes.

A K-tile is eight *eighths* of `k_tile / 8` weight rows, and with b bits it is b *planes* of as many byte rows: field j
of plane i holds eighth `j b + i` (`planar.py`). Where a weight's byte lies, and which of its bits, is thus the same for
all weights of a *slab*, some rows of an eighth in one stripe. So widths need no branch: one gather of byte rows, and a
shift and a mask that differ from slab to slab, read blocks of any mix of widths at once, into one array of full width.
3 bits have a second byte row, that of bit 2, and 16 bits are two byte rows and no code: tiles without such blocks leave
the second one out.

The letters are those of `qtensor.py`; a `q` here is a QTensor of one shard.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class _Slabs(NamedTuple):
  """Where the weights of some columns of one expert are: rows are A groups of B slabs of C, columns S stripes of W.

  Attributes:
    place: `[A, B, 1, S, 2]` int32, buffer rows where the bytes of a slab begin: those with the low bits, and those with
      bit 2 of 3 bits or bits 8-15 of 16 (for other widths, the first again).
    field: `[A, B, 1, S, 3]` uint8: where in a low byte the code begins; the mask of its low bits, 0 for 16 bits; the
      bit of the other byte that is bit 2 of 3 bits, 0 for other widths.
    column: int32 scalar, the first column in the buffer.
    kind: int32 scalar, 2 if any width is 16, else 1 if any is 3, else 0.
    rows, columns: C, W.
  """

  place: jax.Array
  field: jax.Array
  column: jax.Array
  kind: jax.Array
  rows: int
  columns: int


def _find(q: Any, index: jax.Array, column: jax.Array, width: int) -> _Slabs:
  """Finds the packed bytes, the only jax code that does; the arguments are those of `columns`."""
  (_, k_blocks, _), stripe, eighth = q.blocks, q.buffer.shape[2], q.k_tile // 8
  group, stripes = q.k_block if q.groups == 1 else q.group, max(1, width // stripe)
  rows = math.gcd(group, eighth)  # views of TPUs, turned back, have K-tiles whose eighths are not whole groups
  shape = k_blocks * q.k_block // group, group // rows, 1, stripes, 1
  first = np.arange(0, k_blocks * q.k_block, rows, dtype=np.int32).reshape(*shape[:2], 1, 1, 1) % q.k_block
  tile, number, rest = first // q.k_tile, first % q.k_tile // eighth, first % eighth  # rows of a K-block
  mine = [lax.dynamic_slice(a, (index, 0, column // stripe), (1, k_blocks, stripes))[0] for a in (q.bits, q.offset)]
  bits, offset = (jnp.repeat(a, q.k_block // rows, axis=0).reshape(shape) for a in mine)
  planes = jnp.where(bits == 3, 2, jnp.minimum(bits, 8))
  start, plane = offset + eighth * bits * tile + rest, number & (planes - 1)
  second = jnp.where(bits == 16, 8 + plane, jnp.where(bits == 3, 2, plane))
  place = start + eighth * jnp.where(_along(2, -1) == 0, plane, second)
  mask, third = jnp.where(bits == 16, 0, (1 << planes) - 1), jnp.where(bits == 3, 1 << number, 0)
  field = jnp.where(_along(3, -1) == 0, number - plane, jnp.where(_along(3, -1) == 1, mask, third))
  # without the barrier, XLA would compute all of this again for every weight
  place, field = lax.optimization_barrier((place, field.astype(jnp.uint8)))
  kind = jnp.max(jnp.where(mine[0] == 16, 2, jnp.where(mine[0] == 3, 1, 0)))
  return _Slabs(place, field, column % stripe, kind, rows, min(width, stripe))


def _along(count: int, axis: int) -> np.ndarray:
  """The numbers below `count` along one of five axes."""
  shape = [1] * 5
  shape[axis] = count
  return np.arange(count, dtype=np.int32).reshape(shape)


def _bytes(q: Any, slabs: _Slabs, which: int) -> jax.Array:
  """The bytes `[A, B, C, S, W]`, 0: with the low bits, 1: with the others."""
  row = slabs.place[..., which, None] + _along(slabs.rows, 2)
  start = jnp.concatenate([row, jnp.broadcast_to(slabs.column, row.shape)], axis=-1)
  numbers = lax.GatherDimensionNumbers(offset_dims=(4,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
  return lax.gather(q.buffer[0], start, numbers, (1, slabs.columns), mode="promise_in_bounds")


def _codes(q: Any, slabs: _Slabs, three: bool) -> jax.Array:
  """`[A, B, C, S, W]` uint8, zeros where the width is 16; no width is 3 unless `three`."""
  shift, mask, third = (slabs.field[..., number, None] for number in range(3))
  low = _bytes(q, slabs, 0) >> shift & mask
  return low | jnp.where(_bytes(q, slabs, 1) & third != 0, np.uint8(4), np.uint8(0)) if three else low


def _of_codes(q: Any, slabs: _Slabs, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`make(codes)`, of zeros where the width is 16."""
  return lax.cond(slabs.kind > 0, lambda: make(_codes(q, slabs, True)), lambda: make(_codes(q, slabs, False)))


def _of_codes_or_weights(q: Any, slabs: _Slabs, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`make(codes)`, but the weights themselves where the width is 16."""
  def weights() -> jax.Array:
    made, (low, high) = make(_codes(q, slabs, True)), (_bytes(q, slabs, which).astype(jnp.uint16) for which in range(2))
    weights = lax.bitcast_convert_type(low | high << np.uint16(8), jnp.bfloat16)
    return jnp.where(slabs.field[..., 1, None] == 0, weights.astype(made.dtype), made)

  return lax.switch(slabs.kind, [lambda: make(_codes(q, slabs, False)), lambda: make(_codes(q, slabs, True)), weights])


def _grid(q: Any, index: jax.Array, column: jax.Array, slabs: _Slabs) -> list[jax.Array]:
  """Scales and zeros, `[A, 1, 1, S, W]` float32."""
  entries, _, _, stripes, _ = slabs.place.shape
  missing = 0 if q.groups == 1 else entries - q.groups, q.blocks[2] * q.buffer.shape[2] - q.N
  found = []
  for a in (q.scale, q.zero):
    a = jnp.pad(a, ((0, 0), (0, missing[0]), (0, missing[1])))
    mine = lax.dynamic_slice(a, (index, 0, column), (1, a.shape[1], stripes * slabs.columns))[0]
    mine = jnp.broadcast_to(mine, (entries, mine.shape[1])).astype(jnp.float32)
    found.append(mine.reshape(entries, 1, 1, stripes, slabs.columns))
  return found


def columns(q: Any, index: jax.Array, column: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
  """Dequantizes some columns of one expert.

  Args:
    q: weights of one shard.
    index: int32 scalar, the expert; may be traced.
    column: int32 scalar, first column, a multiple of `width`; may be traced.
    width: columns; divides the stripe, or is that of several stripes.
    dtype: of the result; the arithmetic is float32.

  Returns:
    `[K, width]`; columns past N (in a last stripe that is not full) hold no weight.
  """
  slabs = _find(q, index, column, width)

  def values(found: jax.Array) -> jax.Array:
    scale, zero = _grid(q, index, column, slabs)
    return _rounded_to(dtype, (found.astype(jnp.float32) - zero) * scale)

  return _of_codes_or_weights(q, slabs, values).reshape(-1, width)[: q.K]


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
  slabs = _find(q, index, column, width)
  mask, third = slabs.field[..., 1, None], slabs.field[..., 2, None]
  middle = jnp.where(third != 0, np.uint8(4), (mask >> 1) + (mask & 1))

  def centred(found: jax.Array) -> jax.Array:
    found = lax.bitcast_convert_type(found - middle, jnp.int8)
    if dtype == jnp.int8:
      return found
    words = lax.bitcast_convert_type(found.astype(jnp.float32), jnp.uint32)  # 8 bits are exact in bfloat16
    return lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)

  found = (_of_codes if dtype == jnp.int8 else _of_codes_or_weights)(q, slabs, centred)
  scale, zero = _grid(q, index, column, slabs)
  scale = jnp.where(mask[:, :1] == 0, 1.0 if dtype == jnp.bfloat16 else 0.0, scale)
  zero = jnp.where(mask[:, :1] == 0, 0.0, zero - middle[:, :1].astype(jnp.float32))
  # stripes joined before they are in memory would be joined weight by weight
  return tuple(a.reshape(-1, width) for a in lax.optimization_barrier((found, scale, zero)))


def _rounded_to(dtype: jnp.dtype, values: jax.Array) -> jax.Array:
  """`values.astype(dtype)` for finite float32 values (and infinities); the conversion to bfloat16 that XLA:CPU emits
  also looks for NaNs, element by element, and made a third of the time of dequantizing."""
  if values.dtype != jnp.float32 or dtype != jnp.bfloat16:
    return values.astype(dtype)
  bits = lax.bitcast_convert_type(values, jnp.uint32)
  nearest = (bits + (np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1)))) >> 16  # ties to even
  return lax.bitcast_convert_type(nearest.astype(jnp.uint16), jnp.bfloat16)
