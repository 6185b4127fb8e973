"""The Hopper view of packed weights, of the rows that meet them, and of their scales. Plain XLA, bits as data.

A K-tile of `k_tile` rows is cut into *eighths* of `k_tile / 8` weight rows: the byte rows that one bit per weight
needs. A tile of b bits then is b planes of one eighth of byte rows, and field j of plane i holds eighth `j b + i` of
the weight rows: whatever the width, a step of the kernel multiplies the same eight eighths of the rows of x. (3 bits:
planes 0 and 1 are the 2-bit tile, plane 2 the 1-bit tile. 16 bits: plane i holds the low bytes of eighth i, plane
8 + i the high.)

An eighth of more than 64 rows, or of more than a group, is cut into fragments of `width` rows, and a step covers one
fragment of each eighth. A *chunk* is one fragment of one plane for 128 columns, `[128, width]` bytes with K innermost:
contiguous in memory, the unit of a copy to shared memory, and the register operand of two wgmma of 64 columns. Inside
each 16 bytes the order is the one that `gpu_unpack` needs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import qtensor
from moeq_jax.kernels import gpu_unpack
from moeq_jax.qtensor import QTensor

COLUMNS = 128  # of a chunk: 64 per warpgroup, two warpgroups
WIDTHS = (64, 32, 16)  # rows of a fragment; 16 is the depth of one bfloat16 wgmma
EIGHTHS = 8


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["chunks", "affine", "bits", "first"],
  meta_fields=["shape", "stripe", "group", "k_tile", "k_block"],
)
@dataclasses.dataclass(frozen=True)
class HopperWeights:
  """Packed weights in chunks. A pytree, made by `prepare`.

  Letters: E experts, K inputs, N outputs, KB K-blocks, NS N-stripes, ST tiles of 128 columns in a stripe, G scale
  groups of all K-blocks, padding included. Stripes lie one after the other along `count`, as in the QTensor's buffer.

  Attributes:
    chunks: `[ST, count, 128, width]` int8, the bytes.
    affine: `[NS * ST, E * G * 2, 128]` bfloat16, scale and zero of every group in turn.
    bits: `[E, KB, NS]` int32, the width of every block.
    first: `[E, KB, NS]` int32, first chunk of every block.
    shape: `(E, K, N)`.
    stripe: columns of an N-stripe, without padding.
    group: rows that share a scale; K if there is one group.
    k_tile: rows of a K-tile.
    k_block: rows of a K-block.
  """

  chunks: Any
  affine: Any
  bits: Any
  first: Any
  shape: tuple[int, int, int]
  stripe: int
  group: int
  k_tile: int
  k_block: int

  @property
  def grouped(self) -> bool:
    """Whether there is more than one group along K."""
    return self.group < self.shape[1]

  @property
  def eighth(self) -> int:
    """Weight rows of one eighth of a K-tile."""
    return self.k_tile // EIGHTHS

  @property
  def width(self) -> int:
    """Rows of a fragment, padding included."""
    return self.chunks.shape[3]

  @property
  def fragments(self) -> int:
    """Fragments of an eighth."""
    return max(1, self.eighth // self.width)

  @property
  def together(self) -> int:
    """Neighbouring eighths of a step that have one scale: 2, or 1."""
    return 2 if not self.grouped or (self.fragments == 1 and self.group % (2 * self.eighth) == 0) else 1

  @property
  def step_groups(self) -> int:
    """Groups of one K-tile."""
    return self.k_tile // self.group if self.grouped else 1

  @property
  def block_steps(self) -> int:
    """Steps of the kernel in one K-block."""
    return self.k_block // self.k_tile * self.fragments

  @property
  def widths(self) -> list[int]:
    """Widths that a block of this buffer can have."""
    return [b for b in qtensor.WIDTHS if b * self.block_steps <= self.chunks.shape[1]]

  @property
  def groups(self) -> int:
    """G."""
    return self.bits.shape[1] * self.k_block // self.group if self.grouped else 1

  @property
  def tiles(self) -> int:
    """ST, tiles of 128 columns in one N-stripe."""
    return self.chunks.shape[0]


def fragment_width(k_tile: int, group: int, grouped: bool) -> int:
  """Rows of a fragment: the largest of `WIDTHS` that divides an eighth of a K-tile and, if `grouped`, the group.

  Eighths of 8 rows (K-tiles of 64), 4 or 2 (of 32 or 16, in small K-blocks) are padded to fragments of 16: the depth of
  a wgmma.

  Raises:
    ValueError: a K-tile that the kernel cannot cut so.
  """
  eighth = k_tile // EIGHTHS
  if eighth in (2, 4, 8) and not (grouped and k_tile % group):
    return WIDTHS[-1]
  fitting = [w for w in WIDTHS if eighth % w == 0 and (not grouped or group % w == 0)]
  if not fitting or (grouped and k_tile % group):
    raise ValueError(f"K-tiles of {k_tile} rows with groups of {group}: eighths of {eighth} rows are cut into "
                     f"fragments of {WIDTHS} rows inside one group, and a tile must hold whole groups")
  return fitting[0]


def prepare(q: QTensor) -> HopperWeights:
  """The Hopper view of one shard; one pass over the bytes, to be done once at load. May be traced.

  Bytes are those of the QTensor if stripes are multiples of 128 columns and K-tiles have more than 64 rows; otherwise
  columns are padded to 128, and K-tiles of 64, 32 or 16 rows to 2, 4 or 8 times the bytes.

  Raises:
    ValueError: more than one shard, or a layout that the kernel cannot cut (see `fragment_width`).
  """
  if q.shards != 1:
    raise ValueError(f"the Hopper view is of one shard, and the QTensor holds {q.shards}")
  grouped = q.groups > 1
  width, eighth = fragment_width(q.k_tile, q.group, grouped), q.k_tile // EIGHTHS
  (experts, k_blocks, stripes), (_, rows, stripe) = q.blocks, q.buffer.shape
  real, tiles = min(width, eighth), -(-stripe // COLUMNS)
  buffer = jnp.pad(q.buffer[0], ((0, -rows % real), (0, tiles * COLUMNS - stripe)))
  chunks = buffer.reshape(-1, real, tiles, COLUMNS).transpose(2, 0, 3, 1)
  chunks = gpu_unpack.permuted(jnp.pad(chunks, ((0, 0),) * 3 + ((0, width - real),)))
  chunks = lax.bitcast_convert_type(chunks, jnp.int8)
  groups = k_blocks * q.k_block // q.group if grouped else 1
  affine = jnp.stack([q.scale, q.zero], 2)  # [E, G, 2, N]
  missing = groups - affine.shape[1], stripes * stripe - q.N
  affine = jnp.pad(affine, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
  affine = affine.reshape(experts * groups * 2, stripes, stripe)
  affine = jnp.pad(affine, ((0, 0), (0, 0), (0, tiles * COLUMNS - stripe)))
  affine = affine.reshape(-1, stripes * tiles, COLUMNS).swapaxes(0, 1)
  first = q.offset // real
  return HopperWeights(chunks, affine, jnp.asarray(q.bits), first, (experts, q.K, q.N), stripe,
                       q.group if grouped else q.K, q.k_tile, q.k_block)


class Tasks(NamedTuple):
  """Which rows meet which expert; `n` is the number of tasks, static.

  Attributes:
    expert: `[n + 1]` int32, the expert of each task, E for those that are left over, which come last; then the number
      of the others.
    rows: `[n, rows]` int32, source row of each row (in range where not valid).
    valid: `[n, rows]` bool.
    position: `[T]` int32, where each row stands in the flattened tasks.
  """

  expert: jax.Array
  rows: jax.Array
  valid: jax.Array
  position: jax.Array


def tasks(group_sizes: jax.Array, total: int, rows: int, count: int) -> Tasks:
  """Cuts `total` rows, sorted into groups of `group_sizes` (`[E]` int32), into `count` tasks of at most `rows` rows.

  Comparisons of everything with everything, and sums over experts: that is three small kernels, where prefix sums and
  binary searches are thirty.
  """
  expert = jnp.arange(group_sizes.shape[0])
  before = expert[:, None] > expert[None, :]
  parts = (group_sizes + rows - 1) // rows
  first_row, first_task = (jnp.sum(before * a[None, :], axis=1) for a in (group_sizes, parts))
  size, parts, first_row, first_task = (a[None, :] for a in (group_sizes, parts, first_row, first_task))
  task, row = jnp.arange(count)[:, None], jnp.arange(total)[:, None]
  past = first_task + parts <= task  # [n, E]: the experts before the task's own
  here = ~past & (first_task <= task)
  left = jnp.sum(here * (size - (task - first_task) * rows), axis=1)
  source = jnp.sum(here * (first_row + (task - first_task) * rows), axis=1)
  owners = jnp.concatenate([jnp.sum(past, axis=1, dtype=jnp.int32), jnp.sum(parts, axis=1, dtype=jnp.int32)])
  done = first_row + size <= row  # [T, E]
  position = row[:, 0] + jnp.sum(done * (parts * rows - size), axis=1)
  place = jnp.arange(rows)[None, :]
  return Tasks(owners, jnp.minimum(source[:, None] + place, total - 1), place < left[:, None], position)


def rows_view(x: jax.Array, w: HopperWeights) -> jax.Array:
  """`[R, K]` rows -> `[steps, 8, R, width]`: for every step of the kernel its eight fragments, zeros where padded."""
  padded = jnp.pad(x, ((0, 0), (0, w.bits.shape[1] * w.k_block - x.shape[1])))
  real = min(w.width, w.eighth)
  view = padded.reshape(len(x), -1, EIGHTHS, w.fragments, real).transpose(1, 3, 2, 0, 4)
  return jnp.pad(view.reshape(-1, EIGHTHS, len(x), real), ((0, 0),) * 3 + ((0, w.width - real),))


def columns(y: jax.Array, w: HopperWeights) -> jax.Array:
  """`[..., NS * tiles * 128]` -> `[..., N]`: drops the padding of the column tiles."""
  stripes = y.reshape(*y.shape[:-1], w.bits.shape[2], -1)[..., : w.stripe]
  return stripes.reshape(*y.shape[:-1], -1)[..., : w.shape[2]]
