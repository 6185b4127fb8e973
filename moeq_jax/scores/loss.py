"""Scores that estimate, or measure, what quantizing an expert does to the loss."""

from typing import Any

import numpy as np

from moeq_jax.scores import weight


def output_error(evidence: Any) -> np.ndarray:
  """Squared output error summed over projections and calibration tokens, per token, `[L, E, W]`.

  Frequency is inside, since only an expert's own tokens are summed.
  """
  return evidence.errors.output.sum(axis=2) / evidence.stats.total_tokens


def fisher_error(evidence: Any) -> np.ndarray:
  """Diagonal Fisher times squared weight error, `[L, E, W]`: predicted loss increase in nats per token."""
  return evidence.errors.fisher.sum(axis=2)


def measured(evidence: Any) -> np.ndarray:
  """Measured damage at one width, carried to the others in proportion to the squared weight error, `[L, E, W]`.

  Damage that noise made negative counts as zero.

  Raises:
    ValueError: damage was not measured, or at a width that is no candidate.
  """
  if evidence.damage is None:
    raise ValueError("score damage: no measured damage; set config.damage.sequences above 0")
  if evidence.damage_bits not in evidence.errors.widths:
    raise ValueError(f"score damage: measured at {evidence.damage_bits} bits, not one of {evidence.errors.widths}")
  table = weight.mse_table(evidence)
  at = table[..., evidence.errors.widths.index(evidence.damage_bits)][..., None]
  return np.maximum(evidence.damage, 0.0)[..., None] * table / np.maximum(at, 1e-30)
