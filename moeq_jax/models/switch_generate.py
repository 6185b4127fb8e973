"""Decoding of Switch Transformers with a cache: the prompt is the input of the encoder, which runs once.

The mode of capacity of the functions says what a token of the decoder counts with (see `switch`): the tokens before it
in its row (`sequence`), which gives the tokens that full forward passes over the growing text would give; itself alone
(`call`), as transformers does with a cache; or nothing (`off`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.models import layers, switch, switch_moe


class Cache(NamedTuple):
  """What a block of the decoder keeps between two tokens.

  Attributes:
    k, v: `[B, C, H, head_dim]`, keys and values of the tokens so far.
    cross_k, cross_v: `[B, S, H, head_dim]`, those of the encoder's output.
    seen: `[B, E]` int32, tokens so far that wanted each expert; None in a dense block.
  """

  k: jax.Array
  v: jax.Array
  cross_k: jax.Array
  cross_v: jax.Array
  seen: jax.Array | None


class State(NamedTuple):
  """Attributes: caches: of the decoder's blocks; mask: `[B, S]`, 0 at padding of the inputs; position: of the next
  token, `[]` int32."""

  caches: list[Cache]
  mask: jax.Array
  position: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: Any, top: switch.Top, inputs: jax.Array) -> switch.State:
  return functions.embed(top, {"inputs": inputs, "targets": jnp.zeros((inputs.shape[0], 1), jnp.int32)})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode(functions: Any, block: switch.Block, state: switch.State) -> switch.State:
  return functions.block(block, state)[0]


@functools.partial(jax.jit, static_argnums=2)
def _empty(block: switch.Block, encoded: jax.Array, size: int) -> Cache:
  """A cache with room for `size` tokens, and the keys and values of the encoder's output in it."""
  k, v = block.cross.keys_values(encoded)
  room = jnp.zeros((k.shape[0], size, *k.shape[2:]), k.dtype)
  seen = jnp.zeros((k.shape[0], block.moe.router.shape[0]), jnp.int32) if hasattr(block, "moe") else None
  return Cache(room, room, k, v, seen)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _read(functions: Any, top: switch.Top, tokens: jax.Array, position: jax.Array,
          size: int) -> tuple[jax.Array, jax.Array]:
  """Tokens `[B]` as `[B, 1, D]`, and the bias `[1, H, 1, size]` on the logits of their attention."""
  return top.read("decoder", tokens[:, None], functions.dtype), top.bias_at(position, size).astype(functions.dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(functions: Any, block: switch.Block, h: jax.Array, cache: Cache, bias: jax.Array, mask: jax.Array,
            position: jax.Array) -> tuple[jax.Array, Cache]:
  """One block of the decoder on one token of each row, `[B, 1, D]`."""
  norm = lambda weight: layers.rms_norm(h, weight, block.eps)
  x = norm(block.attention_norm)
  k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
          for old, new in zip((cache.k, cache.v), block.attention.keys_values(x), strict=True))
  past = (jnp.arange(k.shape[1]) <= position)[None, None, None]
  h = h + block.attention(x, k, v, bias=bias, mask=past)
  h = h + block.cross(norm(block.cross_norm), cache.cross_k, cache.cross_v, mask=(mask > 0)[:, None, None])
  x = norm(block.ffn_norm)
  if cache.seen is None:
    return h + block.mlp(x), cache._replace(k=k, v=v)
  routing = block.moe.route(x, jnp.ones(x.shape[:2], bool), dropping=functions.capacity != "off",
                            seen=cache.seen if functions.capacity == "sequence" else None)
  y = block.moe(switch_moe.masked(x, routing), routing)
  seen = cache.seen + jax.nn.one_hot(routing.experts[:, 0], cache.seen.shape[1], dtype=jnp.int32)
  return h + y[:, None], cache._replace(k=k, v=v, seen=seen)


@functools.partial(jax.jit, static_argnums=0)
def _head(functions: Any, top: switch.Top, h: jax.Array) -> jax.Array:
  """`[B, 1, D] -> [B, V]`."""
  return functions.head(top, {"decoder": h})[:, 0]


class CachedSwitch:
  """Decoding of a Switch Transformer (see `generate.Decoding`)."""

  def prefill(self, functions: Any, top: switch.Top, blocks: Sequence[switch.Block], prompts: Sequence[Sequence[int]],
              room: int) -> tuple[jax.Array, State]:
    """Encodes the prompts: logits `[B, V]` of the first tokens, and a state with room for `room` of them."""
    inputs = np.full((len(prompts), layers.size_class(max(map(len, prompts)))), top.pad, np.int32)
    for row, prompt in zip(inputs, prompts, strict=True):
      row[: len(prompt)] = prompt
    encoded = _embed(functions, top, jnp.asarray(inputs))
    for block in blocks:
      if block.stack == "encoder":
        encoded = _encode(functions, block, encoded)
    size = layers.size_class(room)
    caches = [_empty(block, encoded["encoder"], size) for block in blocks if block.stack == "decoder"]
    first = jnp.full(len(prompts), top.start, jnp.int32)
    return self.step(functions, top, blocks, first, State(caches, encoded["encoder_mask"], jnp.int32(0)))

  def step(self, functions: Any, top: switch.Top, blocks: Sequence[switch.Block], tokens: jax.Array,
           state: State) -> tuple[jax.Array, State]:
    """Adds a token to each row, `[B]` int32: logits `[B, V]` of the next ones, and the new state (the old is gone)."""
    decoders, grown = [block for block in blocks if block.stack == "decoder"], []
    h, bias = _read(functions, top, tokens, state.position, state.caches[0].k.shape[1])
    for block, cache in zip(decoders, state.caches, strict=True):
      h, cache = _decode(functions, block, h, cache, bias, state.mask, state.position)
      grown.append(cache)
    return _head(functions, top, h), State(grown, state.mask, state.position + 1)
