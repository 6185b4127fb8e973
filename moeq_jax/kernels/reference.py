"""The slow grouped matmul that is obviously right: every expert multiplies every row, and a mask keeps its own.

Always float32 at the highest precision. It costs E times the work, so it serves tests and devices without a back-end.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moeq_jax import qtensor
from moeq_jax.kernels import varying
from moeq_jax.qtensor import QTensor


def supports(shape: tuple[int, int, int, int], dtypes: tuple[jnp.dtype, jnp.dtype | None], device: str) -> str | None:
  """Supports everything that the door lets through."""
  del shape, dtypes, device
  return None


def _weight(w: jax.Array | QTensor, index: jax.Array) -> jax.Array:
  if isinstance(w, QTensor):
    return qtensor.expert(w, index, jnp.float32)
  return lax.dynamic_index_in_dim(w, index, keepdims=False).astype(jnp.float32)


def _mine(group_sizes: jax.Array, total: int, index: jax.Array) -> jax.Array:
  """`[T, 1]` bool, the rows of one expert."""
  end = jnp.cumsum(group_sizes)[index]
  row = jnp.arange(total)
  return ((row >= end - group_sizes[index]) & (row < end))[:, None]


def forward(x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`; see `api.grouped_matmul`."""

  def add(index: jax.Array, y: jax.Array) -> jax.Array:
    part = jnp.dot(x.astype(jnp.float32), _weight(w, index), precision="highest")
    return jnp.where(_mine(group_sizes, x.shape[0], index), part, y)

  y = varying.zeros((x.shape[0], w.shape[2]), jnp.float32, x)
  return lax.fori_loop(0, w.shape[0], add, y).astype(out_dtype)


def backward(
  x: jax.Array, w: jax.Array | QTensor, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """The gradients `([T, K], [E, K, N])` of `forward`, the second None for packed weights."""
  x32, dy32 = x.astype(jnp.float32), dy.astype(jnp.float32)

  def add(index: jax.Array, dx: jax.Array) -> jax.Array:
    part = jnp.dot(dy32, _weight(w, index).T, precision="highest")
    return jnp.where(_mine(group_sizes, x.shape[0], index), part, dx)

  dx = lax.fori_loop(0, w.shape[0], add, varying.zeros(x.shape, jnp.float32, x)).astype(x.dtype)
  if isinstance(w, QTensor):
    return dx, None

  def outer(index: jax.Array) -> jax.Array:
    rows = jnp.where(_mine(group_sizes, x.shape[0], index), x32, 0)
    return jnp.dot(rows.T, dy32, precision="highest").astype(w.dtype)

  return dx, lax.map(outer, jnp.arange(w.shape[0]))
