"""The official code's GPTQ variant against a plain column loop, and what each of its differences does."""

import jax
import numpy as np
import pytest

from moeq_jax.bench import _numpy_codecs
from moeq_jax.codecs import gptq, gptq_official, grid

K, N = 256, 32
encode = jax.jit(gptq_official.encode, static_argnums=3)
published = jax.jit(gptq.encode, static_argnums=3)


def weights(seed: int, rows: int = K) -> np.ndarray:
  return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, N))).astype(np.float32)


def second_moment(seed: int, rows: int = K) -> np.ndarray:
  random = np.random.default_rng(1000 + seed)
  mixing = random.standard_normal((rows, rows)) * np.exp(-np.arange(rows) / 40)[:, None]
  inputs = (random.standard_normal((600, rows)) @ mixing).astype(np.float32)
  return inputs.T @ inputs


def output_error(w: np.ndarray, encoded: grid.Encoded, moment: np.ndarray) -> float:
  group = grid.infer_group(w.shape[0], encoded.scale.shape[0])
  delta = np.asarray(grid.decode(encoded, group, w.shape[0]), np.float64) - w
  return float(np.sum(delta * (moment.astype(np.float64) @ delta)))


def power_search(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Scale and zero `[N]` by the description: 101 factors on both ends, least sum of |error|^2.4."""
  low, high, best = x.min(0), x.max(0), None
  if bits == 1:
    return _numpy_codecs.to_storage(2 * np.abs(x).mean(0)), np.full(x.shape[1], 0.5)
  for factor in [1.0, *(1 + 0.002 * i for i in range(1, 51)), *(1 - 0.002 * i for i in range(1, 51))]:
    scale, zero = _numpy_codecs.affine(factor * low, factor * high, 2**bits - 1)
    error = (np.abs((_numpy_codecs.quantize(x, scale, zero, 2**bits - 1) - zero) * scale - x)**2.4).sum(0)
    if best is None:
      best = [error, scale, zero]
    best = [np.where(error < best[0], new, old) for new, old in zip((error, scale, zero), best)]
  return best[1], best[2]


def oracle(w: np.ndarray, bits: int, moment: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The column loop in float64, by the inverse of the moment."""
  w, rows, block = w.astype(np.float64), w.shape[0], 128
  hessian = moment / moment.diagonal().mean() + 0.01 * np.eye(rows)
  upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
  codes, scales, zeros = np.empty_like(w), [], []
  for start in range(0, rows, block):
    stop = min(start + block, rows)
    inner, pushed = w[start:stop].copy(), np.zeros((stop - start, N))
    for k in range(start, stop):
      if k % group == 0:
        scale, zero = power_search(w[k:min(k + group, rows)], bits)
        scales.append(scale)
        zeros.append(zero)
      x = inner[k - start]
      codes[k] = x >= 0 if bits == 1 else _numpy_codecs.quantize(x, scale, zero, 2**bits - 1)
      pushed[k - start] = (x - (codes[k] - zero) * scale) / upper[k, k]
      if bits > 3:
        inner[k - start + 1:] -= np.outer(upper[k, k + 1:stop], pushed[k - start])
    w[stop:] -= upper[start:stop, stop:].T @ pushed
  return codes, np.stack(scales), np.stack(zeros)


@pytest.mark.parametrize(("bits", "group", "rows"), [(1, 128, K), (2, 128, K), (3, 64, K), (4, 128, K), (2, 128, 200)])
def test_equals_the_described_column_loop(bits: int, group: int, rows: int):
  w, moment = weights(0, rows), second_moment(0, rows)
  encoded = encode(w, bits, moment, gptq_official.Spec(group=group))
  codes, scale, zero = oracle(w, bits, moment.astype(np.float64), group)
  assert encoded.codes.shape == codes.shape and encoded.scale.shape == scale.shape
  assert np.mean(np.asarray(encoded.codes) == codes) >= 0.99
  expected = output_error(w, grid.Encoded(codes.astype(np.uint8), scale, zero), moment)
  assert output_error(w, encoded, moment) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3])
def test_feedback_inside_blocks_is_what_the_variant_lacks_at_low_bits(bits: int):
  w, moment = weights(1), second_moment(1)
  official, fed = (output_error(w, encode(w, bits, moment, gptq_official.Spec(feedback=f)), moment)
                   for f in ("above3", "always"))
  ours = output_error(w, published(w, bits, moment, gptq.Spec(group=128)), moment)
  assert fed < 0.7 * official and ours < 0.7 * official


def test_above_three_bits_there_is_no_difference():
  w, moment = weights(2), second_moment(2)
  official, fed = (encode(w, 4, moment, gptq_official.Spec(feedback=f)) for f in ("above3", "always"))
  for a, b in zip(official, fed, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_with_both_differences_off_it_is_gptq():
  w, moment = weights(3), second_moment(3)
  ours = encode(w, 2, moment, gptq_official.Spec(feedback="always", search="squared"))
  theirs = published(w, 2, moment, gptq.Spec(group=128))
  assert np.mean(np.asarray(ours.codes) == np.asarray(theirs.codes)) > 0.99


def test_one_bit_is_the_sign_times_the_mean_magnitude():
  w = weights(4)
  w[0, :3] = [0.0, 1e-9, -1e-9]
  encoded = encode(w, 1, np.eye(K, dtype=np.float32), gptq_official.Spec())
  restored = np.asarray(grid.decode(encoded, 128, K))
  mean = np.abs(w.reshape(2, 128, N)).mean(1).repeat(128, 0)
  np.testing.assert_allclose(restored, np.where(w >= 0, mean, -mean), rtol=0.005)


@pytest.mark.parametrize(("options", "said"), [
    ({"group": 0}, "blocks of 128 rows"), ({"feedback": "never"}, "neither 'above3'"), ({"damping": 0}, "damping"),
    ({"search": "p2.4"}, "neither 'power'"), ({"grid": "ct"}, "grid 'affine' only")])
def test_senseless_options_are_refused(options: dict, said: str):
  with pytest.raises(ValueError, match=said):
    gptq_official.Spec(**options)


def test_a_missing_moment_is_an_error_that_says_so():
  with pytest.raises(ValueError, match="needs the inputs' second moment .256, 256., found none"):
    gptq_official.encode(weights(0), 2, None, gptq_official.Spec())
