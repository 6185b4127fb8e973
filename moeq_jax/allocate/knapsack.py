"""The multiple-choice knapsack: one choice per unit, least total cost under one budget, with a certificate.

  minimise  sum_u cost[u, k_u]   subject to   sum_u weight[u, k_u] <= budget

A unit is whatever gets one bit-width, a choice is a width, the weight of a choice is what storing it takes. All layers
share the one budget. `solve` has two methods: `exact`, described here, and `lagrangian` (`lagrangian.py`) for instances
of millions of units, whose relative gap shrinks as units become more. The way to the optimum has three steps (the first
two and the lists of the third are standard, see Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11):

1. Lagrangian bound. For a price `m >= 0` of a unit of weight, `D(m) = sum_u min_k (cost + m weight) - m budget` is at
   most the optimum. `D` is concave; bisection on `m` ends at two neighbouring floats, one too low, one high enough to
   keep the budget. Units that the two answer differently are tied and are moved, in order, while the budget lasts: this
   is the base solution.
2. Reduction. `r[u, k] = cost + m weight - min_k' (cost + m weight) >= 0` is what the choice `k` adds to the bound, so a
   choice with `D + r >= value of the incumbent` is in no better solution. Integer weights allow more: order the weight
   changes of an optimal solution against the base so that their running sum stays in a window of `M` integers. If `M`
   units changed, two running sums would agree, and taking back the changes between the two costs nothing. So some
   optimal solution changes fewer than `M` units, and of all choices with the same change of weight only the `M - 1`
   with the least `r` are needed. With equal units of 1 to 4 bits at most thirty choices remain, whatever the number of
   units and however many costs are equal. Units with a choice left are the core.
3. Dynamic program over the core, on lists of (weight, cost) states without dominated ones, each state bounded by
   Lagrangian bounds of the units to come. It starts with the most promising units and a short list. If units or states
   had to be left out that could still matter, the core or the list is widened, with the better incumbent.

The search ends only when nothing was left out that could improve the incumbent: the value is then the optimum. The
bound that is returned is rounded outward. A plain dynamic program over the whole budget is exact too, but slower than a
general integer programming solver at thousands of units.

Steps 1 and 3 are jitted and run in float64 on the host's CPU inside `jax.enable_x64`; nothing outside `solve` sees
float64. Arrays are padded to size classes, so that instances of similar size share one compilation.
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.allocate import instance as instances
from moeq_jax.allocate import lagrangian, search

METHODS = ("auto", "exact", "lagrangian")
EXACT_UNITS = 1 << 17  # `auto` proves the optimum up to here: it takes about a second


@dataclasses.dataclass(frozen=True)
class Solution:
  """A choice for every unit, its total cost, and a proven lower bound on the least cost.

  Attributes:
    choice: `[U]` int64, index of the chosen column of `cost` and `weight`.
    value: sum of the chosen costs, correctly rounded.
    bound: a valid lower bound on the optimum, never above `value`. Where `solve` is exact it differs from `value` by
      rounding alone, which proves the optimum.
    method: `exact` or `lagrangian`, whichever found it.
  """

  choice: np.ndarray
  value: float
  bound: float
  method: str = "exact"

  @property
  def gap(self) -> float:
    """How much dearer than the optimum the choice can be at most, relative to its own cost."""
    return (self.value - self.bound) / abs(self.value) if self.value else 0.0


def solve(cost: Any, weight: Any, budget: int | float, method: str = "auto") -> Solution:
  """Chooses one column per unit at least total cost within the budget.

  By the method `exact`, integer weights, and real ones that are multiples of a common power of two such as 2.25, are
  solved exactly. With other real weights the result is the Lagrangian solution improved by one dynamic program over the
  units nearest to a tie: feasible and close to the optimum, not proven optimal; `bound` is valid there too. Equal
  inputs give equal outputs; of units that tie at the price, those of lower index get the heavier choice first.

  By the method `lagrangian` the choice is feasible, `bound` valid and the gap between them that of one price for all
  units, after a repair that solves the 1,024 units nearest to a tie together: about the cost of one step of one unit at
  most. 8.4 million units take seconds. `auto` is exact up to 131,072 units.

  Args:
    cost: `[U, B]` finite numbers of any sign and scale, not necessarily monotone or convex in the weight.
    weight: `[U, B]` integers or finite reals, in any unit (for example bits).
    budget: the largest allowed sum of chosen weights, in the same unit.
    method: one of `METHODS`.

  Returns:
    The `Solution`.

  Raises:
    ValueError: for arrays of wrong shape or dtype, NaN or infinite entries (names the unit), sums beyond float64, or a
      budget below the least possible weight (states it).
    TypeError: when called inside `jax.jit` or another transformation.
    search.SearchLimitError: when the proof would need more than 1 GiB: many units of large, unrelated integer sizes
      that all tie can lead there, the few sizes of a real model do not.
  """
  _refuse_tracing(cost, weight, budget)
  if method not in METHODS:
    raise ValueError(f"unknown method {method!r} of the knapsack; it is one of {', '.join(METHODS)}")
  cost, weight, budget = _checked(cost, weight, budget)
  if method == "auto":
    method = "exact" if len(cost) <= EXACT_UNITS else "lagrangian"
  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    if method == "lagrangian":
      return _lagrangian(cost, weight, budget)
    instance = instances.normalised(cost, weight, budget)
    if instance is None:
      choice, slack = np.lexsort((weight, cost), axis=1)[:, 0], 0.0
    else:
      choice, slack = search.best(instance)
  value = _sum_of(cost, choice)
  return Solution(choice=choice, value=value, bound=math.nextafter(value - slack, -math.inf))


def _lagrangian(cost: np.ndarray, weight: np.ndarray, budget: int | float) -> Solution:
  """Raises `ValueError` for weights that are no integers of a sum below 2^53 in any binary unit."""
  if weight.dtype.kind not in "iu" or _largest(weight) * len(weight) >= 1 << 53:
    raise ValueError("the method lagrangian needs weights that are integers, or multiples of a power of two, and sum to"
                     " less than 2^53; give them in bits, divided by their common divisor, or take the method exact")
  solved = lagrangian.best(cost, weight, budget)
  value = _sum_of(cost, solved.choice)
  return Solution(solved.choice, value, min(solved.bound, value), "lagrangian")


def _sum_of(cost: np.ndarray, choice: np.ndarray) -> float:
  """The sum of the chosen costs, correctly rounded."""
  chosen = np.take_along_axis(cost, choice[:, None], axis=1)[:, 0]
  return math.fsum(itertools.chain.from_iterable(chosen[i:i + 65536].tolist() for i in range(0, len(chosen), 65536)))


def _largest(array: np.ndarray) -> int | float:
  """The largest absolute value."""
  return max(abs(array.max().item()), abs(array.min().item()))


def _refuse_tracing(*values: Any) -> None:
  if any(isinstance(x, jax.core.Tracer) for x in (*values, jnp.zeros(()))):
    raise TypeError("knapsack.solve runs its own jitted float64 programs and cannot be called inside jax.jit, vmap or "
                    "grad; call it outside and pass its result in")


def _checked(cost: Any, weight: Any, budget: Any) -> tuple[np.ndarray, np.ndarray, int | float]:
  """Returns `(cost float64, weight integers or float64, budget)` or raises `ValueError`."""
  cost, weight = np.asarray(cost), np.asarray(weight)
  if cost.ndim != 2 or 0 in cost.shape or cost.shape != weight.shape:
    raise ValueError(f"cost and weight must both be [units, choices] and not empty, got {cost.shape}, {weight.shape}")
  cost = np.asarray(cost, np.float64)
  integers = weight.dtype.kind in "iu" or (weight.dtype == object and all(isinstance(x, int) for x in weight.flat))
  weight = weight if integers else np.asarray(weight, np.float64)
  _check_finite("cost", cost)
  if not integers:
    _check_finite("weight", weight)
  if not math.isfinite(budget):
    raise ValueError(f"budget is {budget}; it must be finite")
  if not math.isfinite(_largest(cost) * 4 * len(cost)):
    raise ValueError("the sum of the costs exceeds the range of float64; rescale the costs")
  lightest = functools.reduce(np.minimum, weight.T)  # the short axis is slow to reduce
  least = _exact_sum(lightest) if integers else math.fsum(lightest)
  if budget < least:
    raise ValueError(f"no solution: the budget {budget} is below {least}, the least possible total weight of the "
                     f"{len(weight)} units; raise the budget or allow lighter choices")
  return (cost, weight, math.floor(budget)) if integers else (cost, *_as_integers(weight, float(budget)))


def _exact_sum(integers: np.ndarray) -> int:
  """The sum of integers of any size."""
  fits = integers.dtype.kind in "iu" and _largest(integers) * len(integers) < 1 << 62
  return int(integers.sum(dtype=np.int64)) if fits else sum(integers.tolist())


def _check_finite(name: str, array: np.ndarray) -> None:
  if math.isfinite(_largest(array)):  # NaN included, and without a mask of millions of units
    return
  for unit, choice in np.argwhere(~np.isfinite(array))[:1]:
    raise ValueError(f"{name} of unit {unit}, choice {choice} is {array[unit, choice]}; every {name} must be finite")


def _as_integers(weight: np.ndarray, budget: float) -> tuple[np.ndarray, int | float]:
  """Real weights in a unit that makes them integers of a sum below 2^53, if some power of two does; else unchanged."""
  power = 52 - math.frexp(float(np.abs(weight).max()) * len(weight))[1]
  scaled = np.ldexp(weight, power)
  if not (scaled == np.rint(scaled)).all():
    return weight, budget
  return scaled.astype(np.int64), math.floor(Fraction(budget) * Fraction(2)**power)
