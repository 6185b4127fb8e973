"""The grouped matmul for CPUs with activations in 8 bits: for few rows, where unpacking to bfloat16 costs the most.

Every row is quantized per scale group of K, symmetrically: `x ~ s x_q` with `s = max |x| / 127`. With weights
`(code - zero) * scale`, each group then needs one product of integers,

  y = sum over groups of scale * (s sum(x_q code) - zero s sum(x_q)),

so no weight is ever converted to a float. This changes what is computed (by about half a percent of the output's norm),
so it is asked for by name and never chosen where quality is measured. Wide batches and plain arrays go the exact way of
`cpu.py`; so do 16-bit blocks, inside this loop.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moeq_jax import planar, qtensor
from moeq_jax.kernels import cpu, varying
from moeq_jax.qtensor import QTensor

MOST_ROWS = 16  # per expert on average; above, the exact way is as fast
ONE_GROUP = 64  # inputs that are quantized together where one scale serves all of K; divides every K-block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes.

  Attributes:
    rows: rows of a row tile.
    columns: columns of a column tile; divides the stripe.
  """

  rows: int
  columns: int


def heuristic(rows: int, experts: int, stripe: int) -> Config:
  """Tiles of up to four rows (weights are unpacked once for each) and of up to 512 columns, which stay in the cache."""
  mean = max(rows // experts, 1)
  widths = [c for c in range(64, 513, 64) if stripe % c == 0]
  return Config(rows=min(rows, 4 if mean <= 4 else 8), columns=max(widths, default=stripe))


def supports(shape: tuple[int, int, int, int], dtypes: tuple[jnp.dtype, jnp.dtype | None], device: str) -> str | None:
  """The reason why this back-end does not take a matmul `(T, E, K, N)`, or None."""
  if device != "cpu":
    return f"activations in 8 bits are for CPUs, and the device is {device!r}"
  if dtypes[1] is not None:
    return "activations in 8 bits need packed weights"
  return cpu.supports(shape, dtypes, device)


def forward(x: jax.Array, w: QTensor, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`; see `api.grouped_matmul`."""
  if x.shape[0] > MOST_ROWS * w.shape[0]:
    return cpu.forward(x, w, group_sizes, out_dtype)
  config = heuristic(x.shape[0], w.shape[0], w.buffer.shape[2])
  experts, k_blocks, stripes = w.blocks
  padded = stripes * w.buffer.shape[2]
  rows = _quantize(x, w)
  end = jnp.cumsum(group_sizes)

  def expert(index: jax.Array, y: jax.Array) -> jax.Array:
    def column_tile(j: jax.Array, y: jax.Array) -> jax.Array:
      column = j * config.columns

      def row_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        wanted = end[index] - group_sizes[index] + i * config.rows
        first = jnp.minimum(wanted, x.shape[0] - config.rows)
        keep = (first + jnp.arange(config.rows) >= wanted)[:, None]
        tile = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, config.rows), rows)
        part = _product(tile, w, index, column, config.columns).astype(out_dtype)
        old = lax.dynamic_slice(y, (first, column), part.shape)
        return lax.dynamic_update_slice(y, jnp.where(keep, part, old), (first, column))

      return lax.fori_loop(0, -(-group_sizes[index] // config.rows), row_tile, y)

    tiles = jnp.where(group_sizes[index] > 0, padded // config.columns, 0)
    return lax.fori_loop(0, tiles, column_tile, y)

  y = varying.zeros((x.shape[0], padded), out_dtype, x)
  return lax.fori_loop(0, experts, expert, y)[:, : w.N]


backward = cpu.backward


class _Rows(NamedTuple):
  """Rows that meet weights of `blocks` K-blocks, each cut into A groups of `size` inputs; a pytree.

  Attributes:
    values: `[T, KB, k_block]`, what they are, padded with zeros.
    codes: `[T, KB, A, size]` int8.
    scale: `[T, KB, A]` float32.
    sums: `[T, KB, A]` float32, of codes times scale.
  """

  values: jax.Array
  codes: jax.Array
  scale: jax.Array
  sums: jax.Array


def _quantize(x: jax.Array, q: QTensor) -> _Rows:
  """Quantizes rows `[T, K]` per scale group, or per `ONE_GROUP` inputs where one scale serves all of K."""
  size = ONE_GROUP if q.groups == 1 else q.group
  k_blocks = q.blocks[1]
  values = jnp.pad(x, ((0, 0), (0, k_blocks * q.k_block - q.K))).reshape(x.shape[0], k_blocks, q.k_block)
  groups = values.astype(jnp.float32).reshape(*values.shape[:2], -1, size)
  most = jnp.max(jnp.abs(groups), axis=-1)
  scale = jnp.where(most > 0, most / 127, 1.0)
  codes = jnp.round(groups / scale[..., None])
  return _Rows(values, codes.astype(jnp.int8), scale, jnp.sum(codes, axis=-1) * scale)


def _product(rows: _Rows, q: QTensor, index: jax.Array, column: jax.Array, width: int) -> jax.Array:
  """`[R, width]` float32: a tile of rows times some columns of one expert."""

  def block(bits: int, raw: jax.Array, scale: jax.Array, zero: jax.Array, k: jax.Array) -> jax.Array:
    mine = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, 1, keepdims=False), rows)
    if bits == 16:
      weights = planar.decode_bfloat16(raw, q.k_tile).astype(mine.values.dtype)
      return jnp.dot(mine.values, weights, preferred_element_type=jnp.float32)
    found = qtensor.block_codes(raw, bits, q.k_tile)
    shift = 128 if bits == 8 else 0  # 8-bit codes become signed
    signed = lax.bitcast_convert_type(found ^ np.uint8(shift), jnp.int8).reshape(*mine.codes.shape[1:], width)
    dots = lax.dot_general(mine.codes, signed, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)
    scale, zero = (jnp.broadcast_to(a.astype(jnp.float32), (len(signed), width)) for a in (scale, zero))
    parts = dots * mine.scale.T[..., None] - (zero - shift)[:, None] * mine.sums.T[..., None]
    return jnp.sum(parts * scale[:, None], axis=0)

  return jnp.sum(qtensor.map_blocks(q, index, column, width, block), axis=0)
