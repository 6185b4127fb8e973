"""Measured damage: the loss increase when one expert alone is quantized.

The yardstick for every score. Each expert's block runs on the full-precision input of its layer, so only the blocks
after it are computed again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts


@dataclasses.dataclass(frozen=True)
class Damage(artifacts.Saved):
  """Measured damage of every expert.

  Attributes:
    mean: `[L, E]` loss increase in nats per token over all tokens (also those of other experts).
    stderr: `[L, E]` its standard error, paired over sequences.
    bits: width at which each expert was quantized.
    tokens: predicted tokens.
  """

  mean: np.ndarray
  stderr: np.ndarray
  bits: int
  tokens: int


@functools.partial(jax.jit, static_argnums=0)
def _replaced(functions: Any, block: Any, expert: jax.Array, weights: Mapping[str, jax.Array], h: jax.Array):
  """The block's output with one expert's weights `[K, N]` replaced."""
  experts = {name: w.at[expert].set(weights[name].astype(w.dtype)) for name, w in functions.experts(block).items()}
  return functions.block(functions.with_experts(block, experts), h)[0]


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: Any, top: Any, tokens: jax.Array) -> jax.Array:
  return functions.embed(top, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _block(functions: Any, block: Any, h: jax.Array) -> jax.Array:
  return functions.block(block, h)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(functions: Any, top: Any, h: jax.Array, tokens: jax.Array) -> jax.Array:
  return jnp.mean(functions.losses(functions.head(top, h), tokens), axis=-1)


def measure(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[np.ndarray], *, bits: int,
            dequantized: Callable[[int, int], Mapping[str, np.ndarray]],
            advance: Callable[..., None] = lambda **_: None) -> Damage:
  """Quantizes one expert at a time and measures the held-out loss.

  Args:
    functions: the model's functions.
    top, blocks: full-precision parameters.
    batches: held-out tokens `[B, S]` int32, all of one shape.
    bits: the width that `dequantized` stands for.
    dequantized: `(layer, expert) -> {"gate", "up", "down"}` `[K, N]`, that expert after quantization.
    advance: called after each expert.
  """
  batches = [jnp.asarray(tokens) for tokens in batches]
  current = [_embed(functions, top, tokens) for tokens in batches]

  def losses(states: list[jax.Array], after: int) -> np.ndarray:
    for block in blocks[after:]:
      states = [_block(functions, block, h) for h in states]
    return np.concatenate([np.asarray(_loss(functions, top, h, t), np.float64) for h, t in zip(states, batches)])

  baseline = losses(current, 0)
  shape = (len(blocks), functions.experts(blocks[0])["gate"].shape[0])
  mean, stderr = np.zeros(shape), np.zeros(shape)
  for layer, block in enumerate(blocks):
    for expert in range(shape[1]):
      weights = {name: jnp.asarray(w) for name, w in dequantized(layer, expert).items()}
      states = [_replaced(functions, block, jnp.int32(expert), weights, h) for h in current]
      difference = losses(states, layer + 1) - baseline
      mean[layer, expert] = difference.mean()
      stderr[layer, expert] = difference.std(ddof=1) / np.sqrt(len(difference))
      advance(note=f"layer {layer}, expert {expert}: {mean[layer, expert]:+.4f} nats")
    current = [_block(functions, block, h) for h in current]
  return Damage(mean, stderr, bits, sum(int(t.shape[0] * (t.shape[1] - 1)) for t in batches))
