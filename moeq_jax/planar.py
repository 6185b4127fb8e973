"""The byte layout of one packed block of a weight: planar bytes per K-tile.

A block of `[k_block, n]` codes is cut along K into tiles of `k_tile` rows. Byte row r of a tile of b bits holds in its
field j (bits `j b` to `j b + b - 1`) the code of weight row `j (k_tile b / 8) + r` of the tile. Unpacking is then a
shift and a mask of whole rows, which is cheap on every kind of device.

3 bits are a 2-bit tile (the low bits) followed by a 1-bit tile (bit 2), so that no field straddles bytes. 16 bits are
the two byte planes of the bfloat16 weight itself, low bytes first, with no code, scale or zero.
"""

import math
from typing import Any, NamedTuple

import numpy as np

WIDTHS = (1, 2, 3, 4, 8, 16)
K_TILES = (768, 512, 256, 128, 64)
SMALL_TILES = (32, 16)  # for K-blocks of fewer rows than the smallest K-tile
GROUPS = (32, 64, 128)


class Layout(NamedTuple):
  """The static sizes of a packed weight.

  Attributes:
    group: rows of K that share a scale; K if there is one group.
    k_tile: rows of a K-tile.
    k_block: rows of a K-block, padding included.
    stripe: columns of an N-stripe, the width of the buffer.
  """

  group: int
  k_tile: int
  k_block: int
  stripe: int


def layout(K: int, N: int, group: int, k_blocks: int = 1, stripes: int = 1) -> Layout:
  """Chooses the sizes for a `[K, N]` weight.

  Args:
    K, N: logical size.
    group: 32, 64 or 128 rows, or 0 (or anything not below K) for one group.
    k_blocks, stripes: blocks along K and along N.

  Returns:
    The layout with the largest K-tile that divides the K-block and in which every field of every width holds whole
    groups or a whole fraction of one. The K-block is K / k_blocks padded to whole smallest tiles and whole groups; the
    smallest tile has 64 rows, or 16 where several K-blocks have fewer.

  Raises:
    ValueError: unknown group, or a block without rows or columns.
  """
  one = group == 0 or group >= K
  if not one and group not in GROUPS:
    raise ValueError(f"group {group}: choose one of {GROUPS}, or 0 for one group over all of K = {K}")
  small = k_blocks > 1 and -(-K // k_blocks) < K_TILES[-1]
  sizes = K_TILES + SMALL_TILES if small else K_TILES
  unit = sizes[-1] if one else math.lcm(sizes[-1], group)
  k_block = -(-K // (k_blocks * unit)) * unit
  stripe = -(-N // stripes)
  if (k_blocks - 1) * k_block >= K or (stripes - 1) * stripe >= N:
    raise ValueError(f"{k_blocks} blocks of {k_block} rows, {stripes} of {stripe} columns: one is empty at {(K, N)}")
  tiles = [t for t in sizes if k_block % t == 0 and (one or aligned(t, group))]
  return Layout(K if one else group, tiles[0], k_block, stripe)


def aligned(k_tile: int, group: int) -> bool:
  """Whether every field of every width holds whole groups or a whole fraction of one (wider fields are multiples)."""
  field = k_tile // 8
  return field % group == 0 or group % field == 0


def encode(block: np.ndarray, bits: int, k_tile: int) -> np.ndarray:
  """Codes `[k_block, n]` uint8 (bfloat16 weights if `bits` is 16) -> bytes `[k_block bits / 8, n]` uint8."""
  tiles = block.reshape(-1, k_tile, block.shape[1])
  if bits == 16:
    words = tiles.view(np.uint16)
    planes = [(words & 0xFF).astype(np.uint8), (words >> 8).astype(np.uint8)]
  elif bits == 3:
    planes = [_planar(tiles & 3, 2), _planar(tiles >> 2, 1)]
  else:
    planes = [_planar(tiles, bits)]
  return np.concatenate(planes, axis=1).reshape(-1, block.shape[1])


def _planar(tiles: np.ndarray, bits: int) -> np.ndarray:
  count, k_tile, n = tiles.shape
  shift = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
  return np.bitwise_or.reduce(tiles.reshape(count, 8 // bits, k_tile * bits // 8, n) << shift, axis=1)


def decode(raw: Any, bits: int, k_tile: int) -> Any:
  """Bytes `[k_block bits / 8, n]` -> codes `[k_block, n]` uint8, `bits` below 16; numpy arrays or jax arrays.

  The two parts of a 3-bit tile are cut into the same eight fields before they are combined: joining fields of unequal
  height makes XLA emit scalar code on CPUs (a factor of ten).
  """
  n = raw.shape[1]
  raw = raw.reshape(-1, k_tile * bits // 8, n)
  if bits != 3:
    shift = np.arange(0, 8, bits, dtype=np.uint8)[None, :, None, None]
    return ((raw[:, None] >> shift) & np.uint8(2**bits - 1)).reshape(-1, n)
  rows = k_tile // 8
  shift = np.arange(8, dtype=np.uint8).reshape(1, 4, 2, 1, 1)
  low = raw[:, : 2 * rows].reshape(-1, 1, 2, rows, n) >> (shift & np.uint8(6))
  high = raw[:, None, None, 2 * rows :] >> shift
  return ((low & np.uint8(3)) | ((high & np.uint8(1)) << np.uint8(2))).reshape(-1, n)
