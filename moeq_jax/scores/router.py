"""Scores that look at the router: its norms, their change in training, its gradients, and whom it chooses."""

from typing import Any

import numpy as np

from moeq_jax.scores import weight


def norm(evidence: Any) -> np.ndarray:
  """L2 norm of each router row, `[L, E]`: the paper's stand-in where the initial router is not known."""
  return np.linalg.norm(evidence.routers.astype(np.float64), axis=-1)


def norm_change(evidence: Any) -> np.ndarray:
  """`||w(T)|| - ||w(0)||` of each router row, `[L, E]` (arXiv 2604.06515): a difference of norms, not of vectors.

  Raises:
    ValueError: the routers before training are not known.
  """
  if evidence.routers_init is None:
    raise ValueError("score router_norm_change needs router_init.safetensors (the routers before training) beside the"
                     " checkpoint; without it use router_norm")
  return norm(evidence) - np.linalg.norm(evidence.routers_init.astype(np.float64), axis=-1)


def grad(evidence: Any) -> np.ndarray:
  """Root mean square over batches of the norm of d loss / d router row, `[L, E]`."""
  return evidence.stats.router_grad


def frequency(evidence: Any) -> np.ndarray:
  """Share of a layer's rows that go to each expert, `[L, E]`."""
  tokens = evidence.stats.tokens
  return tokens / tokens.sum(axis=1, keepdims=True)


def gate_weight(evidence: Any) -> np.ndarray:
  """Mean routing weight over the tokens of each expert, `[L, E]` (Li et al. 2024); 0 for an expert without tokens."""
  return evidence.stats.gate_weight / np.maximum(evidence.stats.tokens, 1)


def grad_error(evidence: Any) -> np.ndarray:
  """Router gradient norm times squared weight error, `[L, E, P, W]`: one backward pass, no second moments."""
  return grad(evidence)[..., None, None] * weight.cells(evidence)
