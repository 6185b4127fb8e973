"""The multiple-choice knapsack for millions of units: the Lagrangian solution, repaired, with a certificate.

For a price `m >= 0` of a unit of weight, every unit for itself takes the choice of least `cost + m weight`, and

  D(m) = sum_u min_k (cost[u, k] + m weight[u, k]) - m budget  <=  optimum  <=  cost of any choice within the budget.

`D` is concave, and the weight that the units take falls with `m`. The way:

1. Price. A fixed random sample of units, solved by bisection for the wanted share of the weight and for a little more
   and less, gives prices on both sides of the wanted one; one pass over all units checks that. Units that take the same
   weight on both sides are decided, and the rest goes round again, until it is small enough to be bisected down to two
   neighbouring floats: one too low, one high enough to keep the budget.
2. Base solution. Units that the two floats answer differently are tied; in order, they are moved while the budget
   lasts.
3. Repair. Whatever budget is left is worth at most `m` times it. The units nearest to a tie are solved once more, all
   together and with the others fixed, by the exact solver's dynamic program: that finds every swap among them that uses
   the rest up.
4. Certificate. `D` in float64. Each unit's term carries two roundings, sums are naive inside slabs and exact (`fsum`)
   over slabs, the rest is rational arithmetic, and a bound on all rounding is subtracted (`_certified`). Costs are
   scaled by a power of two so that the largest is below one: nothing overflows, and what falls below the least normal
   number is charged too.

Choices that no price selects (above the lower convex hull of a unit's choices) can only come in by step 3. A unit is in
memory as two columns of float64; the programs are jitted and see a slab of units at a time.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.allocate import instance as instances
from moeq_jax.allocate import search

SLAB = 1 << 16  # units of one program, fewer where there are no more
_LANES = 256  # partial sums of a slab
_LEAST_PRICE, _LARGEST_PRICE = 2.0**-1000, 4.0  # costs are below 1 and weights are integers: no step is worth more
_SHARES = (-0.03, -0.01, -0.002, 0.0, 0.002, 0.01, 0.03)  # of the range of weight, around the wanted one
_ROUNDS = 40
_CORE = 1024  # units that the repair solves together
_TABLE = 1 << 21  # of its dynamic program: 8 MiB of parents


class Solved(NamedTuple):
  """A choice within the budget and the proof of how good it is.

  Attributes:
    choice: `[U]` int64.
    bound: valid lower bound on the optimum, before it is compared with the value.
  """

  choice: np.ndarray
  bound: float


class _Slab(NamedTuple):
  """Some units: `cost` and `weight` above each unit's least one, `[B, n]` float64, filled up with units whose choices
  cost and weigh nothing."""

  cost: jax.Array
  weight: jax.Array


class _Price(NamedTuple):
  """Two prices: at `low` the units take more than the budget allows (or it is the least price), at `high` no more."""

  low: float
  high: float


def best(cost: np.ndarray, weight: np.ndarray, budget: int) -> Solved:
  """Chooses one column per unit within the budget.

  Args:
    cost: `[U, B]` finite floats.
    weight: `[U, B]` integers whose absolute values sum to less than 2^53.
    budget: the largest sum of chosen weights, not below the least possible one.
  """
  exponent = math.frexp(max(abs(float(cost.max())), abs(float(cost.min()))))[1]
  slabs = _slabs(cost, weight, exponent)
  capacity = budget - int(functools.reduce(np.minimum, weight.T).sum(dtype=np.int64))
  price = _Price(0.0, 0.0) if _used(slabs, [0.0])[0] <= capacity else _price(slabs, capacity)
  answers = [_answers(slab, *price) for slab in slabs]
  choice, tied = (np.concatenate([np.asarray(answer[i]) for answer in answers])[:len(cost)] for i in range(2))
  bound = max(_certified(slabs, at, capacity) for at in set(price))
  least = np.concatenate([np.asarray(answer[2]) for answer in answers])[:len(cost)]
  if price.high > 0:
    choice = _repaired(cost, weight, _with_tied(weight, choice, tied, budget), least, budget)
  return Solved(choice.astype(np.int64), float(_scaled(bound, exponent)))


def _scaled(bound: Fraction, exponent: int) -> float:
  """`bound * 2 ** exponent`, rounded down."""
  exact = bound * Fraction(2) ** exponent
  rounded = float(exact)
  return rounded if Fraction(rounded) <= exact else math.nextafter(rounded, -math.inf)


def _slabs(cost: np.ndarray, weight: np.ndarray, exponent: int) -> list[_Slab]:
  """All units in slabs; costs times `2 ** -exponent`."""
  length = min(SLAB, instances.size_class(len(cost), _LANES))

  def slab(values: np.ndarray) -> np.ndarray:
    filled = np.zeros((values.shape[1], length))
    filled[:, :len(values)] = values.T
    return filled

  def made(costs: np.ndarray, weights: np.ndarray) -> _Slab:
    weights = slab(weights)
    return _Slab(jnp.asarray(np.ldexp(slab(costs), -exponent)), jnp.asarray(weights - weights.min(axis=0)))

  return [made(cost[i:i + length], weight[i:i + length]) for i in range(0, len(cost), length)]


# ---------------------------------------------------------------------------------------------------------------------
# What the units answer to a price
# ---------------------------------------------------------------------------------------------------------------------


def _answer(slab: _Slab, price: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`(least priced cost, its weight, its choice)` `[n]` each; of choices that cost the same the lighter one."""
  cost, weight = slab
  least, used, choice = cost[0] + price * weight[0], weight[0], jnp.zeros(cost.shape[1], jnp.int8)
  for k in range(1, len(cost)):
    priced = cost[k] + price * weight[k]
    better = (priced < least) | ((priced == least) & (weight[k] < used))
    least, used = jnp.where(better, priced, least), jnp.where(better, weight[k], used)
    choice = jnp.where(better, jnp.int8(k), choice)
  return least, used, choice


