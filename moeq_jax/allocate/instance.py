"""The form in which the knapsack search sees an instance: shifted, scaled, sorted, padded."""

import dataclasses
import math

import numpy as np

_LARGEST_WEIGHT = 1 << 53  # below, sums of integer weights are exact in float64
_EXPONENT_OF_ZERO = -1100  # less than that of any float64


@dataclasses.dataclass(frozen=True)
class Instance:
  """An instance in which not every unit can have its cheapest choice.

  Every unit's least cost and least weight are subtracted; weights are divided by their common divisor; costs are scaled
  by a power of two so that the optimum is above 1/2 and at most `U`; a unit's choices are sorted by weight; useless
  ones have infinite cost; units and choices are padded to size classes with units of one free choice.

  Attributes:
    cost: `[B', U']` float64.
    weight: `[B', U']` float64, integers where `exact`.
    capacity: what the chosen weights may sum to.
    order: `[U, B]`, the original index of each sorted choice.
    exponent: costs were multiplied by `2 ** -exponent`.
    error: how much larger the true capacity may be than `capacity` (real weights only).
    exact: whether all weights are integers.
  """

  cost: np.ndarray
  weight: np.ndarray
  capacity: float
  order: np.ndarray
  exponent: int
  error: float
  exact: bool


def normalised(cost: np.ndarray, weight: np.ndarray, budget: int | float) -> Instance | None:
  """Brings an instance into the search's form; `None` if every unit can have its cheapest choice.

  Args:
    cost: `[U, B]` float64, finite.
    weight: `[U, B]`, float64 for real weights, any other dtype for integers.
    budget: the largest sum of chosen weights, not below the least possible one; an int for integer weights.

  Raises:
    ValueError: if integer weights sum beyond 2^53 times their common divisor.
  """
  weight, capacity, error, exact = _shifted(weight, budget)
  cost = cost - cost.min(axis=1, keepdims=True)
  order = np.lexsort((cost, weight), axis=1)
  cost, weight = np.take_along_axis(cost, order, 1), np.take_along_axis(weight, order, 1)
  if weight[np.arange(len(cost)), cost.argmin(axis=1)].sum() <= capacity:
    return None
  exponents = np.where(cost > 0, np.frexp(cost)[1], _EXPONENT_OF_ZERO)
  exponent = _bottleneck(exponents, weight, capacity)
  useless = exponents > exponent + len(cost).bit_length()  # dearer than a whole solution
  useless[:, 1:] |= cost[:, 1:] >= np.minimum.accumulate(cost, axis=1)[:, :-1]  # dominated by a lighter choice
  cost = np.ldexp(np.where(useless, 0.0, cost), -exponent)
  cost[useless] = np.inf
  padding = (0, size_class(cost.shape[1], 4) - cost.shape[1]), (0, size_class(len(cost), 64) - len(cost))
  padded = np.pad(cost.T, padding, constant_values=np.inf)
  padded[0, len(cost):] = 0.0
  return Instance(padded, np.pad(weight.T, padding), capacity, order, exponent, error, exact)


def size_class(size: int, least: int) -> int:
  """The next power of two, at least `least`: instances of one class share a compilation."""
  return max(least, 1 << (size - 1).bit_length())


def _shifted(weight: np.ndarray, budget: int | float) -> tuple[np.ndarray, float, float, bool]:
  """Weights above each unit's least one, by their common divisor, with their `(capacity, error, exact)`."""
  exact = weight.dtype != np.float64
  if exact:
    largest = max(abs(int(weight.max())), abs(int(weight.min())))
    weight = weight.astype(np.int64 if largest * len(weight) < 1 << 62 else object)
  lightest = weight.min(axis=1, keepdims=True)
  least = int(lightest.sum()) if exact else math.fsum(lightest.flat)
  weight = weight - lightest
  if not exact:
    error = 2.0**-46 * (abs(budget) + float(np.abs(lightest).sum() + weight.max(axis=1).sum()))
    return weight, max(0.0, budget - least - error), 2 * error, False
  divisor = int(np.gcd.reduce(weight.ravel())) or 1
  weight, capacity, total = weight // divisor, (budget - least) // divisor, int(weight.max(axis=1).sum()) // divisor
  if total >= _LARGEST_WEIGHT:
    raise ValueError(f"the weights sum to {total} times their common divisor, above 2^53; use a coarser unit of weight")
  return weight.astype(np.float64), float(min(capacity, total)), 0.0, True


def _bottleneck(exponents: np.ndarray, weight: np.ndarray, capacity: float) -> int:
  """The least `e` such that some solution has only costs below `2 ** e`: the optimum is then in `[2^(e-1), U 2^e)`."""
  low, high = _EXPONENT_OF_ZERO, int(exponents.max())
  while low < high:
    middle = (low + high) // 2
    lightest = np.where(exponents <= middle, weight, np.inf).min(axis=1)
    low, high = (low, middle) if lightest.sum() <= capacity else (middle + 1, high)
  return high
