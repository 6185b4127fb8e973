"""The TPU's own view of a QTensor: 32-bit words whose bytes become rows of weights by a shift and a mask.

Every 32 consecutive byte rows of the canonical buffer become one block of 8 rows of uint32, the tile `(8, 128)` of a
TPU, so that every copy of whole blocks is aligned. Word row `r` of a block holds these byte rows of the 32:

    bits              0-7       8-15      16-23        24-31
    in pairs: row     2 r       16 + 2 r  2 r + 1      16 + 2 r + 1
    in order: row     4 r       4 r + 1   4 r + 2      4 r + 3

In *pairs*, two bytes 16 bits apart are the layout of a packed pair of bfloat16 rows: `word & 0x00FF00FF` bitcast to
bfloat16 is rows 0-15 of the block in order, `(word >> 8) & 0x00FF00FF` rows 16-31. In *order*, the word bitcast to int8
is the 32 rows. Neither way does a row move to another place. Chips that convert int8 to bfloat16 in two operations
(v6e) take their codes in order; v5e, which goes through float32, in pairs (`tpu_unpack.py`). 16-bit weights, two byte
planes that become bfloat16 by joining pairs, are in pairs on every chip.

A K-tile must then have whole blocks at every width: 256 rows or a multiple. Blocks with smaller tiles (K = 576 has
tiles of 64) are packed again, K padded to a multiple of 256; and columns are padded to a multiple of 128.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moeq_jax import planar
from moeq_jax.qtensor import QTensor

BLOCK = 32  # byte rows of a word block
SMALLEST_TILE = 256  # rows of K of the smallest K-tile whose 1-bit bytes fill a word block
LANES = 128


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["words", "bits", "first", "grid"],
  meta_fields=["K", "N", "group", "k_tile", "k_block", "k_rows", "columns", "paired"],
)
@dataclasses.dataclass(frozen=True)
class View:
  """Packed weights as the kernel reads them. A pytree.

  Attributes:
    words: `[R, 8, stripe]` uint32, word blocks; stripe is a multiple of 128.
    bits: `[E, KB, NS]` int32, the width of each block.
    first: `[E, KB, NS]` int32, first word block of each block.
    grid: `[E, tiles, groups, NS stripe]` uint32 per K-tile and group: scale in the high 16 bits, zero in the low 16,
      both bfloat16. `tiles` is 1 where all of K shares one group. 16-bit blocks hold zeros.
    K, N: logical size.
    group: rows of K that share a scale; `k_tile` if there is one group.
    k_tile: rows of a K-tile, a multiple of 256.
    k_block: rows of a K-block with padding, a multiple of `k_tile`.
    k_rows: rows of K that a K-block covers.
    columns: columns of N that a stripe covers.
    paired: whether the words of codes are in pairs.
  """

  words: Any
  bits: Any
  first: Any
  grid: Any
  K: int
  N: int
  group: int
  k_tile: int
  k_block: int
  k_rows: int
  columns: int
  paired: bool

  @property
  def shape(self) -> tuple[int, int, int]:
    """`(E, K, N)`."""
    return self.bits.shape[0], self.K, self.N

  @property
  def blocks(self) -> tuple[int, int, int]:
    """`(E, KB, NS)`."""
    return self.bits.shape

  @property
  def padded(self) -> tuple[int, int]:
    """K and N with the padding of all blocks."""
    return self.blocks[1] * self.k_block, self.blocks[2] * self.words.shape[2]


def prepare(q: QTensor, paired: bool) -> View:
  """The view of one shard; made once at load, or on the fly inside `jit` (widths and offsets stay data).

  Args:
    q: the weights.
    paired: whether the words of codes are in pairs; `pallas_tpu.prepare` chooses what suits the chip.

  Raises:
    ValueError: `q` holds several shards.
  """
  if q.shards > 1:
    raise ValueError(f"the TPU view is of one shard, and this value holds {q.shards}")
  q = jax.tree.map(jnp.asarray, q)
  if q.k_tile < SMALLEST_TILE:
    buffer, first, k_tile, k_block = _retile(q)
  else:
    buffer, first, k_tile, k_block = q.buffer[0], q.offset // BLOCK, q.k_tile, q.k_block
  stripe = -(-buffer.shape[1] // LANES) * LANES
  buffer = jnp.pad(buffer, ((0, -len(buffer) % BLOCK), (0, stripe - buffer.shape[1])))
  group = k_tile if q.groups == 1 else q.group
  pairs = True if paired else _sixteen(q.bits, first, k_block, len(buffer) // BLOCK)
  return View(
    _words(buffer, pairs), q.bits, first, _grid(q, k_block, k_tile, stripe),
    q.K, q.N, group, k_tile, k_block, q.k_block, q.buffer.shape[2], paired,
  )


def _sixteen(bits: jax.Array, first: jax.Array, k_block: int, blocks: int) -> jax.Array:
  """`[blocks]`, which word blocks belong to 16-bit weights."""
  start, wide = first.reshape(-1), (bits.reshape(-1) == 16).astype(jnp.int32)
  edges = jnp.zeros(blocks + 1, jnp.int32).at[start].add(wide).at[start + 16 * k_block // (8 * BLOCK)].add(-wide)
  return jnp.cumsum(edges)[:-1] > 0


def _words(buffer: jax.Array, pairs: jax.Array | bool) -> jax.Array:
  """Bytes `[rows, stripe]` -> words `[rows / 32, 8, stripe]` of this module's table; `pairs` `[rows / 32]` or True."""
  rows, stripe = buffer.shape
  parts = buffer.reshape(rows // BLOCK, 2, 8, 2, stripe).transpose(0, 2, 4, 3, 1)  # from block, half, row, pair, column
  parts = parts.reshape(rows // BLOCK, 8, stripe, 4)
  if pairs is not True:
    ordered = buffer.reshape(rows // BLOCK, 8, 4, stripe).swapaxes(2, 3)
    parts = jnp.where(pairs[:, None, None, None], parts, ordered)
  return lax.bitcast_convert_type(parts, jnp.uint32)


def _grid(q: QTensor, k_block: int, k_tile: int, stripe: int) -> jax.Array:
  """Scales and zeros as words, padded as K and N are; zeros where the width is 16, whose scales are never read."""
  (experts, k_blocks, stripes), columns = q.blocks, q.buffer.shape[2]
  words = [lax.bitcast_convert_type(a.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for a in (q.scale, q.zero)]
  words = words[0] << 16 | words[1]
  one = q.groups == 1
  if not one:
    words = jnp.pad(words, ((0, 0), (0, k_blocks * q.k_block // q.group - q.groups), (0, 0)))
  words = jnp.pad(words, ((0, 0), (0, 0), (0, stripes * columns - q.N)))
  words = words.reshape(experts, 1 if one else k_blocks, -1, stripes, columns)
  if not one:
    words = jnp.where((q.bits == 16)[:, :, None, :, None], jnp.uint32(0), words)
    words = jnp.pad(words, ((0, 0), (0, 0), (0, (k_block - q.k_block) // q.group), (0, 0), (0, 0)))
  words = jnp.pad(words, ((0, 0),) * 4 + ((0, stripe - columns),))
  return words.reshape(experts, 1 if one else k_blocks * (k_block // k_tile), -1, stripes * stripe)


def restore(view: View) -> QTensor:
  """A QTensor of the same weights, with the view's padding as rows and columns of its own: the inverse of `prepare`."""
  experts, tiles, groups, N = view.grid.shape
  K = view.padded[0]
  raw = lax.bitcast_convert_type(view.words, jnp.uint8)  # [R, word row, stripe, 2 * pair + half, or byte]
  blocks, _, stripe = view.words.shape
  ordered = raw.swapaxes(2, 3).reshape(blocks, BLOCK, stripe)
  raw = raw.reshape(*view.words.shape, 2, 2).transpose(0, 4, 1, 3, 2).reshape(blocks, BLOCK, stripe)
  if not view.paired:
    raw = jnp.where(_sixteen(view.bits, view.first, view.k_block, blocks)[:, None, None], raw, ordered)
  grid = view.grid.reshape(experts, tiles * groups, N)
  words = grid >> 16, grid & 0xFFFF
  scale, zero = (lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.bfloat16) for word in words)
  group = K if tiles * groups == 1 else view.group
  return QTensor(raw.reshape(1, -1, view.words.shape[2]), view.bits, view.first * BLOCK, scale, zero, K, N, group,
                 view.k_tile, view.k_block)


# ---------------------------------------------------------------------------------------------------------------------
# Packing again in larger tiles
# ---------------------------------------------------------------------------------------------------------------------


def _retile(q: QTensor) -> tuple[jax.Array, jax.Array, int, int]:
  """Packs every block again with K-tiles of at least 256 rows: bytes, first word blocks, K-tile, K-block."""
  k_block = -(-q.k_block // SMALLEST_TILE) * SMALLEST_TILE
  k_tile = max(t for t in planar.K_TILES if t >= SMALLEST_TILE and k_block % t == 0)
  (_, rows, stripe), unit = q.buffer.shape, k_block // 8
  bits, offset = q.bits.reshape(-1), q.offset.reshape(-1)
  first = (jnp.cumsum(bits) - bits) * unit
  widths = [b for b in planar.WIDTHS if q.k_block * b // 8 <= rows]
  largest = unit * widths[-1]  # a branch writes its own bytes, then zeros that the next block overwrites

  def again(index: jax.Array, buffer: jax.Array) -> jax.Array:
    def branch(b: int) -> jax.Array:
      raw = lax.dynamic_slice(q.buffer[0], (offset[index], 0), (q.k_block * b // 8, stripe))
      return jnp.pad(_encode(_codes(raw, b, q.k_tile, k_block), b, k_tile), ((0, largest - unit * b), (0, 0)))

    choice = jnp.sum(bits[index] > jnp.array(widths))
    block = lax.switch(choice, [functools.partial(branch, b) for b in widths])
    return lax.dynamic_update_slice(buffer, block, (first[index], 0))

  total = rows // (q.k_block // 8) * unit
  buffer = lax.fori_loop(0, math.prod(q.blocks), again, jnp.zeros((total + largest, stripe), jnp.uint8))
  return buffer[:total], (first // BLOCK).reshape(q.blocks), k_tile, k_block


def _codes(raw: jax.Array, bits: int, k_tile: int, k_block: int) -> jax.Array:
  """Bytes of one block -> codes `[k_block, stripe]` uint8 (`[2, k_block, stripe]` byte planes if `bits` is 16)."""
  if bits == 16:
    planes = raw.reshape(-1, 2, k_tile, raw.shape[1]).transpose(1, 0, 2, 3).reshape(2, -1, raw.shape[1])
    return jnp.pad(planes, ((0, 0), (0, k_block - planes.shape[1]), (0, 0)))
  codes = planar.decode(raw, bits, k_tile)
  return jnp.pad(codes, ((0, k_block - len(codes)), (0, 0)))


def _encode(codes: jax.Array, bits: int, k_tile: int) -> jax.Array:
  """The inverse of `_codes` at another K-tile: bytes `[k_block bits / 8, stripe]`."""
  stripe = codes.shape[-1]
  if bits == 16:
    return codes.reshape(2, -1, k_tile, stripe).transpose(1, 0, 2, 3).reshape(-1, stripe)
  tiles = codes.reshape(-1, k_tile, stripe)
  if bits == 3:
    return jnp.concatenate([_planar(tiles & 3, 2), _planar(tiles >> 2, 1)], axis=1).reshape(-1, stripe)
  return _planar(tiles, bits).reshape(-1, stripe)


def _planar(tiles: jax.Array, bits: int) -> jax.Array:
  count, k_tile, stripe = tiles.shape
  fields = tiles.reshape(count, 8 // bits, k_tile * bits // 8, stripe)
  shift = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, -1, 1, 1)
  return lax.reduce_or(fields << shift, axes=(1,))


# ---------------------------------------------------------------------------------------------------------------------
# Rows and columns of activations as the padded blocks see them
# ---------------------------------------------------------------------------------------------------------------------


def _spread(a: jax.Array, parts: int, size: int, padded: int) -> jax.Array:
  """Columns of `a`, cut into `parts` parts of `size` (the last may be short), each padded to `padded`."""
  if size == padded and a.shape[1] == parts * size:
    return a
  a = jnp.pad(a, ((0, 0), (0, parts * size - a.shape[1]))).reshape(len(a), parts, size)
  return jnp.pad(a, ((0, 0), (0, 0), (0, padded - size))).reshape(len(a), parts * padded)


def _gather(a: jax.Array, parts: int, size: int, padded: int, total: int) -> jax.Array:
  """The inverse of `_spread`; `total` columns."""
  return a.reshape(len(a), parts, padded)[:, :, :size].reshape(len(a), -1)[:, :total]


def spread_k(view: View, x: jax.Array) -> jax.Array:
  """`[T, K]` -> `[T, padded K]`, zeros in the padding."""
  return _spread(x, view.blocks[1], view.k_rows, view.k_block)


def spread_n(view: View, y: jax.Array) -> jax.Array:
  """`[T, N]` -> `[T, padded N]`, zeros in the padding."""
  return _spread(y, view.blocks[2], view.columns, view.words.shape[2])


def gather_k(view: View, x: jax.Array) -> jax.Array:
  """The inverse of `spread_k`."""
  return _gather(x, view.blocks[1], view.k_rows, view.k_block, view.K)


def gather_n(view: View, y: jax.Array) -> jax.Array:
  """The inverse of `spread_n`."""
  return _gather(y, view.blocks[2], view.columns, view.words.shape[2], view.N)
