"""Attention against float64 numpy, head by head, and with a cache against attention over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moeq_jax.models import attention, rope

D, HEADS, KV, HEAD = 12, 4, 2, 6
BATCH, LENGTH = 2, 9
ROPE = rope.Rope(HEAD, 50.0, 64)
OPTIONS = {
    "plain": {},
    "biases": {"qkv_bias": True, "o_bias": True},
    "head": {"qk_norm": "head", "window": 3},
    "whole": {"qk_norm": "whole", "qkv_bias": True, "clip": 0.8},
}


@functools.cache
def layer(name: str) -> attention.Attention:
  """Random parameters, biases and norms among them, of a size at which each matters."""
  made = attention.Attention(D, HEADS, KV, ROPE, **OPTIONS[name], dtype=jnp.float32, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(a.mean() > 0.5, 0.5, a.shape), jnp.float32), made)


def rows(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D)).astype(np.float32)


def turn(x: np.ndarray) -> np.ndarray:
  """`[S, HEAD]`, turned by position."""
  half = HEAD // 2
  z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * 50.0 ** (-np.arange(half) / half))
  return np.concatenate([z.real, z.imag], -1)


def oracle(module: attention.Attention, x: np.ndarray, *, qk_norm: str = "", clip: float | None = None,
           window: int | None = None, qkv_bias: bool = False, o_bias: bool = False) -> np.ndarray:
  """`[S, D] -> [S, D]` for one sequence."""
  value = lambda name: np.asarray(getattr(module, name)[...], np.float64)
  norm = lambda y, name: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * value(f"{name}_norm")
  parts = {}
  for name in "qkv":
    y = x @ value(name) + (value(f"{name}_bias") if qkv_bias else 0)
    y = norm(y, name) if qk_norm == "whole" and name != "v" else y
    y = y if clip is None else np.clip(y, -clip, clip)
    y = y.reshape(len(x), -1, HEAD)
    parts[name] = norm(y, name) if qk_norm == "head" and name != "v" else y
  out = np.zeros((len(x), HEADS, HEAD))
  for head in range(HEADS):
    q, k, v = (parts[name][:, head if name == "q" else head * KV // HEADS] for name in "qkv")
    for position in range(len(x)):
      first = 0 if window is None else max(0, position + 1 - window)
      score = turn(k)[first : position + 1] @ turn(q)[position] / np.sqrt(HEAD)
      share = np.exp(score - score.max())
      out[position, head] = share / share.sum() @ v[first : position + 1]
  return out.reshape(len(x), -1) @ value("o") + (value("o_bias") if o_bias else 0)


@jax.jit
def whole(module: attention.Attention, x: jax.Array) -> jax.Array:
  return module(x)


@jax.jit
def cached(module, x, cache, positions):
  return module.cached(x, cache, positions)


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_the_formula(name: str):
  found = whole(layer(name), rows())
  for row, x in zip(found, rows(), strict=True):
    np.testing.assert_allclose(row, oracle(layer(name), np.float64(x), **OPTIONS[name]), rtol=1e-4, atol=1e-4)


def test_parameters_are_there_only_where_they_are_used():
  names = lambda name: {n for n in vars(layer(name)) if isinstance(getattr(layer(name), n), nnx.Param)}
  assert names("plain") == {"q", "k", "v", "o"}
  assert names("biases") == names("plain") | {"q_bias", "k_bias", "v_bias", "o_bias"}
  assert names("head") == names("plain") | {"q_norm", "k_norm"}
  assert [layer("head").k_norm.shape, layer("whole").q_norm.shape, layer("whole").k_norm.shape] == [
      (HEAD,), (HEADS * HEAD,), (KV * HEAD,)]


@pytest.mark.parametrize("name", ["head", "whole"])
def test_a_cache_gives_what_the_whole_sequence_gives(name: str):
  """Rows of 5 and 3 tokens, padded to 5; then 4 and 6 more, one at a time; late slots hold what must not be seen."""
  module, x, full = layer(name), rows(), whole(layer(name), rows())
  cache = jax.tree.map(lambda a: a + 1e3, module.empty(BATCH, 16, jnp.float32))
  assert cache.k.shape == (BATCH, 16, KV, HEAD)
  lengths = np.array([5, 3])
  padded = np.where(np.arange(5)[None, :, None] < lengths[:, None, None], x[:, :5], 7.0)
  out, cache = cached(module, padded, cache, np.arange(5)[None].repeat(BATCH, 0))
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(out[row, :length], full[row, :length], rtol=1e-5, atol=1e-5)
  for step in range(4):
    at = lengths + step
    out, cache = cached(module, x[np.arange(BATCH), at][:, None], cache, at[:, None])
    np.testing.assert_allclose(out[:, 0], full[np.arange(BATCH), at], rtol=1e-5, atol=1e-5)
