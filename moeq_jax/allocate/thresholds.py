"""The threshold rule: rows of high score get the high width, rows of low score the low one.

The abstract of "Automated Fine-Grained Mixture-of-Experts Quantization" (Findings of ACL 2025, 1386) says that widths
are determined per channel from statistics, and that down projections need more precision than up projections. How
scores become widths could not be read. This is the rule nearest to its words, of our own design:

- All rows of one projection, over the whole model, are ranked by their score. The first get the high width, the last
  the low one, the others the middle one, in such numbers that the projection's average is met.
- The projections' averages are shifted by what their Fisher traces differ: with costs that fall as 4^-bits, the sum of
  `trace_p 4^-b_p` is least, for the same budget, where `b_p - 1/2 log2(trace_p / weights_p)` is the same for all.

The knapsack on the same costs is never dearer (`blocks.plan`).
"""

from collections.abc import Sequence

import numpy as np

from moeq_jax import channels
from moeq_jax.allocate import blocks, problem


def shifted(average: float, traces: Sequence[float], weights: Sequence[int], widths: Sequence[int]) -> np.ndarray:
  """The average bits of each projection, `[P]` float64, whose mean over weights is `average`.

  Args:
    average: over all projections.
    traces: of each projection's Fisher matrix, over the whole model; equal ones shift nothing. A zero counts as the
      least of the others.
    weights: of each projection.
    widths: no average leaves their range.

  Raises:
    ValueError: traces that are negative or not finite.
  """
  traces, weights = np.asarray(traces, np.float64), np.asarray(weights, np.float64)
  if not (np.isfinite(traces) & (traces >= 0)).all():
    raise ValueError(f"Fisher traces {traces.tolist()}: they must be finite and not negative")
  positive = traces[traces > 0]
  wanted = np.log2(np.where(traces > 0, traces, positive.min() if len(positive) else 1.0) / weights) / 2
  low, high = average - wanted.max() - widths[-1], average - wanted.min() + widths[-1]
  for _ in range(100):
    middle = (low + high) / 2
    spent = np.clip(wanted + middle, widths[0], widths[-1]) @ weights / weights.sum()
    low, high = (middle, high) if spent <= average else (low, middle)
  return np.clip(wanted + low, widths[0], widths[-1])


def shares(average: float, widths: Sequence[int], spread: float = 0.5) -> np.ndarray:
  """Which share of the rows gets each of two or three widths, ascending, so that the average is met.

  Args:
    average: within the widths.
    widths: two or three, ascending.
    spread: of three, the share that leaves the middle width, where the average allows it.

  Raises:
    ValueError: not two or three widths, an average that they cannot have, or a spread outside [0, 1].
  """
  problem.check_budget(average, widths)
  if len(widths) not in (2, 3) or not 0 <= spread <= 1:
    raise ValueError(f"thresholds need two or three widths and a spread in [0, 1], not {tuple(widths)} and {spread}")
  if len(widths) == 2:
    high = (average - widths[0]) / (widths[1] - widths[0])
    return np.array([1 - high, high])
  down, up = widths[1] - widths[0], widths[2] - widths[1]
  away = average - widths[1]
  spread = max(spread, away / up, -away / down)
  high = (away + down * spread) / (down + up)
  return np.array([spread - high, 1 - spread, high])


def plan(score: np.ndarray, costs: channels.BlockCosts, average: float, widths: Sequence[int], *,
         traces: Sequence[float] | None = None, spread: float = 0.5, method: str = "thresholds") -> channels.BlockPlan:
  """The plan of the threshold rule.

  Args:
    score: `[L, E, J]`, higher = needs more bits; finite.
    costs: the table whose units get widths; only what they are is read, not what they cost.
    average: nominal bits per weight; not exceeded.
    widths: two or three, ascending.
    traces: `[P]` Fisher traces of the projections; `None` leaves their averages equal.
    spread: see `shares`.
    method: the plan's name.

  Raises:
    ValueError: see `shares` and `shifted`; or a score that is not finite or of another shape.
  """
  problem.check_budget(average, widths)
  if score.shape != costs.cost.shape[:3] or not np.isfinite(score).all():
    raise ValueError(f"the score has shape {score.shape}, or values that are not finite; it is one finite number for"
                     f" each unit, {costs.cost.shape[:3]}")
  names = costs.projections
  weights = [int(costs.sizes[costs.part(name)].sum()) for name in names]
  averages = shifted(average, np.ones(len(names)) * weights if traces is None else traces, weights, widths)
  bits = np.empty(score.shape, np.int64)
  for name, own in zip(names, averages, strict=True):
    part = costs.part(name)
    bits[..., part] = _by_rank(score[..., part], np.broadcast_to(costs.sizes[part], score[..., part].shape),
                               shares(float(own), widths, spread), widths)
  return blocks.as_plan(costs, bits, method, average)


def _by_rank(score: np.ndarray, sizes: np.ndarray, share: np.ndarray, widths: Sequence[int]) -> np.ndarray:
  """Widths by rank: a unit gets a width if all of it lies in the width's share of the weights; of equal scores the
  earlier unit ranks higher."""
  ranked = np.argsort(-score.ravel(), kind="stable")
  ends = np.cumsum(sizes.ravel()[ranked])
  bits = np.full(score.size, widths[0], np.int64)
  limits = np.cumsum(share[::-1])[:-1] * ends[-1]
  for width, limit in reversed(list(zip(widths[:0:-1], limits, strict=True))):
    bits[ranked[ends <= limit + 1e-6]] = width
  return bits.reshape(score.shape)
