"""Rotations are orthogonal, change nothing that an expert computes, and calibration sees what belongs to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from moeq_jax import artifacts, codecs
from moeq_jax.calibrate import statistics
from moeq_jax.encode import rotation
from tests import tiny

E, D, F = 2, 48, 32


@pytest.mark.parametrize("size", [1, 7, 192, 256, 576])
def test_a_rotation_is_orthogonal_and_the_same_for_the_same_seed(size: int):
  r = rotation.matrix(size, 3)
  np.testing.assert_allclose(r.T @ r, np.eye(size), atol=1e-5)
  np.testing.assert_array_equal(r, rotation.matrix(size, 3))
  assert size == 1 or not np.array_equal(r, rotation.matrix(size, 4))


def test_powers_of_two_give_hadamard_matrices_with_signs():
  r = rotation.matrix(64, 0) * 8
  signs = r[:, :1]  # the first column of Sylvester's matrix is ones
  np.testing.assert_allclose(signs * r, scipy.linalg.hadamard(64), atol=1e-5)


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match="0 dimensions"):
    rotation.matrix(0, 0)


def _experts(rng: np.random.Generator) -> dict[str, np.ndarray]:
  return {name: rng.normal(size=(E, *shape)).astype(np.float32)
          for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))}


def test_rotated_experts_compute_the_same_from_rotated_rows():
  rng = np.random.default_rng(0)
  experts, r = _experts(rng), rotation.matrix(D, 0)
  x = rng.normal(size=(5, D)).astype(np.float32)
  turned = {name: np.asarray(w) for name, w in rotation.rotate(experts, r).items()}

  def run(w: dict[str, np.ndarray], e: int, x: np.ndarray) -> np.ndarray:
    return (np.asarray(jax.nn.silu(x @ w["gate"][e])) * (x @ w["up"][e])) @ w["down"][e]

  for e in range(E):
    assert not np.allclose(turned["up"][e], experts["up"][e], atol=0.1)
    np.testing.assert_allclose(run(turned, e, x @ r) @ r.T, run(experts, e, x), rtol=1e-4, atol=2e-3)
  for name, w in rotation.restore(turned, r).items():
    np.testing.assert_allclose(w, experts[name], atol=1e-5)


def test_an_outlier_channel_is_gone():
  experts = _experts(np.random.default_rng(1))
  experts["up"][:, 5] *= 30  # one input channel of all neurons
  kurtosis = lambda w: np.median(scipy.stats.kurtosis(w, axis=1, fisher=False))
  turned = rotation.rotate(experts, rotation.matrix(D, 0))
  assert kurtosis(experts["up"]) > 20 > 5 > kurtosis(np.asarray(turned["up"]))


def test_calibration_sees_the_rotated_basis():
  functions, model = tiny.functions(), tiny.model()
  tokens = [np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (2, 16)).astype(np.int32)]
  r = rotation.matrix(tiny.CONFIG.hidden_size, 0)
  plain = statistics.collect(functions, model.top, list(model.blocks), tokens)
  seen = statistics.collect(rotation.watched(functions, r), model.top, list(model.blocks), tokens)
  scale = np.abs(plain.moment_in).max()
  np.testing.assert_allclose(seen.moment_in / scale, rotation.moment(plain.moment_in, r) / scale, atol=1e-4)
  assert not np.allclose(seen.moment_in / scale, plain.moment_in / scale, atol=1e-2)
  for name in ("moment_mid", "grad_sq_gate", "grad_sq_up"):  # nothing of the neurons is rotated
    was = getattr(plain, name)
    np.testing.assert_allclose(getattr(seen, name), was, rtol=2e-2, atol=1e-3 * np.abs(was).max())
  # An orthogonal R keeps the length of the gradient, and moves it between channels.
  np.testing.assert_allclose(seen.grad_sq_down.sum(-1), plain.grad_sq_down.sum(-1), rtol=1e-2)
  assert not np.allclose(seen.grad_sq_down, plain.grad_sq_down, rtol=1e-1)


def test_gptq_with_the_rotated_moment_is_gptq_of_the_rotated_problem():
  rng = np.random.default_rng(2)
  experts, r = _experts(rng), rotation.matrix(D, 0)
  x = (rng.normal(size=(200, D)) * np.linspace(0.1, 3, D)).astype(np.float32)
  w = np.asarray(rotation.rotate(experts, r)["up"][0])
  codec = codecs.get("gptq(group=0)")
  given = codec.encode(jnp.asarray(w), 3, rotation.moment(x.T @ x, r))
  found = codec.encode(jnp.asarray(w), 3, jnp.asarray((x @ r).T @ (x @ r)))
  assert np.mean(np.asarray(given.codes) != np.asarray(found.codes)) < 0.01
  error = lambda encoded: np.square(x @ r @ (np.asarray(codecs.decode(encoded, 0, D)) - w)).sum()
  assert error(given) < 0.7 * error(codec.encode(jnp.asarray(w), 3, jnp.asarray(x.T @ x)))
  assert artifacts.PROJECTIONS == tuple(experts)
