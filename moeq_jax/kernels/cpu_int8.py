"""The grouped matmul for CPUs with activations in 8 bits: for few rows, where unpacking to bfloat16 costs the most.

Rows are rounded to 8 bits per scale group and multiplied with the codes as integers (`cpu_codes.py`), so no weight is
ever converted to a float. This changes what is computed (by about half a percent of the output's norm), so it is asked
for by name and never chosen where quality is measured. Many rows and plain arrays go the exact way of `cpu.py`, and so
do 16-bit blocks, inside this loop.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import unpacking
from moeq_jax.kernels import cpu, cpu_codes, cpu_loop, varying
from moeq_jax.qtensor import QTensor

MOST_ROWS = 8  # per expert on average; above, the exact way is as fast
ONE_GROUP = 64  # inputs that are quantized together where one scale serves all of K, or fewer in smaller K-blocks
MOST_COLUMNS, MOST_WEIGHTS = 1024, 1 << 22  # of an unpacked tile, unless 64 columns have more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes.

  Attributes:
    rows: rows of a row tile.
    columns: columns of a column tile; divides the stripe, or is that of several stripes.
  """

  rows: int
  columns: int


def heuristic(shape: tuple[int, int, int, int], stripes: int = 1) -> Config:
  """Tile sizes for `(T, E, K, columns of a stripe)` and the number of stripes of an expert."""
  rows, experts, K, stripe = shape
  columns = cpu_loop.column_tile(K, stripe, stripes, MOST_COLUMNS, MOST_WEIGHTS)
  return Config(rows=min(rows, 4 if rows <= 4 * experts else 8), columns=columns)


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
  return _products(x, (w,), group_sizes, out_dtype, lambda part: part)


def gated(x: jax.Array, gate: QTensor, up: QTensor, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """See `cpu.gated`."""
  if x.shape[0] > MOST_ROWS * gate.shape[0]:
    return cpu.gated(x, gate, up, group_sizes, out_dtype)
  return _products(x, (gate, up), group_sizes, out_dtype, cpu.swiglu)


backward = cpu.backward


def _products(x: jax.Array, weights: Sequence[QTensor], group_sizes: jax.Array, out_dtype: jnp.dtype,
              join: cpu_loop.Join) -> jax.Array:
  q, stripe = weights[0], weights[0].buffer.shape[2]
  config = heuristic((x.shape[0], q.shape[0], q.K, stripe), q.blocks[2])
  values = jnp.pad(x, ((0, 0), (0, q.blocks[1] * q.k_block - q.K)))

  def wide(q: QTensor, index: jax.Array, column: jax.Array, first: jax.Array) -> jax.Array:
    blocks = lax.dynamic_slice(q.bits, (index, 0, column // stripe), (1, q.blocks[1], max(1, config.columns // stripe)))
    mine = blocks[0] == 16

    def product() -> jax.Array:
      weights = unpacking.codes(q, index, column, config.columns, jnp.dtype(jnp.bfloat16))[0]
      whole = jnp.repeat(jnp.repeat(mine, q.k_block, axis=0), min(config.columns, stripe), axis=1)
      weights = jnp.where(whole, weights.astype(x.dtype), 0)
      return jnp.dot(lax.dynamic_slice_in_dim(values, first, config.rows), weights, preferred_element_type=jnp.float32)

    return lax.cond(mine.any(), product, lambda: varying.zeros((config.rows, config.columns), jnp.float32, x))

  y = varying.zeros((x.shape[0], cpu_loop.padded(q)), out_dtype, x)
  rows = cpu_codes.quantized(x, q, math.gcd(ONE_GROUP, q.k_block) if q.groups == 1 else q.group)
  return cpu_codes.forward(rows, weights, group_sizes, config, y, join, wide)[:, : q.N]
