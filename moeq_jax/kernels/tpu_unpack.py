"""Packed words to bfloat16 rows inside a TPU kernel.

A field of less than 8 bits becomes a bfloat16 by placing it in the mantissa of 128: `0x4300 | code` is `128 + code`,
exactly. Two rows are made at a time in the halves of a word, so a field costs a shift, an `and` and an `or` per pair,
and the 128 goes where the zero goes, into a subtraction that is there anyway. (The trick is that of "Who Says Elephants
Can't Run", Kim et al. 2022, and of Marlin, there in half precision on GPUs; TPUs have it by way of the row pairs of
`tpu_view`.) 8-bit codes do not fit into 7 bits of mantissa and are converted; 16-bit blocks are two byte planes that
only need to be joined.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from moeq_jax.kernels.tpu_view import BLOCK

PAIR = 0x00010001
ONE_HUNDRED_TWENTY_EIGHT = 0x43004300  # two bfloat16
EVEN = 0x00FF00FF
ODD = 0xFF00FF00


def bias(bits: int) -> float:
  """What `unpack` adds to every code."""
  return 128.0 if bits < 8 else 0.0


def blocks(k_tile: int, bits: int) -> int:
  """Word blocks of one K-tile."""
  return k_tile * bits // (8 * BLOCK)


def unpack(words: jax.Array, bits: int) -> jax.Array:
  """One K-tile.

  Args:
    words: `[blocks(k_tile, bits), 8, n]` uint32.
    bits: 1, 2, 3, 4, 8 or 16.

  Returns:
    `[k_tile, n]` bfloat16: codes plus `bias(bits)`, or the weights themselves at 16 bits.
  """
  words = [words[index] for index in range(len(words))]
  pairs = {3: _three, 8: _eight, 16: _sixteen}.get(bits)
  pairs = _field(words, bits) if pairs is None else pairs(words)
  return jnp.concatenate([pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs], axis=0)


def _u32(value: int) -> jax.Array:
  return jnp.uint32(value)


def _shift(word: jax.Array, by: int) -> jax.Array:
  """Right by `by`, left if it is negative."""
  return word if by == 0 else word >> _u32(by) if by > 0 else word << _u32(-by)


def _field(words: list[jax.Array], bits: int) -> list[jax.Array]:
  mask, out = _u32((2**bits - 1) * PAIR), []
  for low in range(0, 8, bits):
    for word in words:
      out += [(_shift(word, low + half) & mask) | _u32(ONE_HUNDRED_TWENTY_EIGHT) for half in (0, 8)]
  return out


def _three(words: list[jax.Array]) -> list[jax.Array]:
  """A 2-bit tile, then a 1-bit tile; both in eighths, so that the fields meet."""
  eighth, out = len(words) // 3, []
  for part in range(8):
    for index in range(eighth):
      low = _shift(words[part % 2 * eighth + index], part // 2 * 2)
      high = _shift(words[2 * eighth + index], part - 2)
      both = (low & _u32(0x03030303)) | (high & _u32(0x04040404))
      out += [(_shift(both, half) & _u32(EVEN)) | _u32(ONE_HUNDRED_TWENTY_EIGHT) for half in (0, 8)]
  return out


def _eight(words: list[jax.Array]) -> list[jax.Array]:
  """Codes below 256 are exact in bfloat16, the upper half of a float32: two of them are joined into a pair."""
  out = []
  for word in words:
    for half in (0, 8):
      low, high = (((word >> _u32(half + by)) & _u32(0xFF)).astype(jnp.int32).astype(jnp.float32) for by in (0, 16))
      out.append(pltpu.bitcast(low, jnp.uint32) >> _u32(16) | pltpu.bitcast(high, jnp.uint32))
  return out


def _sixteen(words: list[jax.Array]) -> list[jax.Array]:
  """Low bytes, then high bytes."""
  rows, out = len(words) // 2, []
  for low, high in zip(words[:rows], words[rows:], strict=True):
    out += [(low & _u32(EVEN)) | (high & _u32(EVEN)) << _u32(8), (low >> _u32(8) & _u32(EVEN)) | (high & _u32(ODD))]
  return out
