"""Budgets, cost tables and plans."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax import artifacts
from moeq_jax.allocate import constraints, knapsack, problem

WIDTHS = (1, 2, 3, 4)


def table(layers: int = 3, experts: int = 4, widths=WIDTHS, seed: int = 0, sizes=(5, 5, 7)) -> artifacts.CostTable:
  random = np.random.default_rng(seed)
  cost = np.exp(random.normal(0, 1.5, (layers, experts, len(sizes), 1))) * 4.0 ** -np.array(widths)
  return artifacts.CostTable(cost, widths, "weight_mse", "arbitrary", artifacts.PROJECTIONS[-len(sizes):], sizes)


@pytest.mark.parametrize("average, total, bits", [
    (2.5, 10, 25), (2.3, 10, 23), (0.29, 100, 29), (1.1, 30, 33), (2.3333, 3, 6), (2.9999, 1, 2), (3, 7, 21),
    (2.5, 45_097_156_608, 112_742_891_520)])
def test_a_budget_is_the_decimal_number_that_was_written(average, total, bits):
  assert problem.budget_bits(average, np.array([total])) == bits


def test_the_instance_holds_bits_of_whole_units():
  costs = table(1, 2, sizes=(4, 4, 3))
  instance = problem.build(constraints.tie(costs, "gate_equals_up"), WIDTHS, 2.5)
  np.testing.assert_allclose(instance.cost, [costs.cost[0, 0, :2].sum(0), costs.cost[0, 0, 2],
                                             costs.cost[0, 1, :2].sum(0), costs.cost[0, 1, 2]])
  np.testing.assert_array_equal(instance.weight, [[8, 16, 24, 32], [3, 6, 9, 12]] * 2)
  assert instance.weight.dtype == np.int64 and instance.budget == 55


def test_a_plan_can_be_kept(tmp_path):
  plan = problem.plan(table(), 2.25, method="knapsack(mine)")
  plan.save(tmp_path / "plan.npz", "key")
  loaded = artifacts.Plan.load(tmp_path / "plan.npz", "key")
  np.testing.assert_array_equal(loaded.bits, plan.bits)
  assert (loaded.method, loaded.budget, loaded.predicted, loaded.lower_bound) == (
    "knapsack(mine)", 2.25, plan.predicted, plan.lower_bound)


def test_the_plan_spends_on_the_units_that_cost_most():
  cost = np.array([[8.0, 0.5], [1.0, 0.9], [6.0, 0.1], [2.0, 1.8]]).reshape(2, 2, 1, 2)
  costs = artifacts.CostTable(cost, (2, 4), "s", "nats", ("up",), (1,))
  np.testing.assert_array_equal(problem.plan(costs, 3.0).bits, [[4, 2], [4, 2]])


def test_predicted_refuses_other_widths():
  with pytest.raises(ValueError, match=r"not \[8\]"):
    problem.predicted(table(1, 2), np.array([[2, 8]]))


def test_average_bits_weighs_by_size():
  assert problem.average_bits(np.array([[1, 4]]), np.array([3, 1])) == 1.75
  assert problem.average_bits(np.array([[1, 4]])) == 2.5


# ---------------------------------------------------------------------------------------------------------------------
# Uniform and random
# ---------------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.floats(1, 4), st.integers(0, 10**6), st.booleans())
def test_uniform_mixes_two_neighbours_and_spends_what_it_can(average, seed, equal):
  sizes = np.ones(40, np.int64) if equal else np.random.default_rng(seed).integers(1, 20, 40)
  bits = problem.uniform(average, WIDTHS, (5, 8), seed=[seed, 1], sizes=sizes)
  assert bits.shape == (5, 8) and bits.dtype == np.int64
  assert set(bits.ravel()) <= {math.floor(average), math.ceil(average)}
  left = problem.budget_bits(average, sizes) - int(bits.ravel() @ sizes)
  low = bits.ravel() == math.floor(average)
  assert 0 <= left and (average == math.floor(average) or not low.any() or left < sizes[low].min())


@pytest.mark.parametrize("width", WIDTHS)
def test_uniform_at_a_width_is_that_width(width):
  np.testing.assert_array_equal(problem.uniform(width, WIDTHS, (3, 4), seed=0), np.full((3, 4), width))


def test_uniform_draws_differ_and_repeat():
  draws = [problem.uniform(2.5, (1, 2, 4), (6, 16), seed=[0, draw]) for draw in range(5)]
  for a, b in itertools.combinations(draws, 2):
    assert (a != b).any()
  for draw, bits in enumerate(draws):
    np.testing.assert_array_equal(bits, problem.uniform(2.5, (1, 2, 4), (6, 16), seed=[0, draw]))
    assert bits.mean() == 2.5 and set(bits.ravel()) == {2, 4}
  generator = np.random.default_rng([0, 1])
  np.testing.assert_array_equal(problem.uniform(2.5, (1, 2, 4), (6, 16), seed=generator), draws[1])


def test_random_tiers_keep_the_counts_of_every_layer():
  bits = problem.random_tiers(20, 8, {1: 3, 2: 4, 3: 1}, seed=7)
  assert bits.shape == (20, 8)
  for layer in bits:
    assert np.bincount(layer, minlength=4).tolist() == [0, 3, 4, 1]
  assert len({tuple(layer) for layer in bits.tolist()}) > 10
  np.testing.assert_array_equal(bits, problem.random_tiers(20, 8, {1: 3, 2: 4, 3: 1}, seed=7))
  assert (bits != problem.random_tiers(20, 8, {1: 3, 2: 4, 3: 1}, seed=8)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda average, widths: problem.plan(table(widths=widths), average),
    lambda average, widths: problem.uniform(average, widths, (3, 4), seed=0)])
def test_impossible_budgets_state_the_range_and_the_remedy(make):
  with pytest.raises(ValueError, match=r"4.5 bits per weight is out of the possible range \[1, 4\].*larger width"):
    make(4.5, WIDTHS)
  with pytest.raises(ValueError, match=r"no solution at 1.5 bits.*\[3, 4\].*add a width of at most 1.5"):
    make(1.5, (3, 4))
  with pytest.raises(ValueError, match=r"no solution at -1 bits.*raise the budget$"):
    make(-1, (3, 4))
  with pytest.raises(ValueError, match="out of the possible range"):
    make(math.nan, WIDTHS)
  for widths in ((), (2, 2), (3, 2)):
    with pytest.raises(ValueError, match="ascending"):
      make(2.0, widths)


def test_a_bad_cost_is_named():
  costs = table()
  costs.cost[1, 3, 2, 2] = np.nan
  with pytest.raises(ValueError, match="weight_mse: down of layer 1, expert 3 at 3 bits costs nan"):
    problem.plan(costs, 2.5)


def test_sizes_must_fit():
  with pytest.raises(ValueError, match="3 sizes for 12 units"):
    problem.uniform(2.5, WIDTHS, (3, 4), 0, sizes=np.ones(3, np.int64))
  with pytest.raises(ValueError, match="positive integers"):
    problem.plan(table(sizes=(0,)), 2.5)
  with pytest.raises(ValueError, match="positive integers"):
    problem.average_bits(np.ones(2, int), 1.5)


def test_the_instance_is_what_the_knapsack_takes():
  instance = problem.build(constraints.tie(table(), "expert"), WIDTHS, 1.0)
  assert knapsack.solve(*instance).choice.tolist() == [0] * 12
