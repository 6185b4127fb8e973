"""The grouped matmul for CPUs.

Packed weights: a loop over experts, tiles of columns and tiles of rows (`cpu_loop.py`). Bits and routing are data: one
compiled program serves every plan and every batch of one shape. Scales and zeros come

  before the product where an expert has many rows: a tile `[K, columns]` is dequantized, in the dtype of the rows;
  after it where there are few: codes are unpacked and multiplied as they are (`cpu_codes.py`).

Plain arrays: one batched matmul over row tiles (`ragged.py`), differentiable in both arguments; with few rows, where
most of its tiles would be empty, a loop over the experts that have any.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import unpacking
from moeq_jax.kernels import cpu_codes, cpu_loop, ragged, varying
from moeq_jax.qtensor import QTensor

CPU_FLAGS = Path("/proc/cpuinfo")
FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")
# tuned on 2 cores of a Xeon with AMX, E = 8, 1024 x 3584 and E = 64, 768 x 3072 (docs/kernels.md)
MOST_ROWS_AFTER = {"bfloat16": 16, "float32": 64}  # mean rows of an expert up to which scales come after the product
LEAST_WEIGHTS_AFTER = 1 << 18  # of an expert; with fewer, starting the steps of a product takes the time
FEW_ROWS = 8  # mean rows of an expert up to which plain arrays go through a loop and not through row tiles
MOST_COLUMNS = {False: 4096, True: 2048}  # of a tile, and where experts have one row: wide ones take half the time
MOST_WEIGHTS = 1 << 22  # of a tile, unless 64 columns have more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How a matmul with packed weights is done.

  Attributes:
    rows: rows of a row tile.
    columns: columns that are unpacked at a time; divides the stripe, or is that of several stripes.
    scales: `"before"` or `"after"` the product.
  """

  rows: int
  columns: int
  scales: str = "before"


def heuristic(shape: tuple[int, int, int, int], dtype: jnp.dtype, fast_bfloat16: bool | None = None,
              stripes: int = 1) -> Config:
  """The sizes for a matmul.

  Args:
    shape: `(T, E, K, columns of a stripe)`.
    dtype: of the rows.
    fast_bfloat16: whether the CPU multiplies bfloat16; float32 rows of three bfloat16 parts pay only then. By default,
      what this machine says of itself.
    stripes: of an expert.
  """
  rows, experts, K, stripe = shape
  mean, name = rows / experts, jnp.dtype(dtype).name
  columns = cpu_loop.column_tile(K, stripe, stripes, MOST_COLUMNS[mean <= 1], MOST_WEIGHTS)
  fast = _fast_bfloat16() if fast_bfloat16 is None else fast_bfloat16
  few = mean <= MOST_ROWS_AFTER[name] and K * stripe * stripes >= LEAST_WEIGHTS_AFTER
  if few and (fast or name == "bfloat16"):
    return Config(rows=min(rows, max(4, min(_power(2 * mean), 64))), columns=columns, scales="after")
  tile = 256 if mean >= 512 else min(math.ceil(1.5 * mean / 16) * 16, 128) if mean > 4 else max(4, _power(2 * mean))
  return Config(rows=min(rows, tile), columns=columns)


def _power(value: float) -> int:
  """The smallest power of two that is at least `value`."""
  return 1 << max(0, math.ceil(value) - 1).bit_length()


@functools.cache
def _fast_bfloat16() -> bool:
  """Whether the CPU has instructions for products of bfloat16; false where it does not say."""
  try:
    return any(flag in CPU_FLAGS.read_text().split() for flag in FAST_BFLOAT16)
  except OSError:
    return False


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
    if x.shape[0] <= FEW_ROWS * w.shape[0] and jax.default_backend() == "cpu":
      return _dense(x, w.astype(x.dtype), group_sizes, out_dtype)
    return _tiled(x, w, group_sizes, out_dtype)
  return _products(x, (w,), group_sizes, out_dtype, lambda part: part)


