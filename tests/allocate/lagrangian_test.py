"""The Lagrangian method: bound <= optimum <= value on everything small, and a small gap on what is large."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax.allocate import knapsack, lagrangian
from tests.allocate import knapsack_test


def solved(cost, weight, budget) -> knapsack.Solution:
  """The solution, checked for what always holds; weights are integers."""
  found = knapsack.solve(cost, weight, budget, "lagrangian")
  knapsack_test.check(np.asarray(cost), np.asarray(weight), budget, found)
  assert found.method == "lagrangian" and math.isfinite(found.bound)
  return found


# ---------------------------------------------------------------------------------------------------------------------
# Against the optimum
# ---------------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(knapsack_test.small_instances())
def test_the_optimum_is_between_bound_and_value(problem):
  cost, weight, budget = problem
  found, optimum = solved(*problem), knapsack_test.brute_force(cost, weight, budget)
  rounding = 1e-15 * np.abs(cost).max(axis=1).sum()  # of the sum that brute force makes, not of ours
  assert found.bound <= optimum + rounding and optimum <= found.value + rounding
  assert found.value == pytest.approx(optimum, rel=0, abs=1e3 * rounding)  # all units fit into the repair


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 10**6), st.floats(1, 4), st.sampled_from([(1,), (2, 2, 7), (1,) * 19 + (40,)]),
                  st.sampled_from([0.0, 0.3, 2.0]))
def test_the_exact_optimum_is_between_bound_and_value(seed: int, average: float, sizes, noise: float):
  problem = knapsack_test.instance(700, average=average, sizes=sizes, seed=seed, noise=noise)
  found, exact = solved(*problem), knapsack.solve(*problem, "exact")
  assert found.bound <= exact.value <= found.value
  assert exact.bound <= found.value


@pytest.mark.parametrize("average", [1.3, 2.5, 3.7])
def test_equals_highs_where_the_repair_sees_every_unit(average: float):
  problem = knapsack_test.instance(120, average=average, sizes=(2, 2, 7), seed=1)
  assert solved(*problem).value == pytest.approx(knapsack_test.highs(*problem), rel=1e-9)


def test_the_repair_alone_uses_the_rest_of_the_budget(monkeypatch):
  """Choices above the lower convex hull, which no price selects, fill what the base solution leaves."""
  cost, weight = np.tile([7.0, 6.5, 0.0], (100, 1)), np.tile([0, 1, 7], (100, 1))
  found = solved(cost, weight, 353)
  assert np.bincount(found.choice).tolist() == [47, 3, 50]
  monkeypatch.setattr(lagrangian, "_repaired", lambda cost, weight, choice, *rest: choice)
  assert solved(cost, weight, 353).value == found.value + 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Many units
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sizes", "equal costs", "few costs", "nearly equal", "rising costs", "wide range",
                                  "negative costs"])
def test_many_units(kind: str):
  """More than one slab, so that sampling, narrowing and joining are at work; the gap is that of one unit's step."""
  units, random = 3 * lagrangian.SLAB + 1000, np.random.default_rng(0)
  cost, weight, budget = knapsack_test.instance(units, sizes=(4096,) * 7 + (14336,), seed=2)
  if kind == "equal costs":
    cost = np.tile(cost[:1], (units, 1))
  elif kind == "few costs":
    cost = cost[random.integers(0, 5, units)]
  elif kind == "nearly equal":
    cost = cost[:1] * (1 + 1e-9 * random.random((units, 1)))
  elif kind == "rising costs":
    cost = np.sort(random.random((units, 4)), axis=1)
    cost[::2] = cost[::2, ::-1]
  elif kind == "wide range":
    cost = cost * np.exp(random.normal(0, 60, (units, 1)))
  elif kind == "negative costs":
    cost = cost - 100
  found = solved(cost, weight, budget)
  assert found.gap <= 1e-5
  if kind != "rising costs":  # there, half of the units take their lightest choice at any price
    assert budget - weight[np.arange(units), found.choice].sum() < 4 * 14336


def test_budgets_at_the_ends():
  cost, weight, _ = knapsack_test.instance(2 * lagrangian.SLAB, noise=0.0)
  for budget, choice in ((int(weight[:, 0].sum()), 0), (int(weight[:, 3].sum()), 3), (10**9, 3)):
    found = solved(cost, weight, budget)
    assert (found.choice == choice).all() and found.gap <= 1e-9


def test_equal_inputs_give_equal_outputs_and_units_may_come_in_any_order():
  problem = knapsack_test.instance(2 * lagrangian.SLAB, seed=5)
  first, second = solved(*problem), solved(*problem)
  np.testing.assert_array_equal(first.choice, second.choice)
  order = np.random.default_rng(0).permutation(len(problem[0]))
  shuffled = solved(problem[0][order], problem[1][order], problem[2])
  assert shuffled.value == pytest.approx(first.value, rel=1e-7)
  assert shuffled.bound <= first.value and first.bound <= shuffled.value


def test_scaling_by_a_power_of_two_changes_nothing():
  cost, weight, budget = knapsack_test.instance(5000, sizes=(2, 2, 7))
  plain = solved(cost, weight, budget)
  for power in (-900, 900):
    scaled = solved(np.ldexp(cost, power), weight, budget)
    np.testing.assert_array_equal(scaled.choice, plain.choice)
    assert math.ldexp(scaled.bound, -power) == pytest.approx(plain.bound, rel=1e-15)


def test_a_bound_that_is_rounded_inward_would_be_found_out():
  """Every unit at its cheapest choice: the bound's sum and the value are the same numbers in another order."""
  random = np.random.default_rng(0)
  cost = random.random((lagrangian.SLAB + 17, 3)) * 10.0 ** random.integers(-12, 12, (lagrangian.SLAB + 17, 1))
  found = solved(cost, np.zeros(cost.shape, np.int64), 0)
  assert found.value == math.fsum(cost.min(axis=1).tolist())
  assert 0 < found.value - found.bound <= 1e-9 * found.value


# ---------------------------------------------------------------------------------------------------------------------
# One call
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_chooses_by_size(monkeypatch):
  problem = knapsack_test.instance(300)
  assert knapsack.solve(*problem).method == "exact"
  monkeypatch.setattr(knapsack, "EXACT_UNITS", 299)
  assert knapsack.solve(*problem).method == "lagrangian"
  assert knapsack.solve(*problem, "exact").method == "exact"


def test_real_weights_that_are_multiples_of_a_power_of_two():
  cost, weight, budget = knapsack_test.instance(200)
  found = knapsack.solve(cost, weight * 2.25, budget * 2.25, "lagrangian")
  assert found.value == knapsack.solve(cost, weight, budget, "lagrangian").value


@pytest.mark.parametrize("change, said", [
    (dict(cost=np.nan), "cost of unit 3, choice 1"), (dict(cost=np.inf), "cost of unit 3, choice 1"),
    (dict(cost=-np.inf), "cost of unit 3, choice 1"), (dict(budget=9), "no solution: the budget 9 is below 10"),
    (dict(budget=math.nan), "budget is nan"), (dict(method="simplex"), "unknown method 'simplex'"),
    (dict(weight=0.1), "needs weights that are integers")])
def test_bad_input_is_named(change: dict, said: str):
  cost, weight, method = np.ones((10, 2)), np.tile([1, 2], (10, 1)), change.get("method", "lagrangian")
  if "cost" in change:
    cost[3, 1] = change["cost"]
  if "weight" in change:
    weight = weight * change["weight"] + 0.01 / 3
  with pytest.raises(ValueError, match=said):
    knapsack.solve(cost, weight, change.get("budget", 15), method)
