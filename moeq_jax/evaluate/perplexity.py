"""Held-out loss of a model, and its distance from a reference run of the full-precision model.

The model runs block by block, each compiled once; quantized blocks are computed from their packed buffers. The
reference keeps the last hidden states and the chosen experts, not the logits, which would be 16 times larger.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Reference:
  """What the full-precision model did on the evaluation batches.

  Attributes:
    hidden: per batch `[B, S, D]`, input of the final norm.
    chosen: per batch `[L, T, E]` bool, the experts of each token.
    loss: `[n]` mean loss of each sequence in nats per token.
  """

  hidden: list[jax.Array]
  chosen: list[np.ndarray]
  loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
  """An evaluation against a reference; one value per sequence.

  Attributes:
    loss: `[n]` mean next-token loss in nats.
    kl: `[n]` mean KL divergence of the next-token distributions, reference to model, in nats.
    router_agreement: share of (token, layer) pairs whose set of experts equals the reference's.
  """

  loss: np.ndarray
  kl: np.ndarray
  router_agreement: float


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: Any, top: Any, tokens: jax.Array) -> jax.Array:
  return functions.embed(top, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _block(functions: Any, block: Any, h: jax.Array) -> tuple[jax.Array, jax.Array]:
  h, routing = functions.block(block, h)
  chosen = jnp.any(jax.nn.one_hot(routing.experts, routing.logits.shape[-1], dtype=bool), axis=1)
  return h, chosen


@functools.partial(jax.jit, static_argnums=0)
def _loss(functions: Any, top: Any, h: jax.Array, tokens: jax.Array) -> jax.Array:
  return jnp.mean(functions.losses(functions.head(top, h), tokens), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_kl(functions: Any, top: Any, h: jax.Array, reference: jax.Array, tokens: jax.Array):
  logits = functions.head(top, h)
  ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(functions.head(top, reference))
  kl = jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axis=-1)
  return jnp.mean(functions.losses(logits, tokens), axis=-1), kl


def hidden_states(functions: Any, top: Any, blocks: Sequence[Any], tokens: np.ndarray) -> tuple[jax.Array, np.ndarray]:
  """Runs the blocks: the last hidden state `[B, S, D]` and the chosen experts `[L, T, E]` bool."""
  h = _embed(functions, top, jnp.asarray(tokens))
  chosen = []
  for block in blocks:
    h, layer = _block(functions, block, h)
    chosen.append(layer)
  return h, np.stack([np.asarray(layer) for layer in chosen])


def reference(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[np.ndarray]) -> Reference:
  """Runs the full-precision model over `batches` (`[B, S]` int32 each)."""
  hidden, chosen, loss = [], [], []
  for tokens in batches:
    h, experts = hidden_states(functions, top, blocks, tokens)
    hidden.append(h)
    chosen.append(experts)
    loss.append(np.asarray(_loss(functions, top, h, jnp.asarray(tokens))))
  return Reference(hidden, chosen, np.concatenate(loss).astype(np.float64))


def measure(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[np.ndarray],
            against: Reference) -> Measured:
  """Evaluates a (quantized) model on the batches of `against`."""
  loss, kl, same = [], [], []
  for tokens, hidden, chosen in zip(batches, against.hidden, against.chosen, strict=True):
    h, experts = hidden_states(functions, top, blocks, tokens)
    batch_loss, batch_kl = _loss_and_kl(functions, top, h, hidden, jnp.asarray(tokens))
    loss.append(np.asarray(batch_loss))
    kl.append(np.asarray(batch_kl))
    same.append((experts == chosen).all(axis=-1))
  return Measured(
      np.concatenate(loss).astype(np.float64), np.concatenate(kl).astype(np.float64), float(np.mean(np.stack(same)))
  )


def paired(loss: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
  """Mean difference of two losses per sequence, and its standard error, both in nats per token."""
  difference = np.asarray(loss, np.float64) - np.asarray(baseline, np.float64)
  return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