def _total(values: jax.Array) -> jax.Array:
  """Sum of a slab, in lanes that the processor adds at once."""
  return jnp.sum(values.reshape(-1, _LANES), axis=0).sum()


@jax.jit
def _weights(slab: _Slab, prices: jax.Array) -> jax.Array:
  """The weight that a slab takes at each price, `[J]`."""
  return jax.lax.map(lambda price: _total(_answer(slab, price)[1]), prices)


@jax.jit
def _answers(slab: _Slab, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Choices at the higher price and at the lower one, and how near each unit is to another choice at the higher one:
  its least reduced cost among choices of another weight, `[n]` each."""
  least, used, choice = _answer(slab, high)
  reduced = jnp.where(slab.weight == used[None], jnp.inf, slab.cost + high * slab.weight - least[None])
  return choice, _answer(slab, low)[2], jnp.min(reduced, axis=0)


@jax.jit
def _undecided(slab: _Slab, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which units take different weights at two prices, `[n]` bool, and what the others weigh together."""
  used, other = _answer(slab, high)[1], _answer(slab, low)[1]
  differs = used != other
  return differs, _total(jnp.where(differs, 0.0, used))


@jax.jit
def _range(slab: _Slab) -> tuple[jax.Array, jax.Array]:
  """The least and the most that a slab can weigh."""
  return _total(jnp.min(slab.weight, axis=0)), _total(jnp.max(slab.weight, axis=0))


@jax.jit
def _bisect(slab: _Slab, capacities: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Bisects the price over its logarithm, for each of `capacities` `[J]`, until two neighbouring floats are left."""

  def halve(bounds):
    middle = jnp.sqrt(bounds[0]) * jnp.sqrt(bounds[1])
    fits = _weights(slab, middle) <= capacities
    inside = (bounds[0] < middle) & (middle < bounds[1])
    return jnp.where(inside & ~fits, middle, bounds[0]), jnp.where(inside & fits, middle, bounds[1]), inside.any()

  start = jnp.full(capacities.shape, low), jnp.full(capacities.shape, high), jnp.array(True)
  return jax.lax.while_loop(lambda bounds: bounds[2], halve, start)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# The price
# ---------------------------------------------------------------------------------------------------------------------


def _used(slabs: Sequence[_Slab], prices: Sequence[float]) -> np.ndarray:
  """The weight that all units take at each price, `[J]`; exact."""
  parts = [_weights(slab, jnp.asarray(prices, jnp.float64)) for slab in slabs]  # all at work before the first is done
  return np.sum([np.asarray(part) for part in parts], axis=0)


def _price(slabs: Sequence[_Slab], capacity: int) -> _Price:
  """The price at which the capacity is used, between two neighbouring floats where it can be found so exactly."""
  low, high, wanted, left = _LEAST_PRICE, _LARGEST_PRICE, float(capacity), list(slabs)
  for turn in range(_ROUNDS):
    if len(left) == 1:
      ends = _bisect(left[0], jnp.array([wanted]), low, high)
      low, high = (float(end[0]) for end in ends)
      break
    probes = _probes(left, wanted, low, high, turn)
    fits = _used(left, probes) <= wanted
    low, high = max([low, *probes[~fits]]), min([high, *probes[fits]])
    if math.nextafter(low, math.inf) >= high:
      break
    left, decided = _compacted(left, low, high)
    wanted -= decided
  step = 2.0**-50
  while _used(slabs, [high])[0] > capacity:  # units nearer to a tie than rounding shows
    high, step = min(high * (1 + step), _LARGEST_PRICE), 2 * step
  return _Price(low, high)


def _probes(slabs: Sequence[_Slab], capacity: float, low: float, high: float, turn: int) -> np.ndarray:
  """Prices at which a random sample of the units takes about the wanted share of its weight, ascending."""
  random = np.random.default_rng(turn)
  count = SLAB // len(slabs) or 1
  sample = _gathered([_Slab(*(np.asarray(field)[:, place] for field in slab)) for slab in slabs[:SLAB]
                      for place in [np.sort(random.integers(0, SLAB, count))]])
  (least, most), (least_here, most_here) = np.sum([_range(slab) for slab in slabs], axis=0), map(float, _range(sample))
  share = (capacity - least) / (most - least) if most > least else 1.0
  wanted = least_here + (share + np.array(_SHARES)) * (most_here - least_here)
  ends = _bisect(sample, jnp.asarray(np.clip(wanted, least_here, most_here)), low, high)
  return np.sort(np.concatenate([np.asarray(end) for end in ends]))


def _gathered(parts: Sequence[_Slab]) -> _Slab:
  """Units of several parts in one slab, at most as many as it holds."""
  joined = _Slab(*(np.concatenate([np.asarray(part[i]) for part in parts], axis=1) for i in range(2)))
  return _Slab(*(jnp.asarray(np.pad(field, ((0, 0), (0, SLAB - field.shape[1])))) for field in joined))


def _compacted(slabs: Sequence[_Slab], low: float, high: float) -> tuple[list[_Slab], float]:
  """The units that the prices between two answer differently, in slabs, and the weight of the others."""
  found = [_undecided(slab, low, high) for slab in slabs]
  keep = [np.asarray(differs) for differs, _ in found]
  fields = [np.concatenate([np.asarray(slab[i])[:, kept] for slab, kept in zip(slabs, keep, strict=True)], axis=1)
            for i in range(2)]
  cuts = range(0, max(fields[0].shape[1], 1), SLAB)
  return ([_gathered([_Slab(*(field[:, i:i + SLAB] for field in fields))]) for i in cuts],
          float(np.sum([np.asarray(decided) for _, decided in found])))


# ---------------------------------------------------------------------------------------------------------------------
# The solution
# ---------------------------------------------------------------------------------------------------------------------


def _chosen(table: np.ndarray, choice: np.ndarray) -> np.ndarray:
  """`table[u, choice[u]]`, `[U]`."""
  return np.take_along_axis(table, choice[:, None].astype(np.intp), axis=1)[:, 0]


def _with_tied(weight: np.ndarray, choice: np.ndarray, tied: np.ndarray, budget: int) -> np.ndarray:
  """Moves units from `choice` to `tied`, where they differ, in order, while the budget lasts."""
  slack = budget - int(_chosen(weight, choice).sum(dtype=np.int64))
  units = np.flatnonzero(choice != tied)
  extra = (_chosen(weight[units], tied[units]) - _chosen(weight[units], choice[units])).astype(np.int64)
  moved = units[np.cumsum(np.maximum(extra, 0)) <= slack]
  choice = choice.copy()
  choice[moved] = tied[moved]
  return choice


def _repaired(cost: np.ndarray, weight: np.ndarray, choice: np.ndarray, nearness: np.ndarray,
              budget: int) -> np.ndarray:
  """Solves the units nearest to a tie again, with the budget that the others leave."""
  count = min(_CORE, len(cost))
  units = np.sort(np.argpartition(nearness, count - 1)[:count])
  own_cost, own_weight = np.asarray(cost[units], np.float64), np.asarray(weight[units], np.int64)
  others = int(_chosen(weight, choice).sum(dtype=np.int64)) - int(_chosen(own_weight, choice[units]).sum())
  instance = instances.normalised(own_cost, own_weight, budget - others)
  found = np.lexsort((own_weight, own_cost), axis=1)[:, 0] if instance is None else search.best(instance, _TABLE)[0]
  if math.fsum(_chosen(own_cost, found)) < math.fsum(_chosen(own_cost, choice[units])):
    choice = choice.copy()
    choice[units] = found
  return choice


# ---------------------------------------------------------------------------------------------------------------------
# The certificate
# ---------------------------------------------------------------------------------------------------------------------


@jax.jit
def _bound_terms(slab: _Slab, price: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A slab's part of `D`, and the sum of what its roundings are proportional to.

  Where costs are not negative, no intermediate result exceeds the least priced cost; otherwise the largest among the
  choices stands for all.
  """
  least = _answer(slab, price)[0]
  largest = jnp.max(jnp.abs(slab.cost) + price * slab.weight, axis=0)
  return _total(least), _total(jnp.where(jnp.min(slab.cost, axis=0) < 0, largest, least))


def _certified(slabs: Sequence[_Slab], price: float, capacity: int) -> Fraction:
  """`D(price)` less all that rounding may have added to it.

  With u = 2^-53: a term is a product and a sum, at most 3 u of its magnitude off; a slab's sum of n terms in any order
  is at most n u of the sum of their magnitudes off, and so is that sum of magnitudes itself. Results below the least
  normal number 2^-1022 may count as zero: four of them a choice.
  """
  found = [tuple(map(float, _bound_terms(slab, price))) for slab in slabs]
  total, magnitude = (math.fsum(part[i] for part in found) for i in range(2))
  lost = Fraction(magnitude) * (SLAB + 8) / 2**52 + Fraction(abs(total)) / 2**52
  tiny = Fraction(len(slabs) * SLAB * 4 * slabs[0].cost.shape[0]) / 2**1022
  return Fraction(total) - Fraction(price) * capacity - lost - tiny
