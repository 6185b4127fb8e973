"""What every method promises about budget, counts and cost, and what it refuses."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moeq_jax import artifacts, registry
from moeq_jax.allocate import constraints, methods, problem

WIDTHS = (1, 2, 3, 4)
SHAPE = (3, 8)


def table(seed: int, score: str = "fisher_error", units: str = "nats") -> artifacts.CostTable:
  rng = np.random.default_rng(seed)
  sensitivity = np.exp(rng.normal(0, 1.5, (*SHAPE, 3, 1)))
  cost = sensitivity * 4.0 ** -np.array(WIDTHS) * np.exp(rng.normal(0, 0.2, (*SHAPE, 3, len(WIDTHS))))
  falling = np.minimum.accumulate(cost, axis=3)
  return artifacts.CostTable(falling, WIDTHS, score, units, artifacts.PROJECTIONS, (4096,) * 3)


def inputs(seed: int = 0, **changes: Any) -> methods.Inputs:
  rng = np.random.default_rng(seed)
  values = {spec: rng.random(SHAPE) for spec in ("router_norm", "frequency")} | {
      "max_var": np.full(SHAPE, 1.0), "max_var(variant='code')": np.full(SHAPE, 1.0)}
  made = methods.Inputs(widths=WIDTHS, shape=SHAPE, cost=functools.partial(_cost, seed),
                        sensitivity=values.__getitem__, draws=5, seed=seed)
  return dataclasses.replace(made, **changes)


def _cost(seed: int, spec: str) -> artifacts.CostTable:
  return table(seed, spec, "nats" if spec in ("fisher_error", "damage") else "arbitrary")


METHODS = ("uniform", "random", "random(levels=3)", "tiers(router_norm)", "tiers(router_norm, levels=3)",
           "tiers(router_norm, variant=code, levels=3)", "tiers(frequency, reverse=True, zeta=0)",
           "knapsack(fisher_error)", "knapsack(damage)", "knapsack(frequency)",
           "knapsack(fisher_error, constraint=expert)", "knapsack(fisher_error, widths=(1, 2, 4))")


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("budget", [1.5, 2.0, 2.5, 3.0, 3.5])
def test_every_method_keeps_a_budget_that_experts_can_share(spec: str, budget: float):
  found = methods.candidates(spec, budget, inputs())
  assert found
  for candidate in found:
    bits = candidate.plan.bits
    assert bits.shape == SHAPE and bits.dtype == np.int64 and set(bits.ravel()) <= set(WIDTHS)
    assert bits.mean() <= budget and bits.mean() > budget - 0.15
    assert candidate.plan.budget == budget and candidate.family in spec + "measured"
    if spec.startswith(("tiers", "random")):
      assert bits.mean() == budget and all(sorted(row) == sorted(bits[0]) for row in bits.tolist())


@pytest.mark.parametrize("budget", np.round(np.arange(1.05, 4, 0.19), 2).tolist())
def test_uniform_and_knapsack_never_exceed_any_budget(budget: float):
  for spec in ("uniform", "knapsack(fisher_error)"):
    for candidate in methods.candidates(spec, budget, inputs()):
      assert candidate.plan.bits.mean() <= budget
      assert candidate.plan.bits.mean() > budget - 0.1


@pytest.mark.parametrize(("budget", "levels", "counts"), [
    (2.5, 2, {3: 4, 2: 4}), (2.0, 2, {3: 4, 1: 4}), (1.5, 2, {2: 4, 1: 4}), (2.25, 2, {3: 2, 2: 6}),
    (3.0, 2, {4: 4, 2: 4}), (2.25, 3, {3: 4, 2: 2, 1: 2}), (2.5, 3, {3: 6, 2: 0, 1: 2}), (3.5, 3, {4: 6, 3: 0, 2: 2}),
    (2.0625, 2, {3: 0, 2: 8})])
def test_the_counts_of_tiers(budget: float, levels: int, counts: dict[int, int]):
  """The three-level counts are those of the table for 8 experts; half an expert is rounded to the even number."""
  assert methods.tier_counts(budget, WIDTHS, 8, levels) == counts


@pytest.mark.parametrize("budget", [1.3, 2.1, 2.7, 3.9])
@pytest.mark.parametrize("spec", ["random", "tiers(frequency)"])
def test_tiers_take_the_nearest_average_where_experts_cannot_share_a_budget(spec: str, budget: float):
  for candidate in methods.candidates(spec, budget, inputs()):
    assert abs(candidate.plan.bits.mean() - budget) <= 0.5 / SHAPE[1]


# ---------------------------------------------------------------------------------------------------------------------
# Each method
# ---------------------------------------------------------------------------------------------------------------------


def test_uniform_is_one_width_or_a_mix_of_its_neighbours():
  exact = methods.candidates("uniform", 2.0, inputs())
  assert [c.draw for c in exact] == [None] and (exact[0].plan.bits == 2).all()
  mixed = methods.candidates("uniform", 2.25, inputs())
  assert [c.draw for c in mixed] == [0, 1, 2, 3, 4]
  assert {tuple(sorted(c.plan.bits.ravel())) for c in mixed} == {(2,) * 18 + (3,) * 6}


@pytest.mark.parametrize("spec", ["uniform", "random", "random(levels=3)"])
def test_random_draws_differ_and_are_the_same_every_time(spec: str):
  draws = lambda seed: [c.plan.bits.tobytes() for c in methods.candidates(spec, 2.25, inputs(seed))]
  assert len(set(draws(0))) == 5
  assert draws(0) == draws(0) and not set(draws(0)) & set(draws(1))
  names = [c.file_name() for c in methods.candidates(spec, 2.25, inputs())]
  assert len(set(names)) == 5 and names[3].endswith("-2.25-draw3")


def test_tiers_give_the_high_bits_to_the_most_sensitive():
  given = inputs()
  sensitivity = given.sensitivity("router_norm")
  for spec, sign in (("tiers(router_norm)", 1), ("tiers(router_norm, reverse=True)", -1)):
    bits = methods.candidates(spec, 2.5, given)[0].plan.bits
    for row, score in zip(bits, sign * sensitivity, strict=True):
      assert score[row == 3].min() > score[row == 2].max()


def test_max_var_moves_an_expert_up_unless_zeta_is_zero():
  max_var = np.full(SHAPE, 1.0)
  sensitivity = np.tile(np.arange(8.0)[::-1], (3, 1))  # expert 0 first, expert 7 last
  max_var[1, 7] = 5.0
  given = inputs(sensitivity=lambda spec: max_var if spec.startswith("max_var") else sensitivity)
  moved = methods.candidates("tiers(frequency)", 2.5, given)[0].plan.bits
  still = methods.candidates("tiers(frequency, zeta=0)", 2.5, given)[0].plan.bits
  far = methods.candidates("tiers(frequency, zeta=6.0)", 2.5, given)[0].plan.bits
  assert moved[1].tolist() == [3, 3, 3, 2, 2, 2, 2, 3] and moved[0].tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
  assert still.tolist() == far.tolist() == [moved[0].tolist()] * 3


def test_the_code_variant_reads_its_own_max_var():
  asked = []
  given = inputs()
  seen = dataclasses.replace(given, sensitivity=lambda spec: asked.append(spec) or given.sensitivity(spec))
  methods.candidates("tiers(frequency, variant=code)", 2.5, seen)
  methods.candidates("tiers(frequency)", 2.5, seen)
  assert asked == ["frequency", "max_var(variant='code')", "frequency", "max_var"]


@hypothesis.given(st.integers(0, 10_000), st.sampled_from([1.5, 2.0, 2.25, 2.5, 3.0]))
@hypothesis.settings(max_examples=10)
def test_no_plan_costs_less_than_the_knapsack(seed: int, budget: float):
  given = inputs(seed)
  best = methods.candidates("knapsack(fisher_error)", budget, given)[0].plan
  costs = table(seed)
  assert problem.predicted(costs, best.bits) == pytest.approx(best.predicted, rel=1e-12)
  assert best.lower_bound <= best.predicted * (1 + 1e-12)
  for spec in METHODS:
    for candidate in methods.candidates(spec, budget, given):
      assert problem.predicted(costs, candidate.plan.bits) >= best.predicted * (1 - 1e-12)


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=10)
def test_more_budget_never_costs_more(seed: int):
  given = inputs(seed)
  budgets = (1.0, 1.1, 1.5, 2.0, 2.05, 2.5, 3.3, 4.0)
  costs = [methods.candidates("knapsack(fisher_error)", b, given)[0].plan.predicted for b in budgets]
  assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


# ---------------------------------------------------------------------------------------------------------------------
# Names and rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "family", "name"), [
    ("uniform", "uniform", "uniform"), ("random(levels=2)", "random", "random"),
    ("random(levels=3)", "random", "random(levels=3)"),
    ("tiers(router_norm, zeta=3.0, levels=2)", "tiers", "tiers(router_norm)"),
    ("tiers( router_norm,reverse=True )", "tiers", "tiers(router_norm, reverse=True)"),
    ("knapsack(fisher_error)", "knapsack", "knapsack(fisher_error)"),
    ("knapsack( fisher_error,constraint='expert')", "knapsack", "knapsack(fisher_error)"),
    ("knapsack(frequency, constraint='none')", "knapsack", "knapsack(frequency, constraint=none)"),
    ("knapsack(damage, widths=[4, 2], constraint=per_layer)", "measured",
     "knapsack(damage, constraint=per_layer, widths=(2, 4))"),
    ("knapsack(damage)", "measured", "knapsack(damage)")])
def test_a_plan_carries_its_family_and_its_name_without_defaults(spec: str, family: str, name: str):
  candidate = methods.candidates(spec, 2.5, inputs())[0]
  assert (candidate.family, candidate.plan.method) == (family, name)
  assert registry.canonical(candidate.plan.method) == name


def test_only_nats_are_shown_as_a_predicted_loss():
  for spec, nats in (("fisher_error", True), ("damage", True), ("frequency", False)):
    candidate = methods.candidates(f"knapsack({spec})", 2.5, inputs())[0]
    row = candidate.as_row()
    assert row["predicted"] == (candidate.plan.predicted if nats else None)
    assert row["lower_bound"] == (candidate.plan.lower_bound if nats else None)
    assert row["cost"] == candidate.plan.predicted > 0
    assert 0 <= row["gap"] < 1e-6 and row["plan"] == artifacts.digest(candidate.plan.bits)
  row = methods.candidates("uniform", 2.5, inputs())[2].as_row()
  assert (row["predicted"], row["gap"], row["draw"], row["id"]) == (None, None, 2, "uniform-2.5-draw2")


@pytest.mark.parametrize("constraint", constraints.CONSTRAINTS)
def test_a_knapsack_under_a_constraint(constraint: str):
  given = inputs()
  candidate = methods.candidates(f"knapsack(fisher_error, constraint={constraint})", 2.25, given)[0]
  expected = problem.plan(table(0), 2.25, constraint)
  np.testing.assert_array_equal(candidate.plan.bits, expected.bits)
  assert candidate.plan.constraint == candidate.as_row()["constraint"] == constraint
  assert candidate.plan.bits.mean() <= 2.25 and candidate.units == "nats"


def test_a_knapsack_on_some_of_the_widths():
  candidate = methods.candidates("knapsack(fisher_error, widths=(2, 4), constraint=none)", 2.5, inputs())[0]
  assert set(candidate.plan.bits.ravel()) == {2, 4} and candidate.plan.bits.mean() <= 2.5
  every = methods.candidates("knapsack(fisher_error, constraint=none)", 2.5, inputs())[0]
  assert every.plan.predicted < candidate.plan.predicted
  assert candidate.file_name() != every.file_name()


def test_the_score_of_a_method():
  assert methods.score_of("knapsack(max_var(variant='code'))") == "max_var(variant=code)"
  assert methods.score_of("tiers(frequency, levels=3)") == "frequency"
  assert methods.score_of("random(levels=3)") is None


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "said"), [
    ("knapsak(fisher_error)", "did you mean 'knapsack'"), ("tiers(frequency, level=3)", "did you mean 'levels'"),
    ("tiers", "takes one score"), ("knapsack", "takes one score"), ("uniform(2)", "takes no score"),
    ("random(3)", "takes no score"), ("knapsack(a, b)", "takes one score"),
    ("knapsack(a, constrain=per_layer)", "did you mean 'constraint'")])
def test_an_unknown_method_or_argument_is_refused(spec: str, said: str):
  for run in (lambda: methods.check([spec], [2.5], WIDTHS), lambda: methods.candidates(spec, 2.5, inputs())):
    with pytest.raises(registry.SpecError, match=said):
      run()


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize(("budget", "said"), [(0.5, "raise the budget"), (4.5, "lower the"), (float("nan"), "range")])
def test_a_budget_out_of_range_is_refused(spec: str, budget: float, said: str):
  for run in (lambda: methods.check([spec], [2.0, budget], WIDTHS), lambda: methods.candidates(spec, budget, inputs())):
    with pytest.raises(ValueError, match=said):
      run()


@pytest.mark.parametrize(("spec", "budget", "widths", "said"), [
    ("tiers(frequency)", 2.0, (2, 3, 4), "a width below and one above"), ("random", 4.0, (2, 3, 4), "a width below"),
    ("tiers(frequency, levels=3)", 2.5, (2, 3), "at least three widths"), ("random(levels=4)", 2.5, WIDTHS, "levels=4"),
    ("tiers(frequency, levels=3)", 3.5, (2, 3, 8), "equally spaced")])
def test_widths_that_give_no_tiers_are_refused_before_the_work(spec: str, budget: float, widths: tuple, said: str):
  for run in (lambda: methods.check([spec], [budget], widths),
              lambda: methods.candidates(spec, budget, inputs(widths=widths))):
    with pytest.raises(ValueError, match=said):
      run()


@pytest.mark.parametrize(("widths", "said"), [
    ((), "bit numbers"), ((3, 2), "ascending"), ((2, 2, 3), "ascending"), ((1, 2, 5), r"encodes \[5\] bits.*choose")])
def test_a_bit_set_that_is_none_is_refused(widths: tuple, said: str):
  with pytest.raises(ValueError, match=said):
    methods.check(["uniform"], [2.0], widths)


@pytest.mark.parametrize(("spec", "said"), [
    ("tiers(frequency, variant=papre)", "unknown variant 'papre'"), ("tiers(frequency, zeta=0.5)", "zeta"),
    ("knapsack(frequency, constraint=per_layr)", "did you mean 'per_layer'"),
    ("knapsack(frequency, widths=(2, 8))", r"choose at least one of config.widths=\(1, 2, 3, 4\)"),
    ("knapsack(frequency, widths=2)", r"write them like \(2, 4\)"),
    ("knapsack(frequency, widths=(3, 4))", "raise the budget or add a width")])
def test_options_are_checked(spec: str, said: str):
  for run in (lambda: methods.check([spec], [2.5], WIDTHS), lambda: methods.candidates(spec, 2.5, inputs())):
    with pytest.raises(ValueError, match=said):
      run()
