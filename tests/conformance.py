"""What every back-end of `kernels.grouped_matmul` must do, and the makers of packed weights that the tests share.

The oracle is float64 numpy over the codes that went *into* `pack`, so it knows nothing of the packed bytes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import planar, qtensor
from moeq_jax.kernels import api, shapes
from moeq_jax.qtensor import QTensor


def widths(bits: Any, shape: tuple[int, int, int], group: int) -> np.ndarray:
  """`[E, K, N]`, the width of every weight under `bits` (int, `[E]` or `[E, KB, NS]`)."""
  experts, K, N = shape
  blocks = np.asarray(bits) if np.ndim(bits) == 3 else np.broadcast_to(bits, experts)[:, None, None]
  size = planar.layout(K, N, group, *blocks.shape[1:])
  return blocks.repeat(size.k_block, 1)[:, :K].repeat(size.stripe, 2)[:, :, :N]


@dataclasses.dataclass(frozen=True)
class Packed:
  """A random packed weight and what went into it.

  Attributes:
    q: the QTensor.
    codes: `[E, K, N]` uint8, zero where the width is 16.
    values: `[E, K, N]` float64, `(code - zero) * scale`, or the bfloat16 weight where the width is 16.
  """

  q: QTensor
  codes: np.ndarray
  values: np.ndarray


def packed(bits: Any, shape: tuple[int, int, int], group: int = 64, seed: int = 0, **kwargs: Any) -> Packed:
  """Random codes, scales, zeros and 16-bit weights, packed; `kwargs` go to `qtensor.pack`."""
  rng = np.random.default_rng(seed)
  width = widths(bits, shape, group)
  rows = shape[1] if group == 0 else min(group, shape[1])
  entries = shape[0], -(-shape[1] // rows), shape[2]
  codes = np.where(width == 16, 0, rng.integers(0, 256, shape) % (1 << np.minimum(width, 8))).astype(np.uint8)
  scale = (rng.uniform(0.5, 1.5, entries) * 2.0 ** -rng.integers(3, 8, entries)).astype(ml_dtypes.bfloat16)
  zero = rng.uniform(0, 4, entries).astype(ml_dtypes.bfloat16)
  weights = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
  spread = [a.astype(np.float64).repeat(rows, 1)[:, : shape[1]] for a in (scale, zero)]
  values = np.where(width == 16, weights.astype(np.float64), (codes - spread[1]) * spread[0])
  return Packed(qtensor.pack(codes, bits, scale, zero, group=group, weights=weights, **kwargs), codes, values)


def mixed(experts: int, seed: int = 0) -> np.ndarray:
  """`[E]` widths, all of them present if there are enough experts."""
  return np.random.default_rng(seed).permutation(np.resize(qtensor.WIDTHS, experts))


def expected(x: np.ndarray, values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """`[T, N]` float64, expert by expert."""
  ends = np.cumsum(sizes)
  parts = [x[end - size : end].astype(np.float64) @ w for end, size, w in zip(ends, sizes, values, strict=True)]
  return np.concatenate(parts)


def difference(actual: Any, wanted: np.ndarray) -> float:
  """Relative Frobenius distance, infinite if anything is not finite."""
  distance = np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
  return float(distance) if np.isfinite(distance) else float("inf")


def rows(count: int, columns: int, dtype: Any = np.float32, seed: int = 1) -> np.ndarray:
  """`[count, columns]` normal rows."""
  return np.random.default_rng(seed).normal(size=(count, columns)).astype(dtype)


@functools.cache
def jitted(backend: str, out_dtype: Any = None) -> Any:
  """The jitted door; one for all tests, so that equal shapes compile once."""
  return jax.jit(functools.partial(api.grouped_matmul, backend=backend, out_dtype=out_dtype))


@functools.cache
def jitted_gradients(backend: str, argnums: tuple[int, ...]) -> Any:
  """The jitted gradients of `sum(y * dy)` in `x` (0) and `w` (1)."""

  def loss(x: jax.Array, w: Any, sizes: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.sum(api.grouped_matmul(x, w, sizes, backend=backend, out_dtype=jnp.float32) * dy)

  return jax.jit(jax.grad(loss, argnums))


def made_by(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
  """All that `module.name` makes from now on; Pallas' interpreters keep the races of the last launch only."""
  found, make = [], getattr(module, name)

  def record(*args: Any, **kwargs: Any) -> Any:
    found.append(make(*args, **kwargs))
    return found[-1]

  monkeypatch.setattr(module, name, record)
  return found


SHAPE = 6, 96, 33
SCALED = {
  "mixtral-8x7b": "down", "switch-base-64": "up", "qwen3-30b-a3b": "gate", "smollm2-upcycled": "down",
  "moeq-small": "up"}


