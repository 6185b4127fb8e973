"""The knapsack against brute force, a plain dynamic program over the budget, and HiGHS."""

import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import optimize, sparse

from moeq_jax.allocate import knapsack, search


def check(cost, weight, budget, solution: knapsack.Solution) -> None:
  """Feasible, consistent, and bounded from below by something that is not above the value."""
  units = np.arange(len(cost))
  assert solution.choice.shape == (len(cost),) and solution.choice.dtype == np.int64
  assert math.fsum(np.asarray(weight)[units, solution.choice].tolist()) <= budget
  assert solution.value == math.fsum(np.asarray(cost, np.float64)[units, solution.choice])
  assert solution.bound <= solution.value


def brute_force(cost, weight, budget) -> float:
  """The optimum of a small instance."""
  units = np.arange(len(cost))
  choices = np.array(list(itertools.product(range(cost.shape[1]), repeat=len(cost))))
  used = weight[units, choices].sum(axis=1)
  return cost[units, choices].sum(axis=1)[used <= budget].min()


def plain_program(cost, weight, budget: int) -> float:
  """The optimum by a table over the whole budget; small non-negative integer weights."""
  best = np.zeros(budget + 1)
  for costs, weights in zip(cost, weight, strict=True):
    rows = [np.r_[np.full(min(w, budget + 1), np.inf), best[: max(0, budget + 1 - w)] + c]
            for c, w in zip(costs, weights.tolist(), strict=True)]
    best = np.min(rows, axis=0)
  return best[-1]


def highs(cost, weight, budget) -> float:
  """The optimum by HiGHS, whose absolute gap of 1e-6 must be small beside the costs."""
  units, choices = cost.shape
  rows = sparse.vstack([sparse.csr_array(weight.reshape(1, -1).astype(float)),
                        sparse.kron(sparse.eye_array(units), np.ones((1, choices)))])
  limits = optimize.LinearConstraint(rows, np.r_[-np.inf, np.ones(units)], np.r_[float(budget), np.ones(units)])
  found = optimize.milp(cost.reshape(-1), constraints=limits, integrality=np.ones(cost.size), bounds=(0, 1),
                        options={"mip_rel_gap": 0.0})
  assert found.status == 0
  return cost[np.arange(units), found.x.reshape(units, choices).argmax(axis=1)].sum()