def _tiled(x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """Plain arrays, all row tiles at once."""
  mean = x.shape[0] // w.shape[0]
  rows = min(x.shape[0], 256 if mean >= 512 else max(8, min(_power(2 * mean), 128)))
  return ragged.matmul(x, w.astype(x.dtype), group_sizes, rows).astype(out_dtype)


def _dense(x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """Plain arrays and few rows: only experts that have rows are touched."""
  tiles = Config(rows=min(len(x), max(4, _power(2 * len(x) / len(w)))), columns=w.shape[2])

  def update(y: jax.Array, mine: jax.Array, column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
    part = jnp.dot(lax.dynamic_slice_in_dim(x, first, tiles.rows), mine, preferred_element_type=jnp.float32)
    return cpu_loop.write(y, part, column, first, keep)

  def take(index: jax.Array, column: jax.Array) -> jax.Array:
    del column
    return lax.dynamic_index_in_dim(w, index, keepdims=False)

  y = varying.zeros((x.shape[0], w.shape[2]), out_dtype, x)
  return cpu_loop.sweep(y, w.shape[2], group_sizes, tiles, take, update)


def gated(x: jax.Array, gate: QTensor, up: QTensor, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """`silu(x gate) * (x up)` in one sweep over weights that are `cpu_loop.alike`: `[T, K], 2 [E, K, N] -> [T, N]`."""
  return _products(x, (gate, up), group_sizes, out_dtype, swiglu)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """What an expert makes of its two inner products."""
  gate, up = lax.optimization_barrier((gate, up))  # fused, every use of them would compute them again
  return jax.nn.silu(gate) * up


def _products(x: jax.Array, weights: Sequence[QTensor], group_sizes: jax.Array, out_dtype: jnp.dtype,
              join: cpu_loop.Join) -> jax.Array:
  q = weights[0]
  config = heuristic((x.shape[0], q.shape[0], q.K, q.buffer.shape[2]), x.dtype, stripes=q.blocks[2])
  y = varying.zeros((x.shape[0], cpu_loop.padded(q)), out_dtype, x)
  if config.scales == "after":
    return cpu_codes.forward(cpu_codes.exact(x, q), weights, group_sizes, config, y, join)[:, : q.N]
  kind = out_dtype if x.dtype == jnp.bfloat16 and len(weights) == 1 else jnp.float32

  def update(y: jax.Array, tiles: Sequence[jax.Array], column: jax.Array, first: jax.Array,
             keep: jax.Array) -> jax.Array:
    rows = lax.dynamic_slice_in_dim(x, first, config.rows)
    parts = [jnp.dot(rows, tile, preferred_element_type=kind) for tile in tiles]
    return cpu_loop.write(y, join(*parts), column, first, keep)

  def unpack(index: jax.Array, column: jax.Array) -> list[jax.Array]:
    return [unpacking.columns(q, index, column, config.columns, x.dtype) for q in weights]

  return cpu_loop.sweep(y, y.shape[1], group_sizes, config, unpack, update)[:, : q.N]


def backward(
  x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients `([T, K], [E, K, N])` of `forward`, the second None for packed weights."""
  if not isinstance(w, QTensor):
    return jax.vjp(lambda x, w: _tiled(x, w, group_sizes, dy.dtype), x, w)[1](dy)
  config = heuristic((x.shape[0], w.shape[0], w.K, w.buffer.shape[2]), x.dtype, False, w.blocks[2])
  dy = jnp.pad(dy.astype(x.dtype), ((0, 0), (0, cpu_loop.padded(w) - w.N)))
  kind = x.dtype if cpu_loop.padded(w) == config.columns else jnp.float32  # one column tile: nothing is accumulated
  contract = (((1,), (1,)), ((), ()))

  def update(dx: jax.Array, tile: jax.Array, column: jax.Array, first: jax.Array, keep: jax.Array) -> jax.Array:
    rows = lax.dynamic_slice(dy, (first, column), (config.rows, config.columns))
    part = lax.dot_general(rows, tile, contract, preferred_element_type=kind)
    old = lax.dynamic_slice(dx, (first, 0), part.shape)
    part = jnp.where(column > 0, part + old, part)
    return lax.dynamic_update_slice(dx, jnp.where(keep, part, old), (first, 0))

  dx = varying.zeros((x.shape[0], w.K), kind, x)
  unpack = lambda index, column: unpacking.columns(w, index, column, config.columns, x.dtype)
  return cpu_loop.sweep(dx, cpu_loop.padded(w), group_sizes, config, unpack, update).astype(x.dtype), None