class Conformance:
  """Inherit, name the class `Test...`, and set `backend`.

  Attributes:
    backend: its name.
    kept: whether programs are kept from call to call; those of the Hopper interpreter were seen to be traced again.
  """

  backend: str
  kept: bool = True

  def matmul(self, x: Any, w: Any, sizes: Any, out_dtype: Any = None) -> jax.Array:
    return jitted(self.backend, out_dtype)(x, w, sizes)

  def gradients(self, x: Any, w: Any, sizes: Any, dy: np.ndarray) -> tuple[jax.Array, ...]:
    """`(dx, dw)` for an array, `(dx,)` for packed weights."""
    return jitted_gradients(self.backend, (0,) if isinstance(w, QTensor) else (0, 1))(x, w, sizes, dy)

  @pytest.mark.parametrize(("dtype", "count", "limit"), [(np.float32, 60, 1e-5), (ml_dtypes.bfloat16, 80, 1e-2)])
  @pytest.mark.parametrize(("name", "projection"), SCALED.items())
  def test_named_shapes_at_a_sixteenth_under_every_routing(
      self, name: str, projection: str, dtype: Any, count: int, limit: float):
    """Of the 60 rows a TPU kernel computes all at once; 80 it sorts into row tiles."""
    shape = shapes.LAYERS[name].scaled(1 / 16).matmuls()[projection]
    made, x = packed(mixed(shape[0]), shape, group=32), rows(count, shape[1], dtype)
    for routing in shapes.ROUTINGS:
      sizes = shapes.group_sizes(routing, count, shape[0])
      assert difference(self.matmul(x, made.q, sizes), expected(x, made.values, sizes)) < limit

  @pytest.mark.parametrize("routing", shapes.ROUTINGS)
  @pytest.mark.parametrize("count", [1, 100])
  def test_routings(self, routing: str, count: int):
    made = packed(mixed(6), SHAPE, group=32)
    x, sizes = rows(count, 96), shapes.group_sizes(routing, count, 6)
    wanted = expected(x, made.values, sizes)
    assert difference(self.matmul(x, made.q, sizes), wanted) < 1e-5
    assert difference(self.matmul(x, made.values.astype(np.float32), sizes), wanted) < 1e-5

  @pytest.mark.parametrize(
    "sizes", [(0, 0, 100, 0, 0, 0), (1, 1, 1, 1, 1, 95), (99, 0, 0, 0, 0, 1), (0, 0, 1, 0, 99, 0)]
  )
  def test_empty_experts_and_experts_of_one_row(self, sizes: tuple[int, ...]):
    made = packed(mixed(6), SHAPE, group=32)
    x, sizes = rows(100, 96), np.array(sizes, np.int32)
    wanted = expected(x, made.values, sizes)
    assert difference(self.matmul(x, made.q, sizes), wanted) < 1e-5
    assert difference(self.matmul(x, made.values.astype(np.float32), sizes), wanted) < 1e-5

  def test_packed_equals_dequantized(self):
    made = packed(mixed(6), SHAPE, group=32)
    x, sizes = rows(100, 96), shapes.group_sizes("uniform", 100, 6)
    dense = self.matmul(x, qtensor.dequantize(made.q), sizes)
    assert difference(self.matmul(x, made.q, sizes), np.asarray(dense, np.float64)) < 1e-5

  def test_bfloat16_rows(self):
    made = packed(mixed(6), SHAPE, group=32)
    x, sizes = rows(100, 96, ml_dtypes.bfloat16), shapes.group_sizes("zipf", 100, 6)
    wanted = expected(x, made.values, sizes)
    assert self.matmul(x, made.q, sizes).dtype == jnp.bfloat16
    assert difference(self.matmul(x, made.q, sizes), wanted) < 1e-2
    assert difference(self.matmul(x, made.values.astype(ml_dtypes.bfloat16), sizes), wanted) < 1e-2
    dx = self.gradients(x, made.q, sizes, rows(100, 33))[0]
    assert dx.dtype == jnp.bfloat16
    assert difference(dx, expected(rows(100, 33), made.values.swapaxes(1, 2), sizes)) < 1e-2

  def test_the_type_of_the_output_can_be_chosen(self):
    made = packed(4, (2, 64, 16))
    for dtype, out in ((np.float32, jnp.bfloat16), (ml_dtypes.bfloat16, jnp.float32)):
      x, sizes = rows(20, 64, dtype), np.array([11, 9], np.int32)
      y = self.matmul(x, made.q, sizes, out_dtype=out)
      assert y.dtype == out
      assert difference(y, expected(x, made.values, sizes)) < 1e-2

  @pytest.mark.parametrize("group", [0, *planar.GROUPS])
  def test_scale_groups(self, group: int):
    made = packed((3, 16, 1), (3, 256, 40), group=group)
    x, sizes = rows(12, 256), np.array([7, 1, 4], np.int32)
    assert difference(self.matmul(x, made.q, sizes), expected(x, made.values, sizes)) < 1e-5

  def test_widths_that_change_inside_an_expert(self):
    bits = np.random.default_rng(3).choice(qtensor.WIDTHS, (3, 4, 3))
    made = packed(bits, (3, 500, 50), group=32)
    x, sizes = rows(50, 500), np.array([20, 0, 30], np.int32)
    dy = rows(50, 50, seed=2)
    assert difference(self.matmul(x, made.q, sizes), expected(x, made.values, sizes)) < 1e-5
    assert difference(self.gradients(x, made.q, sizes, dy)[0], expected(dy, made.values.swapaxes(1, 2), sizes)) < 1e-5

  def test_padding_is_never_read(self):
    bits = np.array([2, 16, 3, 16, 1, 8])
    made = packed(bits, SHAPE, group=32, capacity=2000)
    buffer, scale, zero = (np.array(a) for a in (made.q.buffer, made.q.scale, made.q.zero))
    buffer[:, qtensor.used_rows(made.q) :] = 0xFF
    scale[bits == 16], zero[bits == 16] = np.nan, np.nan
    poisoned = dataclasses.replace(made.q, buffer=buffer, scale=scale, zero=zero)
    x, sizes, dy = rows(100, 96), np.array([7, 8, 0, 15, 30, 40], np.int32), rows(100, 33)
    np.testing.assert_array_equal(self.matmul(x, poisoned, sizes), self.matmul(x, made.q, sizes))
    np.testing.assert_array_equal(*(self.gradients(x, q, sizes, dy)[0] for q in (poisoned, made.q)))

  def test_an_expert_without_rows_is_never_used(self):
    values = packed(8, (3, 64, 16)).values.astype(np.float32)
    values[1] = np.nan
    x, sizes, dy = rows(25, 64), np.array([12, 0, 13], np.int32), rows(25, 16)
    dx, dw = self.gradients(x, values, sizes, dy)
    assert np.isfinite(self.matmul(x, values, sizes)).all()
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dw[1], 0)

  @pytest.mark.parametrize("routing", shapes.ROUTINGS)
  def test_gradients_equal_the_dense_formulas(self, routing: str):
    made = packed(mixed(6), SHAPE, group=32)
    x, sizes, dy = rows(100, 96), shapes.group_sizes(routing, 100, 6), rows(100, 33, seed=2)
    dx = expected(dy, made.values.swapaxes(1, 2), sizes)
    ends = np.cumsum(sizes)
    dw = np.stack([x[e - n : e].T.astype(np.float64) @ dy[e - n : e] for e, n in zip(ends, sizes, strict=True)])
    assert difference(self.gradients(x, made.q, sizes, dy)[0], dx) < 1e-5
    actual = self.gradients(x, made.values.astype(np.float32), sizes, dy)
    assert difference(actual[0], dx) < 1e-5
    assert difference(actual[1], dw) < 1e-5

  def test_one_compilation_serves_every_plan_and_every_routing(self):
    traced = []

    @jax.jit
    def run(x: jax.Array, w: QTensor, sizes: jax.Array) -> jax.Array:
      traced.append(w.shape)
      return api.grouped_matmul(x, w, sizes, backend=self.backend)

    x, shape = rows(40, 64), (4, 64, 24)
    for seed, bits in enumerate((2, (1, 2, 3, 4), (16, 1, 8, 2), 16)):
      made = packed(bits, shape, capacity=qtensor.packed_rows(16, shape, 64))
      sizes = shapes.group_sizes("zipf", 40, 4, seed)
      assert difference(run(x, made.q, sizes), expected(x, made.values, sizes)) < 1e-5
    assert traced == [shape] or not self.kept

  def test_vmap_over_rows_equals_a_loop(self):
    made = packed((3, 2), (2, 64, 24))
    x, sizes = rows(60, 64).reshape(3, 20, 64), np.array([[20, 0], [9, 11], [1, 19]], np.int32)
    many = jax.vmap(lambda x, sizes: api.grouped_matmul(x, made.q, sizes, backend=self.backend))(x, sizes)
    for index in range(3):
      assert difference(many[index], expected(x[index], made.values, sizes[index])) < 1e-5

  def test_vmap_over_weights_is_refused(self):
    made = packed(3, (2, 64, 24))
    x, sizes = rows(20, 64), np.array([9, 11], np.int32)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), made.q)
    run = lambda w: api.grouped_matmul(x, w, sizes, backend=self.backend)  # noqa: E731
    for w in (stacked, jnp.ones((2, 2, 64, 24))):
      with pytest.raises(ValueError, match="vmap over w"):
        jax.vmap(run)(w)
    with pytest.raises(ValueError, match="vmap over w"):
      jax.vmap(jax.grad(lambda w: run(w).sum()))(jnp.ones((2, 2, 64, 24)))
