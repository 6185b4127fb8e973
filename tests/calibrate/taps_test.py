"""The tap passes values and gradients on as they are, and sums squared gradients by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.calibrate import taps


def squares(gradient: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  parts = np.split(np.asarray(gradient, np.float64) ** 2, np.cumsum(sizes)[:-1])
  return np.stack([part.sum(0) for part in parts])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [0, 10, 0, 0], [1, 2, 3, 4]])
def test_values_gradients_and_sums(compiled: bool, dtype: jnp.dtype, sizes: list[int]):
  rng = np.random.default_rng(0)
  x, cotangent = (jnp.asarray(rng.normal(size=(10, 7)), dtype) for _ in range(2))
  sizes = jnp.array(sizes, jnp.int32)

  def loss(x: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = taps.square_sum(x, total, sizes)
    return jnp.sum((y * cotangent).astype(jnp.float32)), y

  run = jax.grad(loss, argnums=(0, 1), has_aux=True)
  (dx, total), y = (jax.jit(run) if compiled else run)(x, jnp.zeros((4, 7), jnp.float32))
  np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))
  np.testing.assert_array_equal(np.asarray(dx, np.float32), np.asarray(cotangent, np.float32))
  assert dx.dtype == dtype and total.dtype == jnp.float32
  np.testing.assert_allclose(total, squares(np.asarray(cotangent, np.float64), sizes), rtol=1e-5)


def test_rows_past_the_last_group_belong_to_nobody():
  rows = jnp.ones((6, 2))
  np.testing.assert_array_equal(taps.group_squares(rows, jnp.array([2, 0, 1], jnp.int32)), [[2, 2], [0, 0], [1, 1]])


def test_it_goes_through_scan_and_remat():
  sizes = jnp.array([1, 2], jnp.int32)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4)), jnp.float32)
  x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32)

  def loss(total: jax.Array) -> jax.Array:
    step = jax.checkpoint(lambda h, w: (taps.square_sum(jnp.tanh(h @ w), total, sizes), None))
    return jnp.sum(jax.lax.scan(step, x, weights)[0])

  def perturbed(extra: jax.Array) -> jax.Array:
    h = x
    for w, e in zip(weights, extra, strict=True):
      h = jnp.tanh(h @ w) + e
    return jnp.sum(h)

  expected = sum(squares(g, np.asarray(sizes)) for g in jax.grad(perturbed)(jnp.zeros((3, 3, 4))))
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.zeros((2, 4))), expected, rtol=1e-4)
