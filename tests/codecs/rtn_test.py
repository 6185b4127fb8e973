"""RTN against plain numpy, and its promises."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax.bench import _numpy_codecs
from moeq_jax.codecs import grid, rtn

encode = functools.partial(jax.jit(rtn.encode, static_argnums=3), moment=None)


def weights(seed: int, rows: int = 128, columns: int = 48, degrees: float = 5) -> np.ndarray:
  return (0.02 * np.random.default_rng(seed).standard_t(degrees, (rows, columns))).astype(np.float32)


def squared_error(w: np.ndarray, encoded: grid.Encoded, group: int) -> float:
  return float(np.square(np.asarray(grid.decode(encoded, group, w.shape[0]), np.float64) - w).sum())


@pytest.mark.parametrize("bits", grid.WIDTHS)
@pytest.mark.parametrize(("rows", "group"), [(128, 32), (128, 0), (200, 128)])
def test_equals_numpy(rows, group, bits):
  w = weights(0, rows)
  encoded = encode(w, bits, spec=rtn.Spec(group=group))
  codes, scale, zero = _numpy_codecs.rtn(w.astype(np.float64), bits, group)
  same = (np.asarray(encoded.scale, np.float64) == scale) & (np.asarray(encoded.zero, np.float64) == zero)
  assert same.mean() > 0.95  # the rest: two ranges whose errors are equal to float32 rounding
  rows_of = np.arange(rows) // (group or rows)
  np.testing.assert_array_equal(np.asarray(encoded.codes)[same[rows_of]], codes[same[rows_of]])
  expected = np.square(_numpy_codecs.decode((codes, scale, zero), group) - w).sum()
  assert squared_error(w, encoded, group) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_shapes_types_and_range(bits):
  encoded = encode(weights(1, rows=100), bits, spec=rtn.Spec(group=64))
  assert encoded.codes.dtype == jnp.uint8 and encoded.codes.shape == (100, 48)
  assert encoded.scale.dtype == encoded.zero.dtype == jnp.bfloat16
  assert encoded.scale.shape == encoded.zero.shape == (2, 48)
  assert int(encoded.codes.max()) == 2**bits - 1 and int(encoded.codes.min()) == 0


@hypothesis.given(st.integers(0, 10_000), st.sampled_from([2.5, 5, 50]))
def test_more_bits_never_increase_the_error(seed, degrees):
  w = weights(seed, degrees=degrees)
  errors = [squared_error(w, encode(w, bits, spec=rtn.Spec(group=64)), 64) for bits in grid.WIDTHS]
  assert errors == sorted(errors, reverse=True)


def test_smaller_groups_lower_the_error():
  w = weights(2)
  errors = [squared_error(w, encode(w, 3, spec=rtn.Spec(group=group)), group) for group in (32, 64, 0)]
  assert errors == sorted(errors)


def test_experts_are_encoded_as_if_alone():
  w = np.stack([weights(seed) for seed in range(3)])
  spec = rtn.Spec(group=64)
  together = jax.jit(jax.vmap(lambda w, bits: rtn.encode(w, bits, None, spec)))(w, jnp.array([1, 3, 8]))
  for i, bits in enumerate((1, 3, 8)):
    alone = encode(w[i], bits, spec=spec)
    assert np.mean(np.asarray(together.codes[i]) == np.asarray(alone.codes)) > 0.99
    error = squared_error(w[i], jax.tree.map(lambda a, i=i: a[i], together), 64)
    assert error == pytest.approx(squared_error(w[i], alone, 64), rel=1e-3)
