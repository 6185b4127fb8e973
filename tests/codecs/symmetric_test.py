"""The symmetric integer grid `ct`: what the format fixes, and a search that is never worse than plain scaling."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax import codecs
from moeq_jax.codecs import gptq, grid, rtn
from tests.codecs import gptq_test, grid_test

BITS = (2, 3, 4, 8)
search = jax.jit(grid.search_symmetric)
encode_rtn = functools.partial(jax.jit(rtn.encode, static_argnums=3), moment=None)
encode_gptq = jax.jit(gptq.encode, static_argnums=3)


def bfloat16(x: np.ndarray) -> np.ndarray:
  return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def squared_error(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
  """Of a group `[g, N]`, by the format's own arithmetic: integers from -2^(b-1) to 2^(b-1) - 1 times the scale."""
  scale = np.where(np.asarray(scale, np.float64) > 0, scale, 1).astype(np.float64)
  integers = np.clip(np.round(x.astype(np.float64) / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  return np.square(integers * scale - x).sum(0)


def plain_scales(x: np.ndarray, bits: int) -> list[np.ndarray]:
  """The largest magnitude over the largest integer, and over half the number of steps."""
  largest = np.abs(x).max(0)
  return [bfloat16(largest / np.float32(2 ** (bits - 1) - 1)), bfloat16(largest / np.float32((2**bits - 1) / 2))]


@hypothesis.given(st.sampled_from(sorted(grid_test.DISTRIBUTIONS)), st.sampled_from(BITS), st.integers(0, 1000))
def test_search_is_never_worse_than_plain_scaling(name, bits, seed):
  x = grid_test.draw(name, seed)
  scale, zero = (np.asarray(a) for a in search(x, None, bits))
  assert (zero == 2 ** (bits - 1)).all() and (scale > 0).all()
  np.testing.assert_array_equal(scale, bfloat16(scale))
  found = squared_error(x, scale[0], bits)
  for plain in plain_scales(x, bits):
    assert (found <= squared_error(x, plain, bits) * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["gaussian", "heavy", "skewed"])
def test_search_is_near_an_exhaustive_one(name, bits):
  x = grid_test.draw(name, 2)
  widest = plain_scales(x, bits)[0]
  tried = [squared_error(x, bfloat16(widest * share), bits) for share in np.geomspace(0.03, 1.05, 200)]
  found = squared_error(x, np.asarray(search(x, None, bits)[0])[0], bits)
  assert found.sum() < 1.02 * np.min(tried, axis=0).sum()
  assert found.sum() < {2: 0.95, 3: 0.98, 4: 0.99}[bits] * min(squared_error(x, s, bits).sum()
                                                               for s in plain_scales(x, bits))


@pytest.mark.parametrize("bits", BITS)
def test_padding_has_no_influence(bits):
  w = grid_test.draw("heavy", 3, rows=100)
  slabs, valid = grid.split(w, 64)
  padded, alone = search(slabs[1], valid[1], bits)[0], search(w[64:], None, bits)[0]
  assert squared_error(w[64:], padded[0], bits).sum() == pytest.approx(squared_error(w[64:], alone[0], bits).sum(),
                                                                       rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_are_exact_and_extremes_finite(bits):
  x = grid_test.draw("gaussian", 6) * np.array([0, 1e-38, 1e20, 1e36], np.float32).repeat(10)
  scale, zero = search(x, None, bits)
  restored = np.asarray((grid.quantize(x, scale, zero, grid.top_code(bits)) - zero) * scale)
  assert np.isfinite(restored).all() and (restored[:, :10] == 0).all()
  assert (np.abs(restored - x).max(0) <= np.abs(x).max(0) + 1e-37).all()


@pytest.mark.parametrize("spec", ["rtn(group=32, grid=ct)", "rtn(group=0, grid=ct)", "gptq(group=64, grid=ct)"])
def test_one_program_encodes_every_width_to_the_format(spec):
  codec = codecs.get(spec)
  w, moment = gptq_test.weights(3, rows=100), gptq_test.second_moment(3, rows=100)
  encode, errors = jax.jit(codec.encode), []
  for bits in BITS:
    encoded = encode(w, jnp.int32(bits), moment)
    assert encoded.codes.dtype == jnp.uint8 and encoded.scale.dtype == encoded.zero.dtype == jnp.bfloat16
    assert (np.asarray(encoded.zero, np.float32) == 2 ** (bits - 1)).all()
    assert (np.asarray(encoded.scale, np.float32) > 0).all()
    assert int(encoded.codes.max()) == 2**bits - 1 and (bits == 8 or int(encoded.codes.min()) == 0)
    errors.append(gptq_test.errors(w, encoded, moment)[1])
  assert encode._cache_size() == 1
  assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", BITS)
def test_rtn_rounds_every_weight_to_the_nearest_level(bits):
  w = gptq_test.weights(4)
  encoded = encode_rtn(w, bits, spec=rtn.Spec(group=32, grid="ct"))
  scale = np.asarray(encoded.scale, np.float32).repeat(32, axis=0)
  expected = np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
  assert np.mean(np.asarray(encoded.codes) == expected) > 0.999  # the rest: ties of x / scale and x / scale + zero


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("seed", [1, 2])
def test_gptq_beats_rtn_on_the_outputs(bits, group, seed):
  w, moment = gptq_test.weights(seed), gptq_test.second_moment(seed)
  _, output = gptq_test.errors(w, encode_gptq(w, bits, moment, gptq.Spec(group=group, grid="ct")), moment)
  nearest = encode_rtn(w, bits, spec=rtn.Spec(group=group, grid="ct"))
  assert output < 0.6 * gptq_test.errors(w, nearest, moment)[1]


@pytest.mark.parametrize("bits", BITS)
def test_gptq_without_correlations_is_rtn(bits):
  w = gptq_test.weights(5)
  found = encode_gptq(w, bits, np.zeros((gptq_test.K, gptq_test.K), np.float32), gptq.Spec(group=32, grid="ct"))
  gptq_test.assert_equal(found, encode_rtn(w, bits, spec=rtn.Spec(group=32, grid="ct")))


def test_what_the_freedom_of_the_affine_grid_is_worth():
  w = gptq_test.weights(6)
  for bits in BITS:
    free, symmetric = (gptq_test.errors(w, encode_rtn(w, bits, spec=rtn.Spec(group=32, grid=kind)), np.eye(len(w)))[0]
                       for kind in ("affine", "ct"))
    assert free < symmetric < 2.5 * free


@pytest.mark.parametrize(("spec", "said"), [
    ("hqq(grid=ct)", r"hqq\(grid=ct\).*take rtn or gptq"),
    ("rtn(grid=int)", "grid='int' is neither 'affine' nor 'ct'"),
    ("gptq(grd=ct)", "did you mean 'grid'"),
])
def test_what_cannot_be_is_refused_by_name(spec, said):
  with pytest.raises(ValueError, match=said):
    codecs.get(spec)


def test_one_bit_is_refused_on_this_grid_alone():
  with pytest.raises(ValueError, match=r"rtn\(grid=ct, group=64\): one bit on the grid 'ct'.*leave 1 out"):
    codecs.get("rtn(grid=ct)").check_widths((1, 2, 4))
  with pytest.raises(ValueError, match="one bit on the grid 'ct'"):
    codecs.get("gptq(grid=ct)").encode(np.zeros((64, 8), np.float32), 1, np.eye(64, dtype=np.float32))
  with pytest.raises(ValueError, match=r"no codec encodes \[5\] bits"):
    codecs.get("rtn").check_widths((4, 5))
  codecs.get("rtn(grid=ct)").check_widths((2, 3, 4, 8))
  codecs.get("rtn").check_widths(codecs.WIDTHS)


def test_the_grid_is_in_the_spec_only_where_it_differs():
  assert str(codecs.get("rtn(grid=ct)")) == "rtn(grid=ct, group=64)"
  assert codecs.get(str(codecs.get("gptq(grid=ct, group=0)"))) == codecs.get("gptq(group=0, grid=ct)")
  assert str(codecs.get("rtn(grid=affine)")) == "rtn(group=64)"
