"""The loop of the CPU back-ends: over experts that have rows, over tiles of columns, over tiles of rows.

A tile of columns is unpacked once and then meets every row of its expert, so unpacking is amortised and no weight is
ever dense as a whole. Experts without rows are not in the loop at all: XLA moves what does not depend on a loop's index
out of the loop without asking whether it runs even once, so a loop of no steps is not free.

Row tiles need no mask at the end of an expert: what a tile writes past it belongs to the next expert, which comes later
and writes it again. Only the last rows of the array need one, because a tile that would stick out is moved back.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax.qtensor import QTensor

MOST_STRIPES = 48  # of a tile: each is read from another place, and caches follow so many at a time (docs/kernels.md)
Join = Callable[..., jax.Array]  # products of the same rows with several weights, [rows, columns] each -> one


class Tiles(Protocol):
  """The sizes of tiles: `rows` of a row tile, `columns` of a column tile."""

  rows: int
  columns: int


def padded(q: QTensor) -> int:
  """Columns with the padding of the last stripe."""
  return q.blocks[2] * q.buffer.shape[2]


def alike(*weights: QTensor) -> bool:
  """Whether the weights can be swept together: equal sizes and layouts, whatever their widths."""
  return len({(q.shape, q.blocks, q.buffer.shape[2], q.group, q.k_block) for q in weights}) == 1


def column_tile(K: int, stripe: int, stripes: int, most_columns: int, most_weights: int) -> int:
  """Columns to unpack at a time: as many whole stripes, at most `MOST_STRIPES`, as divide their number and keep a tile
  of K rows within both limits; or, of a wider stripe, the largest multiple of 64 that divides it and keeps within them,
  or the smallest one; all of a stripe that no multiple of 64 divides."""
  most = min(most_columns, most_weights // K)
  if whole := [n * stripe for n in range(1, min(stripes, MOST_STRIPES) + 1) if stripes % n == 0 and n * stripe <= most]:
    return max(whole)
  dividing = [c for c in range(64, most_columns + 1, 64) if stripe % c == 0]
  return max((c for c in dividing if c * K <= most_weights), default=min(dividing, default=stripe))


def write(y: jax.Array, part: jax.Array, column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
  """`y` with the rows of `part` that are to be kept, in the dtype of `y`, from `first` and `column` on."""
  old = lax.dynamic_slice(y, (first, column), part.shape)
  return lax.dynamic_update_slice(y, jnp.where(keep, part.astype(y.dtype), old), (first, column))


def loop(count: int, step: Callable[[Any, jax.Array], jax.Array], out: jax.Array) -> jax.Array:
  """`lax.fori_loop` from 0; a loop of one step is no loop: it costs as much as the products of a small model."""
  return step(jnp.int32(0), out) if count == 1 else lax.fori_loop(0, count, step, out)


def sweep(
  out: jax.Array,
  columns: int,
  group_sizes: jax.Array,
  tiles: Tiles,
  unpack: Callable[[jax.Array, jax.Array], Any],
  update: Callable[[jax.Array, Any, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Calls `update` for every row tile of every column tile of every expert that has rows.

  Args:
    out: `[T, _]`, carried through the updates.
    columns: of the weights, with the padding of the last stripe.
    group_sizes: `[E]` int32.
    tiles: sizes.
    unpack: `(expert, first column) -> tile`.
    update: `(out, tile, first column, first row, keep [rows, 1] bool) -> out`.

  Returns:
    The last `out`.
  """
  end = jnp.cumsum(group_sizes)
  active = jnp.argsort(group_sizes == 0, stable=True)

  def expert(number: jax.Array, out: jax.Array) -> jax.Array:
    index = active[number]

    def column_tile(j: jax.Array, out: jax.Array) -> jax.Array:
      column = j * tiles.columns
      tile = unpack(index, column)

      def row_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        wanted = end[index] - group_sizes[index] + i * tiles.rows
        first = jnp.minimum(wanted, out.shape[0] - tiles.rows)
        keep = (first + jnp.arange(tiles.rows) >= wanted)[:, None]
        return update(out, tile, column, first, keep)

      return lax.fori_loop(0, -(-group_sizes[index] // tiles.rows), row_tile, out)

    return loop(columns // tiles.columns, column_tile, out)

  return lax.fori_loop(0, jnp.sum(group_sizes > 0), expert, out)
