"""Plans for parts of experts: rows, blocks of rows, projections, experts, by one call.

`plan(costs, average, constraint)` gives one width to each of

  none                   every unit of the table: a row, or a block of neighbouring rows
  gate_equals_up         a unit of up and that of gate of the same neurons share one, down's are free
  projection             all units of a projection of an expert share one
  expert                 all units of an expert share one
  per_layer_projection   all experts of a layer share one for each projection
  per_layer              all experts of a layer share one

under one budget for the whole model. `none` is looser than `gate_equals_up` and `projection`, those (the latter two)
are looser than `expert`, and `merged` blocks are a constraint on their rows: a looser one never has a dearer optimum,
and its lower bound is at most the value of any tighter one.

Neurons can be put in order first (`order`, `ordered`), which is free but for the order itself: units of a block then
need about the same width.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moeq_jax import channels, registry
from moeq_jax.allocate import constraints, knapsack, problem

CONSTRAINTS = ("none", "gate_equals_up", "projection", "expert", "per_layer_projection", "per_layer")
DEFAULT = "none"


def units(costs: channels.BlockCosts, constraint: str) -> np.ndarray:
  """The number of the unit that each part of an expert belongs to, `[L, E, J]` int64.

  Raises:
    ValueError: an unknown constraint, or gate and up in units of different neurons.
  """
  if constraint not in CONSTRAINTS:
    near = registry.did_you_mean(str(constraint), CONSTRAINTS)
    raise ValueError(f"unknown constraint {constraint!r}{near} (constraints of blocks: {', '.join(CONSTRAINTS)})")
  layers, experts, parts = costs.cost.shape[:3]
  if constraint == "none":
    return np.arange(layers * experts * parts).reshape(layers, experts, parts)
  if constraint != "gate_equals_up":
    whole = constraints.units("none" if constraint == "projection" else constraint, layers, experts, costs.projections)
    return whole[..., costs.projection]
  part = np.arange(parts)
  if "gate" in costs.projections:
    part[costs.part("gate")] = part[costs.part("up")]
  part = np.unique(part, return_inverse=True)[1]
  return (np.arange(layers * experts) * (part.max() + 1)).reshape(layers, experts, 1) + part


def tie(costs: channels.BlockCosts, constraint: str) -> constraints.Tied:
  """Sums costs and weights of what shares a width; costs of a unit never rise with its bits, see `constraints.tie`.

  Raises:
    ValueError: an unknown constraint, or a cost that is not finite; names its place.
  """
  unit = units(costs, constraint)
  for layer, expert, part, choice in np.argwhere(~np.isfinite(costs.cost))[:1]:
    cost = costs.cost[layer, expert, part, choice]
    raise ValueError(f"cost table {costs.score}: unit {part} ({costs.projections[costs.projection[part]]}) of layer"
                     f" {layer}, expert {expert} at {costs.widths[choice]} bits costs {cost}; costs must be finite,"
                     " check the score's inputs there")
  cost, sizes = costs.cost.reshape(-1, len(costs.widths)), np.broadcast_to(costs.sizes, unit.shape).ravel()
  if constraint != "none":
    cost = np.stack([np.bincount(unit.ravel(), weights=column) for column in cost.T], axis=1)
    sizes = np.bincount(unit.ravel(), weights=sizes).astype(np.int64)
  return constraints.Tied(np.minimum.accumulate(cost, axis=1), sizes, unit)


def plan(costs: channels.BlockCosts, average: float, constraint: str = "none", *, method: str | None = None,
         solver: str = "auto") -> channels.BlockPlan:
  """The plan of least total cost, with its certificate.

  Args:
    costs: of every unit.
    average: nominal bits per weight that may be spent.
    constraint: one of `CONSTRAINTS`.
    method: the plan's name; by default `knapsack(SCORE)`.
    solver: of `knapsack.METHODS`.

  Raises:
    ValueError: an impossible budget, an unknown constraint, or a cost that is not finite.
  """
  problem.check_budget(average, costs.widths)
  tied = tie(costs, constraint)
  solution = knapsack.solve(*problem.build(tied, costs.widths, average), solver)
  bits = np.array(costs.widths, np.int64)[solution.choice][tied.unit]
  return as_plan(costs, bits, method or f"knapsack({costs.score})", average, predicted=solution.value,
                 lower_bound=solution.bound, constraint=constraint)


def restricted(costs: channels.BlockCosts, widths: Sequence[int]) -> channels.BlockCosts:
  """The costs at some of their widths only; errors as of `constraints.restricted`."""
  wanted = constraints.chosen(costs.widths, widths)
  return dataclasses.replace(costs, cost=costs.cost[..., [costs.widths.index(w) for w in wanted]], widths=wanted)


def as_plan(costs: channels.BlockCosts, bits: np.ndarray, method: str, average: float,
            **promised: float | str | None) -> channels.BlockPlan:
  """A plan for the units of `costs`."""
  shared = ("projections", "projection", "sizes", "axis", "block", "down_block", "order")
  same = {name: getattr(costs, name) for name in shared}
  return channels.BlockPlan(bits, method, average, **same, **promised)


# ---------------------------------------------------------------------------------------------------------------------
# Neurons in order, and in blocks
# ---------------------------------------------------------------------------------------------------------------------


def order(costs: channels.BlockCosts) -> np.ndarray:
  """Neurons of every expert from the dearest to the cheapest, `[L, E, F]` int32: by what their units cost at the least
  width, over the projections that they have units in.

  Raises:
    ValueError: units that are not single neurons.
  """
  _check_rows(costs)
  dear = sum(costs.cost[..., costs.part(name), 0] for name in _with_neurons(costs))
  return np.argsort(-dear, axis=2, kind="stable").astype(np.int32)


def ordered(costs: channels.BlockCosts, neurons: np.ndarray) -> channels.BlockCosts:
  """The same costs with the neurons of every expert in another order, `neurons` `[L, E, F]`.

  Raises:
    ValueError: units that are not single neurons, or are ordered already, or an order that is no permutation.
  """
  _check_rows(costs)
  if costs.order is not None or (np.sort(neurons, axis=-1) != np.arange(neurons.shape[-1])).any():
    raise ValueError("neurons are put in order once, by a permutation of each expert's")
  cost = costs.cost.copy()
  for name in _with_neurons(costs):
    cost[..., costs.part(name), :] = np.take_along_axis(cost[..., costs.part(name), :], neurons[..., None], axis=2)
  return dataclasses.replace(costs, cost=cost, order=np.asarray(neurons, np.int32))


def merged(costs: channels.BlockCosts, block: int, down_block: int | None = None) -> channels.BlockCosts:
  """The costs of blocks of `block` neighbouring channels, of `down_block` in down where that is another number; where a
  projection's channels do not divide, its last block has fewer.

  Raises:
    ValueError: a block that the units of the table do not add up to.
  """
  down_block = block if down_block is None else down_block
  for wanted, held in ((block, costs.block), (down_block, costs.down_block)):
    if wanted < 1 or wanted % held:
      raise ValueError(f"blocks of {wanted} channels cannot be made of units of {held}; take a multiple")
  ends = np.searchsorted(costs.projection, np.arange(len(costs.projections) + 1))
  steps = [down_block // costs.down_block if name == "down" else block // costs.block for name in costs.projections]
  starts = np.concatenate([np.arange(*pair, step) for *pair, step in zip(ends, ends[1:], steps)])
  return dataclasses.replace(
      costs, cost=np.add.reduceat(costs.cost, starts, axis=2), projection=costs.projection[starts],
      sizes=np.add.reduceat(costs.sizes, starts), block=block, down_block=down_block)


def _with_neurons(costs: channels.BlockCosts) -> list[str]:
  return [name for name in costs.projections if costs.axis == "neurons" or name != "down"]


def _check_rows(costs: channels.BlockCosts) -> None:
  if (costs.block, costs.down_block) != (1, 1):
    raise ValueError("neurons are put in order before they are merged into blocks, not in blocks of"
                     f" {costs.block} and {costs.down_block}")
