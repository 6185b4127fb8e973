"""The two-layer model against written-out numpy, `jax.grad`, and what its data promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import registry
from moeq_jax.theory import measures, two_layer

SMALL = {"dim": 64, "tokens": 6, "neurons": 8, "batch": 64, "init": 0.02}


def _setting(design: str = "B", **options) -> two_layer.Setting:
  """A small setting whose router scores are no ties."""
  return two_layer.Setting.parse(f"{design}({', '.join(f'{k}={v}' for k, v in (SMALL | options).items())})")


def _model(setting: two_layer.Setting, scale: float = 1.0) -> tuple[two_layer.Params, two_layer.Batch]:
  params = two_layer.start(jax.random.key(1), setting)
  return two_layer.Params(scale * params.experts, params.router), two_layer.sample(jax.random.key(2), setting, 128)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "said"), [
    ("C(alpha=0.1)", "unknown design 'C'"), ("A(alfa=0.1)", "did you mean 'alpha'"), ("A(alpha=0.6)", "alpha=0.6"),
    ("B(alpha=0.1, kept=11)", "kept=11"), ("B(experts=3)", "at least 4 experts"), ("B(dim=12)", "more dimensions"),
])
def test_a_wrong_setting_is_explained(spec: str, said: str):
  with pytest.raises((registry.SpecError, ValueError), match=said):
    two_layer.Setting.parse(spec)


@pytest.mark.parametrize("design", ["A", "B"])
def test_every_input_has_one_relevant_token_which_decides_its_label(design: str):
  setting = _setting(design, alpha=0.2)
  batch = two_layer.sample(jax.random.key(0), setting, 4000)
  labels, _ = setting.features()
  tokens = np.asarray(batch.tokens)
  relevant = tokens < len(labels)
  assert (relevant.sum(1) == 1).all()
  np.testing.assert_array_equal(tokens[relevant], batch.feature)
  np.testing.assert_array_equal(labels[tokens[relevant]], batch.labels)
  assert tokens.max() == setting.dim - 1
  places = relevant.mean(0)
  assert np.all(abs(places - 1 / setting.tokens) < 0.03)  # at a random place: five standard errors


@pytest.mark.parametrize(("design", "positive", "rare"), [("A", 0.8, 0.2), ("B", 0.5, 0.2)])
def test_classes_are_balanced_in_b_and_not_in_a(design: str, positive: float, rare: float):
  batch = two_layer.sample(jax.random.key(0), _setting(design, alpha=0.2), 8000)
  labels, is_rare = _setting(design).features()
  assert abs(np.mean(np.asarray(batch.labels) > 0) - positive) < 0.03
  share = is_rare[np.asarray(batch.feature)]
  assert abs(share.mean() - rare) < 0.025
  for label in set(labels) if design == "B" else ():
    assert abs(share[np.asarray(batch.labels) == label].mean() - rare) < 0.035  # rare inside each class


def test_experts_are_aligned_to_tokens_of_their_sign():
  for design, own in (("A", [0, 0, 1, 1]), ("B", [0, 1, 2, 3])):
    setting = _setting(design)
    router = np.asarray(two_layer.start(jax.random.key(0), setting).router)
    labels = setting.features()[0]
    np.testing.assert_array_equal(router[:4].argmax(1), own)
    np.testing.assert_array_equal(setting.signs()[:4], labels[own])
    assert (router[4:].argmax(1) >= len(labels)).all()
    assert setting.signs()[4:].sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def _plain_output(params: two_layer.Params, setting: two_layer.Setting, tokens: np.ndarray) -> float:
  """f of one input in the dense basis of unit vectors, in loops."""
  experts, router = (np.asarray(a, np.float64) for a in params)
  x = np.eye(setting.dim)[tokens]
  total = 0.0
  for s in range(setting.experts):
    scores = x @ router[s]
    kept = sorted(range(len(tokens)), key=lambda j: -scores[j])[: setting.kept]
    gates = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
    for gate, j in zip(gates, kept, strict=True):
      neurons = [max(0.0, float(experts[s, :, r] @ x[j])) for r in range(setting.neurons)]
      total += setting.signs()[s] * gate * sum(neurons) / setting.neurons
  return total


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_expert_choice_against_a_plain_loop(kept: int):
  setting = _setting(kept=kept)
  params, batch = _model(setting)
  found = two_layer.outputs(params, setting, batch.tokens[:16])
  plain = [_plain_output(params, setting, np.asarray(tokens)) for tokens in batch.tokens[:16]]
  np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)
  chosen, gates = two_layer.route(params.router, batch.tokens, kept)
  scores = np.take_along_axis(np.asarray(params.router)[:, None], np.asarray(chosen), axis=2)
  assert (np.diff(scores, axis=-1) <= 0).all()
  np.testing.assert_allclose(np.asarray(gates).sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_written_out_gradients_are_those_of_autodiff(scale: float):
  setting = _setting()
  params, batch = _model(setting, scale)
  active = np.mean(np.asarray(batch.labels * two_layer.outputs(params, setting, batch.tokens)) < 1)
  assert active == 1 if scale == 1 else 0.1 < active < 0.9  # also with a hinge that is partly off
  written, traced = two_layer.gradients(params, setting, batch), jax.grad(two_layer.loss)(params, setting, batch)
  np.testing.assert_allclose(written.experts, setting.neurons * np.asarray(traced.experts), rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(written.router, traced.router, rtol=1e-4, atol=1e-7)
  moved = two_layer.step(params, setting, batch)
  np.testing.assert_allclose(moved.router, params.router - setting.router_rate * written.router, rtol=1e-6)
  assert two_layer.loss(moved, setting, batch) < two_layer.loss(params, setting, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[two_layer.Setting, two_layer.Trained]:
  setting = _setting(alpha=0.2, neurons=16)
  return setting, two_layer.train(setting, range(4), test_size=512)


def test_training_stops_when_every_test_input_is_right(trained: tuple):
  setting, found = trained
  assert found.reached.all()
  for seed in range(4):
    after = jax.tree.map(lambda a, n=seed: a[n], found.after)
    test = two_layer.test_batch(seed, setting, 512)
    assert (measures.margins(after, setting, test) > 0).all()
  assert (found.steps % 5 == 0).all()
  assert len(set(found.steps.tolist())) > 1  # seeds stop for themselves


def test_training_is_deterministic_and_seeds_do_not_touch_each_other(trained: tuple):
  setting, found = trained
  again = two_layer.train(setting, range(4), test_size=512)
  assert all(map(np.array_equal, jax.tree.leaves(found.after), jax.tree.leaves(again.after)))
  alone = two_layer.train(setting, [2], test_size=512)
  assert alone.steps[0] == found.steps[2]
  np.testing.assert_allclose(alone.after.experts[0], found.after.experts[2], atol=1e-6)


def test_a_margin_that_is_not_reached_is_said():
  found = two_layer.train(_setting(margin=5.0), [0], test_size=64, most=10)
  assert found.reached.tolist() == [False]


def test_norm_changes_and_activations_order_relevant_experts_by_frequency(trained: tuple):
  setting, found = trained
  kinds = measures.experts_of(setting)
  for seed in range(4):
    before, after = (jax.tree.map(lambda a, n=seed: a[n], p) for p in (found.before, found.after))
    change, active = measures.norm_change(before, after), measures.activations(after, setting)
    assert change[kinds["rare"]].max() < change[kinds["frequent"]].min()
    assert active[kinds["rare"]].mean() < active[kinds["frequent"]].mean()
    assert np.isnan(active[kinds["irrelevant"]]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def test_norm_change_is_the_difference_of_norms():
  before = two_layer.Params(jnp.zeros((1, 2, 1)), jnp.array([[3.0, 4.0]]))
  after = two_layer.Params(jnp.zeros((1, 2, 1)), jnp.array([[-3.0, -4.0]]))
  assert measures.norm_change(before, after) == 0  # where the norm of the difference would be 10


def test_max_variance_is_the_biased_one_of_the_worst_neuron():
  dense = np.array([[[1.0, 5.0], [3.0, 5.0]], [[0.0, 9.0], [0.0, 1.0]]])
  np.testing.assert_allclose(measures.max_variance(dense), [1.0, 16.0])


def test_proficiency_of_a_router_that_looks_for_one_token():
  setting = _setting()
  router = jnp.zeros((setting.experts, setting.dim)).at[0, 1].set(3.0).at[1, 1].set(-3.0)
  test = two_layer.sample(jax.random.key(0), setting, 500)
  skill = measures.proficiency(two_layer.Params(jnp.zeros((8, 64, 8)), router), setting, test)
  assert skill.shape == (8, 4)
  assert skill[0, 1] == 1
  assert skill[1, 1] == 0
