"""Causal grouped-query attention over whole sequences, and over a cache of keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moeq_jax.models import layers
from moeq_jax.models.rope import Rope, rotate


class Cache(NamedTuple):
  """Keys (turned to their positions) and values of one block; slot `i` is for the token at position `i`.

  Attributes:
    k, v: `[B, C, kv heads, head_dim]` in the compute dtype.
  """

  k: jax.Array
  v: jax.Array

  def write(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> "Cache":
    """The cache with `k`, `v` `[B, S, kv heads, head_dim]` at `positions` `[B, S]`."""
    row = jnp.arange(k.shape[0])[:, None]
    return Cache(self.k.at[row, positions].set(k), self.v.at[row, positions].set(v))


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions.

  Attributes:
    q, k, v, o: `[D, heads * head_dim]` and, for `o`, the other way round.
    q_bias, k_bias, v_bias, o_bias: present where the config has them.
    q_norm, k_norm: `[head_dim]` with `qk_norm == "head"`, as wide as the projection with `"whole"`.
    window: how many positions a token sees, itself among them; `None` for all.
  """

  def __init__(self, hidden: int, heads: int, kv_heads: int, rope: Rope, *, qkv_bias: bool = False,
               o_bias: bool = False, qk_norm: str = "", clip: float | None = None, window: int | None = None,
               eps: float = 1e-5, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.rope, self.qk_norm, self.clip, self.window, self.eps = rope, qk_norm, clip, window, eps
    wide = {"q": heads * rope.head_dim, "k": kv_heads * rope.head_dim, "v": kv_heads * rope.head_dim}
    for name, size in wide.items():
      setattr(self, name, layers.normal(rngs, hidden, size, dtype=dtype))
      if qkv_bias:
        setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(size, dtype)))
      if qk_norm and name != "v":
        setattr(self, f"{name}_norm", nnx.Param(jnp.ones(rope.head_dim if qk_norm == "head" else size, dtype)))
    self.o = layers.normal(rngs, wide["q"], hidden, dtype=dtype)
    if o_bias:
      self.o_bias = nnx.Param(jnp.zeros(hidden, dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, S, D] -> [B, S, D]`, over the sequences themselves."""
    q, k, v = self._heads(x, jnp.arange(x.shape[1])[None])
    window = None if self.window is None else (self.window - 1, 0)
    return self._out(jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window))

  def cached(self, x: jax.Array, cache: Cache, positions: jax.Array) -> tuple[jax.Array, Cache]:
    """`[B, S, D] -> [B, S, D]` over the cache, to which the tokens at `positions` `[B, S]` are added first.

    A token sees the slots up to its own position, so what stands in later ones does not matter.
    """
    q, k, v = self._heads(x, positions)
    cache = cache.write(k, v, positions)
    distance = positions[:, :, None] - jnp.arange(cache.k.shape[1])[None, None]
    seen = distance >= 0
    if self.window is not None:
      seen &= distance < self.window
    return self._out(jax.nn.dot_product_attention(q, cache.k, cache.v, mask=seen[:, None])), cache

  def empty(self, rows: int, size: int, dtype: jnp.dtype) -> Cache:
    """A cache for `rows` sequences of at most `size` tokens."""
    shape = (rows, size, self.k.shape[1] // self.rope.head_dim, self.rope.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def _heads(self, x: jax.Array, positions: jax.Array) -> list[jax.Array]:
    """Queries, keys and values, `[B, S, heads, head_dim]` each."""
    q, k, v = (self._project(x, name) for name in "qkv")
    return [rotate(q, positions, self.rope), rotate(k, positions, self.rope), v]

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    y = layers.dense(x, getattr(self, name)[...])
    if hasattr(self, f"{name}_bias"):
      y += getattr(self, f"{name}_bias")[...].astype(y.dtype)[None, None]
    split = lambda y: y.reshape(*x.shape[:2], -1, self.rope.head_dim)
    y = split(y) if self.qk_norm == "head" else y
    if hasattr(self, f"{name}_norm"):
      y = layers.rms_norm(y, getattr(self, f"{name}_norm"), self.eps)
    return split(y if self.clip is None else jnp.clip(y, -self.clip, self.clip))

  def _out(self, mixed: jax.Array) -> jax.Array:
    """`[B, S, heads, head_dim] -> [B, S, D]`."""
    y = layers.dense(mixed.reshape(*mixed.shape[:2], -1), self.o[...])
    return y + self.o_bias[...].astype(y.dtype)[None, None] if hasattr(self, "o_bias") else y
