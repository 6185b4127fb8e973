"""HQQ by its own criterion, against numpy, min-max and RTN."""

import functools

import jax
import numpy as np
import pytest

from moeq_jax.bench import _numpy_codecs
from moeq_jax.codecs import grid, hqq, rtn

P = 0.7
encode = functools.partial(jax.jit(hqq.encode, static_argnums=3), moment=None)
encode_rtn = functools.partial(jax.jit(rtn.encode, static_argnums=3), moment=None)


def weights(seed: int, degrees: float = 3) -> np.ndarray:
  return (0.02 * np.random.default_rng(seed).standard_t(degrees, (128, 64))).astype(np.float32)


def criterion(w: np.ndarray, restored: np.ndarray, group: int) -> np.ndarray:
  """`sum |w - w_hat|^p` of every group, `[G, N]`."""
  powers = np.abs(np.asarray(restored, np.float64) - w) ** P
  return powers.reshape(-1, group or len(w), w.shape[1]).sum(1)


def minmax(w: np.ndarray, bits: int, group: int) -> np.ndarray:
  """Weights rounded on the min-max grid."""
  parts = w.reshape(-1, group or len(w), w.shape[1])
  scale, zero = (a[:, None] for a in _numpy_codecs.affine(parts.min(1), parts.max(1), 2**bits - 1))
  return ((_numpy_codecs.quantize(parts, scale, zero, 2**bits - 1) - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize("bits", grid.WIDTHS)
@pytest.mark.parametrize("group", [64, 0])
def test_equals_numpy(bits, group):
  w = weights(0)
  encoded = encode(w, bits, spec=hqq.Spec(group=group))
  codes, scale, zero = _numpy_codecs.hqq(w.astype(np.float64), bits, group)
  np.testing.assert_array_equal(np.asarray(encoded.scale, np.float64), scale)
  assert np.mean(np.asarray(encoded.zero, np.float64) == zero) > 0.97
  assert np.mean(np.asarray(encoded.codes) == codes) > 0.995


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_lowers_its_criterion_below_minmax(bits, seed):
  w = weights(seed)
  found = criterion(w, grid.decode(encode(w, bits, spec=hqq.Spec(group=64)), 64, 128), 64)
  plain = criterion(w, minmax(w, bits, 64), 64)
  assert (found <= plain * (1 + 1e-4)).all()
  assert found.sum() < {1: 0.6, 2: 0.95, 3: 0.99, 4: 0.995}[bits] * plain.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_from_the_searched_range_it_beats_rtn_by_its_criterion(bits, seed):
  w = weights(seed)
  found = criterion(w, grid.decode(encode(w, bits, spec=hqq.Spec(group=64, start="search")), 64, 128), 64)
  nearest = criterion(w, grid.decode(encode_rtn(w, bits, spec=rtn.Spec(group=64)), 64, 128), 64)
  assert (found <= nearest * (1 + 1e-3)).mean() > 0.99
  assert found.sum() < nearest.sum()


def test_the_zero_is_a_real_number():
  zero = np.asarray(encode(weights(1), 3, spec=hqq.Spec(group=64)).zero, np.float32)
  assert (zero != np.round(zero)).mean() > 0.5


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_the_unit_of_the_weights_does_not_matter(factor):
  w = weights(2)
  plain, scaled = (encode(v, 2, spec=hqq.Spec(group=64)) for v in (w, w * np.float32(factor)))
  assert np.mean(np.asarray(plain.codes) == np.asarray(scaled.codes)) > 0.999


@pytest.mark.parametrize("bits", [1, 4])
def test_short_last_group_and_flat_columns(bits):
  w = weights(3)[:100]
  w[:, :2] = [0.5, -2.0]
  w[64:, 2] += 5
  encoded = encode(w, bits, spec=hqq.Spec(group=64))
  restored = np.asarray(grid.decode(encoded, 64, 100))
  np.testing.assert_array_equal(restored[:, :2], w[:, :2])
  alone = np.asarray(grid.decode(encode(w[64:], bits, spec=hqq.Spec(group=0)), 0, 36))
  assert criterion(w[64:], restored[64:], 0).sum() == pytest.approx(criterion(w[64:], alone, 0).sum(), rel=1e-3)


@pytest.mark.parametrize("options", [{"p": 0}, {"beta": -1}, {"kappa": 0.5}, {"iterations": 0}, {"start": "middle"}])
def test_senseless_options_are_refused(options):
  with pytest.raises(ValueError, match="needs|neither"):
    hqq.Spec(**options)
