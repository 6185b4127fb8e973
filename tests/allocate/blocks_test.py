"""Rows, blocks, projections and experts by one call: nested sets, constraints against brute force, neurons in order."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax import artifacts, channels
from moeq_jax.allocate import blocks, problem

LOOSER = [("none", "gate_equals_up"), ("none", "projection"), ("gate_equals_up", "expert"), ("projection", "expert"),
          ("projection", "per_layer_projection"), ("expert", "per_layer"), ("per_layer_projection", "per_layer")]


def costs(seed: int, neurons: int = 8, layers: int = 2, experts: int = 2, hidden: int = 3, widths=(1, 2, 3, 4),
          names=artifacts.PROJECTIONS, axis: str = "neurons", noise: float = 0.3) -> channels.BlockCosts:
  random = np.random.default_rng(seed)
  counts = [hidden if name == "down" and axis == "outputs" else neurons for name in names]
  projection, sizes = channels.units([(count, neurons + hidden - count if count != neurons else hidden)
                                      for count in counts])
  scale = np.exp(random.normal(0, 1.5, (layers, experts, len(projection), 1))) * sizes[:, None]
  scale = scale * np.exp(random.normal(0, 1, (layers, experts, 1, 1)))
  cost = scale * 4.0 ** -np.array(widths) * np.exp(random.normal(0, noise, (*scale.shape[:3], len(widths))))
  return channels.BlockCosts(cost, widths, "s", "nats", names, projection, sizes, axis)


def check(plan: channels.BlockPlan, table: channels.BlockCosts, average: float) -> channels.BlockPlan:
  assert plan.bits.shape == table.cost.shape[:3] and set(np.unique(plan.bits)) <= set(table.widths)
  assert plan.average_bits() <= average + 1e-12 and plan.lower_bound <= plan.predicted
  index = np.searchsorted(table.widths, plan.bits)[..., None]
  assert np.take_along_axis(table.cost, index, 3).sum() <= plan.predicted * (1 + 1e-12)
  return plan


# ---------------------------------------------------------------------------------------------------------------------
# Nested sets of units
# ---------------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.integers(0, 10**6), st.floats(1, 4), st.sampled_from(["exact", "lagrangian"]),
                  st.sampled_from([0.0, 0.5, 2.0]))
def test_a_finer_set_s_bound_is_at_most_the_coarser_set_s_value(seed: int, average: float, solver: str, noise: float):
  """Expert, projection, block x projection, row x projection, at equal nominal bits; truly nested."""
  rows = costs(seed, noise=noise)
  finer = [blocks.plan(rows, average, "none", solver=solver)]
  finer += [blocks.plan(blocks.merged(rows, size), average, "none", solver=solver) for size in (2, 4, 8)]
  finer += [blocks.plan(rows, average, constraint, solver=solver) for constraint in ("projection", "expert")]
  values, bounds = np.array([plan.predicted for plan in finer]), np.array([plan.lower_bound for plan in finer])
  for fine, coarse in itertools.combinations(range(len(finer)), 2):
    assert bounds[fine] <= values[coarse]
  if solver == "exact":
    assert (values[:-1] <= values[1:] * (1 + 1e-9)).all()
  assert finer[3].predicted == pytest.approx(finer[4].predicted, rel=1e-9) or solver == "lagrangian"  # all 8 neurons


@pytest.mark.parametrize(("loose", "tight"), LOOSER)
def test_a_looser_constraint_is_never_dearer(loose: str, tight: str):
  for seed in range(3):
    table = costs(seed)
    for average in (1.3, 2.5, 3.4):
      plans = [check(blocks.plan(table, average, constraint), table, average) for constraint in (loose, tight)]
      assert plans[0].lower_bound <= plans[0].predicted <= plans[1].predicted * (1 + 1e-12)


@pytest.mark.parametrize("constraint", blocks.CONSTRAINTS)
def test_constraints_equal_brute_force(constraint: str):
  table = costs(1, neurons=2, layers=1, experts=2, names=("gate", "up", "down"), widths=(1, 3), noise=1.5)
  unit = blocks.units(table, constraint)
  cells = np.array(list(itertools.product((0, 1), repeat=unit.size))).reshape(-1, *unit.shape)
  kept = np.ones(len(cells), bool)
  for number in range(unit.max() + 1):
    own = cells[:, unit == number]
    kept &= (own == own[:, :1]).all(axis=1)
  many = np.broadcast_to(table.cost, (len(cells), *table.cost.shape))
  price = np.take_along_axis(many, cells[..., None], 4).sum((1, 2, 3, 4))
  used = ((1 + 2 * cells) * table.sizes).sum((1, 2, 3))
  for average in (1.2, 1.9, 2.6):
    budget = problem.budget_bits(average, np.broadcast_to(table.sizes, unit.shape))
    found = check(blocks.plan(table, average, constraint), table, average)
    assert found.predicted == pytest.approx(price[kept & (used <= budget)].min(), rel=1e-12)
    assert found.constraint == constraint


def test_units_that_share_a_width():
  table = costs(0, neurons=2, layers=1, experts=2)
  number = {constraint: blocks.units(table, constraint).tolist() for constraint in blocks.CONSTRAINTS}
  assert number["none"] == [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]]
  assert number["gate_equals_up"] == [[[0, 1, 0, 1, 2, 3], [4, 5, 4, 5, 6, 7]]]
  assert number["projection"] == [[[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]]
  assert number["expert"] == [[[0] * 6, [1] * 6]]
  assert number["per_layer_projection"] == [[[0, 0, 1, 1, 2, 2]] * 2]
  assert number["per_layer"] == [[[0] * 6] * 2]
  assert len(np.unique(blocks.units(costs(0, names=("up", "down")), "gate_equals_up"))) == 4 * 16


def test_whole_experts_get_the_plan_that_they_always_got():
  table = costs(3)
  starts = np.searchsorted(table.projection, np.arange(3))
  whole = artifacts.CostTable(np.add.reduceat(table.cost, starts, axis=2), table.widths, table.score, table.units,
                              table.projections, tuple(np.add.reduceat(table.sizes, starts).tolist()))
  for constraint, name in (("expert", "expert"), ("none", "projection"), ("per_layer", "per_layer")):
    old, new = problem.plan(whole, 2.5, constraint), blocks.plan(table, 2.5, name)
    assert new.predicted == pytest.approx(old.predicted, rel=1e-12)
    for place, part in enumerate(new.by_projection().values()):
      np.testing.assert_array_equal(part, np.repeat(old.by_projection(3)[..., place, None], part.shape[-1], axis=2))


# ---------------------------------------------------------------------------------------------------------------------
# Neurons
# ---------------------------------------------------------------------------------------------------------------------


def test_neurons_are_ordered_once_and_together():
  table = costs(5)
  neurons = blocks.order(table)
  ready = blocks.ordered(table, neurons)
  total = sum(ready.cost[..., ready.part(name), 0] for name in table.projections)
  assert (np.diff(total, axis=-1) <= 0).all() and ready.order.dtype == np.int32
  for name in table.projections:  # the same neuron stands at the same place in all projections
    for place in np.ndindex(2, 2):
      plain = table.cost[place][table.part(name)]
      np.testing.assert_array_equal(ready.cost[place][ready.part(name)], plain[neurons[place]])
  assert blocks.plan(ready, 2.2).predicted == pytest.approx(blocks.plan(table, 2.2).predicted, rel=1e-12)
  assert blocks.plan(blocks.merged(ready, 4), 2.2).order is ready.order
  with pytest.raises(ValueError, match="put in order once"):
    blocks.ordered(ready, neurons)
  with pytest.raises(ValueError, match="before they are merged"):
    blocks.order(blocks.merged(table, 2))


def test_order_makes_blocks_better():
  """Not a theorem for every table, but for rows of very unequal cost: it is what the order is for."""
  better = 0
  for seed in range(5):
    table = costs(seed, neurons=64)
    plain = blocks.plan(blocks.merged(table, 16), 2.0).predicted
    better += blocks.plan(blocks.merged(blocks.ordered(table, blocks.order(table)), 16), 2.0).predicted < plain
  assert better == 5


def test_outputs_of_down_stay_where_they_are():
  table = costs(2, neurons=8, hidden=3, axis="outputs")
  np.testing.assert_array_equal(np.bincount(table.projection), [8, 8, 3])
  ready = blocks.ordered(table, blocks.order(table))
  np.testing.assert_array_equal(ready.cost[..., ready.part("down"), :], table.cost[..., table.part("down"), :])


def test_blocks_that_do_not_divide_end_in_a_smaller_one():
  table = costs(0, neurons=10)
  made = blocks.merged(table, 4)
  assert made.sizes.tolist() == [12, 12, 6] * 3 and made.block == 4
  np.testing.assert_allclose(made.cost.sum(2), table.cost.sum(2))
  np.testing.assert_allclose(made.cost[..., 2, :], table.cost[..., 8:10, :].sum(2))
  np.testing.assert_allclose(blocks.merged(blocks.merged(table, 2), 4).cost, made.cost)
  coarser = blocks.merged(table, 2, down_block=5)  # blocks of down are whole scale groups
  assert np.bincount(coarser.projection).tolist() == [5, 5, 2] and (coarser.block, coarser.down_block) == (2, 5)
  np.testing.assert_allclose(coarser.cost[..., -1, :], table.cost[..., -5:, :].sum(2))
  for block in (0, 6):
    with pytest.raises(ValueError, match="take a multiple"):
      blocks.merged(made, block)


def test_bits_of_the_order_are_counted():
  table = costs(0, neurons=8, hidden=3)
  ready = blocks.ordered(table, blocks.order(table))
  assert blocks.plan(table, 2.5).permutation_bits() == 0
  assert blocks.plan(ready, 2.5).permutation_bits() == 8 * 16 / (3 * 8 * 3)


def test_a_plan_is_kept_and_opened_again(tmp_path):
  table = costs(0)
  plan = blocks.plan(blocks.merged(blocks.ordered(table, blocks.order(table)), 2), 2.5)
  plan.save(tmp_path / "plan.npz")
  opened = channels.BlockPlan.load(tmp_path / "plan.npz")
  assert artifacts.digest_of(opened) == artifacts.digest_of(plan)
  shapes = {name: part.shape for name, part in opened.by_projection().items()}
  assert shapes == dict.fromkeys(table.projections, (2, 2, 4))


def test_bad_input_is_named():
  table = costs(0)
  with pytest.raises(ValueError, match="unknown constraint 'experts'; did you mean 'expert'"):
    blocks.plan(table, 2.5, "experts")
  for average in (0.9, 4.1):
    with pytest.raises(ValueError, match="possible range"):
      blocks.plan(table, average)
  for value in (np.nan, np.inf):
    cost = table.cost.copy()
    cost[1, 0, 9, 2] = value
    with pytest.raises(ValueError, match=r"unit 9 \(up\) of layer 1, expert 0 at 3 bits"):
      blocks.plan(dataclasses.replace(table, cost=cost), 2.5)
