"""Matmul, norm and feed-forward network against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.models import layers


def test_dense_and_its_gradients():
  rng = np.random.default_rng(0)
  x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 4), (2, 3, 4)))
  y, pull = jax.vjp(layers.dense, jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(y, np.float64(x) @ w, rtol=1e-5, atol=1e-5)
  dx, dw = pull(jnp.asarray(dy))
  np.testing.assert_allclose(dx, np.float64(dy) @ w.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, np.einsum("bsk,bsn->kn", np.float64(x), dy), rtol=1e-5, atol=1e-5)


def test_dense_sums_the_gradient_of_the_weight_in_float32():
  """2049 is no bfloat16; the weight keeps its own dtype, the rows theirs."""
  x, w = jnp.ones((3, 683, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.float32)
  y, pull = jax.vjp(layers.dense, x, w)
  dx, dw = pull(jnp.ones_like(y))
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(dw, np.full((3, 2), 2049.0))


def test_rms_norm():
  rng = np.random.default_rng(0)
  x, weight = 100 * rng.normal(size=(2, 3, 8)), rng.normal(size=8)
  expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.5) * weight
  found = layers.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 0.5)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert layers.rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), 0.5).dtype == jnp.bfloat16


def test_the_feed_forward_network_and_what_its_tap_sees():
  rng, seen = np.random.default_rng(0), {}
  x, gate, up, down = (rng.normal(size=s).astype(np.float32) for s in ((5, 4), (4, 6), (4, 6), (6, 4)))

  def tap(name: str, value: jax.Array) -> jax.Array:
    seen[name] = value
    return -value if name == "down" else value

  out = layers.swiglu({"gate": gate, "up": up, "down": down}, jnp.asarray(x), tap)
  a = np.float64(x) @ gate
  expected = {"gate": a, "up": np.float64(x) @ up, "mid": a / (1 + np.exp(-a)) * (np.float64(x) @ up)}
  expected["down"] = expected["mid"] @ down
  assert list(seen) == ["gate", "up", "mid", "down"]
  for name, value in expected.items():
    np.testing.assert_allclose(seen[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  np.testing.assert_array_equal(out, -seen["down"])  # what the tap returns is what goes on


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 5), (5,)])
def test_logits(shape: tuple[int, ...]):
  rng = np.random.default_rng(0)
  h, weight = rng.normal(size=shape).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
  logits, pull = jax.vjp(layers.unembed, jnp.asarray(h, jnp.bfloat16), jnp.asarray(weight))
  assert (logits.shape, logits.dtype) == ((*shape[:-1], 7), jnp.float32)
  np.testing.assert_allclose(logits, np.float64(h) @ weight.T, atol=0.1)
  dy = rng.normal(size=logits.shape).astype(np.float32)
  np.testing.assert_allclose(np.float64(pull(jnp.asarray(dy))[0]), np.float64(dy) @ weight, atol=0.2)
