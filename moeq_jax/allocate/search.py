"""The search for the optimum of a knapsack instance: Lagrangian bisection, reduction, widening of the core.

`knapsack` tells the method and its proof; `dynamic_program` solves the core.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.allocate import dynamic_program
from moeq_jax.allocate import instance as instances

_FIRST_UNITS, _FIRST_STATES = 64, 256  # of the first, narrow core
_LARGEST_TABLE = 1 << 28  # core units times states: one GiB of parents
_PRICES = np.array([0.0, 0.5, 0.8, 0.95, 1.0, 1.05, 1.25, 2.0])  # of the program's bounds, in units of the best price


class SearchLimitError(RuntimeError):
  """The proof of optimality needs more memory than the search allows itself."""


@dataclasses.dataclass(frozen=True)
class _Dual:
  """The best Lagrangian bound and the base solution beside it.

  Attributes:
    price: the best price of one unit of weight.
    reduced: `[B', U']` reduced costs at that price (infinite for absent choices).
    base: `[U']` chosen rows of the base solution.
    slack: capacity that the base leaves.
    noise: sum of the base's reduced costs; only rounding.
    magnitude: sum of the absolute values that the bound is made of.
  """

  price: float
  reduced: np.ndarray
  base: np.ndarray
  slack: float
  noise: float
  magnitude: float

  @property
  def gap(self) -> float:
    """Cost of the base less the bound."""
    return self.price * self.slack + self.noise


def best(instance: instances.Instance, largest_table: int | None = None) -> tuple[np.ndarray, float]:
  """Returns the best choice `[U]` and by how much the optimum may lie below its cost (only rounding if exact).

  With `largest_table` the search gives up the proof where it would need a larger one, and returns the best found.

  Rounding: a term of the bound and a reduced cost carry a relative error of at most 2^-51, a sum of n changes at most
  n 2^-53 of its terms; `tolerance` is more than all of them together.
  """
  dual = _dual(instance)
  choice, gain = dual.base.copy(), 0.0  # gain: cost of the incumbent less cost of the base, at most 0
  tolerance = 2.0**-48 * dual.magnitude
  limit, states, finished = _FIRST_UNITS, _FIRST_STATES, instance.exact
  while dual.gap + gain > tolerance:
    core = _core(instance, dual, dual.gap + gain, limit)
    gain, left_out = core.improve(choice, dual, gain, tolerance - dual.gap, states)
    tolerance = max(tolerance, 2.0**-48 * dual.magnitude + 2.0**-50 * core.magnitude)
    cut_units, cut_states = core.next_reduced < dual.gap + gain, left_out < gain
    if not (instance.exact and (cut_units or cut_states)):
      break
    limit, states = (limit, 8 * states) if cut_states else (4 * limit, states)
    if largest_table and limit * states > largest_table:
      finished = False
      break
  remaining = 0.0 if finished else dual.gap + gain + dual.price * instance.error
  units = len(instance.order)
  return instance.order[np.arange(units), choice[:units]], math.ldexp(remaining + tolerance, instance.exponent)


def _dual(instance: instances.Instance) -> _Dual:
  found = _bisect(instance.cost, instance.weight, instance.capacity)
  price, reduced, affordable, cheap, magnitude = map(np.asarray, found)
  every = np.arange(len(affordable))
  used = instance.weight[affordable, every]
  extra = instance.weight[cheap, every] - used
  base = np.where(np.cumsum(extra) <= instance.capacity - used.sum(), cheap, affordable)
  slack, noise = instance.capacity - instance.weight[base, every].sum(), reduced[base, every].sum()
  magnitude = magnitude + price * instance.capacity
  return _Dual(float(price), reduced, base, float(slack), float(noise), float(magnitude))


@jax.jit
def _bisect(cost: jax.Array, weight: jax.Array, capacity: jax.Array) -> tuple[jax.Array, ...]:
  """Bisects the price over its logarithm until two neighbouring floats are left.

  Returns `(price, reduced [B, U], choice [U] at price, choice [U] just below it, sum of the absolute terms of D)`.
  """

  def answer(price):
    least, used, choice = cost[0] + price * weight[0], weight[0], jnp.zeros(cost.shape[1], jnp.int32)
    for k in range(1, cost.shape[0]):
      priced = cost[k] + price * weight[k]
      better = priced < least
      least, used = jnp.where(better, priced, least), jnp.where(better, weight[k], used)
      choice = jnp.where(better, k, choice)
    return least, used, choice

  def middle(bounds):
    return jnp.sqrt(bounds[0]) * jnp.sqrt(bounds[1])

  def halve(bounds):
    price = middle(bounds)
    fits = answer(price)[1].sum() <= capacity
    return jnp.where(fits, bounds[0], price), jnp.where(fits, price, bounds[1])

  def apart(bounds):
    return (bounds[0] < middle(bounds)) & (middle(bounds) < bounds[1])

  low, high = jax.lax.while_loop(apart, halve, (jnp.float64(2.0**-1000), jnp.float64(2.0**200)))
  least, _, affordable = answer(high)
  return high, cost + high * weight - least[None], affordable, answer(low)[2], least.sum()


@dataclasses.dataclass(frozen=True)
class _Core:
  """The units that may still differ from the base, those with the widest change of weight first.

  Attributes:
    units: `[n]`.
    cost, weight: `[n, B']` changes against the base; choices that cannot improve the incumbent have infinite cost.
    next_reduced: least reduced cost among the choices of the units left out for lack of room.
    magnitude: bound on the absolute values that the program sums, times the number of summands.
  """

  units: np.ndarray
  cost: np.ndarray
  weight: np.ndarray
  next_reduced: float
  magnitude: float

  def improve(self, choice: np.ndarray, dual: _Dual, gain: float, target: float, states: int) -> tuple[float, float]:
    """Runs the program; writes a better choice into `choice`. Returns `(gain, least bound of the states left out)`."""
    count = len(self.units)
    rows = instances.size_class(count, _FIRST_UNITS)
    if rows * states > _LARGEST_TABLE:
      raise SearchLimitError(
        f"proving the optimum needs more than {_LARGEST_TABLE // rows} states for {count} units; give the weights in a "
        "coarser unit, rounded up")
    padding = (0, rows - count), (0, 0)
    cost, weight = np.pad(self.cost, padding), np.pad(self.weight, padding)
    base = np.pad(dual.base[self.units], padding[0])
    change, found, left_out = map(np.asarray, dynamic_program.run(
      cost, weight, base, count, dual.price * _PRICES, dual.slack, gain, target, states=states))
    if change < gain:
      choice[:] = dual.base
      choice[self.units] = found[:count]
    return min(float(change), gain), float(left_out)


def _core(instance: instances.Instance, dual: _Dual, gap: float, limit: int) -> _Core:
  """Keeps the choices that an optimal solution may need, and of their units the `limit` with least reduced cost."""
  every = np.arange(len(dual.base))
  cost = instance.cost - instance.cost[dual.base, every]
  weight = instance.weight - instance.weight[dual.base, every]
  needed = _needed(instance, dual, gap, weight)
  least = np.where(needed, dual.reduced, np.inf).min(axis=0)
  ranked = np.argsort(least, kind="stable")[:np.isfinite(least).sum()]
  units, others = ranked[:limit], ranked[limit:]
  units = units[np.argsort(-np.abs(np.where(needed, weight, 0.0)[:, units]).max(axis=0), kind="stable")]
  needed[dual.base, every] = True
  cost, weight = np.where(needed, cost, np.inf)[:, units].T, np.where(needed, weight, 0.0)[:, units].T
  terms = np.where(np.isfinite(cost), np.abs(cost), 0.0) + 2 * _PRICES.max() * dual.price * np.abs(weight)
  magnitude = (len(units) + 4) * terms.max(axis=1).sum()
  return _Core(units, cost, weight, float(least[others[0]]) if len(others) else math.inf, float(magnitude))


def _needed(instance: instances.Instance, dual: _Dual, gap: float, change: np.ndarray) -> np.ndarray:
  """Marks `[B', U']` the choices that some best solution is made of, if there is one better than the incumbent.

  For integer weights: the total change of weight of a solution better than the base is in `[-e, slack]`, `e` being the
  rounding noise of the base's reduced costs over the price. The changes, each at most `widest`, can then be ordered so
  that all running sums lie in a window of `widest + max(widest, slack) + e` integers; fewer changes than that suffice.
  """
  needed = (dual.reduced < gap) & (change != 0)
  if instance.exact and needed.any():
    widest = np.abs(change[needed]).max()
    window = widest + max(widest, dual.slack) + dual.noise // dual.price
    choice, unit = np.nonzero(needed)
    kept = _least_of_each(change[choice, unit], dual.reduced[choice, unit], int(window) - 1)
    needed[:] = False
    needed[choice[kept], unit[kept]] = True
  return needed


def _least_of_each(change: np.ndarray, reduced: np.ndarray, most: int) -> np.ndarray:
  """Indices of the `most` least `reduced` among the entries of equal `change`; the earlier one first in a tie."""
  order = np.lexsort((reduced, change))
  starts = np.flatnonzero(np.diff(change[order], prepend=np.nan))
  rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
  return order[rank < most]
