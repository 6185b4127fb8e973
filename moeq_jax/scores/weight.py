"""Scores that look at weights only."""

from typing import Any

import numpy as np


def max_var(evidence: Any, variant: str = "paper") -> np.ndarray:
  """Maximum intra-neuron variance, `[L, E]` (arXiv 2604.06515, section on MaxVar).

  A neuron is a row of the first expert matrix (`gate`, HF's w1): the weights from all inputs to one hidden unit.

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
    gate = np.asarray(experts["gate"], np.float32)  # [E, D, F]: neurons are columns here
    if variant == "paper":
      rows.append(gate.var(axis=1).max(axis=1))
    else:
      largest = np.linalg.norm(gate, axis=1).argmax(axis=1)
      rows.append(gate[np.arange(len(gate)), :, largest].var(axis=1, ddof=1))
  return np.stack(rows)


def mse_table(evidence: Any) -> np.ndarray:
  """Squared weight error per expert and width, relative to the mean squared norm of an expert, `[L, E, W]`."""
  errors = evidence.errors
  return errors.weight.sum(axis=2) / errors.norm.sum(axis=2).mean()


def mse(evidence: Any) -> np.ndarray:
  """Squared weight error of all three projections, `[L, E, W]`: the cost that knows nothing of data or routing."""
  return mse_table(evidence)
