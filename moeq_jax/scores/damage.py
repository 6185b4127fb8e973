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

from moeq_jax import artifacts, steps


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
def _replaced(functions: Any, block: Any, expert: jax.Array, weights: Mapping[str, jax.Array], state: Any) -> Any:
  """The block's output with one expert's weights `[K, N]` replaced."""
  experts = {name: w.at[expert].set(weights[name].astype(w.dtype)) for name, w in functions.experts(block).items()}
  return functions.block(functions.with_experts(block, experts), state)[0]


def measure(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[Any], *, bits: int,
            dequantized: Callable[[int, int], Mapping[str, np.ndarray]],
            advance: Callable[..., None] = lambda **_: None) -> Damage:
  """Quantizes one expert at a time and measures the held-out loss.

  Args:
    functions: the model's functions.
    top, blocks: full-precision parameters.
    batches: held-out tokens `[B, S]` int32 (or what else the functions embed), all of one shape. Padded targets count
      as tokens with a loss of 0.
    bits: the width that `dequantized` stands for.
    dequantized: `(layer, expert) -> {projection: [K, N]}`, that expert after quantization; MoE layers only are counted.
    advance: called after each expert.
  """
  batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
  places = steps.sparse(functions, blocks)

  def through(states: list[Any], start: int, stop: int) -> list[Any]:
    for block in blocks[start:stop]:
      states = [steps.block(functions, block, state)[0] for state in states]
    return states

  def losses(states: list[Any], start: int) -> np.ndarray:
    ends = zip(through(states, start, len(blocks)), batches)
    return np.concatenate([np.asarray(steps.sequence_losses(functions, top, *end), np.float64) for end in ends])

  current, reached = [steps.embed(functions, top, tokens) for tokens in batches], 0
  baseline = losses(current, 0)
  shape = len(places), len(next(iter(functions.experts(blocks[places[0]]).values())))
  mean, stderr = np.zeros(shape), np.zeros(shape)
  for layer, place in enumerate(places):
    current, reached = through(current, reached, place), place
    for expert in range(shape[1]):
      weights = {name: jnp.asarray(w) for name, w in dequantized(layer, expert).items()}
      states = [_replaced(functions, blocks[place], jnp.int32(expert), weights, state) for state in current]
      difference = losses(states, place + 1) - baseline
      mean[layer, expert] = difference.mean()
      stderr[layer, expert] = difference.std(ddof=1) / np.sqrt(len(difference))
      advance(note=f"layer {layer}, expert {expert}: {mean[layer, expert]:+.4f} nats")
  predicted = lambda state, batch: jax.eval_shape(functions.losses, functions.head(top, state), batch).size
  return Damage(mean, stderr, bits, sum(predicted(*end) for end in zip(current, batches, strict=True)))
