"""Plans under every constraint, against all plans of small models, and against HiGHS with cells tied by equations."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import optimize, sparse

from moeq_jax import artifacts
from moeq_jax.allocate import constraints, knapsack, problem

LOOSER = [("none", "gate_equals_up"), ("gate_equals_up", "expert"), ("expert", "per_layer"),
          ("none", "per_layer_projection"), ("per_layer_projection", "per_layer")]


def keeps(bits: np.ndarray, constraint: str) -> np.ndarray:
  """Whether bits `[..., L, E, gate up down]` keep a constraint, `[...]` bool."""
  first = {"none": bits, "gate_equals_up": bits[..., [0, 0, 2]], "expert": bits[..., :1],
           "per_layer_projection": bits[..., :1, :], "per_layer": bits[..., :1, :1]}[constraint]
  return (bits == first).all((-3, -2, -1))


def table(seed: int, layers: int = 2, experts: int = 2, widths=(1, 2, 3, 4), sizes=(3, 3, 5), noise: float = 0.0,
          ) -> artifacts.CostTable:
  random = np.random.default_rng(seed)
  scale = np.exp(random.normal(0, 1.5, (layers, experts, len(sizes), 1)))
  cost = scale * 4.0 ** -np.array(widths) * np.exp(random.normal(0, noise, (*scale.shape[:3], len(widths))))
  return artifacts.CostTable(cost, widths, "s", "nats", artifacts.PROJECTIONS[-len(sizes):], sizes)


def check(plan: artifacts.Plan, costs: artifacts.CostTable, average: float) -> np.ndarray:
  """Checks what holds for every plan; returns its bits `[L, E, P]`."""
  bits = plan.by_projection(len(costs.sizes))
  assert bits.shape == costs.cost.shape[:3] and set(bits.ravel().tolist()) <= set(costs.widths)
  assert problem.average_bits(bits, np.broadcast_to(costs.sizes, bits.shape).ravel()) <= average
  assert plan.predicted == pytest.approx(problem.predicted(costs, plan.bits), rel=1e-12)
  assert plan.lower_bound <= plan.predicted == pytest.approx(plan.lower_bound, rel=1e-10)
  return bits


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "experts", "widths"), [(2, 2, (1, 4)), (1, 2, (1, 2, 3, 4))])
@hypothesis.given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(1, 1, 1), (3, 3, 5), (2, 7, 1)]))
@hypothesis.settings(max_examples=12, deadline=None)
def test_every_constraint_equals_brute_force(layers: int, experts: int, widths, seed: int, share: float, sizes):
  costs = table(seed, layers, experts, widths, sizes, noise=1.5)  # costs that may rise with the bits
  average = widths[0] + share * (widths[-1] - widths[0])
  cells = np.array(list(itertools.product(widths, repeat=layers * experts * 3))).reshape(-1, layers, experts, 3)
  index = np.searchsorted(widths, cells)
  price = sum(costs.cost[l, e, p][index[:, l, e, p]] for l, e, p in np.ndindex(layers, experts, 3))
  total = layers * experts * sum(sizes)
  fits = (cells * np.array(sizes)).sum((1, 2, 3)) <= problem.budget_bits(average, np.array([total]))
  for constraint in constraints.CONSTRAINTS:
    plan = problem.plan(costs, average, constraint)
    assert keeps(check(plan, costs, average), constraint) and plan.constraint == constraint
    assert plan.predicted == pytest.approx(price[fits & keeps(cells, constraint)].min(), rel=1e-12)


@pytest.mark.parametrize("constraint", constraints.CONSTRAINTS)
@pytest.mark.parametrize("average", [1.4, 2.5])
def test_every_constraint_equals_highs(constraint: str, average: float):
  costs = table(0, 4, 6, noise=0.3)
  costs = dataclasses.replace(costs, cost=1e3 * costs.cost)
  expected = highs(costs, average, constraint)
  assert problem.plan(costs, average, constraint).predicted == pytest.approx(expected, rel=1e-9)


def highs(costs: artifacts.CostTable, average: float, constraint: str) -> float:
  """The optimum with one variable per cell and width, and an equation per pair of neighbours that share a width."""
  shape, widths = costs.cost.shape[:3], len(costs.widths)
  number = np.arange(np.prod(shape)).reshape(shape)
  along = {"expert": (2,), "per_layer_projection": (1,), "per_layer": (1, 2)}.get(constraint, ())
  before, after = (lambda axis: np.delete(number, -1, axis)), (lambda axis: np.delete(number, 0, axis))
  tied = [(before(axis), after(axis)) for axis in along]
  if constraint == "gate_equals_up":
    tied = [(number[..., 0], number[..., 1])]
  one = np.eye(widths)
  rows, low, high = [np.kron(np.eye(number.size), np.ones(widths))], [np.ones(number.size)], [np.ones(number.size)]
  for a, b in (pair for x, y in tied for pair in zip(x.ravel(), y.ravel(), strict=True)):
    rows.append(np.kron(np.eye(number.size)[a] - np.eye(number.size)[b], one.T))
    low, high = [*low, np.zeros(widths)], [*high, np.zeros(widths)]
  used = np.kron(np.broadcast_to(costs.sizes, shape).ravel(), costs.widths)
  budget = problem.budget_bits(average, np.array([int(used.sum() / sum(costs.widths))]))
  limits = optimize.LinearConstraint(sparse.csr_array(np.vstack([*rows, used])), np.r_[(*low, -np.inf)],
                                     np.r_[(*high, float(budget))])
  found = optimize.milp(costs.cost.ravel(), constraints=limits, integrality=np.ones(costs.cost.size), bounds=(0, 1),
                        options={"mip_rel_gap": 0.0})
  assert found.status == 0
  return found.fun


@hypothesis.given(st.integers(0, 10**6), st.floats(1, 4), st.sampled_from([(1, 1, 1), (3, 3, 5)]))
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_looser_constraint_never_costs_more(seed: int, average: float, sizes):
  costs = table(seed, 3, 5, sizes=sizes, noise=1.0)
  plans = {constraint: problem.plan(costs, average, constraint) for constraint in constraints.CONSTRAINTS}
  for constraint, plan in plans.items():
    assert keeps(check(plan, costs, average), constraint)
  for looser, tighter in LOOSER:
    assert plans[looser].predicted <= plans[tighter].predicted * (1 + 1e-12)


def test_experts_as_units_give_the_plan_of_summed_costs():
  costs = table(3, 5, 16, noise=0.5)
  summed = np.minimum.accumulate(costs.cost.sum(axis=2), axis=-1).reshape(-1, 4)
  sizes = np.full(80, sum(costs.sizes))
  for average in (1.5, 2.0, 2.5, 3.3):
    expected = knapsack.solve(summed, sizes[:, None] * np.array(costs.widths), problem.budget_bits(average, sizes))
    np.testing.assert_array_equal(problem.plan(costs, average).bits.ravel(), 1 + expected.choice)


@pytest.mark.parametrize(("layers", "experts", "sizes"), [(48, 256, (1, 1, 1)), (94, 360, (2, 2, 3))])
def test_a_hundred_thousand_free_cells_are_proven_optimal(layers: int, experts: int, sizes):
  costs = table(5, layers, experts, sizes=sizes, noise=0.3)
  check(problem.plan(costs, 2.3, "none"), costs, 2.3)


# ---------------------------------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("constraint", "expected"), [
    ("none", [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]),
    ("gate_equals_up", [[[0, 0, 1], [2, 2, 3]], [[4, 4, 5], [6, 6, 7]]]),
    ("expert", [[[0, 0, 0], [1, 1, 1]], [[2, 2, 2], [3, 3, 3]]]),
    ("per_layer_projection", [[[0, 1, 2], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]]),
    ("per_layer", [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]])])
def test_the_units_of_two_layers_of_two_experts(constraint: str, expected: list):
  assert constraints.units(constraint, 2, 2, artifacts.PROJECTIONS).tolist() == expected


def test_without_a_gate_only_up_and_down_are_tied():
  units = lambda constraint: constraints.units(constraint, 1, 2, ("up", "down")).tolist()
  assert units("none") == units("gate_equals_up") == [[[0, 1], [2, 3]]]
  assert units("expert") == [[[0, 0], [1, 1]]] and units("per_layer_projection") == [[[0, 1], [0, 1]]]


def test_costs_of_units_are_sums_that_never_rise():
  cost = np.array([[[[4.0, 1.0, 2.0], [1.0, 3.0, 0.5]]]])  # either projection is worse at some larger width
  costs = artifacts.CostTable(cost, (1, 2, 3), "s", "nats", ("up", "down"), (2, 3))
  np.testing.assert_array_equal(constraints.tie(costs, "none").cost, [[4, 1, 1], [1, 1, 0.5]])
  tied = constraints.tie(costs, "expert")
  np.testing.assert_array_equal(tied.cost, [[5, 4, 2.5]])  # not 5, 2, 1.5: one width for both
  assert tied.sizes.tolist() == [5] and constraints.tie(costs, "none").sizes.tolist() == [2, 3]


def test_plans_have_the_smallest_form_that_holds_them():
  costs = table(1)
  shapes = {constraint: problem.plan(costs, 2.5, constraint).bits.shape for constraint in constraints.CONSTRAINTS}
  assert shapes == {"none": (2, 2, 3), "gate_equals_up": (2, 2, 3), "expert": (2, 2), "per_layer_projection": (2, 2, 3),
                    "per_layer": (2, 2)}


def test_a_table_with_fewer_widths():
  costs = table(2, 3, 4)
  fewer = constraints.restricted(costs, (4, 2))
  assert fewer.widths == (2, 4) and set(problem.plan(fewer, 2.5, "none").bits.ravel()) <= {2, 4}
  np.testing.assert_array_equal(fewer.cost, costs.cost[..., [1, 3]])
  for widths in ((2, 8), ()):
    with pytest.raises(ValueError, match=r"config.widths=\(1, 2, 3, 4\)"):
      constraints.restricted(costs, widths)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="unknown constraint 'per_layr'; did you mean 'per_layer'"):
    problem.plan(table(0), 2.5, "per_layr")
  for change in ({"sizes": (1, 2)}, {"projections": ("up", "down")}, {"widths": (1, 2)}, {"cost": np.ones((4, 4))}):
    with pytest.raises(ValueError, match="cost table s: cost has shape"):
      problem.plan(dataclasses.replace(table(0), **change), 1.5)