def instance(units: int, widths=(1, 2, 3, 4), average=2.5, sizes=(1,), seed=0, noise=0.3):
  """Costs like those of quantized experts, `(cost, weight, budget)`, of about 100 per unit."""
  random = np.random.default_rng(seed)
  sizes, widths = np.resize(np.array(sizes, np.int64), units), np.array(widths)
  scale = 1000 * np.exp(random.normal(0, 1.5, units)) * sizes / sizes.mean()
  cost = scale[:, None] * 4.0**-widths[None] * np.exp(random.normal(0, noise, (units, len(widths))))
  return cost, sizes[:, None] * widths[None], math.floor(average * int(sizes.sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def small_instances(draw):
  units, choices = draw(st.integers(1, 5)), draw(st.integers(1, 5))
  costs = draw(st.sampled_from([st.integers(0, 3), st.floats(-1e3, 1e3), st.floats(0, 1e-6), st.integers(-5, 10**9)]))
  weights = draw(st.sampled_from([st.integers(0, 4), st.integers(-3, 50), st.integers(0, 10**12)]))
  table = lambda values: [[draw(values) for _ in range(choices)] for _ in range(units)]
  cost, weight = np.array(table(costs), np.float64), np.array(table(weights), np.int64)
  least, most = int(weight.min(axis=1).sum()), int(weight.max(axis=1).sum())
  return cost, weight, draw(st.integers(least, most + 1))


@hypothesis.settings(max_examples=120)
@hypothesis.given(small_instances())
def test_equals_brute_force(problem):
  cost, weight, budget = problem
  solution = knapsack.solve(cost, weight, budget)
  check(cost, weight, budget, solution)
  optimum, scale = brute_force(cost, weight, budget), 1e-12 * np.abs(cost).max(axis=1).sum()
  assert solution.value == pytest.approx(optimum, rel=0, abs=scale)
  assert solution.bound == pytest.approx(optimum, rel=0, abs=10 * scale + 1e-300)


@pytest.mark.parametrize("sizes", [(1,), (2, 2, 7), (3, 50, 4096), tuple(range(1001, 1401, 7)), (1,) * 19 + (40,)])
@pytest.mark.parametrize("widths, average", [
    ((1, 2, 3, 4), 2.5), ((1, 2, 4, 8), 1.3), ((2, 3), 2.71), ((0, 1, 3), 2.0)])
def test_equals_highs(sizes, widths, average):
  for units, seed in ((60, 0), (120, 1)):
    problem = instance(units, widths, average, sizes, seed)
    solution = knapsack.solve(*problem)
    check(*problem, solution)
    assert solution.value == pytest.approx(highs(*problem), rel=1e-9)
    assert solution.value - solution.bound <= 1e-11 * solution.value


@pytest.mark.parametrize("average", [1.01, 1.5, 2.0, 2.5, 3.99])
def test_many_units_are_proven_optimal(average):
  problem = instance(12288, average=average, seed=3)
  solution = knapsack.solve(*problem)
  check(*problem, solution)
  assert solution.value - solution.bound <= 1e-11 * solution.value


def test_costs_need_not_fall_with_the_weight():
  random = np.random.default_rng(0)
  cost, weight = random.uniform(1, 1000, (120, 6)), random.integers(0, 30, (120, 6))
  for budget in (weight.min(axis=1).sum(), 900, 1400, 2200):
    solution = knapsack.solve(cost, weight, int(budget))
    check(cost, weight, budget, solution)
    assert solution.value == pytest.approx(plain_program(cost, weight, int(budget)), rel=1e-12)


@pytest.mark.parametrize("costs", [
    [1.0, 0.9, 0.2, 0.1], [1.0, 1.0, 0.25, 0.25], [1.0, 0.5, 0.0, 0.0], [8.0, 4.0, 2.0, 1.0]])
def test_equal_units(costs):
  cost, weight = np.tile(costs, (300, 1)), np.tile([1, 2, 4, 7], (300, 1))
  for budget in range(900, 907):
    solution = knapsack.solve(cost, weight, budget)
    check(cost, weight, budget, solution)
    assert solution.value == pytest.approx(plain_program(cost, weight, budget), rel=1e-12)


def test_equal_units_of_which_many_must_change():
  """Whole steps of 7 leave a slack of up to 6, which as many units fill by a step of 1."""
  cost, weight = np.tile([7.0, 6.5, 0.0], (100, 1)), np.tile([0, 1, 7], (100, 1))
  for slack in range(7):
    solution = knapsack.solve(cost, weight, 350 + slack)
    assert np.bincount(solution.choice).tolist() == [50 - slack, slack, 50]
    assert solution.value == pytest.approx(plain_program(cost, weight, 350 + slack), rel=1e-12)


def test_units_that_all_tie_at_one_price():
  sizes = np.random.default_rng(1).integers(100, 1000, 60)
  cost, weight = sizes[:, None] * np.array([8.0, 4.0, 2.0, 1.0]), sizes[:, None] * np.arange(1, 5)
  for average in (1.7, 2.5, 3.1):
    budget = int(average * sizes.sum())
    solution = knapsack.solve(cost, weight, budget)
    check(cost, weight, budget, solution)
    assert solution.value == pytest.approx(plain_program(cost, weight, budget), rel=1e-12)


def test_widening_a_core_and_list_that_are_too_narrow_leads_to_the_optimum(monkeypatch):
  monkeypatch.setattr(search, "_FIRST_UNITS", 16)
  monkeypatch.setattr(search, "_FIRST_STATES", 4)
  for seed in range(6):
    problem = instance(80, sizes=(5, 8, 13, 31), seed=seed, noise=1.0)
    solution = knapsack.solve(*problem)
    check(*problem, solution)
    assert solution.value == pytest.approx(plain_program(*problem), rel=1e-12)
    assert solution.bound == pytest.approx(solution.value, rel=1e-11)


def test_more_budget_never_costs_more():
  for sizes in ((1,), (2, 2, 7)):
    cost, weight, _ = instance(40, sizes=sizes, seed=5, noise=1.0)
    budgets = np.arange(weight.min(axis=1).sum(), weight.max(axis=1).sum() + 1, max(sizes) // 2 or 1)
    values = [knapsack.solve(cost, weight, budget).value for budget in budgets]
    assert all(b <= a for a, b in itertools.pairwise(values))
    assert values[0] > values[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------------------------------


def test_one_unit():
  cost, weight = np.array([[5.0, 3.0, 1.0]]), np.array([[1, 4, 9]])
  assert [knapsack.solve(cost, weight, b).choice.item() for b in (1, 3, 4, 8, 9, 100)] == [0, 0, 1, 1, 2, 2]
  assert knapsack.solve(cost[:, :1], weight[:, :1], 1) == knapsack.Solution(
    pytest.approx(np.zeros(1)), 5.0, math.nextafter(5.0, 0))


def test_the_least_budget_takes_the_lightest_choices_and_of_those_the_cheapest():
  cost, weight = np.array([[1.0, 9.0, 7.0], [4.0, 5.0, 0.0]]), np.array([[3, 2, 2], [1, 1, 5]])
  solution = knapsack.solve(cost, weight, 3)
  assert solution.choice.tolist() == [2, 0] and solution.value == 11.0
  assert solution.bound == pytest.approx(11.0)


def test_a_budget_for_everything_takes_the_cheapest_choices_and_of_those_the_lightest():
  cost, weight = np.array([[3.0, 1.0, 1.0], [0.0, 0.0, 2.0]]), np.array([[1, 9, 8], [5, 4, 1]])
  for budget in (12, 13, 10**15):
    solution = knapsack.solve(cost, weight, budget)
    assert solution.choice.tolist() == [2, 1] and solution.value == 1.0 == pytest.approx(solution.bound)


def test_scaling_costs_or_weights_changes_nothing():
  cost, weight, budget = instance(100, sizes=(2, 3), seed=2)
  expected = knapsack.solve(cost, weight, budget)
  for factor in (2.0**-1000, 2.0**-40, 2.0**900):
    scaled = knapsack.solve(cost * factor, weight, budget)
    np.testing.assert_array_equal(scaled.choice, expected.choice)
    assert scaled.value == expected.value * factor
  for size in (3 * 4096 * 14336, 10**13):  # an expert of Mixtral, in weights; beyond what float64 sums exactly
    scaled = knapsack.solve(cost, weight * size, budget * size + size - 1)
    np.testing.assert_array_equal(scaled.choice, expected.choice)
    shifted = knapsack.solve(cost, (weight * size).astype(np.uint64), float(budget * size))
    np.testing.assert_array_equal(shifted.choice, expected.choice)
  huge = knapsack.solve(cost, weight.astype(object) * 10**30, budget * 10**30)
  np.testing.assert_array_equal(huge.choice, expected.choice)


def test_a_huge_cost_does_not_blur_the_others():
  cost, weight, budget = instance(50, seed=4)
  expected = knapsack.solve(cost, weight, budget)
  avoided = np.r_[cost, [[1e290, 1e280, 1e250, 0.0]]]
  solution = knapsack.solve(avoided, np.r_[weight, [[1, 2, 3, 4]]], budget + 4)
  np.testing.assert_array_equal(solution.choice, np.r_[expected.choice, 3])
  unavoidable = np.r_[cost, [[1e290] * 4]]
  solution = knapsack.solve(unavoidable, np.r_[weight, [[1, 2, 3, 4]]], budget + 1)
  np.testing.assert_array_equal(solution.choice, np.r_[expected.choice, 0])


def test_equal_inputs_give_equal_outputs_and_ties_go_to_the_first_units():
  cost, weight = np.tile([4.0, 1.0], (10, 1)), np.tile([1, 2], (10, 1))
  assert knapsack.solve(cost, weight, 14).choice.tolist() == [1] * 4 + [0] * 6
  problem = instance(300, sizes=(2, 2, 7))
  first, second = knapsack.solve(*problem), knapsack.solve(*problem)
  np.testing.assert_array_equal(first.choice, second.choice)
  assert (first.value, first.bound) == (second.value, second.bound)


def test_the_order_of_units_and_choices_does_not_change_the_value():
  cost, weight, budget = instance(150, sizes=(2, 2, 7), seed=6)
  expected = knapsack.solve(cost, weight, budget)
  random = np.random.default_rng(0)
  units, choices = random.permutation(150), random.permutation(4)
  permuted = knapsack.solve(cost[units][:, choices], weight[units][:, choices], budget)
  assert permuted.value == pytest.approx(expected.value, rel=1e-14)
  np.testing.assert_array_equal(choices[permuted.choice], expected.choice[units])


def test_instances_of_one_size_class_share_a_compilation():
  knapsack.solve(*instance(65, (1, 2, 3, 4)))
  compiled = search._bisect._cache_size()
  for units in (66, 100, 128):
    knapsack.solve(*instance(units, (1, 2, 4)))
  assert search._bisect._cache_size() == compiled


# ---------------------------------------------------------------------------------------------------------------------
# Real weights
# ---------------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.integers(0, 10**6), st.floats(0.02, 0.98))
def test_real_weights_give_a_feasible_solution_and_a_valid_bound(seed, share):
  random = np.random.default_rng(seed)
  cost, weight = random.uniform(0, 1, (6, 4)), np.exp(random.normal(0, 1, (6, 4)))
  least, most = weight.min(axis=1).sum(), weight.max(axis=1).sum()
  budget = float(least + share * (most - least))
  solution = knapsack.solve(cost, weight, budget)
  check(cost, weight, budget, solution)
  optimum = brute_force(cost, weight, budget)
  assert solution.bound <= optimum * (1 + 1e-15) <= solution.value * (1 + 2e-15)
  assert solution.value - optimum < np.ptp(cost, axis=1).max()


def test_real_weights_of_many_units_end_close_to_the_bound():
  cost, weight, budget = instance(4000, seed=7)
  solution = knapsack.solve(cost, weight * np.pi, budget * np.pi * (1 + 1e-9))
  exact = knapsack.solve(cost, weight, budget)
  assert solution.bound <= exact.value
  assert solution.value == pytest.approx(exact.value, rel=1e-6)
  assert solution.value - solution.bound < 1e-4 * solution.value


def test_real_weights_in_steps_of_a_power_of_two_are_solved_exactly():
  cost, weight, budget = instance(200, sizes=(2, 2, 7), seed=8)
  expected = knapsack.solve(cost, weight, budget)
  for factor in (1.0, 0.25, 2.0**-300, 3.0 * 2.0**40):
    solution = knapsack.solve(cost, weight * factor, budget * factor)
    np.testing.assert_array_equal(solution.choice, expected.choice)
    assert (solution.value, solution.bound) == (expected.value, expected.bound)
  effective = knapsack.solve(cost, weight + 0.25 * weight[:, :1], budget + 0.25 * weight[:, 0].sum())
  np.testing.assert_array_equal(effective.choice, expected.choice)


def test_the_least_real_budget_is_met():
  weight = np.array([[0.1, 0.7], [0.2, 0.3], [0.3, 0.9]])
  budget = math.fsum([0.1, 0.2, 0.3])
  solution = knapsack.solve(np.array([[2.0, 1.0]] * 3), weight, budget)
  assert solution.choice.tolist() == [0, 0, 0] and solution.bound <= 6.0 == solution.value


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and what stays outside
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_entries_must_be_finite(value):
  cost, weight = np.ones((3, 2)), np.ones((3, 2), np.int64)
  cost[1, 0] = value
  with pytest.raises(ValueError, match="cost of unit 1, choice 0"):
    knapsack.solve(cost, weight, 9)
  with pytest.raises(ValueError, match="weight of unit 1, choice 0"):
    knapsack.solve(np.ones((3, 2)), cost, 9)
  with pytest.raises(ValueError, match="budget"):
    knapsack.solve(np.ones((3, 2)), weight, value)


def test_too_small_a_budget_states_the_least_possible_weight():
  with pytest.raises(ValueError, match="budget 6 is below 7"):
    knapsack.solve(np.ones((3, 2)), np.array([[2, 3], [4, 3], [2, 9]]), 6)
  with pytest.raises(ValueError, match="budget 0.5 is below 1.5"):
    knapsack.solve(np.ones((3, 1)), np.full((3, 1), 0.5), 0.5)


@pytest.mark.parametrize("cost, weight", [
    (np.ones(3), np.ones(3)), (np.ones((0, 2)), np.ones((0, 2))), (np.ones((2, 0)), np.ones((2, 0))),
    (np.ones((2, 2)), np.ones((2, 3)))])
def test_shapes_must_fit(cost, weight):
  with pytest.raises(ValueError, match="must both be"):
    knapsack.solve(cost, weight, 5)


def test_sums_beyond_float64_are_refused():
  with pytest.raises(ValueError, match="rescale the costs"):
    knapsack.solve(np.full((4, 2), 1e308), np.ones((4, 2), np.int64), 5)
  with pytest.raises(ValueError, match="coarser unit of weight"):
    knapsack.solve(np.array([[4.0, 3.0, 1.0]] * 4), np.array([[1, 2, 2**53]] * 4), 2**54)


def test_the_search_refuses_to_outgrow_its_table(monkeypatch):
  monkeypatch.setattr(search, "_LARGEST_TABLE", 64 * 255)
  with pytest.raises(search.SearchLimitError, match="more than 255 states"):
    knapsack.solve(*instance(80, sizes=(5, 8, 13, 31), noise=1.0))


def test_refuses_to_run_inside_a_transformation():
  cost, weight = jnp.ones((3, 2)), jnp.ones((3, 2), jnp.int32)
  with pytest.raises(TypeError, match="outside"):
    jax.jit(lambda c: knapsack.solve(c, weight, 5).value)(cost)
  with pytest.raises(TypeError, match="outside"):
    jax.jit(lambda x: x + knapsack.solve(np.ones((3, 2)), np.ones((3, 2), np.int64), 5).value)(1.0)
  with pytest.raises(TypeError, match="outside"):
    jax.vmap(lambda b: knapsack.solve(cost, weight, b).value)(jnp.arange(3, 6))


def test_float64_stays_inside():
  knapsack.solve(*instance(20))
  assert jnp.asarray(np.ones(3)).dtype == jnp.float32 and not jax.config.jax_enable_x64
