"""How unequal the eigenvalues of an expert's input Gram matrix are, from a sketch of it that fits beside the vectors.

The Gram matrix `M = sum_t x_t x_t^T` `[N, N]` is never made. For a fixed Gaussian matrix `T` `[N, R]` of test vectors,
`Y = M T` is a sum over tokens like the others (`taps.group_sums`), and the diagonal of M is the sum of the squared
inputs. With `N <= R`, T is the identity and everything is exact.

What codecs see is damped as in GPTQ: `M + d`, with d a share of the mean eigenvalue. That also gives a singular matrix,
of a dead channel or of fewer tokens than channels, a finite condition. Two bounds are certain, up to rounding in
float32. Nystrom: `Q = Y (T^T Y)^-1 Y^T` has rank R and `0 <= Q <= M` (Halko, Martinsson and Tropp 2011, section 5.4),
so that its eigenvalues q are lower bounds of M's and the residual `M - Q` is positive semi-definite with trace `tau =
tr M - tr Q`:

  condition   (q_1 + d) / (tau / (N - R) + d)  <=  (l_1 + d) / (l_N + d)  <=  (q_1 + tau + d) / d
  log det     log det(Q + d) + log(1 + tau / (q_1 + d))  <=  log det(M + d)  <=  tau poured over the least of q + d

the latter because log det is concave: of all residuals, one along the top eigenvector of Q adds least, and one that
levels the smallest eigenvalues adds most. Hadamard's inequality bounds log det by the diagonal, too.

The estimate between the bounds takes the eigenvalues as lognormal with the mean `tr M / N` and the mean square
`|M|_F^2 / N`, of which `|Y|_F^2 / R` is an unbiased estimate. A sketch cannot see small eigenvalues, so that it is an
estimate and no more: with 32 test vectors for 192 channels it is off by at most 0.4 nats of log AM/GM for eigenvalues
that fall as a power of their rank from 0.5 to 1.5 or are lognormal, and by up to 2 where they fall exponentially, or in
steps (`tests/calibrate/spectrum_test.py`). `RANK` is what can be had for less than a tenth of a pass.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

RANK = 32
DAMPING = 0.01  # of the mean eigenvalue, as in `codecs.gptq`


class Summary(NamedTuple):
  """Lower bound, estimate and upper bound, `[..., 3]` float64 each.

  Attributes:
    condition: largest by smallest eigenvalue of the damped matrix.
    log_am_gm: log of the mean less mean of the logs of its eigenvalues, in nats.
  """

  condition: np.ndarray
  log_am_gm: np.ndarray


def test_vectors(channels: int, rank: int = RANK) -> np.ndarray:
  """`[N, R]` float32: the identity where it is small enough, else the same Gaussian matrix in every run."""
  if channels <= rank:
    return np.eye(channels, dtype=np.float32)
  return np.random.default_rng(channels).standard_normal((channels, rank)).astype(np.float32)


def summarise(sketch: np.ndarray, diagonal: np.ndarray, damping: float = DAMPING) -> Summary:
  """The summary of every Gram matrix.

  Args:
    sketch: `[..., N, R]`, `M @ test_vectors(N, R)`.
    diagonal: `[..., N]`, that of M.
    damping: share of the mean eigenvalue, above 0.

  Returns:
    Of leading shape `[...]`. A matrix of zeros, whose eigenvalues are all equal, has condition 1 and logarithm 0.
  """
  lead, (channels, rank) = sketch.shape[:-2], sketch.shape[-2:]
  pairs = zip(sketch.reshape(-1, channels, rank), diagonal.reshape(-1, channels), strict=True)
  found = [_summary(np.asarray(y, np.float64), np.asarray(d, np.float64), damping) for y, d in pairs]
  condition, log_am_gm = (np.array([one[i] for one in found]).reshape(*lead, 3) for i in range(2))
  return Summary(condition, log_am_gm)


def _summary(sketch: np.ndarray, diagonal: np.ndarray, damping: float) -> tuple[list[float], list[float]]:
  channels, rank = sketch.shape
  mean = diagonal.sum() / channels
  if not mean > 0:
    return [1.0] * 3, [0.0] * 3
  sketch, diagonal = sketch / mean, diagonal / mean  # in units of the mean eigenvalue
  top = _nystrom(sketch)
  top *= min(1.0, channels / top.sum())
  if rank == channels:
    return _exact(top, damping)
  missing = channels - top.sum()
  known = np.append(top, np.zeros(channels - rank))
  along_top = known + missing * (np.arange(channels) == 0)
  likely = _lognormal(channels, np.square(sketch).sum() / (rank * channels))
  low, estimate, high = (_log_am_gm(values, damping) for values in (_levelled(known, missing), likely, along_top))
  first, last = top[0] + damping, missing / (channels - rank) + damping
  conditions = first / last, (max(likely[-1], top[0]) + damping) / (likely[0] + damping), (first + missing) / damping
  return _ordered(*conditions), _ordered(max(low, _log_am_gm(diagonal, damping)), estimate, high)


def _log_am_gm(values: np.ndarray, damping: float) -> float:
  """Of damped values, whose mean before damping is one."""
  return float(np.log1p(damping) - np.log(values + damping).mean())


def _ordered(low: float, estimate: float, high: float) -> list[float]:
  high = max(low, high)  # they may cross by rounding
  return [low, min(max(estimate, low), high), high]


def _exact(values: np.ndarray, damping: float) -> tuple[list[float], list[float]]:
  return [float((values.max() + damping) / (values.min() + damping))] * 3, [_log_am_gm(values, damping)] * 3


def _nystrom(sketch: np.ndarray) -> np.ndarray:
  """Eigenvalues of `Y (T^T Y)^-1 Y^T`, descending, `[R]`, none below zero."""
  channels, rank = sketch.shape
  test = np.asarray(test_vectors(channels, rank), np.float64)
  if rank == channels:
    return np.maximum(np.linalg.eigvalsh((sketch + sketch.T) / 2)[::-1], 0.0)
  core = test.T @ sketch
  values, vectors = np.linalg.eigh((core + core.T) / 2)
  kept = values > 1e-6 * values[-1]  # below, float32 sums are noise; leaving directions out keeps Q <= M
  half = sketch @ (vectors[:, kept] / np.sqrt(values[kept]))
  return np.maximum(np.append(np.linalg.eigvalsh(half.T @ half)[::-1], np.zeros(rank - kept.sum())), 0.0)


def _levelled(values: np.ndarray, amount: float) -> np.ndarray:
  """`values` after `amount` was poured over the smallest of them, which it brings to one level."""
  ascending = np.sort(values)
  counts = np.arange(1, len(values) + 1)
  levels = (amount + np.cumsum(ascending)) / counts  # if the first n are levelled
  held = np.flatnonzero(levels <= np.append(ascending[1:], np.inf))[0]
  return np.maximum(ascending, levels[held])


def _lognormal(count: int, mean_square: float) -> np.ndarray:
  """Quantiles of a lognormal distribution of mean one and of this mean square, ascending, `[count]`, of mean one."""
  deviation = np.sqrt(np.log(max(mean_square, 1.0)))
  values = np.exp(deviation * special.ndtri((np.arange(count) + 0.5) / count))
  return values / values.mean()
