"""What deployability costs: plans of one score and budget under several constraints, side by side."""

from collections.abc import Mapping, Sequence

import numpy as np

from moeq_jax import registry
from moeq_jax.allocate import constraints
from moeq_jax.report import points as points_lib
from moeq_jax.report import tables

HEADER = (
  "what shares one width", "nominal bits", "predicted cost", "against free", "measured increase", "± 95%",
  "against free", "more than free, ± 95%", "against uniform, ± 95%",
)  # fmt: skip
FREE = constraints.CONSTRAINTS[0]


def table(points: Sequence[points_lib.Point], losses: Mapping[str, np.ndarray]) -> tables.Table | None:
  """A group for each method and budget with plans under several constraints, the loosest first; None without any.

  Args:
    points: of all quantized rows.
    losses: the loss of every sequence by row id, for the paired difference from the free plan; may lack rows.
  """
  found: dict[tuple, dict[str, points_lib.Point]] = {}
  for point in points:
    constraint = point.rows[0].get("constraint")
    if point.family in ("knapsack", "measured") and constraint in constraints.CONSTRAINTS:
      found.setdefault((point.setting, _base(point.method), point.budget), {})[constraint] = point
  several = len(points_lib.settings(points)) > 1
  groups = []
  for (setting, method, budget), plans in found.items():
    if len(plans) > 1:
      title = f"{method} at {budget} bits asked" + (f", {setting.label}" if several else "")
      lines = [_line(name, plans[name], plans.get(FREE), losses) for name in constraints.CONSTRAINTS if name in plans]
      groups.append(tables.Group(title, tuple(lines)))
  return tables.Table(HEADER, tuple(groups)) if groups else None


def _base(method: str) -> str:
  """A method's spec without its constraint."""
  try:
    spec = registry.parse(method)
  except registry.SpecError:
    return method
  return str(registry.Spec(spec.name, spec.args, {k: v for k, v in spec.kwargs.items() if k != "constraint"}))


def _line(name: str, point: points_lib.Point, free: points_lib.Point | None, losses: Mapping[str, np.ndarray],
          ) -> tables.Line:
  cells = (
    tables.number(point.mean("nominal_bits"), ".3f"),
    tables.number(point.mean("cost"), ".5g"),
    _ratio(point, free, "cost"),
    tables.number(point.mean("loss_delta"), "+.4f"),
    tables.number(point.mean("loss_delta_ci95"), ".4f"),
    _ratio(point, free, "loss_delta"),
    tables.ABSENT if free is None or point is free else _paired(point, free, losses),
    tables.against_uniform(point),
  )
  return tables.Line(name, "", cells)


def _ratio(point: points_lib.Point, free: points_lib.Point | None, field: str) -> str:
  """A field divided by that of the free plan, where that is positive."""
  mine, its = point.mean(field), free.mean(field) if free else None
  return tables.ABSENT if mine is None or its is None or its <= 0 else f"{mine / its:.2f}×"


def _paired(point: points_lib.Point, free: points_lib.Point, losses: Mapping[str, np.ndarray]) -> str:
  """The mean difference of two plans' losses and half of its 95% interval, paired over sequences."""
  mine, its = (losses.get(p.rows[0]["id"]) for p in (point, free))
  if mine is None or its is None or len(mine) < 2:
    return tables.ABSENT
  difference = mine - its
  return f"{difference.mean():+.4f} ± {1.96 * difference.std(ddof=1) / np.sqrt(len(difference)):.4f}"
