"""The dynamic program over the core of a multiple-choice knapsack, on lists of states.

A state is what a choice for the first units changes against the base solution: `(weight used, cost spent)`. Each unit
extends every state by every choice; a state that is neither lighter nor cheaper than another one is dropped, and so is
one whose Lagrangian bound, for any of several prices of weight, shows that it leads to nothing better than the
incumbent. Lists have a fixed length: when more states survive, those of least bound are kept and the least bound of the
others is returned, so that the caller knows whether anything that matters was lost.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly: a repeatable sample of states of equal bound
_GRAINS = 1024  # bounds that differ by less than this part of the gap count as equal when a list is shortened


class _Ahead(NamedTuple):
  """What the units still to come allow, after each unit.

  Attributes:
    cost: `[n, J]` least sum of cost + price * weight of the units after each.
    weight: `[n]` their least sum of weights.
    prices: `[J]`.
    slack: what all changes of weight may sum to.
    gain: only changes of cost below this are wanted.
  """

  cost: jax.Array
  weight: jax.Array
  prices: jax.Array
  slack: jax.Array
  gain: jax.Array

  def bound(self, unit: jax.Array, used: jax.Array, spent: jax.Array) -> jax.Array:
    """Lower bound on the change of cost that each state after `unit` leads to; infinity if it is of no use."""
    low = spent + jnp.max(self.cost[unit][None] + self.prices[None] * (used[:, None] - self.slack), axis=1)
    return jnp.where((low < self.gain) & (used + self.weight[unit] <= self.slack), low, jnp.inf)


@partial(jax.jit, static_argnames="states")
def run(
  cost: jax.Array,
  weight: jax.Array,
  base: jax.Array,
  count: int,
  prices: jax.Array,
  slack: float,
  gain: float,
  target: float,
  *,
  states: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Searches for the least change of cost whose change of weight is at most `slack`.

  Args:
    cost: `[n, B]` float64 changes against the base solution; infinity where a unit has no such choice.
    weight: `[n, B]` float64 changes against the base solution.
    base: `[n]` int32, the base solution's choice (zero change).
    count: how many of the `n` units are real.
    prices: `[J]` prices of weight for the bounds.
    slack: what the changes of weight may sum to.
    gain: only changes of cost below this are wanted (0, or that of the incumbent).
    target: a change of cost that is good enough to stop at.
    states: length of the list.

  Returns:
    `(change, choice [n] int32, left_out)`: the least change found (infinity if none), its choices, and the least bound
    of the states left out for lack of room.
  """
  priced = cost[:, :, None] + weight[:, :, None] * prices[None, None]
  ahead = _Ahead(_after(jnp.min(priced, axis=1)),
                 _after(jnp.min(jnp.where(jnp.isfinite(cost), weight, jnp.inf), axis=1)), prices, slack, gain)
  grain = (gain - target) / _GRAINS

  def complete(used, spent):
    return jnp.where(used <= slack, spent, jnp.inf)

  def unfinished(carry):
    unit, used, spent, _, _ = carry
    return (unit < count) & (complete(used, spent).min() > target)

  def step(carry):
    unit, used, spent, parents, left_out = carry
    used, spent, low, parent = _extend(ahead, unit, used, spent, cost[unit], weight[unit])
    used, spent, parent, lost = jax.lax.cond(jnp.isfinite(low).sum() > states, partial(_best, grain, states),
                                             partial(_all, states), used, spent, low, parent)
    return unit + 1, used, spent, parents.at[unit].set(parent), jnp.minimum(left_out, lost)

  spent = jnp.full(states, jnp.inf).at[0].set(0.0)
  carry = 0, jnp.zeros(states), spent, jnp.zeros((len(cost), states), jnp.int32), jnp.array(jnp.inf)
  done, used, spent, parents, left_out = jax.lax.while_loop(unfinished, step, carry)
  last = jnp.argmin(complete(used, spent))
  return complete(used, spent)[last], _trace_back(parents, base, done, last, cost.shape[1]), left_out


def _after(x: jax.Array) -> jax.Array:
  """Sums over the rows after each row."""
  return jnp.flip(jnp.cumsum(jnp.flip(x, 0), 0), 0) - x


def _extend(ahead, unit, used, spent, cost, weight):
  """Every state by every choice of a unit, sorted by weight; useless and dominated ones get an infinite bound."""
  used, spent = (used[:, None] + weight[None]).reshape(-1), (spent[:, None] + cost[None]).reshape(-1)
  useful = jnp.isfinite(ahead.bound(unit, used, spent))
  used, spent = jnp.where(useful, used, 0.0), jnp.where(useful, spent, jnp.inf)
  used, spent, parent = jax.lax.sort((used, spent, jnp.arange(len(used), dtype=jnp.int32)), num_keys=2)
  cheapest = jnp.concatenate([jnp.array([jnp.inf]), jax.lax.cummin(spent)[:-1]])
  return used, spent, jnp.where(spent < cheapest, ahead.bound(unit, used, spent), jnp.inf), parent


def _all(states, used, spent, low, parent):
  """Moves the states of finite bound to the front of the list; there is room for all."""
  kept = jnp.isfinite(low)
  place = jnp.where(kept, jnp.cumsum(kept) - 1, states)
  used = jnp.zeros(states).at[place].set(used, mode="drop")
  spent = jnp.full(states, jnp.inf).at[place].set(spent, mode="drop")
  return used, spent, jnp.zeros(states, jnp.int32).at[place].set(parent, mode="drop"), jnp.array(jnp.inf)


def _best(grain, states, used, spent, low, parent):
  """Keeps the states of least bound, and of (almost) equal bounds a sample spread over the weights."""
  ranks = jnp.floor(low / grain), jnp.mod(used * _GOLDEN, 1.0)
  _, _, low, used, spent, parent = jax.lax.sort((*ranks, low, used, spent, parent), num_keys=2)
  return used[:states], spent[:states], parent[:states], low[states:].min()


def _trace_back(parents, base, done, last, width):
  """Choices `[n]` on the way to state `last` after `done` units; the base's choice for the units after."""

  def back(step, carry):
    state, choice = carry
    unit = done - 1 - step
    return parents[unit, state] // width, choice.at[unit].set(parents[unit, state] % width)

  return jax.lax.fori_loop(0, done, back, (last.astype(jnp.int32), base))[1]
