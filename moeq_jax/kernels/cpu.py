"""The grouped matmul for CPUs.

Packed weights: a loop over experts, over tiles of columns, and over tiles of rows. A column tile of one expert,
`[K, columns]`, is dequantized once and then meets every row of that expert, so unpacking is amortised over the rows,
the whole weight is never dense, and an expert without rows costs one comparison. Bits and routing are data: one
compiled program serves every plan and every batch of one shape.

Row tiles need no mask at the end of an expert: what a tile writes past it belongs to the next expert, which comes later
and writes it again. Only the last rows of the array need one, because a tile that would stick out is moved back.

Plain arrays: one batched matmul over row tiles (`ragged.py`), differentiable in both arguments.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import qtensor
from moeq_jax.kernels import ragged, varying
from moeq_jax.qtensor import QTensor

Update = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes.

  Attributes:
    rows: rows of a row tile.
    columns: columns that are dequantized at a time; divides the stripe.
  """

  rows: int
  columns: int


def heuristic(rows: int, experts: int, stripe: int) -> Config:
  """Tile sizes for `rows` rows over `experts` experts and stripes of `stripe` columns.

  A row tile is about twice the rows of an average expert, between 8 and 128, or 256 where experts have 512 or more; a
  column tile is the largest multiple of 64 up to 1024 that divides the stripe, or all of a stripe that has none.
  """
  mean = rows // experts
  tile = 256 if mean >= 512 else min(128, max(8, 1 << (2 * mean - 1).bit_length()))
  widths = [c for c in range(64, 1025, 64) if stripe % c == 0]
  return Config(rows=min(rows, tile), columns=max(widths, default=stripe))


def supports(shape: tuple[int, int, int, int], dtypes: tuple[jnp.dtype, jnp.dtype | None], device: str) -> str | None:
  """The reason why this back-end does not take a matmul `(T, E, K, N)`, or None; plain arrays may be on any device."""
  if shape[0] == 0:
    return "there are no rows"
  if dtypes[1] is None and device != "cpu":
    return f"packed weights are unpacked in a loop made for CPUs, and the device is {device!r}"
  return None


def forward(x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`; see `api.grouped_matmul`."""
  if not isinstance(w, QTensor):
    config = heuristic(x.shape[0], w.shape[0], w.shape[2])
    return ragged.matmul(x, w.astype(x.dtype), group_sizes, config.rows).astype(out_dtype)
  config = heuristic(x.shape[0], w.shape[0], w.buffer.shape[2])
  kind = jnp.float32 if x.dtype == jnp.float32 else out_dtype

  def update(y: jax.Array, tile: jax.Array, column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
    part = jnp.dot(_rows(x, first, config), tile, preferred_element_type=kind).astype(out_dtype)
    old = lax.dynamic_slice(y, (first, column), part.shape)
    return lax.dynamic_update_slice(y, jnp.where(keep, part, old), (first, column))

  y = varying.zeros((x.shape[0], _padded(w)), out_dtype, x)
  return _sweep(y, x, w, group_sizes, config, update)[:, : w.N]


def backward(
  x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients `([T, K], [E, K, N])` of `forward`, the second None for packed weights."""
  if not isinstance(w, QTensor):
    return jax.vjp(lambda x, w: forward(x, w, group_sizes, dy.dtype), x, w)[1](dy)
  config = heuristic(x.shape[0], w.shape[0], w.buffer.shape[2])
  dy = jnp.pad(dy.astype(x.dtype), ((0, 0), (0, _padded(w) - w.N)))
  kind = x.dtype if _padded(w) == config.columns else jnp.float32  # one column tile: nothing is accumulated
  contract = (((1,), (1,)), ((), ()))

  def update(dx: jax.Array, tile: jax.Array, column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
    rows = lax.dynamic_slice(dy, (first, column), (config.rows, config.columns))
    part = lax.dot_general(rows, tile, contract, preferred_element_type=kind)
    old = lax.dynamic_slice(dx, (first, 0), part.shape)
    part = jnp.where(column > 0, part + old, part)
    return lax.dynamic_update_slice(dx, jnp.where(keep, part, old), (first, 0))

  dx = varying.zeros((x.shape[0], w.K), kind, x)
  return _sweep(dx, dy, w, group_sizes, config, update).astype(x.dtype), None


def _padded(q: QTensor) -> int:
  """Columns with the padding of the last stripe."""
  return q.blocks[2] * q.buffer.shape[2]


def _rows(x: jax.Array, first: jax.Array, config: Config) -> jax.Array:
  return lax.dynamic_slice(x, (first, 0), (config.rows, x.shape[1]))


def _sweep(
  out: jax.Array, x: jax.Array, q: QTensor, group_sizes: jax.Array, config: Config, update: Update
) -> jax.Array:
  """Calls `update` for every row tile of every column tile of every expert that has rows.

  Args:
    out: carried through the updates.
    x: `[T, _]` rows; gives T and the dtype of the dequantized tiles.
    q: weights.
    group_sizes: `[E]` int32.
    config: tile sizes.
    update: `(out, weights [K, columns], first column, first row, keep [rows, 1] bool) -> out`.

  Returns:
    The last `out`.
  """
  end = jnp.cumsum(group_sizes)

  def expert(index: jax.Array, out: jax.Array) -> jax.Array:
    def column_tile(j: jax.Array, out: jax.Array) -> jax.Array:
      column = j * config.columns
      tile = qtensor.columns(q, index, column, config.columns, x.dtype)

      def row_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        wanted = end[index] - group_sizes[index] + i * config.rows
        first = jnp.minimum(wanted, x.shape[0] - config.rows)
        keep = (first + jnp.arange(config.rows) >= wanted)[:, None]
        return update(out, tile, column, first, keep)

      return lax.fori_loop(0, -(-group_sizes[index] // config.rows), row_tile, out)

    tiles = jnp.where(group_sizes[index] > 0, _padded(q) // config.columns, 0)
    return lax.fori_loop(0, tiles, column_tile, out)

  return lax.fori_loop(0, q.blocks[0], expert, out)
