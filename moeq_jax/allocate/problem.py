"""From a cost table and a budget to a plan.

The budget is the average number of nominal bits per expert weight: codes only, without scales and zeros. No plan made
here exceeds it.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moeq_jax import artifacts
from moeq_jax.allocate import constraints, knapsack, tiers


class Problem(NamedTuple):
  """A knapsack instance: `cost [U, W]` float64, `weight [U, W]` int64 bits, `budget` bits."""

  cost: np.ndarray
  weight: np.ndarray
  budget: int


def budget_bits(average: float, sizes: np.ndarray) -> int:
  """`floor(average * total weights)`, with `average` read as the decimal number that was written.

  Args:
    average: bits per weight.
    sizes: weights of each unit.
  """
  return math.floor(Fraction(repr(float(average))) * int(np.sum(sizes)))


def average_bits(bits: np.ndarray, sizes: int | np.ndarray = 1) -> float:
  """The nominal bits per weight that a plan really uses.

  Args:
    bits: bits per unit, any shape.
    sizes: weights of each unit, in the same order; one number for equal units.
  """
  sizes = unit_sizes(sizes, np.size(bits))
  return int(np.ravel(bits).astype(np.int64) @ sizes) / int(sizes.sum())


def unit_sizes(sizes: int | np.ndarray, units: int) -> np.ndarray:
  """Weights of each unit, `[U]` int64, from one number for all or one per unit.

  Raises:
    ValueError: not one size per unit, or a size that is not a positive integer.
  """
  array = np.asarray(sizes)
  if array.size not in (1, units):
    raise ValueError(f"{array.size} sizes for {units} units; give one number, or one per unit")
  if array.dtype.kind not in "iu" or array.min() < 1:
    raise ValueError("sizes are the weights of each unit: positive integers")
  return np.broadcast_to(array.reshape(-1), (units,)).astype(np.int64)


def check_budget(average: float, widths: Sequence[int]) -> None:
  """Refuses widths that are no bit set, and budgets that no plan meets.

  Raises:
    ValueError: names the possible range and the remedy.
  """
  if not widths or list(widths) != sorted(set(widths)) or min(widths) < 0:
    raise ValueError(f"the candidate widths {tuple(widths)} must be different bit numbers in ascending order")
  if not isinstance(average, int | float):
    raise ValueError(f"the budget {average!r} is no number; it is an average of bits per weight, for example 2.5")
  if average < widths[0]:
    smaller = f" or add a width of at most {average} bits" if average >= 1 else ""
    raise ValueError(f"widths {tuple(widths)} have no solution at {average} bits per weight: the possible range is "
                     f"[{widths[0]}, {widths[-1]}]; raise the budget{smaller}")
  if not average <= widths[-1]:
    raise ValueError(f"the budget of {average} bits per weight is out of the possible range [{widths[0]}, "
                     f"{widths[-1]}] of widths {tuple(widths)}; lower the budget or add a larger width")


def build(tied: constraints.Tied, widths: Sequence[int], average: float) -> Problem:
  """The knapsack instance of tied costs.

  Args:
    tied: costs and sizes of U units.
    widths: `[W]` candidate bits.
    average: nominal bits per weight that may be spent, possible with `widths`.
  """
  weight = unit_sizes(tied.sizes, len(tied.cost))[:, None] * np.array(widths, np.int64)[None]
  return Problem(tied.cost, weight, budget_bits(average, tied.sizes))


def plan(table: artifacts.CostTable, average: float, constraint: str = constraints.DEFAULT,
         method: str | None = None) -> artifacts.Plan:
  """The plan of least total cost, exact over all layers, with its certificate.

  Args:
    table: costs of every cell.
    average: nominal bits per weight that may be spent.
    constraint: which cells share one width.
    method: the plan's name; by default `knapsack(SCORE)`.

  Raises:
    ValueError: an impossible budget, an unknown constraint, or a table that does not fit together.
  """
  check_budget(average, table.widths)
  tied = constraints.tie(table, constraint)
  solution = knapsack.solve(*build(tied, table.widths, average))
  bits = np.array(table.widths, np.int64)[solution.choice][tied.unit]
  return artifacts.Plan(constraints.as_plan(bits, constraint), method or f"knapsack({table.score})", average,
                        solution.value, solution.bound, constraint)


def predicted(table: artifacts.CostTable, bits: np.ndarray) -> float:
  """The total cost of any plan under a cost table.

  Args:
    table: costs of every cell.
    bits: `[L, E]` or `[L, E, P]`.

  Raises:
    ValueError: a width that the table does not hold.
  """
  missing = sorted(set(np.ravel(bits).tolist()) - set(table.widths))
  if missing:
    raise ValueError(f"cost table {table.score} has widths {table.widths}, not {missing}")
  choice = np.searchsorted(table.widths, bits)
  choice = np.broadcast_to(choice[..., None] if choice.ndim == 2 else choice, table.cost.shape[:3])
  return math.fsum(np.take_along_axis(table.cost, choice[..., None], axis=3).flat)


def uniform(
  average: float,
  widths: Sequence[int],
  shape: tuple[int, ...],
  seed: int | Sequence[int] | np.random.Generator,
  sizes: int | np.ndarray = 1,
) -> np.ndarray:
  """One width for all units; between two widths, a random mix of the two neighbours within the budget.

  Units are raised to the upper width in random order while the budget lasts.

  Args:
    average: nominal bits per weight that may be spent.
    widths: candidate bits, ascending.
    shape: of the units, for example `(L, E)`.
    seed: of the order, or a generator.
    sizes: weights of each unit, flat, or one number for equal units.

  Returns:
    Bits, int64, of shape `shape`.

  Raises:
    ValueError: an impossible budget.
  """
  check_budget(average, widths)
  sizes = unit_sizes(sizes, math.prod(shape))
  low = max(w for w in widths if w <= average)
  high = min((w for w in widths if w > average), default=low)
  left = budget_bits(average, sizes) - low * int(sizes.sum())
  bits = np.full(len(sizes), low, np.int64)
  for unit in np.random.default_rng(seed).permutation(len(sizes)):
    step = (high - low) * int(sizes[unit])
    if step <= left:
      bits[unit], left = high, left - step
  return bits.reshape(shape)


def random_tiers(layers: int, experts: int, counts: Mapping[int, int], seed: int | Sequence[int]) -> np.ndarray:
  """In every layer the same number of experts per width, in a random order: the control of the tier rules.

  Args:
    layers: L.
    experts: E.
    counts: width -> experts of a layer that get it, together E.
    seed: of the orders.

  Returns:
    `[L, E]` int64 bits.

  Raises:
    ValueError: counts that do not sum to the experts.
  """
  rng = np.random.default_rng(seed)
  orders = np.stack([rng.permutation(experts) for _ in range(layers)])
  return tiers.assign(orders, tuple(counts.values()), tuple(counts))
