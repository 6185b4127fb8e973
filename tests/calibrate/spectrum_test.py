"""Bounds and estimates of spectra from sketches, against eigenvalues, on spectra of many shapes."""

import numpy as np
import pytest

from moeq_jax.calibrate import spectrum

N, RANK, DAMPING = 192, 32, 0.01
SHAPES = {
    "power law": np.arange(1, N + 1.0) ** -1.0, "slow power law": np.arange(1, N + 1.0) ** -0.5,
    "fast power law": np.arange(1, N + 1.0) ** -1.5, "steep power law": np.arange(1, N + 1.0) ** -2.5,
    "exponential": np.exp(-np.arange(N) / 20), "flat": np.ones(N),
    "two levels": np.r_[np.full(60, 5.0), np.full(132, 0.1)],
    "lognormal": np.exp(np.random.default_rng(1).normal(0, 1.5, N)),
    "singular": np.r_[np.arange(1, 21.0), np.zeros(N - 20)], "half dead": np.r_[np.ones(96), np.zeros(96)]}


def gram(values: np.ndarray, seed: int = 0) -> np.ndarray:
  rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
  return (rotation * values) @ rotation.T


def truth(matrix: np.ndarray, damping: float = DAMPING) -> tuple[float, float]:
  """`(condition, log AM/GM)` of the damped matrix, by eigenvalues."""
  values = np.maximum(np.linalg.eigvalsh(matrix), 0)
  damped = values + damping * values.mean()
  return damped.max() / damped.min(), np.log(damped.mean()) - np.log(damped).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
def test_the_truth_is_between_the_bounds(shape: str, scale: float):
  matrix = gram(SHAPES[shape]) * scale
  sketch = (matrix @ spectrum.test_vectors(N, RANK)).astype(np.float32)
  found, (condition, log_am_gm) = spectrum.summarise(sketch, np.diag(matrix)), truth(matrix)
  for (low, estimate, high), exact in ((found.condition, condition), (found.log_am_gm, log_am_gm)):
    assert low * (1 - 1e-4) - 1e-6 <= exact <= high * (1 + 1e-4) + 1e-6
    assert low <= estimate <= high
  # How far the estimate is off with 32 of 192 test vectors: what the module says.
  usual = "power law" in shape and "steep" not in shape or shape in ("lognormal", "flat")
  assert abs(found.log_am_gm[1] - log_am_gm) <= (0.4 if usual else 2.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_inputs_are_exact(shape: str):
  matrix = gram(SHAPES[shape][::6][:RANK])
  found = spectrum.summarise(matrix @ spectrum.test_vectors(len(matrix), RANK), np.diag(matrix))
  for values, exact in zip(found, truth(matrix), strict=True):
    np.testing.assert_allclose(values, [exact] * 3, rtol=1e-6, atol=1e-12)


def test_more_test_vectors_bring_the_bounds_together():
  matrix = gram(SHAPES["power law"])
  widths = []
  for rank in (8, 32, 128, N):
    found = spectrum.summarise(matrix @ spectrum.test_vectors(N, rank), np.diag(matrix))
    widths.append(found.log_am_gm[2] - found.log_am_gm[0])
  assert widths[0] > widths[1] > widths[2] > widths[3] == 0


def test_nothing_at_all_and_one_token():
  """No token: all eigenvalues are equal. One token: one eigenvalue, the others only damping."""
  nothing = spectrum.summarise(np.zeros((2, N, RANK)), np.zeros((2, N)))
  np.testing.assert_array_equal(nothing.condition, np.ones((2, 3)))
  np.testing.assert_array_equal(nothing.log_am_gm, np.zeros((2, 3)))
  x = np.random.default_rng(0).normal(size=(N, 1))
  one = spectrum.summarise(x @ x.T @ spectrum.test_vectors(N, RANK), x[:, 0]**2)
  np.testing.assert_allclose(one.condition, [N / DAMPING + 1] * 3, rtol=1e-6)
  assert np.isfinite(one.log_am_gm).all()


def test_pouring_levels_the_smallest():
  np.testing.assert_allclose(spectrum._levelled(np.array([3.0, 0.0, 1.0, 9.0]), 3.0), [2, 2, 3, 9])
  np.testing.assert_allclose(spectrum._levelled(np.array([0.0, 0.0, 4.0]), 11.0), [5, 5, 5])


def test_channels_of_unequal_scale_are_seen_in_the_diagonal():
  """A diagonal matrix: the bound by its diagonal is the truth, whatever the sketch shows."""
  values = SHAPES["half dead"][np.random.default_rng(0).permutation(N)]
  found = spectrum.summarise(np.diag(values) @ spectrum.test_vectors(N, 4), values)
  assert found.log_am_gm[0] == pytest.approx(truth(np.diag(values))[1], rel=1e-9) == found.log_am_gm[1]
