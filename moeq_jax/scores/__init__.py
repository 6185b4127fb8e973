"""Scores: how sensitive is each expert?

A score is a function of the `Evidence`; it returns one of two things:

- `[L, E]`, a *ranking*: one number an expert. `SCORES` states which end of it is the sensitive one by the claim of its
  source, because the sources disagree (small router norm change, but high frequency).
- `[L, E, W]`, a *cost*: the price of storing each expert at each candidate width; or, where it is known, of each of its
  projections, `[L, E, P, W]`.

Either can drive the tier rules (a cost is ranked by its value at the lowest width) and the knapsack (a ranking is
turned into a cost by `as_cost`). To add one, write the function and enter it in `SCORES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moeq_jax import artifacts, registry
from moeq_jax.scores import loss, router, weight


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Everything a score may look at.

  Attributes:
    stats: calibration statistics.
    errors: errors of every expert at every width.
    routers: `[L, E, D]` float32, router rows.
    routers_init: `[L, E, D]` float32, the rows before training, or `None` if they are not known.
    experts: per layer `{projection: [E, K, N]}`: `gate` (where the model has it), `up`, `down`.
    damage: `[L, E]` measured loss increase at `damage_bits`, or `None` before it is measured.
    damage_stderr: `[L, E]` standard error of `damage`, or `None` if it is exact.
    damage_bits: the width at which damage was measured.
  """

  stats: artifacts.Stats
  errors: artifacts.ErrorTable
  routers: np.ndarray
  routers_init: np.ndarray | None
  experts: Sequence[Mapping[str, Any]]
  damage: np.ndarray | None = None
  damage_stderr: np.ndarray | None = None
  damage_bits: int = 2


@dataclasses.dataclass(frozen=True)
class Score:
  """An entry of the table.

  Attributes:
    function: `(evidence, **options) -> [L, E], [L, E, W] or [L, E, P, W]`.
    sensitive: for rankings, which end needs the bits by the source's claim: `"low"` or `"high"`.
    units: for costs, `"nats"` (predicted loss increase per token) or `"arbitrary"`.
  """

  function: Callable[..., np.ndarray]
  sensitive: str = "high"
  units: str = "arbitrary"


SCORES: dict[str, Score] = {
    "router_norm_change": Score(router.norm_change, sensitive="low"),
    "router_norm": Score(router.norm, sensitive="low"),
    "router_grad": Score(router.grad),
    "frequency": Score(router.frequency),
    "gate_weight": Score(router.gate_weight),
    "max_var": Score(weight.max_var),
    "weight_mse": Score(weight.cells),
    "router_grad_error": Score(router.grad_error),
    "output_error": Score(loss.output_error),
    "fisher_error": Score(loss.fisher_error, units="nats"),
    "damage": Score(loss.measured, units="nats"),
}


def _function(spec: str) -> Callable[[Evidence], np.ndarray]:
  """The score that `spec` names, bound to its options."""
  bound = registry.Registry("score", {name: score.function for name, score in SCORES.items()}).get(spec)
  if bound.args:
    raise registry.ArgumentError(f"{spec}: options of a score are given by name, for example max_var(variant='code')")
  return bound


def check(specs: Sequence[str]) -> None:
  """Raises `registry.SpecError` (a `ValueError`) for an unknown score or option; the message names the nearest."""
  for spec in specs:
    _function(spec)


def evaluate(spec: str, evidence: Evidence) -> np.ndarray:
  """The values of the score that `spec` names, `[L, E]`, `[L, E, W]` or `[L, E, P, W]` float64.

  Raises:
    registry.SpecError: no such score or option; names the nearest.
    ValueError: the score needs evidence that is not there, or gave values of another shape or that are not finite.
  """
  values = np.asarray(_function(spec)(evidence), np.float64)
  cells = (*evidence.routers.shape[:2], len(evidence.errors.projections), len(evidence.errors.widths))
  if values.shape not in (cells[:2], (*cells[:2], cells[3]), cells):
    raise ValueError(f"score {spec}: gave shape {values.shape}; a score is [L, E] = {list(cells[:2])}, or [L, E, W]"
                     f" with {cells[3]} widths")
  for layer, expert, *_ in np.argwhere(~np.isfinite(values))[:1]:
    raise ValueError(f"score {spec}: not finite for layer {layer}, expert {expert}; the evidence that it reads is"
                     " damaged there: calibrate and encode again")
  return values


def sensitivity(spec: str, evidence: Evidence) -> np.ndarray:
  """`[L, E]`, higher = more sensitive by the claim of the score's source."""
  values = evaluate(spec, evidence)
  if values.ndim > 2:
    return values.reshape(*values.shape[:2], -1, values.shape[-1])[..., 0].sum(axis=2)
  return -values if SCORES[registry.parse(spec).name].sensitive == "low" else values


def as_cost(spec: str, evidence: Evidence) -> artifacts.CostTable:
  """The cost table of a score, `[L, E, P, W]`.

  A ranking `s` becomes `s * weight error` where high is sensitive and `exp(-s / std(s)) * weight error` where low is
  (norm changes may be negative, so they cannot be divided by). A cost per expert is split over its projections in
  proportion to their weight error at that width. Negative values count as zero.
  """
  values = evaluate(spec, evidence)
  score, errors = SCORES[registry.parse(spec).name], evidence.errors
  if values.ndim == 2:
    if score.sensitive == "low":
      values = np.exp(-(values - values.mean()) / max(values.std(), 1e-12))
    values = values[..., None, None] * weight.cells(evidence)
  elif values.ndim == 3:
    values = values[:, :, None] * weight.shares(evidence)
  return artifacts.CostTable(np.maximum(values, 0.0), errors.widths, registry.canonical(spec), score.units,
                             errors.projections, errors.sizes)
