"""Grouped matmul for plain arrays as one batched matmul over row tiles, with cheap gradients.

Rows are sorted by expert. Each expert's rows are padded to a multiple of `tile` and cut into tiles; every tile belongs
to one expert. The number of tiles is bounded by `T // tile + E` whatever the routing, so shapes are static, no token is
dropped, and the waste is at most `tile` rows per expert (buckets of equal size waste in proportion to the most loaded
expert). Both gradients are batched matmuls over the same tiles; nothing is scattered.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
  """Where the tiles come from. `n` is the static number of tiles.

  Attributes:
    expert: `[n]` int32, the expert of each tile (tiles past the last are given to the last expert and hold no row).
    rows: `[n, tile]` int32, source row of each tile row (clipped where not valid).
    valid: `[n, tile]` bool.
    position: `[T]` int32, where each row stands in the flattened tiles.
  """

  expert: jax.Array
  rows: jax.Array
  valid: jax.Array
  position: jax.Array


def tiles(group_sizes: jax.Array, total: int, tile: int) -> Tiles:
  """Cuts `total` rows, sorted into groups of `group_sizes` (`[E]` int32), into tiles of `tile` rows."""
  experts = group_sizes.shape[0]
  count = total // tile + experts
  end = jnp.cumsum(group_sizes)
  start = end - group_sizes
  tiles_end = jnp.cumsum((group_sizes + tile - 1) // tile)
  tiles_start = jnp.concatenate([jnp.zeros(1, tiles_end.dtype), tiles_end[:-1]])
  index = jnp.arange(count)
  expert = jnp.minimum(jnp.searchsorted(tiles_end, index, side="right"), experts - 1)
  rows = (start[expert] + (index - tiles_start[expert]) * tile)[:, None] + jnp.arange(tile)[None, :]
  valid = (rows < end[expert][:, None]) & (index < tiles_end[-1])[:, None]
  row = jnp.arange(total)
  owner = jnp.minimum(jnp.searchsorted(end, row, side="right"), experts - 1)
  position = tiles_start[owner] * tile + row - start[owner]
  return Tiles(expert, jnp.clip(rows, 0, max(total - 1, 0)), valid, position)


def _gather(x: jax.Array, cut: Tiles) -> jax.Array:
  return jnp.where(cut.valid[..., None], x[cut.rows], 0)


def _matmul(x: jax.Array, w: jax.Array, cut: Tiles, contract: int) -> jax.Array:
  dims = (((2,), (contract,)), ((0,), (0,)))
  out = lax.dot_general(_gather(x, cut), w[cut.expert], dims)
  return out.reshape(-1, out.shape[-1])[cut.position]


def outer(x: jax.Array, y: jax.Array, group_sizes: jax.Array, tile: int = 128) -> jax.Array:
  """Sum of `x_t y_t^T` over the rows of each group: `[T, K], [T, N] -> [E, K, N]` float32.

  Products are summed in the inputs' dtype within a tile, in float32 over tiles. The transposition runs in a loop of its
  own, because XLA:CPU would fold it into the dot and then leave its fast bfloat16 path (3x slower as measured).
  """
  cut = tiles(group_sizes, x.shape[0], tile)
  x_transposed = lax.map(jnp.transpose, _gather(x, cut))
  parts = lax.dot_general(x_transposed, _gather(y, cut), (((2,), (1,)), ((0,), (0,))))
  return jax.ops.segment_sum(parts.astype(jnp.float32), cut.expert, group_sizes.shape[0], indices_are_sorted=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, tile: int = 128) -> jax.Array:
  """`y[t] = x[t] @ w[e(t)]` for rows sorted by expert.

  Args:
    x: `[T, K]` rows, the rows of expert 0 first.
    w: `[E, K, N]`, of the dtype of `x`.
    group_sizes: `[E]` int32, rows of each expert; they sum to T.
    tile: rows of a tile.

  Returns:
    `[T, N]`, dtype of `x`. Differentiable in `x` and `w`.
  """
  return _matmul(x, w, tiles(group_sizes, x.shape[0], tile), 1)


def _forward(x, w, group_sizes, tile):
  return matmul(x, w, group_sizes, tile), (x, w, group_sizes)


def _backward(tile, saved, dy):
  x, w, group_sizes = saved
  dx = _matmul(dy, w, tiles(group_sizes, x.shape[0], tile), 2)
  return dx, outer(x, dy, group_sizes, tile).astype(w.dtype), None


matmul.defvjp(_forward, _backward)
