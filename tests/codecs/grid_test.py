"""The shared grid: storage, rounding, groups, and the range search against exhaustive searches."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax.bench import _numpy_codecs
from moeq_jax.codecs import grid

DISTRIBUTIONS = {
    "gaussian": lambda random, shape: random.standard_normal(shape),
    "heavy": lambda random, shape: random.standard_t(3, shape),
    "skewed": lambda random, shape: random.exponential(1, shape),
    "far from zero": lambda random, shape: 5 + 0.3 * random.standard_normal(shape),
}
search = jax.jit(grid.search)


def draw(name: str, seed: int, rows: int = 64, columns: int = 40) -> np.ndarray:
  return DISTRIBUTIONS[name](np.random.default_rng(seed), (rows, columns)).astype(np.float32)


def squared_error(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
  x, scale, zero = (np.asarray(a, np.float64) for a in (x, scale, zero))
  return np.square((np.clip(np.round(x / scale + zero), 0, 2**bits - 1) - zero) * scale - x).sum(0)


def minmax_error(x: np.ndarray, bits: int) -> np.ndarray:
  return squared_error(x, *_numpy_codecs.affine(x.min(0), x.max(0), 2**bits - 1), bits)


def test_storage_rounding_survives_compilation():
  x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 300
  rounded = np.asarray(jax.jit(lambda v: grid.to_storage(v) + 0)(x))
  np.testing.assert_array_equal(rounded, x.astype(jnp.bfloat16).astype(np.float32))
  assert (rounded != x).mean() > 0.9


def test_top_code_of_every_width():
  assert [int(grid.top_code(b)) for b in grid.WIDTHS] == [1, 3, 7, 15, 255]


@hypothesis.given(st.sampled_from(sorted(DISTRIBUTIONS)), st.sampled_from(grid.WIDTHS), st.integers(0, 1000))
def test_rounding_is_within_half_a_step_inside_the_range(name, bits, seed):
  x = draw(name, seed)
  scale, zero = (np.asarray(a) for a in search(x, None, bits))
  codes = np.asarray(grid.quantize(x, scale, zero, grid.top_code(bits)))
  assert set(np.unique(codes)) <= set(range(2**bits))
  restored = (codes - zero) * scale
  inside = (x >= -zero * scale) & (x <= (2**bits - 1 - zero) * scale)
  assert inside.mean() > 0.1
  slack = 1e-6 * np.abs(zero * scale)
  assert (np.abs(restored - x) <= (0.5 + 1e-5) * scale + slack)[inside].all()


@hypothesis.given(st.sampled_from(sorted(DISTRIBUTIONS)), st.sampled_from(grid.WIDTHS), st.integers(0, 1000))
def test_search_is_never_worse_than_minmax(name, bits, seed):
  x = draw(name, seed)
  scale, zero = search(x, None, bits)
  assert (squared_error(x, scale, zero, bits) <= minmax_error(x, bits) * (1 + 1e-4)).all()


def test_search_gains_where_clipping_pays():
  x = draw("gaussian", 0)
  gain = {bits: squared_error(x, *search(x, None, bits), bits).sum() / minmax_error(x, bits).sum()
          for bits in (1, 2, 3, 4)}
  assert gain[1] < 0.2 and gain[2] < 0.6 and gain[3] < 0.8 and gain[4] < 0.9


def best_two_levels(x: np.ndarray) -> np.ndarray:
  """The least squared error of any two levels, per column: every split of the sorted weights."""
  ordered = np.sort(x.astype(np.float64), axis=0)
  errors = [sum(np.square(part - part.mean(0)).sum(0) for part in (ordered[:i], ordered[i:]))
            for i in range(1, len(ordered))]
  return np.min(errors, axis=0)


@pytest.mark.parametrize("name", ["gaussian", "heavy", "skewed"])
def test_one_bit_is_near_the_best_two_levels(name):
  x = draw(name, 1)
  ratio = squared_error(x, *search(x, None, 1), 1) / best_two_levels(x)
  assert ratio.min() > 1 - 1e-6
  assert np.mean(ratio) < 1.05


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_near_an_exhaustive_one(bits):
  x = draw("heavy", 2)
  low, high, center = x.min(0), x.max(0), x.mean(0)
  keep = np.linspace(1, 1 - grid.DEEPEST_CUT[bits], 24, dtype=np.float32)
  grids = [_numpy_codecs.affine(center + a * (low - center), center + b * (high - center), 2**bits - 1)
           for a in keep for b in keep]
  exhaustive = np.min([squared_error(x, *g, bits) for g in grids], axis=0)
  assert squared_error(x, *search(x, None, bits), bits).sum() < 1.05 * exhaustive.sum()


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_flat_groups_are_exact(bits):
  constants = np.array([0, 1, -1, 0.15625, -3e30, 2.0**-100, -0.0], np.float32)
  constants = constants.astype(jnp.bfloat16).astype(np.float32)
  x = np.broadcast_to(constants, (32, len(constants)))
  scale, zero = search(x, None, bits)
  restored = (grid.quantize(x, scale, zero, grid.top_code(bits)) - zero) * scale
  np.testing.assert_array_equal(restored, x)


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_nearly_flat_groups_keep_the_precision_of_the_scale(bits):
  x = (3 + 1e-6 * np.random.default_rng(0).standard_normal((64, 20))).astype(np.float32)
  scale, zero = search(x, None, bits)
  restored = (grid.quantize(x, scale, zero, grid.top_code(bits)) - zero) * scale
  np.testing.assert_allclose(restored, x, rtol=2.0**-7)


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_extreme_weights_stay_finite(bits):
  x = draw("gaussian", 6) * np.array([1e-38, 1e-30, 1e20, 1e36], np.float32).repeat(10)
  scale, zero = search(x, None, bits)
  restored = (grid.quantize(x, scale, zero, grid.top_code(bits)) - zero) * scale
  assert np.isfinite(np.asarray(restored)).all()
  assert (np.abs(restored - x).max(0) <= np.ptp(x.astype(np.float64), axis=0) + 1e-37).all()


def test_padding_has_no_influence():
  w = 5 + draw("gaussian", 3, rows=100)
  slabs, valid = grid.split(w, 64)
  assert slabs.shape == (2, 64, 40) and int(valid.sum()) == 100
  for bits in (1, 2, 4):
    padded, alone = search(slabs[1], valid[1], bits), search(w[64:], None, bits)
    np.testing.assert_allclose(squared_error(w[64:], *padded, bits), squared_error(w[64:], *alone, bits), rtol=1e-3)


@pytest.mark.parametrize("group", grid.GROUPS[1:])
def test_group_size_is_read_off_the_shapes(group):
  for rows in range(1, 700):
    groups = -(-rows // group)
    assert grid.infer_group(rows, groups) == (group if groups > 1 else 0)
  with pytest.raises(ValueError, match="fit no group size"):
    grid.infer_group(256, 3)


@pytest.mark.parametrize("group", [48, 64.0, -1, None, True])
def test_other_groups_are_refused(group):
  with pytest.raises(ValueError, match="is not one of"):
    grid.check_group(group)


def random_encoded(rows: int, groups: int, columns: int, padding: int = 0) -> grid.Encoded:
  random = np.random.default_rng(4)
  scale, zero = random.uniform(0.5, 2, (2, 3, groups, columns)).astype(jnp.bfloat16)
  return grid.Encoded(random.integers(0, 16, (3, rows + padding, columns)).astype(np.uint8), scale, zero)


@pytest.mark.parametrize(("rows", "group", "groups"), [(100, 64, 2), (128, 32, 4), (70, 0, 1)])
def test_decode_is_the_formula(rows, group, groups):
  encoded = random_encoded(rows, groups, 5, padding=8)
  found = np.asarray(grid.decode(encoded, group, rows))
  assert found.dtype == np.float32 and found.shape == (3, rows, 5)
  for e, k, n in np.ndindex(found.shape):
    g = k // group if group else 0
    expected = (float(encoded.codes[e, k, n]) - float(encoded.zero[e, g, n])) * float(encoded.scale[e, g, n])
    assert found[e, k, n] == pytest.approx(expected, rel=1e-6)


def test_errors_are_the_formulas_in_float64():
  random = np.random.default_rng(5)
  w = random.standard_normal((100, 7)).astype(np.float32)
  inputs = random.standard_normal((300, 100)).astype(np.float32)
  encoded = jax.tree.map(lambda a: a[0], random_encoded(100, 2, 7))
  weight, output = jax.jit(grid.errors)(w, encoded, inputs.T @ inputs)
  delta = np.asarray(functools.partial(grid.decode, group=64, rows=100)(encoded), np.float64) - w
  assert float(weight) == pytest.approx(np.square(delta).sum(), rel=1e-5)
  assert float(output) == pytest.approx(np.square(inputs @ delta).sum(), rel=1e-4)
