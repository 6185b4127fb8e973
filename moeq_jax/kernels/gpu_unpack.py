"""Codes from packed bytes in registers, by masks alone: no shift, because 8-bit shifts have no lowering on Hopper.

Field j of b bits, masked in place and read as a signed byte, is `code * 2**(b j)`: the power of two goes into the
scale. The top field would be negative for large codes; with its highest bit flipped it is
`(code - 2**(b - 1)) * 2**(8 - b)`, which is affine again: the subtracted constant goes into the zero. All values fit
bfloat16 exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


class Unit(NamedTuple):
  """Operand of one fragment of one eighth: weight `(multiplier * operand + offset - zero) * scale`.

  Attributes:
    eighth: which of the eight eighths of the rows it multiplies, 0 to 7.
    operand: `[64, width]` bfloat16, exact integers (the weights themselves for 16 bits).
    multiplier: power of two.
    offset: what must be added to get the code.
  """

  eighth: int
  operand: jax.Array
  multiplier: float
  offset: float


def plane(bits: int | jax.Array, index: int | jax.Array) -> int | jax.Array:
  """The plane that is copied as number `index` of a step: 3 bits begin with the high bit, 16 bits alternate bytes."""
  if isinstance(bits, int):
    return (index + 2) % 3 if bits == 3 else index % 2 * 8 + index // 2 if bits == 16 else index
  three = lax.rem(index + 2, jnp.int32(3))
  sixteen = lax.rem(index, jnp.int32(2)) * 8 + lax.div(index, jnp.int32(2))
  return jnp.where(bits == 3, three, jnp.where(bits == 16, sixteen, index))


def ready(bits: jax.Array, index: jax.Array) -> jax.Array:
  """How many units can be computed once chunk `index` of a step is read, and not before (see `units`)."""
  three = jnp.where(index == 0, 0, 4)
  return jnp.where(bits == 3, three, jnp.where(bits == 16, lax.rem(index, jnp.int32(2)), lax.div(jnp.int32(8), bits)))


def eighth(bits: jax.Array, index: jax.Array) -> jax.Array:
  """The eighth of the rows that unit number `index` of a step multiplies, in the order of `units`."""
  stride = jnp.where(bits == 3, 2, jnp.minimum(bits, 8))
  fields = lax.div(jnp.int32(8), stride)
  return lax.rem(index, fields) * stride + lax.div(index, fields)


def units(bits: int, index: int, read: dict[int, jax.Array]) -> list[Unit]:
  """The units that can be computed once chunk number `index` of a step is read.

  Args:
    bits: width.
    index: number of the chunk, in the order of `plane`.
    read: the chunks read so far, `[64, width]` int8 by plane.

  Returns:
    Every eighth once, over all `index` of a step.
  """
  new = plane(bits, index)
  if bits == 16:
    return [_weights(new - 8, read[new - 8], read[new])] if new >= 8 else []
  if bits == 3:
    return [_three(2 * j + new, read[new], read[2]) for j in range(4)] if new < 2 else []
  return [_field(j * bits + new, read[new], bits, j) for j in range(8 // bits)]


def _masked(raw: jax.Array, bits: int, j: int) -> tuple[jax.Array, float]:
  """Field `j` in place as bfloat16 `(code - offset) * 2**(bits j)`, and that offset."""
  top = (j + 1) * bits == 8
  if top:
    raw = raw ^ jnp.int8(-128)
  if bits < 8:
    raw = raw & jnp.int8(((1 << bits) - 1 << j * bits) - (256 if top else 0))
  return plgpu.layout_cast(raw, plgpu.Layout.WGMMA).astype(jnp.bfloat16), 2.0 ** (bits - 1) if top else 0.0


def _field(eighth: int, raw: jax.Array, bits: int, j: int) -> Unit:
  operand, offset = _masked(raw, bits, j)
  return Unit(eighth, operand, 2.0 ** (-bits * j), offset)


def _three(eighth: int, low: jax.Array, high: jax.Array) -> Unit:
  """Low field `eighth // 2` of the 2-bit plane and bit `eighth` of the 1-bit plane."""
  j = eighth // 2
  low, low_offset = _masked(low, 2, j)
  high, high_offset = _masked(high, 1, eighth)
  operand = low * jnp.bfloat16(4.0**-j) + high * jnp.bfloat16(2.0 ** (2 - eighth))
  return Unit(eighth, operand, 1.0, low_offset + 4 * high_offset)


def _weights(eighth: int, low: jax.Array, high: jax.Array) -> Unit:
  low, high = (plgpu.layout_cast(part, plgpu.Layout.WGMMA).astype(jnp.int16) for part in (low, high))
  words = (low & jnp.int16(0xFF)) | (high << jnp.int16(8))
  return Unit(eighth, lax.bitcast_convert_type(words, jnp.bfloat16), 1.0, 0.0)
