"""Codes from packed bytes in registers: a mask and an `or` give two weights as bfloat16, without any conversion.

A code of less than 8 bits, left where it stands in its byte, is placed into the mantissa of bfloat16 128.0, whose last
bit is worth one: `(word & mask) | 0x43004300` reads as two numbers `128 + code 2**p`, exactly. The power of two goes
into the scale and the 128 into the zero. Bytes 0 and 2 of a word make one such pair, bytes 1 and 3 (after a shift by 8)
the other; the view (`gpu_view.py`) has the bytes in an order in which these pairs are what wgmma expects, so nothing
moves between threads. A field that reaches bit 7 is shifted down first; 8-bit codes are the difference of two such
numbers; 3 bits join a 2-bit and a 1-bit plane, 16 bits two byte planes. Per weight, with shifts shared by a register,
that is 0.6 instructions at 1 bit, 0.7 at 2, 0.9 at 4, 1.4 at 3 and 2.3 at 8.

Two implementations give the same operands: `in_registers` for the compiler, `in_interpreter` for Pallas' interpreter,
which cannot run the first, and for tests.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

MAGIC = 0x4300  # bfloat16 128.0: the last of its 7 bits of mantissa is worth one
ORDER = 3, 1, 0, 2  # of the bits of an index inside 16 weights, from where a thread has them to where wgmma wants them
CHUNKS = {1: 1, 2: 2, 3: 3, 4: 2, 8: 2, 16: 2}  # planes that are read together


class Field(NamedTuple):
  """Where the codes of one eighth of the rows stand: weight `(multiplier * operand + offset - zero) * scale`.

  Attributes:
    eighth: which of the eight eighths of the rows, 0 to 7.
    planes: the planes that hold it: one, or for 3 bits the low two bits and the high one, or for 16 bits the low and
      the high byte.
    shifts: by which each plane is shifted to the right (left if negative) first.
    masks: of each plane after that, for one byte.
    multiplier: power of two.
    offset: what must be added to get the code.
  """

  eighth: int
  planes: tuple[int, ...]
  shifts: tuple[int, ...]
  masks: tuple[int, ...]
  multiplier: float
  offset: float


def plane(bits: int | jax.Array, index: int | jax.Array) -> int | jax.Array:
  """The plane that is copied as number `index` of a step: in order, but 16 bits alternate low and high bytes."""
  if isinstance(bits, int):
    return index % 2 * 8 + index // 2 if bits == 16 else index
  return jnp.where(bits == 16, lax.rem(index, jnp.int32(2)) * 8 + lax.div(index, jnp.int32(2)), index)


def ready(bits: jax.Array, index: jax.Array) -> jax.Array:
  """How many fields can be computed once chunk `index` of a step is read, and not before (see `batches`)."""
  last = jnp.where(bits <= 3, index == bits - 1, lax.rem(index, jnp.int32(2)) == 1)
  return jnp.where(last, jnp.where(bits <= 3, 8, lax.div(jnp.int32(16), bits)), 0)


def eighth(bits: jax.Array, index: jax.Array) -> jax.Array:
  """The eighth of the rows that field number `index` of a step multiplies, in the order of `batches`."""
  inner = (index >= 2) & (index < 6)
  return jnp.where((bits == 4) & inner, index ^ 6, index)


def batches(bits: int) -> list[tuple[list[int], list[Field]]]:
  """Planes that are read together, and the fields that they hold; every eighth once over all batches.

  Fields 2i and 2i + 1 of a batch are neighbouring eighths with one multiplier and one offset, so that their products
  may be added before they are scaled. 16 bits have one field per batch.
  """
  found = []
  for start in range(0, bits, CHUNKS[bits]):
    read = [plane(bits, start + i) for i in range(CHUNKS[bits])]
    found.append((read, _fields(bits, read)))
  return found


def _fields(bits: int, read: list[int]) -> list[Field]:
  """All fields of the planes `read`."""
  if bits == 16:
    return [Field(read[0], tuple(read), (0, 0), (0xFF, 0xFF), 1.0, 0.0)]
  if bits == 8:
    return [_field(p, (p,), (0,), (0xFF,), 0, 128.0) for p in read]
  if bits == 3:  # the low bits stay, the high one comes to stand above them
    fields = []
    for e in range(8):
      down = 4 if e >= 6 else 0  # bits 6 and 7 leave no place for a third
      low = e // 2 * 2 - down
      fields.append(_field(e, (e % 2, 2), (down, e - low - 2), (3 << low, 4 << low), low))
    return fields
  fields = []
  for j in range(8 // bits):
    for p in read:
      e = j * bits + p
      if bits == 1:
        p, shift = 0, e % 2  # two neighbours at one place
      else:
        shift = {2: (0, 0, 0, 1), 4: (0, 4)}[bits][j]
      place = j * bits - shift
      fields.append(_field(e, (p,), (shift,), ((1 << bits) - 1 << place,), place))
  return fields


def _field(eighth: int, planes: tuple[int, ...], shifts: tuple[int, ...], masks: tuple[int, ...], place: int,
           offset: float | None = None) -> Field:
  multiplier = 2.0**-place
  return Field(eighth, planes, shifts, masks, multiplier, -128.0 * multiplier if offset is None else offset)


def centred(field: Field) -> Field:
  """The same field with 128 subtracted from its operand, which is then the code times a power of two."""
  return field if field.masks[0] == 0xFF else field._replace(offset=0.0)


def permuted(chunk: jax.Array) -> jax.Array:
  """Bytes `[..., width]` in the order in which `in_registers` needs them, from the order of the rows."""
  return _swapped(chunk, np.argsort(ORDER))


def _swapped(value: jax.Array, order: Sequence[int]) -> jax.Array:
  """Moves the four bits of an index inside each 16 of the last dimension."""
  lead = value.shape[:-1]
  cut = value.reshape(*lead, -1, 2, 2, 2, 2)
  base = len(lead) + 1
  return cut.transpose(*range(base), *(base + int(i) for i in order)).reshape(value.shape)


# ---------------------------------------------------------------------------------------------------------------------
# For the compiler
# ---------------------------------------------------------------------------------------------------------------------


def in_registers(
  field: Field, read: dict[int, jax.Array], exact: bool, affine: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
  """The operand `[64, width]` bfloat16 of a field, in the layout of wgmma.

  Args:
    field: where the codes stand.
    read: planes, `[64, width]` int8 in the layout WGMMA_UPCAST_2X.
    exact: whether 128 is subtracted, as `centred` says.
    affine: None, or factor and addend `[64]` bfloat16 of each column: the operand becomes `operand * factor + addend`,
      rounded once.
  """
  raw = [read[p] for p in field.planes]
  extra = () if affine is None else affine
  rows = plgpu.Layout.WGMMA.reduce(1)
  run = plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,) * len(raw) + (rows,) * len(extra),
    return_type=plgpu.ShapeDtypeStruct(raw[0].shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA))

  def emit(_: Any, *arrays: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    return _emit(field, arrays[:len(raw)], exact, arrays[len(raw):])

  return run(emit)(*raw, *extra)


def _emit(
  field: Field, raw: tuple[mgpu.FragmentedArray, ...], exact: bool, affine: tuple[mgpu.FragmentedArray, ...]
) -> mgpu.FragmentedArray:
  """`in_registers` in terms of the compiler.

  Registers of planes are `[1, width / 16, 1, 1, 2, ...]` words of four bytes of one column, those of the operand
  `[1, width / 8, 1, 1, 2, ...]` pairs; the fifth axis is the column of the two that a thread holds.
  """
  word, bfloat16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
  pair = ir.VectorType.get((2,), bfloat16)
  layout = plgpu.Layout.WGMMA.to_mgpu()
  registers = np.empty(layout.registers_shape(raw[0].shape), dtype=object)

  def constant(value: int) -> ir.Value:
    return arith.constant(word, ir.IntegerAttr.get(word, value if value < 1 << 31 else value - (1 << 32)))

  def both(value: int) -> ir.Value:
    return constant(value | value << 16)

  def shifted(value: ir.Value, right: int) -> ir.Value:
    if right == 0:
      return value
    return (arith.shrui if right > 0 else arith.shli)(value, constant(abs(right)))

  def masked(value: ir.Value, shift: int, mask: int) -> ir.Value:
    return arith.andi(shifted(value, shift), both(mask))

  def placed(bits: ir.Value, value: ir.Value, shift: int, mask: int) -> ir.Value:
    """`bits | (value >> shift) & mask` in one instruction after the shift, which the compiler makes two."""
    table = "lop3.b32 $0, $1, $2, $3, 0xEA;"
    return llvm.inline_asm(word, [shifted(value, shift), both(mask), bits], table, "=r,r,r,r")

  def fused(value: ir.Value, factor: ir.Value, addend: ir.Value) -> ir.Value:
    """`value * factor + addend` in one instruction; the compiler would go through float32."""
    operands = [mgpu.utils.bitcast(v, word) for v in (value, factor, addend)]
    return mgpu.utils.bitcast(llvm.inline_asm(word, operands, "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r"), pair)

  def numbers(words: list[ir.Value], second: int) -> ir.Value:
    """Two bfloat16 from bytes 0 and 2 (`second` 0) or 1 and 3 (1) of the planes."""
    if field.masks[0] == 0xFF and len(words) == 2:  # 16 bits
      low, high = words
      parts = ((masked(low, 0, 0xFF), masked(high, -8, 0xFF00)), (masked(low, 8, 0xFF), masked(high, 0, 0xFF00)))
      return mgpu.utils.bitcast(arith.ori(*parts[second]), pair)
    if field.masks[0] == 0xFF:  # 8 bits: the lower seven, less 128 where the highest is not set
      low = placed(magic, words[0], 8 * second, 0x7F)
      high = placed(magic, arith.xori(words[0], both(0x8080)), 8 * second, 0x80)
      return arith.subf(*(mgpu.utils.bitcast(value, pair) for value in (low, high)))
    bits = magic
    for value, shift, mask in zip(words, field.shifts, field.masks, strict=True):
      bits = placed(bits, value, shift + 8 * second, mask)
    value = mgpu.utils.bitcast(bits, pair)
    if exact:
      value = arith.subf(value, vector.broadcast(pair, arith.constant(bfloat16, ir.FloatAttr.get(bfloat16, 128.0))))
    return value

  magic = both(MAGIC)
  columns = [[vector.broadcast(pair, _scalar(array, half)) for array in affine] for half in (0, 1)] if affine else None
  for index in np.ndindex(raw[0].registers.shape):
    tile, half = index[1], index[4]
    words = [mgpu.utils.bitcast(array.registers[index], word) for array in raw]
    for second in (0, 1):
      value = numbers(words, second)
      if columns:
        value = fused(value, *columns[half])
      registers[0, 2 * tile + second, 0, 0, half, 0, 0, 0, 0] = value
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _scalar(array: mgpu.FragmentedArray, half: int) -> ir.Value:
  """The value of a per-column array for the first (0) or second (1) column that a thread holds."""
  value = array.registers.reshape(-1)[half]
  if isinstance(value.type, ir.VectorType):
    value = vector.extract(value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
  return value


# ---------------------------------------------------------------------------------------------------------------------
# For the interpreter
# ---------------------------------------------------------------------------------------------------------------------


def in_interpreter(
  field: Field, read: dict[int, jax.Array], exact: bool, affine: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
  """What `in_registers` gives, from plain operations on `[64, width]` int8."""
  planes = [jnp.asarray(read[p]).astype(jnp.int32) & 0xFF for p in field.planes]
  shift = lambda value, by: value >> by if by >= 0 else value << -by  # noqa: E731
  if field.masks[0] == 0xFF and len(planes) == 2:
    words = (planes[0] | planes[1] << 8).astype(jnp.uint16)
    value = lax.bitcast_convert_type(words, jnp.bfloat16)
  elif field.masks[0] == 0xFF:
    value = (planes[0] - 128).astype(jnp.bfloat16)
  else:
    parts = [shift(p, by) & mask for p, by, mask in zip(planes, field.shifts, field.masks, strict=True)]
    value = (sum(parts) + (0 if exact else 128)).astype(jnp.bfloat16)
  value = _swapped(value, ORDER)
  if affine is None:
    return value
  factor, addend = (lax.broadcast_in_dim(a.astype(jnp.float32), value.shape, (0,)) for a in affine)
  return (value.astype(jnp.float32) * factor + addend).astype(jnp.bfloat16)
