"""Deployability: which cells of a plan share one width.

A cell is one projection of one expert of one layer. Files and kernels that other tools read may want one width for
several cells; the cells that share one are a unit, the thing that the knapsack gives bits to.

  none                   every cell is free
  gate_equals_up         gate and up of an expert share one (they are often kept as one matrix), down is free
  expert                 all projections of an expert share one: the papers' unit, and the default
  per_layer_projection   all experts of a layer share one for each projection
  per_layer              all experts of a layer share one

A plan that keeps a constraint keeps every looser one: `none` is looser than all, `expert` and `per_layer_projection`
are looser than `per_layer`, `gate_equals_up` is looser than `expert`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeq_jax import artifacts, registry

DEFAULT = "expert"
CONSTRAINTS = ("none", "gate_equals_up", DEFAULT, "per_layer_projection", "per_layer")


class Tied(NamedTuple):
  """The units of a cost table under a constraint, in (layer, expert, projection) order of their first cells.

  Attributes:
    cost: `[U, W]` float64, what the cells of a unit cost together; never rises with the bits.
    sizes: `[U]` int64, the weights of a unit.
    unit: `[L, E, P]` int64, the unit of each cell.
  """

  cost: np.ndarray
  sizes: np.ndarray
  unit: np.ndarray


def check(constraint: str) -> None:
  """Raises `ValueError` for an unknown constraint; names the nearest."""
  if constraint not in CONSTRAINTS:
    near = registry.did_you_mean(str(constraint), CONSTRAINTS)
    raise ValueError(f"unknown constraint {constraint!r}{near} (constraints: {', '.join(CONSTRAINTS)})")


def units(constraint: str, layers: int, experts: int, projections: Sequence[str]) -> np.ndarray:
  """The number of the unit that each cell belongs to, `[L, E, P]` int64.

  Raises:
    ValueError: an unknown constraint.
  """
  check(constraint)
  layer, expert, projection = np.indices((layers, experts, len(projections)))
  if constraint == "gate_equals_up":
    matrix = np.array([projections.index("up") if name == "gate" else place for place, name in enumerate(projections)])
    projection = matrix[projection]
  if constraint in ("per_layer", "per_layer_projection"):
    expert = np.zeros_like(expert)
  if constraint in ("per_layer", DEFAULT):
    projection = np.zeros_like(projection)
  keys = np.ravel_multi_index((layer, expert, projection), layer.shape)
  return np.unique(keys, return_inverse=True)[1].reshape(keys.shape)


def tie(table: artifacts.CostTable, constraint: str) -> Tied:
  """Sums the costs and the weights of the cells that share a width.

  Costs of a unit never rise with its bits: where an encoder was worse at more bits, the better, smaller code's cost is
  charged. A looser constraint therefore never has a dearer optimum.

  Raises:
    ValueError: an unknown constraint, or fields of the table that do not fit together.
  """
  check_table(table)
  unit = units(constraint, *table.cost.shape[:2], table.projections)
  cells = table.cost.reshape(-1, len(table.widths))
  cost = np.stack([np.bincount(unit.ravel(), weights=column) for column in cells.T], axis=1)
  sizes = np.bincount(unit.ravel(), weights=np.broadcast_to(table.sizes, unit.shape).ravel()).astype(np.int64)
  return Tied(np.minimum.accumulate(cost, axis=1), sizes, unit)


def check_table(table: artifacts.CostTable) -> None:
  """Raises `ValueError` unless the table's fields fit together and its costs are finite; names score and cell."""
  expected = len(table.projections), len(table.widths)
  if table.cost.ndim != 4 or table.cost.shape[2:] != expected or len(table.sizes) != expected[0]:
    raise ValueError(f"cost table {table.score}: cost has shape {table.cost.shape} and there are {len(table.sizes)}"
                     f" sizes, not (layers, experts, {expected[0]}, {expected[1]}) and {expected[0]}")
  for layer, expert, place, choice in np.argwhere(~np.isfinite(table.cost))[:1]:
    raise ValueError(f"cost table {table.score}: {table.projections[place]} of layer {layer}, expert {expert} at"
                     f" {table.widths[choice]} bits costs {table.cost[layer, expert, place, choice]}; costs must be"
                     " finite, check the score's inputs for that expert")


def restricted(table: artifacts.CostTable, widths: Sequence[int]) -> artifacts.CostTable:
  """The table with some of its widths only.

  Raises:
    ValueError: a width that the table does not hold, or none at all.
  """
  wanted = chosen(table.widths, widths)
  columns = [table.widths.index(width) for width in wanted]
  fields = {name: getattr(table, name) for name in ("score", "units", "projections", "sizes")}
  return artifacts.CostTable(table.cost[..., columns], wanted, **fields)


def chosen(held: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
  """`widths`, ascending; raises `ValueError` unless `held` holds them all and there is one."""
  wanted = tuple(sorted(set(widths)))
  if not wanted or not set(wanted) <= set(held):
    raise ValueError(f"widths={tuple(widths)}: choose at least one of config.widths={tuple(held)}, or add to those")
  return wanted


def as_plan(bits: np.ndarray, constraint: str) -> np.ndarray:
  """Bits of every cell in the smallest form that holds them: `[L, E, P]`, or `[L, E]` where projections are alike."""
  return bits[..., 0] if constraint in ("per_layer", DEFAULT) else bits
