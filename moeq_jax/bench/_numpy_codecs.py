"""The codecs in plain numpy: the yardstick of the benchmark, and the oracle of the tests.

Same formulas as `moeq_jax/codecs`, written the plain way: loops over groups, rows and candidates, and GPTQ as it was
published, with the inverse of the moment and errors pushed to later rows. All arithmetic is in the dtype of `w`.
Arrays as there: `w [K, N]`, codes `[K, N]` uint8, scale and zero `[G, N]` (here in the dtype of `w`, bf16 values).
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from moeq_jax.codecs import grid

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


def to_storage(x: np.ndarray) -> np.ndarray:
  """Rounds to bf16 values, in the dtype of `x`."""
  return x.astype(np.float32).astype(jnp.bfloat16).astype(x.dtype)


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int) -> np.ndarray:
  """Codes of `x` on a grid, as floating point integers."""
  return np.clip(np.round(x / scale + zero), 0, top)


def affine(low: np.ndarray, high: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
  """Scale and zero of the grid that spans `[low, high]`; the scale of a flat range is 1."""
  scale = to_storage((high - low) / top)
  scale = np.where(scale > 0, scale, 1)
  return scale, to_storage(-low / scale)


def search(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Scale and zero `[N]` of the clipped range of least squared error of a group `x [g, N]`."""
  top, unit = 2**bits - 1, x.dtype.type(grid.DEEPEST_CUT[bits])
  low, high = x.min(0), x.max(0)
  center = np.clip(x.mean(0), low, high)

  def attempt(cut_low: np.ndarray, cut_high: np.ndarray) -> list[np.ndarray]:
    scale, zero = affine(low + cut_low * (center - low), high - cut_high * (high - center), top)
    error = np.square((quantize(x, scale, zero, top) - zero) * scale - x).sum(0)
    return [error, cut_low, cut_high, scale, zero]

  def better(new: list[np.ndarray], old: list[np.ndarray]) -> list[np.ndarray]:
    return [np.where(new[0] < old[0], a, b) for a, b in zip(new, old, strict=True)]

  none = np.zeros_like(low)
  best = [np.full_like(low, np.inf), none, none, *affine(low, high, top)]
  for again, *moves in grid.MOVES.astype(x.dtype):
    best = better(attempt(*(np.clip((1 - again) * cut + move * unit, *grid.CUT_LIMITS)
                            for cut, move in zip(best[1:3], moves, strict=True))), best)
  return best[3], best[4]


def rtn(w: np.ndarray, bits: int, group: int) -> Encoded:
  """Round to nearest with the clipping search."""
  scales, zeros = zip(*(search(x, bits) for x in _groups(w, group)), strict=True)
  codes = [quantize(x, s, z, 2**bits - 1) for x, s, z in zip(_groups(w, group), scales, zeros, strict=True)]
  return _encoded(codes, scales, zeros)


def hqq(w: np.ndarray, bits: int, group: int, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01,
        iterations: int = 20) -> Encoded:
  """Half-quadratic quantization from the min-max scale."""
  top, codes, scales, zeros = 2**bits - 1, [], [], []
  for x in _groups(w, group):
    scale, zero = affine(x.min(0), x.max(0), top)
    best, least = zero, np.full_like(zero, np.inf)
    for i in range(iterations + 1):
      residual = x / scale - (quantize(x, scale, zero, top) - zero)
      magnitude = np.abs(residual)
      criterion = (magnitude**p).sum(0)
      best, least = np.where(criterion < least, zero, best), np.minimum(criterion, least)
      threshold = np.maximum(magnitude, 1e-12) ** (p - 1) / (beta * kappa**i)
      forgiven = np.sign(residual) * np.maximum(magnitude - threshold, 0)
      zero = to_storage(zero - (residual - forgiven).mean(0))
    codes.append(quantize(x, scale, best, top))
    scales.append(scale)
    zeros.append(best)
  return _encoded(codes, scales, zeros)


def gptq(w: np.ndarray, bits: int, moment: np.ndarray, group: int, damping: float = 0.01, block: int = 128) -> Encoded:
  """GPTQ as published (Frantar et al., 2023, algorithm 1): rows of the Cholesky factor of the inverse moment.

  A group must not cross the end of a block that it does not fill: one of the two sizes divides the other.
  """
  rows, top = w.shape[0], 2**bits - 1
  size = group or rows
  excited = moment.diagonal()[moment.diagonal() > 0]
  hessian = moment / excited.mean() + damping * np.eye(rows, dtype=w.dtype)
  upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
  w, codes, scales, zeros = w.copy(), np.empty_like(w), [], []
  for start in range(0, rows, block):
    end = min(start + block, rows)
    pushed = np.zeros_like(w[start:end])
    for k in range(start, end):
      if k % size == 0:
        scale, zero = search(w[k : k + size], bits)
        scales.append(scale)
        zeros.append(zero)
      codes[k] = quantize(w[k], scale, zero, top)
      pushed[k - start] = (w[k] - (codes[k] - zero) * scale) / upper[k, k]
      w[k + 1 : end] -= np.outer(upper[k, k + 1 : end], pushed[k - start])
    w[end:] -= upper[start:end, end:].T @ pushed
  return _encoded([codes], scales, zeros)


def decode(encoded: Encoded, group: int) -> np.ndarray:
  """The weights `[K, N]` that codes stand for."""
  codes, scale, zero = encoded
  index = np.arange(codes.shape[0]) // (group or codes.shape[0])
  return (codes - zero[index]) * scale[index]


def _groups(w: np.ndarray, group: int) -> Iterator[np.ndarray]:
  size = group or w.shape[0]
  return (w[i : i + size] for i in range(0, w.shape[0], size))


def _encoded(codes: list[np.ndarray], scales: list[np.ndarray], zeros: list[np.ndarray]) -> Encoded:
  return np.concatenate(codes).astype(np.uint8), np.stack(scales), np.stack(zeros)
