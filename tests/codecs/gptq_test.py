"""GPTQ against the published column loop in float64, against RTN, and on the inputs that break it."""

import jax
import numpy as np
import pytest

from moeq_jax.bench import _numpy_codecs
from moeq_jax.codecs import gptq, grid, rtn

K, N = 128, 64
encode = jax.jit(gptq.encode, static_argnums=3)
encode_rtn = jax.jit(rtn.encode, static_argnums=3)


def weights(seed: int, rows: int = K) -> np.ndarray:
  return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, N))).astype(np.float32)


def second_moment(seed: int, tokens: int = 400, rows: int = K) -> np.ndarray:
  """Of inputs with an exponentially falling spectrum, so that they are strongly correlated."""
  random = np.random.default_rng(1000 + seed)
  mixing = random.standard_normal((rows, rows)) * np.exp(-np.arange(rows) / 30)[:, None]
  inputs = (random.standard_normal((tokens, rows)) @ mixing).astype(np.float32)
  return inputs.T @ inputs


def errors(w: np.ndarray, encoded: grid.Encoded, moment: np.ndarray) -> tuple[float, float]:
  """Squared error of weights and outputs, in float64."""
  group = grid.infer_group(w.shape[0], encoded.scale.shape[0])
  delta = np.asarray(grid.decode(encoded, group, w.shape[0]), np.float64) - w
  return np.square(delta).sum(), np.sum(delta * (moment.astype(np.float64) @ delta))


def assert_equal(a: grid.Encoded, b: grid.Encoded) -> None:
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def is_finite(encoded: grid.Encoded) -> bool:
  return all(np.isfinite(np.asarray(a, np.float32)).all() for a in encoded)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 0])
def test_equals_the_published_column_loop(bits, group):
  w, moment = weights(0), second_moment(0)
  encoded = encode(w, bits, moment, gptq.Spec(group=group))
  oracle = _numpy_codecs.gptq(w.astype(np.float64), bits, moment.astype(np.float64), group)
  assert np.mean(np.asarray(encoded.codes) == oracle[0]) >= 0.995
  found, expected = errors(w, encoded, moment), errors(w, grid.Encoded(*oracle), moment)
  assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trades_weight_error_for_output_error(bits, group, seed):
  w, moment = weights(seed), second_moment(seed)
  weight, output = errors(w, encode(w, bits, moment, gptq.Spec(group=group)), moment)
  weight_rtn, output_rtn = errors(w, encode_rtn(w, bits, None, rtn.Spec(group=group)), moment)
  assert output < 0.6 * output_rtn
  assert weight > weight_rtn


@pytest.mark.parametrize("bits", grid.WIDTHS)
def test_feedback_runs_inside_a_block_at_every_width(bits):
  w, moment = weights(4), second_moment(4)
  whole = encode(w, bits, moment, gptq.Spec(group=0, block=K))  # one block: no other feedback than inside it
  assert errors(w, whole, moment)[1] < 0.6 * errors(w, encode_rtn(w, bits, None, rtn.Spec(group=0)), moment)[1]
  cut = encode(w, bits, moment, gptq.Spec(group=0, block=16))
  assert np.mean(np.asarray(whole.codes) == np.asarray(cut.codes)) > 0.995
  assert errors(w, cut, moment) == pytest.approx(errors(w, whole, moment), rel=0.01)


@pytest.mark.parametrize("bits", [2, 4])
def test_blocks_inside_a_group_do_not_change_the_result(bits):
  w, moment = weights(5), second_moment(5)
  whole, cut = (encode(w, bits, moment, gptq.Spec(group=64, block=block)) for block in (128, 16))
  assert np.mean(np.asarray(whole.codes) == np.asarray(cut.codes)) > 0.995


@pytest.mark.parametrize("bits", grid.WIDTHS)
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("moment", [np.zeros((K, K), np.float32), 7 * np.eye(K, dtype=np.float32)])
def test_without_correlations_it_is_rtn(bits, group, moment):
  w = weights(6)
  assert_equal(encode(w, bits, moment, gptq.Spec(group=group)), encode_rtn(w, bits, None, rtn.Spec(group=group)))


def test_an_expert_without_tokens_among_others_is_rtn():
  w = np.stack([weights(7), weights(8)])
  moment = np.stack([second_moment(7), np.zeros((K, K), np.float32)])
  both = jax.jit(jax.vmap(lambda w, m: gptq.encode(w, 2, m, gptq.Spec(group=32))))(w, moment)
  alone = encode_rtn(w[1], 2, None, rtn.Spec(group=32))
  assert np.mean(np.asarray(both.codes[1]) == np.asarray(alone.codes)) > 0.995
  assert np.mean(np.asarray(both.codes[0]) == np.asarray(encode_rtn(w[0], 2, None, rtn.Spec(group=32)).codes)) < 0.95


