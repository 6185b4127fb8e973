"""Attention as in T5: positions enter as a learned bias on the logits, and the logits are not scaled.

The distance between two positions falls into a bucket: near distances have one each, far ones share them on a
logarithmic scale (T5, arXiv 1910.10683, section 2.1). All blocks of a stack share the bias of one table.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moeq_jax.models import layers


def buckets(relative: np.ndarray, *, count: int, furthest: int, bidirectional: bool) -> np.ndarray:
  """The bucket of each relative position.

  The first half of the buckets of a direction hold one distance each. The second half grow by a constant factor and end
  at `furthest`; everything beyond is in the last. The logarithm is rounded in float32, as in other implementations,
  which decides where distances at the edge of a bucket fall.

  Args:
    relative: integers, position of the key minus position of the query.
    count: how many buckets there are.
    furthest: the distance from which on all are in the last bucket.
    bidirectional: half of the buckets are for keys after the query; else those count as distance 0.

  Returns:
    Integers in `[0, count)` of the same shape.
  """
  if bidirectional:
    count //= 2
    base, distance = np.where(relative > 0, count, 0), np.abs(relative)
  else:
    base, distance = 0, np.maximum(-relative, 0)
  exact = count // 2
  growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  far = exact + (growth / np.float32(np.log(furthest / exact)) * np.float32(count - exact)).astype(np.int64)
  return base + np.where(distance < exact, distance, np.minimum(far, count - 1))


def position_bias(table: jax.Array, length: int, *, furthest: int, bidirectional: bool) -> jax.Array:
  """The bias on the logits of self-attention: `[buckets, H]` -> `[1, H, length, length]` (query, key)."""
  relative = np.arange(length)[None, :] - np.arange(length)[:, None]
  index = buckets(relative, count=table.shape[0], furthest=furthest, bidirectional=bidirectional)
  return jnp.moveaxis(table[index], -1, 0)[None]


def bias_at(table: jax.Array, position: jax.Array, length: int, *, furthest: int) -> jax.Array:
  """The row of a causal `position_bias` for the query at `position` `[]`: `[1, H, 1, length]`."""
  index = buckets(-np.arange(length), count=table.shape[0], furthest=furthest, bidirectional=False)
  distance = jnp.maximum(position - jnp.arange(length), 0)
  return jnp.moveaxis(table[jnp.asarray(index)[distance]], -1, 0)[None, :, None]


class Attention(nnx.Module):
  """Multi-head attention to given keys and values: its own stack's (self) or the encoder's (cross)."""

  def __init__(self, hidden: int, heads: int, head_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.head_dim, wide = head_dim, heads * head_dim
    self.q = layers.normal(  # its deviation stands in for the scale of the logits
        rngs, hidden, wide, deviation=(hidden * head_dim) ** -0.5, dtype=dtype)
    self.k = layers.normal(rngs, hidden, wide, deviation=hidden**-0.5, dtype=dtype)
    self.v = layers.normal(rngs, hidden, wide, deviation=hidden**-0.5, dtype=dtype)
    self.o = layers.normal(rngs, wide, hidden, deviation=wide**-0.5, dtype=dtype)

  def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys and values of rows `[B, S, D]`, each `[B, S, H, head_dim]`."""
    return self._heads(x, self.k), self._heads(x, self.v)

  def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, *, bias: jax.Array | None = None,
               mask: jax.Array | None = None, causal: bool = False) -> jax.Array:
    """`[B, T, D] -> [B, T, D]`.

    Args:
      x: rows of the queries.
      keys, values: `[B, S, H, head_dim]`, from `keys_values`.
      bias: `[1, H, T, S]`, added to the logits.
      mask: bool, broadcasts to `[B, H, T, S]`; false hides a key.
      causal: hides the keys after each query.
    """
    bias = None if bias is None else bias.astype(x.dtype)
    mixed = jax.nn.dot_product_attention(self._heads(x, self.q), keys, values, bias=bias, mask=mask, scale=1.0,
                                         is_causal=causal)
    return layers.dense(mixed.reshape(*x.shape[:2], -1), self.o[...])

  def _heads(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
    return layers.dense(x, weight[...]).reshape(*x.shape[:2], -1, self.head_dim)
