"""Scores that look at weights only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SLAB = 2048  # neurons at a time: what stays in the cache is read ten times faster


def max_var(evidence: Any, variant: str = "paper") -> np.ndarray:
  """Maximum intra-neuron variance, `[L, E]` (arXiv 2604.06515, section on MaxVar).

  A neuron is a row of the first expert matrix (`gate`, HF's w1; `up` where there is no gate): the weights from all
  inputs to one hidden unit.

  Args:
    evidence: `scores.Evidence`.
    variant: `"paper"`: the largest biased variance of a neuron; `"code"`: the unbiased variance of the neuron with the
      largest L2 norm, as the official Mixtral code computes it.

  Raises:
    ValueError: another variant.
  """
  if variant not in ("paper", "code"):
    raise ValueError(f"max_var: variant {variant!r} is neither 'paper' nor 'code'")
  rows = []
  for experts in evidence.experts:
    first = experts["gate" if "gate" in experts else "up"]  # [E, D, F]: neurons are columns; may be read one by one
    own = []
    for w in first:
      neurons = np.asarray(w).T
      parts = [_moments(neurons[i:i + SLAB]) for i in range(0, len(neurons), SLAB)]
      variances, norms = (np.concatenate(part) for part in zip(*parts))
      own.append(variances.max() if variant == "paper" else variances[norms.argmax()] * len(w) / (len(w) - 1))
    rows.append(own)
  return np.array(rows, np.float64)


@jax.jit
def _moments(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Biased variance and squared norm of every row of `[F, D]`, float32."""
  weights = weights.astype(jnp.float32)
  return jnp.var(weights, axis=1), jnp.sum(jnp.square(weights), axis=1)


def cells(evidence: Any) -> np.ndarray:
  """Squared weight error of every projection and width, relative to the mean squared norm of an expert,
  `[L, E, P, W]`: the cost that knows nothing of data or routing."""
  errors = evidence.errors
  return errors.weight / errors.norm.sum(axis=2).mean()


def shares(evidence: Any) -> np.ndarray:
  """How a cost of an expert is split over its projections, `[L, E, P, W]`: in proportion to their squared weight error,
  and to their sizes where there is no error at all."""
  errors = evidence.errors
  total = errors.weight.sum(axis=2, keepdims=True)
  sizes = np.array(errors.sizes) / sum(errors.sizes)
  return np.where(total > 0, errors.weight / np.where(total > 0, total, 1.0), sizes[:, None])