@pytest.mark.parametrize("bits", [1, 3])
def test_dead_inputs_are_rounded_and_never_zeroed(bits):
  w, moment = weights(9), second_moment(9)
  dead = np.zeros(K, bool)
  dead[[0, 5, 40, 41, 127]] = True
  moment[dead] = 0
  moment[:, dead] = 0
  encoded = encode(w, bits, moment, gptq.Spec(group=0))
  scale, zero = (np.asarray(a, np.float32) for a in encoded[1:])
  expected = np.clip(np.round(w / scale + zero), 0, 2**bits - 1)
  np.testing.assert_array_equal(np.asarray(encoded.codes)[dead], expected[dead])
  assert np.mean(np.asarray(encoded.codes)[~dead] == expected[~dead]) < 0.9
  assert errors(w, encoded, moment)[1] < 0.6 * errors(w, encode_rtn(w, bits, None, rtn.Spec(group=0)), moment)[1]


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_few_tokens(tokens):
  w, moment = weights(10), second_moment(10, tokens)
  encoded = encode(w, 2, moment, gptq.Spec(group=32))
  assert is_finite(encoded)
  assert errors(w, encoded, moment)[1] < 0.3 * errors(w, encode_rtn(w, 2, None, rtn.Spec(group=32)), moment)[1]


def test_the_number_of_tokens_does_not_matter():
  w, moment = weights(11), second_moment(11)
  few, many = (encode(w, 3, moment * np.float32(scale), gptq.Spec(group=32)) for scale in (2.0**-20, 2.0**20))
  assert_equal(few, many)


@pytest.mark.parametrize("bits", [2, 4])
def test_short_last_group(bits):
  w, moment = weights(12, rows=100), second_moment(12, rows=100)
  w[64:] += 0.2  # far from the zeros of the padding
  encoded = encode(w, bits, moment, gptq.Spec(group=64))
  assert encoded.codes.shape == (100, N) and encoded.scale.shape == (2, N)
  oracle = _numpy_codecs.gptq(w.astype(np.float64), bits, moment.astype(np.float64), 64)
  assert np.mean(np.asarray(encoded.codes) == oracle[0]) >= 0.995
  assert errors(w, encoded, moment)[1] == pytest.approx(errors(w, grid.Encoded(*oracle), moment)[1], rel=0.01)


def test_flat_columns_are_exact():
  w, moment = weights(13), second_moment(13)
  w[:, :3] = [0.5, -0.25, 0]
  restored = grid.decode(encode(w, 2, moment, gptq.Spec(group=0)), 0, K)
  np.testing.assert_array_equal(np.asarray(restored)[:, :3], w[:, :3])


def test_factor_is_triangular_and_reproduces_the_damped_moment():
  moment = second_moment(14)
  factor = np.asarray(jax.jit(gptq.upper_factor, static_argnums=(1, 2))(moment, 0.01, 32), np.float64)
  np.testing.assert_array_equal(factor, np.triu(factor))
  damped = moment / moment.diagonal().mean() + 0.01 * np.eye(K)
  np.testing.assert_allclose(factor @ factor.T, damped, atol=1e-5)


def test_damping_grows_until_the_moment_can_be_factorised():
  moment = np.eye(K, dtype=np.float32)
  moment[0, 1] = moment[1, 0] = 1.5  # eigenvalue -0.5: damping by 0.01 and 0.1 fails, by 1 works
  factor = np.asarray(jax.jit(gptq.upper_factor, static_argnums=(1, 2))(moment, 0.01, 32), np.float64)
  np.testing.assert_allclose(factor @ factor.T, moment + np.eye(K), atol=1e-5)
  w = weights(15)
  assert is_finite(encode(w, 2, moment, gptq.Spec(group=32)))


def test_a_missing_moment_is_an_error_that_says_so():
  with pytest.raises(ValueError, match=r"second moment \[128, 128\].*found none"):
    gptq.encode(weights(0), 2, None, gptq.Spec())
  with pytest.raises(ValueError, match=r"one of shape \(64, 64\)"):
    gptq.encode(weights(0), 2, np.eye(64, dtype=np.float32), gptq.Spec())


@pytest.mark.parametrize("options", [{"damping": 0}, {"block": 0}, {"group": 64, "block": 48}, {"group": 7}])
def test_senseless_options_are_refused(options):
  with pytest.raises(ValueError, match="damping|block|group"):
    gptq.Spec(**options)


@pytest.mark.parametrize("group", [32, 0])
def test_panels_do_not_change_the_result(group, monkeypatch):
  w, moment, spec = weights(16, rows=300), second_moment(16, rows=300), gptq.Spec(group=group, block=32)
  whole = jax.jit(lambda w, m: gptq.encode(w, 2, m, spec))(w, moment)
  factor = np.asarray(jax.jit(lambda m: gptq.factorise(m, spec))(moment))
  monkeypatch.setattr(gptq, "PANEL", 96)
  cut_factor = jax.jit(lambda m: gptq.factorise(m, spec))(moment)
  np.testing.assert_allclose(cut_factor, factor, atol=1e-4 * np.abs(factor).max())
  cut = jax.jit(lambda w, f: gptq.encode(w, 2, None, spec, factor=f))(w, cut_factor)
  assert np.mean(np.asarray(whole.codes) == np.asarray(cut.codes)) > 0.995
  assert errors(w, cut, moment) == pytest.approx(errors(w, whole, moment), rel=0.01)


def test_a_factor_serves_all_widths_and_slabs_of_columns():
  w, moment, spec = weights(17), second_moment(17), gptq.Spec(group=32)
  factor = jax.jit(gptq.factorise, static_argnums=1)(moment, spec)
  slab = jax.jit(lambda w, bits: gptq.encode(w, bits, None, spec, factor=factor))
  for bits in (1, 3):
    assert_equal(jax.tree.map(lambda part: part[:, :40], encode(w, bits, moment, spec)), slab(w[:, :40], bits))
