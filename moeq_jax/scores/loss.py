"""Scores that estimate, or measure, what quantizing an expert does to the loss."""

from typing import Any

import numpy as np
from jax.scipy.stats import norm

from moeq_jax.scores import weight


def output_error(evidence: Any) -> np.ndarray:
  """Squared output error summed over calibration tokens, per token, `[L, E, P, W]`.

  Frequency is inside, since only an expert's own tokens are summed.
  """
  return evidence.errors.output / evidence.stats.total_tokens


def fisher_error(evidence: Any) -> np.ndarray:
  """Diagonal Fisher times squared weight error, `[L, E, P, W]`: predicted loss increase in nats per token.

  Raises:
    ValueError: the errors were measured without a backward pass.
  """
  if evidence.errors.fisher is None:
    raise ValueError("score fisher_error: no backward pass was made, so there are no gradients; make one, or take"
                     " output_error")
  return evidence.errors.fisher


def measured(evidence: Any) -> np.ndarray:
  """Measured damage at one width, carried to the others in proportion to the squared weight error, `[L, E, W]`.

  Most experts do less damage than its standard error, and a measured value below zero says "small", not "free". So the
  cost is the mean of the damage given its measured value and that it is not negative: for a normal error of standard
  deviation s around the measured m, `m + s phi(m / s) / Phi(m / s)` (mean of a normal distribution truncated at zero).

  Raises:
    ValueError: damage was not measured, or at a width that is no candidate.
  """
  if evidence.damage is None:
    raise ValueError("score damage: no measured damage; set config.damage.sequences above 0")
  if evidence.damage_bits not in evidence.errors.widths:
    raise ValueError(f"score damage: measured at {evidence.damage_bits} bits, not one of {evidence.errors.widths}")
  table = weight.cells(evidence).sum(axis=2)
  at = table[..., evidence.errors.widths.index(evidence.damage_bits)][..., None]
  stderr = np.zeros_like(evidence.damage) if evidence.damage_stderr is None else evidence.damage_stderr
  damage = truncated_mean(evidence.damage, stderr)
  return damage[..., None] * table / np.maximum(at, 1e-30)


def truncated_mean(mean: np.ndarray, stderr: np.ndarray) -> np.ndarray:
  """Mean of normal distributions truncated to non-negative values; `max(mean, 0)` where the error is zero."""
  scaled = np.asarray(mean) / np.maximum(stderr, 1e-30)
  ratio = np.exp(np.asarray(norm.logpdf(scaled) - norm.logcdf(scaled), np.float64))
  return np.where(np.asarray(stderr) > 0, np.maximum(mean + stderr * ratio, 0.0), np.maximum(mean, 0.0))
