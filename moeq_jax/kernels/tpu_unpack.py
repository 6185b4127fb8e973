"""Packed words to rows of codes inside a TPU kernel, from either order of bytes in a word (`tpu_view.py`).

In order, a shift and an `and` of a word give 32 rows of int8, which the chip converts to bfloat16.

In pairs, a field of less than 8 bits becomes a bfloat16 by placing it in the mantissa of 128: `0x4300 | code` is `128 +
code`, exactly. Two rows are made at a time in the halves of a word, so a field costs a shift, an `and` and an `or` per
pair, and the 128 goes where the zero goes, into a subtraction that is there anyway. (The trick is that of "Who Says
Elephants Can't Run", Kim et al. 2022, and of Marlin, there in half precision on GPUs; TPUs have it by way of the row
pairs of `tpu_view`.) 8-bit codes do not fit into 7 bits of mantissa and are converted from int16. 16-bit weights,
always in pairs, are two byte planes that only need to be joined.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from moeq_jax.kernels.tpu_view import BLOCK

BYTES = 0x01010101
PAIR = 0x00010001
ONE_HUNDRED_TWENTY_EIGHT = 0x43004300  # two bfloat16
EVEN = 0x00FF00FF
ODD = 0xFF00FF00


def bias(bits: int, paired: bool) -> float:
  """What `codes` adds to every code."""
  return 128.0 if paired and bits < 8 else 0.0


def blocks(k_tile: int, bits: int) -> int:
  """Word blocks of one K-tile."""
  return k_tile * bits // (8 * BLOCK)


def codes(words: jax.Array, bits: int, paired: bool) -> list[jax.Array]:
  """One K-tile, in pieces of some rows each, in order.

  Args:
    words: `[blocks(k_tile, bits), 8, n]` uint32.
    bits: 1, 2, 3, 4, 8 or 16.
    paired: the order of the words (`tpu_view.View.paired`).

  Returns:
    Codes plus `bias(bits, paired)` as `[16, n]` bfloat16 or int16 or as `[32, n]` int8 or uint8, or the weights
    themselves as `[16, n]` bfloat16 at 16 bits.
  """
  words = [words[index] for index in range(len(words))]
  if bits == 16:
    return [pltpu.bitcast(pair, jnp.bfloat16) for pair in _sixteen(words)]
  if bits == 8:
    eight = [_shift(word, half) & _u32(EVEN) for word in words for half in (0, 8)] if paired else words
    return [pltpu.bitcast(word, jnp.int16 if paired else jnp.uint8) for word in eight]
  if bits == 3:
    words, bits = _four_of_three(words), 4
  if not paired:
    return [pltpu.bitcast(field, jnp.int8) for field in _fields(words, bits, (0,), BYTES)]
  pairs = _fields(words, bits, (0, 8), PAIR)
  return [pltpu.bitcast(pair | _u32(ONE_HUNDRED_TWENTY_EIGHT), jnp.bfloat16) for pair in pairs]


def unpack(words: jax.Array, bits: int, paired: bool) -> jax.Array:
  """`[k_tile, n]` bfloat16: all pieces of `codes`, joined."""
  return jnp.concatenate([piece.astype(jnp.bfloat16) for piece in codes(words, bits, paired)], axis=0)


def _u32(value: int) -> jax.Array:
  return jnp.uint32(value)


def _shift(word: jax.Array, by: int) -> jax.Array:
  """Right by `by`, left if it is negative."""
  return word if by == 0 else word >> _u32(by) if by > 0 else word << _u32(-by)


def _fields(words: list[jax.Array], bits: int, halves: tuple[int, ...], ones: int) -> list[jax.Array]:
  """One code wherever `ones` has a one: every field of every word, from each of the `halves`."""
  mask = _u32((2**bits - 1) * ones)
  return [_shift(word, low + half) & mask for low in range(0, 8, bits) for word in words for half in halves]


def _four_of_three(words: list[jax.Array]) -> list[jax.Array]:
  """A 3-bit tile as a 4-bit tile: two codes of the 2-bit tile and their two bits of the 1-bit tile at a time.

  In eighths of the K-tile, codes i and i + 4 (i below 4) are the two halves of a byte of 4-bit codes. Their low bits
  lie 4 bits apart in eighth `i % 2` of the 2-bit tile's bytes, and so do their high bits in the 1-bit tile.
  """
  eighth, out = len(words) // 3, []
  for part in range(4):
    for index in range(eighth):
      low = _shift(words[part % 2 * eighth + index], part // 2 * 2)
      high = _shift(words[2 * eighth + index], part - 2)
      out.append((low & _u32(0x33 * BYTES)) | (high & _u32(0x44 * BYTES)))
  return out


def _sixteen(words: list[jax.Array]) -> list[jax.Array]:
  """Low bytes, then high bytes."""
  rows, out = len(words) // 2, []
  for low, high in zip(words[:rows], words[rows:], strict=True):
    out += [(low & _u32(EVEN)) | (high & _u32(EVEN)) << _u32(8), (low >> _u32(8) & _u32(EVEN)) | (high & _u32(ODD))]
  return out
