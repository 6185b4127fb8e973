"""Activations in 8 bits: against the same rounding in float64, near the exact product, and only when asked for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax.kernels import api, cpu, cpu_int8, cpu_loop, shapes, varying
from tests import conformance


def rounded(x: np.ndarray, size: int) -> np.ndarray:
  """`[T, K]` float64: rows as 8-bit codes times a scale for every `size` inputs."""
  groups = np.pad(x, ((0, 0), (0, -x.shape[1] % size))).reshape(len(x), -1, size)
  scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
  return (np.round(groups / np.where(scale > 0, scale, 1)) * np.float64(scale)).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("rows", [1, 3, 24])
@pytest.mark.parametrize(("shape", "group"), [((6, 128, 192), 64), ((4, 192, 40), 32), ((3, 100, 65), 0),
                                              ((5, 576, 64), 128)])
def test_the_product_is_that_of_the_rounded_rows(shape: tuple[int, int, int], group: int, rows: int):
  bits = conformance.mixed(shape[0])
  made = conformance.packed(bits, shape, group=group)
  x, sizes = conformance.rows(rows, shape[1]), shapes.group_sizes("zipf", rows, shape[0])
  x[0, :64] = 0
  y = jax.jit(lambda x: api.grouped_matmul(x, made.q, sizes, activations="int8"))(x)
  owner = np.repeat(bits, sizes)[:, None]
  wanted = np.where(owner == 16, x, rounded(x, group or cpu_int8.ONE_GROUP))
  assert conformance.difference(y, conformance.expected(wanted, made.values, sizes)) < 1e-5
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 2e-2


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (ml_dtypes.bfloat16, 1e-2)])
@pytest.mark.parametrize(("name", "projection"), conformance.SCALED.items())
def test_named_shapes_under_every_routing(
    monkeypatch: pytest.MonkeyPatch, name: str, projection: str, dtype: type, limit: float):
  """At 1/16 of their size; outputs are NaN where nothing is written."""
  rows, zeros = 32, varying.zeros  # at most 8 per expert; with more, the exact way is taken
  monkeypatch.setattr(varying, "zeros", lambda shape, dtype, like: (
    jnp.full(shape, jnp.nan, dtype) if shape[0] == rows else zeros(shape, dtype, like)))
  shape = shapes.LAYERS[name].scaled(1 / 16).matmuls()[projection]
  bits = conformance.mixed(shape[0])
  made, x = conformance.packed(bits, shape, group=32), conformance.rows(rows, shape[1], dtype)
  exact = x.astype(np.float64)
  for routing in shapes.ROUTINGS:
    sizes = shapes.group_sizes(routing, rows, shape[0])
    wide = np.repeat(bits, sizes)[:, None] == 16
    y = conformance.jitted("cpu_int8")(x, made.q, sizes)
    wanted = conformance.expected(np.where(wide, exact, rounded(exact, 32)), made.values, sizes)
    assert conformance.difference(y, wanted) < limit
    assert conformance.difference(y, conformance.expected(exact, made.values, sizes)) < 2e-2


@pytest.mark.parametrize("most", [1, 2, 32])
def test_blocks_of_their_own_widths(monkeypatch, most: int):
  monkeypatch.setattr(cpu_loop, "MOST_STRIPES", most)
  bits = np.array([[[1, 8, 16, 2], [3, 16, 4, 1]], [[4, 2, 3, 16], [2, 1, 8, 3]]])
  made = conformance.packed(bits, (2, 256, 64), group=64)
  x, sizes = conformance.rows(9, 256), np.array([4, 5], np.int32)
  y = api.grouped_matmul(x, made.q, sizes, activations="int8")
  wide = conformance.widths(bits, (2, 256, 64), 64) == 16
  wanted = (conformance.expected(x, np.where(wide, made.values, 0), sizes)
            + conformance.expected(rounded(x, 64), np.where(wide, 0, made.values), sizes))
  assert conformance.difference(y, wanted) < 1e-5
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 2e-2


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_k_blocks_smaller_than_a_group_of_inputs(monkeypatch, activations: str, dtype: type):
  monkeypatch.setattr(cpu, "LEAST_WEIGHTS_AFTER", 0)
  bits = np.array([[[1], [3], [8], [2]], [[4], [2], [1], [3]]])
  made = conformance.packed(bits, (2, 64, 64), group=0)
  assert made.q.k_block == 16
  x, sizes = conformance.rows(9, 64, dtype), np.array([4, 5], np.int32)
  y = api.grouped_matmul(x, made.q, sizes, activations=activations)
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-2


def test_many_rows_and_gradients_are_exact():
  made = conformance.packed(2, (2, 64, 64))
  x, sizes = conformance.rows(100, 64), np.array([60, 40], np.int32)
  run = lambda activations: jax.vjp(lambda x: api.grouped_matmul(x, made.q, sizes, activations=activations), x)
  (y, pull), (exact, exact_pull) = run("int8"), run("exact")
  np.testing.assert_array_equal(y, exact)
  few = jnp.asarray(x[:4]), jnp.array([3, 1])
  grad = lambda kind: jax.grad(lambda x: jnp.sum(api.grouped_matmul(x, made.q, few[1], activations=kind)))(few[0])
  np.testing.assert_array_equal(grad("int8"), grad("exact"))
  np.testing.assert_array_equal(pull(exact)[0], exact_pull(exact)[0])


def test_it_is_never_chosen_unasked_and_says_what_it_cannot_do():
  q = conformance.packed(2, (2, 64, 64)).q
  x, sizes = conformance.rows(4, 64), np.array([2, 2], np.int32)
  assert api.choose(x, q, device="cpu") == "cpu"
  assert api.choose(x, q, device="cpu", activations="int8") == "cpu_int8"
  with pytest.raises(ValueError, match="8 bits are for CPUs, and the device is 'gpu'"):
    api.choose(x, q, device="gpu", activations="int8")
  with pytest.raises(ValueError, match="need packed weights"):
    api.grouped_matmul(x, jnp.ones((2, 64, 64)), sizes, activations="int8")
  with pytest.raises(ValueError, match="activations='int4' is not one of"):
    api.grouped_matmul(x, q, sizes, activations="int4")
