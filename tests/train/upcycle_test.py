"""Dense networks as experts: what they compute together is what the dense one did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.train import upcycle

D, F = 24, 48
Weights = dict[str, np.ndarray]


def dense(seed: int = 0) -> Weights:
  """A random network whose neurons point in a few directions."""
  rng = np.random.default_rng(seed)
  gate = rng.normal(size=(D, 4))[:, rng.integers(0, 4, F)] + 0.3 * rng.normal(size=(D, F))
  return {"gate": gate.astype(np.float32), "up": rng.normal(size=(D, F)).astype(np.float32),
          "down": rng.normal(size=(F, D)).astype(np.float32)}


def run(weights: Weights, x: np.ndarray) -> np.ndarray:
  weights = {name: w.astype(np.float64) for name, w in weights.items()}
  gate = x @ weights["gate"]
  return gate / (1 + np.exp(-gate)) * (x @ weights["up"]) @ weights["down"]


def mixture(router: np.ndarray, experts: Weights, x: np.ndarray, top_k: int) -> np.ndarray:
  """Mixtral's rule: softmax over the `top_k` largest logits."""
  logits = x @ router.T.astype(np.float64)
  out = np.zeros_like(x)
  for row, (logit, token) in enumerate(zip(logits, x)):
    chosen = np.argsort(-logit, kind="stable")[:top_k]
    weights = np.exp(logit[chosen] - logit[chosen].max())
    for e, weight in zip(chosen, weights / weights.sum()):
      out[row] += weight * run({name: w[e] for name, w in experts.items()}, token)
  return out


def rows(seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(16, D))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_compute_what_the_network_did_whatever_the_router_says(top_k: int):
  router, experts = upcycle.copy(dense(), 4, top_k, seed=3)
  assert router.shape == (4, D) and experts["gate"].shape == (4, D, F) and experts["down"].shape == (4, F, D)
  np.testing.assert_allclose(mixture(router, experts, rows(), top_k), run(dense(), rows()), rtol=1e-9, atol=1e-12)
  assert len(set(np.argmax(rows() @ router.T, 1))) > 1
  assert not np.array_equal(router, upcycle.copy(dense(), 4, top_k, seed=4)[0])


@pytest.mark.parametrize("experts", [2, 4, 6])
def test_all_parts_together_are_the_network(experts: int):
  router, parts = upcycle.split(dense(), experts, experts, seed=0)
  expected = run(dense(), rows())
  np.testing.assert_allclose(mixture(router, parts, rows(), experts), expected, atol=3e-5 * np.abs(expected).max())


def test_some_parts_are_the_sum_of_their_neurons():
  router, parts = upcycle.split(dense(), 4, 2, seed=0)
  out = mixture(router, parts, rows(), 2)
  chosen = np.argsort(-rows() @ router.T.astype(np.float64), axis=1)[:, :2]
  halves = {name: w / (2 if name == "down" else 1) for name, w in parts.items()}
  for token, got, two in zip(rows(), out, chosen):
    expected = sum(run({name: w[e] for name, w in halves.items()}, token) for e in two)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_every_neuron_is_in_one_part():
  _, parts = upcycle.split(dense(), 4, 1, seed=0)
  gates = np.moveaxis(parts["gate"], 0, 1).reshape(D, F)
  order = [int(np.flatnonzero((dense()["gate"] == gates[:, [i]]).all(0))[0]) for i in range(F)]
  assert sorted(order) == list(range(F))
  np.testing.assert_array_equal(np.moveaxis(parts["up"], 0, 1).reshape(D, F), dense()["up"][:, order])
  np.testing.assert_array_equal(parts["down"].reshape(F, D), dense()["down"][order])


def test_neurons_that_point_one_way_come_together():
  """Four bundles of 12 neurons each, in any order, are found again."""
  rng = np.random.default_rng(0)
  bundle = rng.permutation(np.repeat(np.arange(4), 12))
  centres = np.linalg.qr(rng.normal(size=(D, 4)))[0].T
  points = centres[bundle] + 0.05 * rng.normal(size=(48, D))
  members, found = upcycle.cluster(points / np.linalg.norm(points, axis=1, keepdims=True), 4, seed=2)
  assert sorted(tuple(bundle[group]) for group in members) == [(b,) * 12 for b in range(4)]
  assert np.max(found @ centres.T, axis=1) == pytest.approx(np.ones(4), abs=0.1)


def test_tokens_go_to_the_parts_that_they_excite():
  """The chosen half of the parts holds more of the output than a half drawn at random."""
  router, parts = upcycle.split(dense(), 4, 2, seed=0)
  expected = run(dense(), rows())
  error = lambda chosen: np.linalg.norm(mixture(chosen, parts, rows(), 2) - expected)
  rng = np.random.default_rng(0)
  assert error(router) < 0.9 * np.mean([error(1e-6 * rng.normal(size=router.shape)) for _ in range(10)])


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 9))
def test_groups_are_of_one_size_and_hold_every_point(groups: int, size: int, seed: int):
  points = np.random.default_rng(seed).normal(size=(groups * size, 5))
  members, centres = upcycle.cluster(points, groups, seed)
  assert members.shape == (groups, size) and centres.shape == (groups, 5)
  assert sorted(members.ravel()) == list(range(groups * size))
  assert upcycle.cluster(points, groups, seed)[0].tolist() == members.tolist()


def test_a_network_that_cannot_be_split_evenly_is_refused():
  with pytest.raises(ValueError, match="width 48 cannot be split into 5"):
    upcycle.split(dense(), 5, 1, seed=0)
