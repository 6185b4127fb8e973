"""Rank correlations of scores of experts, inside layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from moeq_jax import registry, scores


def inside(first: np.ndarray, second: np.ndarray) -> list[float | None]:
  """Spearman's rank correlation of two scores `[L, E]` in each layer; None where one of them is the same for all."""
  found = []
  for one, other in zip(first, second, strict=True):
    flat = np.ptp(one) == 0 or np.ptp(other) == 0
    found.append(None if flat else float(scipy_stats.spearmanr(one, other).statistic))
  return found


def mean(layers: Sequence[float | None]) -> float | None:
  """The mean over the layers that have one."""
  known = [value for value in layers if value is not None]
  return float(np.mean(known)) if known else None


def summary(specs: Sequence[str], evidence: scores.Evidence, skip: Sequence[str] = ()) -> dict[str, Any]:
  """The values of scores and their rank correlations with routing frequency and with measured damage.

  Args:
    specs: which scores; a cost is taken at the width of the measured damage, summed over projections.
    evidence: what they look at.
    skip: names of scores that cannot be had.

  Returns:
    `{"scores": {spec: [L][E]}, "correlations": {"spec ~ other": {"layers", "mean"}}}`; `damage` is among the scores
    where it was measured.
  """
  values, width = {}, evidence.errors.widths.index(evidence.damage_bits)
  for spec in specs:
    if registry.parse(spec).name not in skip:
      found = scores.evaluate(spec, evidence)
      if found.ndim > 2:
        found = found.reshape(*found.shape[:2], -1, found.shape[-1])[..., width].sum(axis=2)
      values[spec] = found
  if evidence.damage is not None:
    values["measured damage"] = evidence.damage
  pairs = [(a, b) for b in ("frequency", "measured damage") for a in values if a != b and b in values]
  layers = {f"{a} ~ {b}": inside(values[a], values[b]) for a, b in pairs}
  return {"scores": {name: value.tolist() for name, value in values.items()},
          "correlations": {name: {"layers": found, "mean": mean(found)} for name, found in layers.items()}}
