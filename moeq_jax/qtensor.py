"""QTensor: the stacked expert weights of one projection, packed to 1, 2, 3, 4, 8 or 16 bits, block by block.

A weight `[E, K, N]` is cut into blocks: per expert, `KB` equal blocks along K and `NS` equal stripes along N (one of
each, unless a plan is finer than an expert). Every block has its own width and is packed as `planar.py` says. The
blocks are laid end to end along the rows of one byte buffer, as wide as a stripe, so mixed widths waste nothing; and
the widths are *data*: one compiled program serves every plan.

The value of a code is `(code - zero) * scale`, with bfloat16 scale and zero per group of `group` rows and per column.

Letters are those of `artifacts.py` (E experts, K inputs, N outputs, G scale groups), and KB K-blocks, NS N-stripes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from moeq_jax import planar, unpacking

WIDTHS = planar.WIDTHS
CUT = {"expert": 0, "k": 1, "n": 2}  # the dimension of bits, offset, scale and zero that each kind of sharding cuts


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["buffer", "bits", "offset", "scale", "zero"],
  meta_fields=["K", "N", "group", "k_tile", "k_block", "axis"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
  """Packed stacked weights. A pytree; the leaves may also be abstract or specs, so nothing is checked on construction.

  One shard of a QTensor is a QTensor: inside `shard_map` a device sees `shards = 1` and its own part of the rest.

  Attributes:
    buffer: `[shards, rows, stripe]` uint8; rows past the last block are padding and are never read.
    bits: `[E, KB, NS]` int32, the width of each block.
    offset: `[E, KB, NS]` int32, first buffer row of each block, local to its shard.
    scale: `[E, G, N]` bfloat16; not read for 16-bit blocks.
    zero: `[E, G, N]` bfloat16; not read for 16-bit blocks.
    K: rows of the weight in one shard, without padding.
    N: columns of the weight in one shard, without padding.
    group: rows of K that share a scale; K if there is one group.
    k_tile: rows of a K-tile.
    k_block: rows of a K-block, padding included.
    axis: what the shards cut: `"n"` (gate, up), `"k"` (down), `"expert"`, or None.

  Invariants, checked by `validate`:
    * every width is in `WIDTHS`; blocks lie inside the buffer and do not overlap;
    * `k_block` is a multiple of `k_tile`, and of `group` unless G = 1; `KB k_block >= K` per shard;
    * `NS stripe >= N > (NS - 1) stripe` per shard; G = ceil(K / group) per shard;
    * every field of a 1-bit tile holds whole groups, or a group holds whole fields, unless G = 1;
    * `axis` is None only with one shard.
  """

  buffer: Any
  bits: Any
  offset: Any
  scale: Any
  zero: Any
  K: int
  N: int
  group: int
  k_tile: int
  k_block: int
  axis: str | None = None

  @property
  def shards(self) -> int:
    """Number of shards that this value holds."""
    return self.buffer.shape[0]

  @property
  def shape(self) -> tuple[int, int, int]:
    """`(E, K, N)` of the whole weight, over all shards held."""
    k, n = (self.shards if self.axis == axis else 1 for axis in ("k", "n"))
    return self.bits.shape[0], self.K * k, self.N * n

  @property
  def blocks(self) -> tuple[int, int, int]:
    """`(E, KB, NS)` of one shard."""
    cut = [self.shards if self.axis == axis else 1 for axis in CUT]
    return tuple(size // parts for size, parts in zip(self.bits.shape, cut, strict=True))

  @property
  def groups(self) -> int:
    """G of one shard."""
    return -(-self.K // self.group)

  def validate(self, name: str = "QTensor") -> None:
    """Raises `ValueError`, naming `name`, where an invariant of the class does not hold (arrays must be concrete)."""
    self.validate_shapes(name)
    bits = np.asarray(self.bits)
    check(np.isin(bits, WIDTHS).all(), f"{name}: widths {np.setdiff1d(bits, WIDTHS).tolist()} are not in {WIDTHS}")
    for part in (local(self, index) for index in range(self.shards)):
      start, end = (np.sort(edge.ravel()) for edge in _edges(part))
      apart = start[0] >= 0 and end[-1] <= part.buffer.shape[1] and (end[:-1] <= start[1:]).all()
      check(apart, f"{name}: blocks overlap or lie outside the buffer of {part.buffer.shape[1]} rows")

  def validate_shapes(self, name: str = "QTensor") -> None:
    """The part of `validate` that takes no values: dtypes, shapes and static sizes."""
    _validate_shapes(self, name)


def check(condition: bool, message: str) -> None:
  """Raises `ValueError(message)` unless `condition`."""
  if not condition:
    raise ValueError(message)


def _validate_shapes(q: QTensor, name: str) -> None:
  (_, k_blocks, stripes), stripe = q.blocks, q.buffer.shape[2]
  entries = (q.shape[0], q.groups * (q.shards if q.axis == "k" else 1), q.shape[2])
  check(q.axis in (None, *CUT) and (q.axis is not None or q.shards == 1), f"{name}: {q.shards} shards of {q.axis!r}")
  check(q.buffer.dtype == np.uint8, f"{name}: buffer is {q.buffer.dtype}, not uint8")
  for label, array in (("scale", q.scale), ("zero", q.zero)):
    check(array.dtype == ml_dtypes.bfloat16, f"{name}: {label} is {array.dtype}, not bfloat16")
    check(array.shape == entries, f"{name}: {label} has shape {array.shape}, expected {entries}")
  check(q.offset.shape == q.bits.shape, f"{name}: offset has shape {q.offset.shape}, bits {q.bits.shape}")
  check(q.k_block % q.k_tile == 0, f"{name}: a K-block of {q.k_block} rows cuts a tile of {q.k_tile}")
  fits = q.groups == 1 or (q.k_block % q.group == 0 and planar.aligned(q.k_tile, q.group))
  check(fits, f"{name}: a K-block of {q.k_block} rows in tiles of {q.k_tile} cuts a group of {q.group}")
  check(k_blocks * q.k_block >= q.K, f"{name}: {k_blocks} K-blocks of {q.k_block} rows do not cover K = {q.K}")
  check((stripes - 1) * stripe < q.N <= stripes * stripe, f"{name}: stripes of {stripe} do not fit N = {q.N}")


def _edges(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
  """First buffer row of every block and the row after its last, `[E, KB, NS]`."""
  start = np.asarray(q.offset, np.int64)
  return start, start + q.k_block * np.asarray(q.bits, np.int64) // 8


def local(q: QTensor, index: int) -> QTensor:
  """Shard `index` of `q`, as the device that holds it sees it."""
  if q.shards == 1:
    return q
  cut = CUT[q.axis]

  def take(array: Any) -> Any:
    size = array.shape[cut] // q.shards
    return array[(slice(None),) * cut + (slice(index * size, (index + 1) * size),)]

  fields = {field: take(getattr(q, field)) for field in ("bits", "offset", "scale", "zero")}
  return dataclasses.replace(q, buffer=q.buffer[index : index + 1], **fields)


# ---------------------------------------------------------------------------------------------------------------------
# Packing and unpacking, on the host
# ---------------------------------------------------------------------------------------------------------------------


def pack(
  codes: np.ndarray,
  bits: Any,
  scale: np.ndarray,
  zero: np.ndarray,
  *,
  group: int,
  capacity: int | None = None,
  weights: np.ndarray | None = None,
) -> QTensor:
  """Packs codes. Runs in numpy; the leaves are numpy arrays.

  Args:
    codes: `[E, K, N]` uint8, below `2**bits`; not read in 16-bit blocks.
    bits: int, `[E]`, or `[E, KB, NS]`.
    scale: `[E, G, N]`, already rounded to bfloat16.
    zero: `[E, G, N]`, already rounded to bfloat16.
    group: 32, 64, 128, or 0 for all of K.
    capacity: rows to pad the buffer to (see `packed_rows`); padding is in no count of bits or bytes and not on disk.
    weights: `[E, K, N]`, needed where a block has 16 bits.

  Returns:
    An unsharded QTensor.

  Raises:
    ValueError: shapes that do not fit, a width not in `WIDTHS`, a code too large for its width, scales that are not
      finite or not bfloat16 values, missing weights, too small a capacity.
  """
  codes = np.asarray(codes)
  check(codes.dtype == np.uint8 and codes.ndim == 3, f"codes are {codes.dtype}{codes.shape}, expected uint8 [E, K, N]")
  experts, K, N = codes.shape
  bits = _as_blocks(bits, experts)
  size = planar.layout(K, N, group, *bits.shape[1:])
  entries = (experts, -(-K // size.group), N)
  scale, zero = (_as_bfloat16(label, value, entries) for label, value in (("scale", scale), ("zero", zero)))
  rows = size.k_block * bits.astype(np.int64) // 8
  used = int(rows.sum())
  check(capacity is None or capacity >= used, f"capacity {capacity}: the blocks need {used} rows")
  offset = (np.cumsum(rows).reshape(rows.shape) - rows).astype(np.int32)
  source = {False: _to_blocks(codes, bits.shape, size)}
  _check_codes(source[False], bits)
  if (bits == 16).any():
    check(np.shape(weights) == codes.shape, f"16-bit blocks are bfloat16 weights: pass `weights` {codes.shape}")
    source[True] = _to_blocks(np.asarray(weights).astype(ml_dtypes.bfloat16), bits.shape, size)
  buffer = np.zeros((1, capacity or used, size.stripe), np.uint8)
  for e, k, n in np.ndindex(*bits.shape):
    block = np.ascontiguousarray(source[bits[e, k, n] == 16][e, k, :, n])
    first = offset[e, k, n]
    buffer[0, first : first + rows[e, k, n]] = planar.encode(block, int(bits[e, k, n]), size.k_tile)
  return QTensor(buffer, bits, offset, scale, zero, K, N, size.group, size.k_tile, size.k_block)


def packed_rows(bits: Any, shape: Sequence[int], group: int) -> int:
  """Buffer rows that the widths `bits` (int, `[E]` or `[E, KB, NS]`) need for a weight of `shape` `(E, K, N)`.

  A sweep over plans takes the rows of its widest plan as `capacity`, so that one compiled program serves them all.
  """
  bits = _as_blocks(bits, shape[0])
  return int(planar.layout(*shape[1:], group, *bits.shape[1:]).k_block * bits.astype(np.int64).sum() // 8)


def rounded(q: QTensor) -> QTensor:
  """The same weights in a buffer of a rounder length (numpy): at most an eighth longer, 8 lengths per factor of 2.

  Compiled programs depend on the length, and the layers of a model differ in it: rounded, few programs serve them all.
  """
  rows = q.buffer.shape[1]
  unit = 1 << max(rows.bit_length() - 4, 0)
  return dataclasses.replace(q, buffer=np.pad(q.buffer, ((0, 0), (0, -rows % unit), (0, 0))))


def _as_blocks(bits: Any, experts: int) -> np.ndarray:
  bits = np.array(bits, np.int32)
  known = bits.shape in ((), (experts,)) or (bits.ndim == 3 and len(bits) == experts)
  check(known, f"bits has shape {bits.shape}: pass an int, [E] or [E, KB, NS] with E = {experts}")
  blocks = bits if bits.ndim == 3 else np.full((experts, 1, 1), bits.reshape(-1, 1, 1), np.int32)
  check(np.isin(blocks, WIDTHS).all(), f"widths {np.setdiff1d(blocks, WIDTHS).tolist()}: choose from {WIDTHS}")
  return blocks


def _to_blocks(weight: np.ndarray, shape: Sequence[int], size: planar.Layout) -> np.ndarray:
  """`[E, K, N]` -> `[E, KB, k_block, NS, stripe]`, zero-padded."""
  experts, K, N = weight.shape
  _, k_blocks, stripes = shape
  padded = np.pad(weight, ((0, 0), (0, k_blocks * size.k_block - K), (0, stripes * size.stripe - N)))
  return padded.reshape(experts, k_blocks, size.k_block, stripes, size.stripe)


def _as_bfloat16(label: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  value = np.asarray(value)
  check(value.shape == shape, f"{label} has shape {value.shape}, expected {shape}")
  rounded = value.astype(ml_dtypes.bfloat16)
  check(np.isfinite(rounded.astype(np.float32)).all(), f"{label} has values that are not finite")
  same = (rounded.astype(np.float64) == value.astype(np.float64)).all()
  check(same, f"{label} is not rounded to bfloat16: round it before the codes are computed, or they fit another grid")
  return rounded


def _check_codes(blocks: np.ndarray, bits: np.ndarray) -> None:
  top = blocks.max(axis=(2, 4))
  for expert, k_block, stripe in np.argwhere((top >= 2**bits) & (bits < 16)):
    place = f"expert {expert}, K-block {k_block}, stripe {stripe}"
    raise ValueError(f"{place}: code {top[expert, k_block, stripe]} does not fit {bits[expert, k_block, stripe]} bits")


def unpack(q: QTensor) -> np.ndarray:
  """`[E, K, N]` uint8 codes (numpy). 16-bit blocks have none and come back as zeros: `dequantize` gives the weights."""
  if q.shards > 1:
    return np.concatenate([unpack(local(q, index)) for index in range(q.shards)], axis=CUT[q.axis])
  buffer, bits = np.asarray(q.buffer[0]), np.asarray(q.bits)
  start, end = _edges(q)
  (experts, k_blocks, stripes), stripe = bits.shape, buffer.shape[1]
  codes = np.zeros((experts, k_blocks, q.k_block, stripes, stripe), np.uint8)
  for e, k, n in np.argwhere(bits < 16):
    codes[e, k, :, n] = planar.decode(buffer[start[e, k, n] : end[e, k, n]], int(bits[e, k, n]), q.k_tile)
  return codes.reshape(experts, k_blocks * q.k_block, stripes * stripe)[:, : q.K, : q.N]


# ---------------------------------------------------------------------------------------------------------------------
# Dequantizing, in jax, with bits as data
# ---------------------------------------------------------------------------------------------------------------------


def expert(q: QTensor, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`[K, N]` weights of one expert (`index` may be traced) of one shard, in `dtype`."""
  return unpacking.columns(q, index, jnp.int32(0), q.blocks[2] * q.buffer.shape[2], dtype)[:, : q.N]


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(q: QTensor, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """`[E, K, N]` weights `(code - zero) * scale`, computed in float32 and cast to `dtype`."""
  if q.shards > 1:
    return jnp.concatenate([dequantize(local(q, index), dtype) for index in range(q.shards)], axis=CUT[q.axis])
  return lax.map(lambda index: expert(q, index, dtype), jnp.arange(q.blocks[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Bits and bytes
# ---------------------------------------------------------------------------------------------------------------------


def nominal_bits(*tensors: QTensor) -> float:
  """Average bits per weight, codes only (the convention of the papers); 16 in 16-bit blocks."""
  total = sum(float(np.sum(_weights(q) * np.asarray(q.bits))) for q in tensors)
  return total / sum(math.prod(q.shape) for q in tensors)


def effective_bits(*tensors: QTensor) -> float:
  """Average bits per weight with scales and zeros (not those of 16-bit blocks, which are not read), without padding."""
  quantized = (_weights(q) * (np.asarray(q.bits) < 16) * 32 * q.groups / q.K for q in tensors)
  return nominal_bits(*tensors) + sum(map(np.sum, quantized)) / sum(math.prod(q.shape) for q in tensors)


def used_rows(q: QTensor) -> int:
  """Rows of the buffer (of the fullest shard) that hold blocks."""
  return int(_edges(q)[1].max())


def stored_bytes(*tensors: QTensor) -> int:
  """Bytes of the payload in a file: used rows with K padding, widths, offsets, scales, zeros; no capacity padding."""
  total = 0
  for q in tensors:
    total += q.shards * used_rows(q) * q.buffer.shape[2]
    total += sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in (q.bits, q.offset, q.scale, q.zero))
  return total


def _weights(q: QTensor) -> np.ndarray:
  """`[E, KB, NS]` float64, logical weights in each block."""
  _, k_blocks, stripes = q.blocks
  rows = np.clip(q.K - np.arange(k_blocks) * q.k_block, 0, q.k_block)
  width = np.clip(q.N - np.arange(stripes) * q.buffer.shape[2], 0, q.buffer.shape[2])
  repeats = np.array(q.bits.shape) // (1, k_blocks, stripes)
  return np.tile(np.outer(rows, width)[None].astype(np.float64), repeats)
