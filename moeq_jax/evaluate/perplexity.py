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

from moeq_jax import steps


@dataclasses.dataclass(frozen=True)
class Reference:
  """What the full-precision model did on the evaluation batches.

  Attributes:
    hidden: per batch the state after the last block, for a decoder `[B, S, D]`.
    chosen: per batch and MoE layer `[T, E]` bool, the experts of each token.
    loss: `[n]` mean loss of each sequence in nats per token.
  """

  hidden: list[Any]
  chosen: list[list[np.ndarray]]
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
def _loss_and_kl(functions: Any, top: Any, state: Any, reference: Any, tokens: jax.Array):
  logits = functions.head(top, state)
  ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(functions.head(top, reference))
  kl = jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axis=-1)
  return jnp.mean(functions.losses(logits, tokens), axis=-1), kl


def hidden_states(functions: Any, top: Any, blocks: Sequence[Any], tokens: np.ndarray) -> tuple[Any, list[np.ndarray]]:
  """Runs the blocks: the state after the last one, and the chosen experts `[T, E]` bool of each MoE layer."""
  state = steps.embed(functions, top, jnp.asarray(tokens))
  routings = []
  for block in blocks:
    state, routing = steps.block(functions, block, state)
    routings += [] if routing is None else [routing]
  return state, [_chosen(np.asarray(r.experts), r.logits.shape[1]) for r in routings]


def _chosen(experts: np.ndarray, count: int) -> np.ndarray:
  """The experts of each token, `[T, k]` indices, as a set: `[T, count]` bool."""
  chosen = np.zeros((len(experts), count), bool)
  np.put_along_axis(chosen, experts, True, axis=1)
  return chosen


def reference(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[np.ndarray]) -> Reference:
  """Runs the full-precision model over `batches` (`[B, S]` int32 each)."""
  hidden, chosen, loss = [], [], []
  for tokens in batches:
    h, experts = hidden_states(functions, top, blocks, tokens)
    hidden.append(h)
    chosen.append(experts)
    loss.append(np.asarray(steps.sequence_losses(functions, top, h, jnp.asarray(tokens))))
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
    same += [(ours == theirs).all(axis=-1) for ours, theirs in zip(experts, chosen, strict=True)]
  return Measured(
      np.concatenate(loss).astype(np.float64), np.concatenate(kl).astype(np.float64),
      float(np.mean(np.concatenate(same))) if same else 1.0,
  )


def paired(loss: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
  """Mean difference of two losses per sequence, and its standard error, both in nats per token."""
  difference = np.asarray(loss, np.float64) - np.asarray(baseline, np.float64)
  return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
