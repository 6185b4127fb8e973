"""Every score against its formula on small hand-made evidence, and what happens when evidence is missing or damaged."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moeq_jax import artifacts, registry, scores
from moeq_jax.scores import weight

LAYERS, EXPERTS, D, F = 2, 3, 4, 5
WIDTHS = (1, 2, 4)


def evidence(seed: int = 0, **changes: Any) -> scores.Evidence:
  rng = np.random.default_rng(seed)
  shape = LAYERS, EXPERTS
  stats = artifacts.Stats(
      tokens=np.array([[6, 2, 0], [1, 3, 4]]), gate_weight=np.array([[3.0, 1.5, 0.0], [0.5, 0.6, 2.0]]),
      router_norm=np.zeros(shape), router_grad=rng.random(shape), moment_in=np.zeros((*shape, D, D), np.float32),
      moment_mid=np.zeros((*shape, F, F), np.float32), grad_sq_gate=np.zeros((*shape, F), np.float32),
      grad_sq_up=np.zeros((*shape, F), np.float32), grad_sq_down=np.zeros((*shape, D), np.float32), total_tokens=8,
      batches=1)
  falling = lambda: np.sort(rng.random((*shape, 3, len(WIDTHS))))[..., ::-1]
  errors = artifacts.ErrorTable(weight=falling(), output=falling(), fisher=falling(), norm=1 + rng.random((*shape, 3)),
                                widths=WIDTHS, codec="rtn(group=32)", group=32, projections=artifacts.PROJECTIONS,
                                sizes=(D * F,) * 3)
  experts = [{"gate": rng.normal(size=(EXPERTS, D, F)), "up": rng.normal(size=(EXPERTS, D, F)),
              "down": rng.normal(size=(EXPERTS, F, D))} for _ in range(LAYERS)]
  made = scores.Evidence(stats, errors, rng.normal(size=(*shape, D)).astype(np.float32),
                         rng.normal(size=(*shape, D)).astype(np.float32), experts)
  return dataclasses.replace(made, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------------------------


def test_scores_equal_their_formulas():
  e = evidence()
  mse = e.errors.weight / e.errors.norm.sum(2).mean()
  expected = {
      "router_norm": np.sqrt((e.routers.astype(np.float64) ** 2).sum(-1)),
      "router_grad": e.stats.router_grad,
      "frequency": [[6 / 8, 2 / 8, 0], [1 / 8, 3 / 8, 4 / 8]],
      "gate_weight": [[0.5, 0.75, 0], [0.5, 0.2, 0.5]],
      "max_var": [[max(np.var(x["gate"][i, :, f]) for f in range(F)) for i in range(EXPERTS)] for x in e.experts],
      "weight_mse": mse,
      "router_grad_error": e.stats.router_grad[..., None, None] * mse,
      "output_error": e.errors.output / 8,
      "fisher_error": e.errors.fisher,
  }
  for spec, values in expected.items():
    np.testing.assert_allclose(scores.evaluate(spec, e), values, rtol=1e-6, err_msg=spec)
  assert set(expected) | {"router_norm_change", "damage"} == set(scores.SCORES)


def test_norm_change_is_a_difference_of_norms_not_the_norm_of_a_difference():
  routers = np.array([[[3, 4, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]]] * 2, np.float32)
  initial = np.array([[[0, 0, 5, 0], [0, 0, 0, 3], [1, 0, 0, 0]]] * 2, np.float32)
  e = evidence(routers=routers, routers_init=initial)
  np.testing.assert_allclose(scores.evaluate("router_norm_change", e), [[0, -2, 1]] * 2, atol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_max_var_is_the_same_in_slabs_and_one_expert_at_a_time(variant: str, monkeypatch: pytest.MonkeyPatch):
  random = np.random.default_rng(5)
  gates = [random.normal(0, random.uniform(0.5, 2, (3, 1, 50)), (3, 20, 50)).astype(np.float32) for _ in range(2)]
  known = [g.var(axis=1).max(axis=1) if variant == "paper" else np.array(
      [w[:, np.square(w).sum(0).argmax()].var(ddof=1) for w in g]) for g in gates]
  monkeypatch.setattr(weight, "SLAB", 16)
  lazy = types.SimpleNamespace(experts=[{"gate": iter(layer)} for layer in gates])
  np.testing.assert_allclose(weight.max_var(lazy, variant), known, rtol=1e-5)


def test_the_two_variants_of_max_var():
  # Expert 0 has a neuron of large norm and no variance, and one of small norm and large variance.
  gate = np.zeros((EXPERTS, D, 2))
  gate[0, :, 0], gate[0, :, 1] = [10, 10, 10, 10], [1, -1, 1, -1]
  gate[1, :, 0], gate[1, :, 1] = [2, 0, 0, 0], [0, 1, 0, 0]
  e = evidence(experts=[{"gate": gate}] * LAYERS)
  np.testing.assert_allclose(scores.evaluate("max_var", e)[0], [1, 0.75, 0])  # biased: (4 - 4/4) / 4
  np.testing.assert_allclose(scores.evaluate("max_var(variant='code')", e)[0], [0, 1, 0])  # unbiased: (4 - 4/4) / 3


def test_measured_damage_is_carried_to_other_widths_by_the_weight_error():
  damage = np.array([[0.3, -0.1, 0.0], [0.02, 0.5, 1.0]])
  e = evidence(damage=damage, damage_bits=2)
  values, mse = scores.evaluate("damage", e), weight.cells(e).sum(2)
  np.testing.assert_allclose(values[..., 1], np.maximum(damage, 0))
  np.testing.assert_allclose(values[..., 0], np.maximum(damage, 0) * mse[..., 0] / mse[..., 1])
  np.testing.assert_allclose(values[..., 2], np.maximum(damage, 0) * mse[..., 2] / mse[..., 1])
  assert not values[0, 1].any()


def test_noisy_damage_is_the_mean_of_a_truncated_normal():
  damage, stderr = np.array([[0.3, -0.1, 0.0], [-2.0, 0.5, -0.3]]), np.array([[0.1, 0.1, 0.2], [0.4, 0.0, 0.0]])
  values = scores.evaluate("damage", evidence(damage=damage, damage_stderr=stderr, damage_bits=2))[..., 1]
  noisy = stderr > 0
  expected = stats.truncnorm.mean(-damage[noisy] / stderr[noisy], np.inf, damage[noisy], stderr[noisy])
  np.testing.assert_allclose(values[noisy], expected, rtol=1e-3)
  np.testing.assert_array_equal(values[~noisy], [0.5, 0.0])
  assert (values[noisy] > 0).all()


def test_damage_where_the_measured_width_is_exact():
  errors = evidence().errors
  exact = errors.weight.copy()
  exact[0, 0, :, 1:] = 0
  values = scores.evaluate("damage", evidence(damage=np.zeros((LAYERS, EXPERTS)),
                                              errors=dataclasses.replace(errors, weight=exact)))
  assert not values.any()


# ---------------------------------------------------------------------------------------------------------------------
# Directions and costs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "sign"), [
    ("router_norm", -1), ("router_norm_change", -1), ("router_grad", 1), ("frequency", 1), ("gate_weight", 1),
    ("max_var", 1)])
def test_sensitivity_points_where_the_source_claims(spec: str, sign: int):
  e = evidence()
  np.testing.assert_array_equal(scores.sensitivity(spec, e), sign * scores.evaluate(spec, e))


@pytest.mark.parametrize("spec", ["weight_mse", "router_grad_error", "output_error", "fisher_error"])
def test_the_sensitivity_of_a_cost_is_its_value_at_the_lowest_width(spec: str):
  e = evidence()
  np.testing.assert_array_equal(scores.sensitivity(spec, e), scores.evaluate(spec, e).sum(2)[..., 0])


@pytest.mark.parametrize("spec", scores.SCORES)
@pytest.mark.parametrize("seed", range(3))
def test_costs_are_not_negative_and_name_what_they_are_of(spec: str, seed: int):
  rng = np.random.default_rng(seed)
  e = evidence(seed, damage=rng.normal(size=(LAYERS, EXPERTS)))
  table = scores.as_cost(spec, e)
  assert table.cost.shape == (LAYERS, EXPERTS, 3, len(WIDTHS)) and table.widths == WIDTHS and table.score == spec
  assert (table.cost >= 0).all() and table.cost.any()
  assert table.projections == artifacts.PROJECTIONS and table.sizes == (D * F,) * 3
  assert table.units == ("nats" if spec in ("fisher_error", "damage") else "arbitrary")


@pytest.mark.parametrize("spec", ["frequency", "router_norm_change", "damage", "mine"])
def test_a_number_per_expert_is_split_in_proportion_to_the_weight_error(spec: str, monkeypatch):
  mine = np.random.default_rng(1).normal(size=(LAYERS, EXPERTS, len(WIDTHS)))
  monkeypatch.setitem(scores.SCORES, "mine", scores.Score(lambda evidence: mine))
  e = evidence(damage=np.arange(6.0).reshape(LAYERS, EXPERTS))
  exact = e.errors.weight.copy()
  exact[1, 2, :, 2] = 0  # an expert that loses nothing: its cost is split by size
  e = dataclasses.replace(e, errors=dataclasses.replace(e.errors, weight=exact, sizes=(10, 10, 20)))
  cost = scores.as_cost(spec, e).cost
  whole = {"damage": scores.evaluate("damage", e), "mine": mine}.get(spec, cost.sum(2))
  np.testing.assert_allclose(cost.sum(2), np.maximum(whole, 0), rtol=1e-12, atol=1e-15)
  lossy = exact.sum(2) > 0
  share = (exact / np.maximum(exact.sum(2, keepdims=True), 1e-300)).swapaxes(2, 3)[lossy]
  np.testing.assert_allclose(cost.swapaxes(2, 3)[lossy], cost.sum(2)[lossy][:, None] * share, rtol=1e-12)
  np.testing.assert_allclose(cost[1, 2, :, 2], cost[1, 2, :, 2].sum() * np.array([0.25, 0.25, 0.5]))


def test_experts_without_a_gate():
  base = evidence()
  cut = {name: getattr(base.errors, name)[:, :, 1:] for name in ("weight", "output", "fisher", "norm")}
  errors = dataclasses.replace(base.errors, **cut, projections=("up", "down"), sizes=(D * F,) * 2)
  experts = [{name: w for name, w in layer.items() if name != "gate"} for layer in base.experts]
  e = dataclasses.replace(base, errors=errors, experts=experts, damage=np.ones((LAYERS, EXPERTS)))
  for spec in scores.SCORES:
    table = scores.as_cost(spec, e)
    assert table.cost.shape == (LAYERS, EXPERTS, 2, len(WIDTHS)) and table.projections == ("up", "down")
  neurons = [[np.var(x["up"][i], axis=0).max() for i in range(EXPERTS)] for x in experts]
  np.testing.assert_allclose(scores.evaluate("max_var", e), neurons, rtol=1e-6)


@pytest.mark.parametrize(("spec", "low"), [("router_norm_change", True), ("frequency", False)])
def test_a_ranking_becomes_a_cost_that_is_larger_for_sensitive_experts(spec: str, low: bool):
  e = evidence()
  same = np.broadcast_to(e.errors.weight[:1, :1], e.errors.weight.shape)
  e = dataclasses.replace(e, errors=dataclasses.replace(e.errors, weight=same))
  cost, value = scores.as_cost(spec, e).cost.sum(2).reshape(-1, len(WIDTHS)), scores.evaluate(spec, e).ravel()
  order = np.argsort(-value if low else value, kind="stable")
  assert (np.diff(cost[order], axis=0) >= 0).all() and np.ptp(cost[:, 0]) > 0
  if low:  # exp(-s / std(s)) up to a factor
    ratio = cost[:, 0] / np.exp(-value / value.std())
    np.testing.assert_allclose(ratio, ratio[0])
  else:
    np.testing.assert_allclose(cost, value[:, None] * weight.cells(e).sum(2).reshape(-1, len(WIDTHS)))


def test_a_score_is_called_by_its_normal_form():
  assert scores.as_cost("max_var( variant = 'code' )", evidence()).score == "max_var(variant=code)"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "said"), [
    ("router_norm_chnage", "did you mean 'router_norm_change'"), ("max_var(varian='code')", "did you mean 'variant'"),
    ("max_var('code')", "options of a score are given by name"), ("frequency(2)", "positional|by name"),
    ("not a spec", "not a spec")])
def test_an_unknown_score_or_option_is_named_with_the_nearest(spec: str, said: str):
  for run in (lambda: scores.check(["frequency", spec]), lambda: scores.evaluate(spec, evidence())):
    with pytest.raises(registry.SpecError, match=said):
      run()


@pytest.mark.parametrize(("spec", "changes", "said"), [
    ("router_norm_change", {"routers_init": None}, "router_init.safetensors.*use router_norm"),
    ("damage", {"damage": None}, "config.damage.sequences"),
    ("fisher_error", {"errors": dataclasses.replace(evidence().errors, fisher=None)}, "no backward pass"),
    ("damage", {"damage": np.ones((LAYERS, EXPERTS)), "damage_bits": 3}, r"measured at 3 bits, not one of \(1, 2, 4\)"),
    ("max_var(variant='both')", {}, "neither 'paper' nor 'code'")])
def test_missing_evidence_is_named_with_the_remedy(spec: str, changes: dict, said: str):
  with pytest.raises(ValueError, match=said):
    scores.evaluate(spec, evidence(**changes))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_evidence_that_is_not_finite_is_named(bad: float):
  base = evidence()
  grad = base.stats.router_grad.copy()
  grad[1, 2] = bad
  fisher = base.errors.fisher.copy()
  fisher[0, 1, 2, 1] = bad
  damaged = dataclasses.replace(base, stats=dataclasses.replace(base.stats, router_grad=grad),
                                errors=dataclasses.replace(base.errors, fisher=fisher))
  for spec, place in (("router_grad", "layer 1, expert 2"), ("router_grad_error", "layer 1, expert 2"),
                      ("fisher_error", "layer 0, expert 1")):
    for run in (scores.evaluate, scores.sensitivity, scores.as_cost):
      with pytest.raises(ValueError, match=f"score {spec}: not finite for {place}"):
        run(spec, damaged)
  scores.evaluate("frequency", damaged)


def test_a_score_of_another_shape_is_refused(monkeypatch):
  monkeypatch.setitem(scores.SCORES, "mine", scores.Score(lambda evidence: evidence.stats.tokens.T))
  with pytest.raises(ValueError, match=r"score mine: gave shape \(3, 2\)"):
    scores.evaluate("mine", evidence())
