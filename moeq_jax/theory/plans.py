"""Two-width plans on the two-layer model: which pairs of widths leave no test input wrong, and what they save.

Theorem 4.4 as the sources tell it: with the experts of small Lambda at b_h and the others at b_l, both above a bound,
no input is wrong, and b_l may lie log2((1 - alpha) / alpha) below b_h. Here every pair (b_l, b_h) of half-bit steps is
tried, with the rule and with its reverse, with the whole error of the quantized experts or a part of it only.
"""

import dataclasses

import numpy as np

from moeq_jax.theory import quantization

ORDERS = ("small", "large")  # which Lambda gets the high width: the theorem's rule, and its reverse
SOURCES = ("all", "own", "cross")  # which part of the error counts: both, that on own tokens, that on all others


def select(parts: quantization.Parts, source: str) -> np.ndarray:
  """The output of each expert at each width, `[W + 1, E, B]`, with only the part of the error that `source` names."""
  own, other = parts
  if source == "own":
    other = np.broadcast_to(other[-1:], other.shape)
  elif source == "cross":
    own = np.broadcast_to(own[-1:], own.shape)
  return own + other


def high_experts(change: np.ndarray, ranked: np.ndarray, order: str) -> np.ndarray:
  """`[E]` bool: the half of the `ranked` experts (`[E]` bool) with the smallest (or largest) Lambda `change` `[E]`."""
  members = np.flatnonzero(ranked)
  line = members[np.argsort(change[members], kind="stable")]
  count = len(line) // 2
  high = np.zeros(len(change), bool)
  high[line[:count] if order == "small" else line[len(line) - count :]] = True
  return high


def errors(outputs: np.ndarray, labels: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
  """Wrong test inputs for every pair of widths: `[W, W]` int, rows b_l, columns b_h.

  Args:
    outputs: `[W + 1, E, B]`, of `select`.
    labels: `[B]`.
    high, low: `[E]` bool; experts in neither stay in full precision.
  """
  rest = outputs[-1, ~(high | low)].sum(0)
  lows, highs = labels * outputs[:-1, low].sum(1), labels * (outputs[:-1, high].sum(1) + rest)
  return (lows[:, None] + highs[None] <= 0).sum(-1)


@dataclasses.dataclass(frozen=True)
class Savings:
  """What a grid of errors says about one order, in bits; None where no width on the grid is free of errors.

  Attributes:
    uniform: the least width from which on equal widths leave no input wrong.
    saved: with the high width at `uniform`, how far the low one may fall before an input is wrong.
    average: the least (b_l + b_h) / 2 of an error-free pair with b_l <= b_h.
  """

  uniform: float | None
  saved: float | None
  average: float | None


def savings(wrong: np.ndarray) -> Savings:
  """Reads `Savings` off a grid of `errors`."""
  bits = np.array(quantization.BITS[: len(wrong)])
  start = _from_there_on(np.diag(wrong) == 0)
  if start is None:
    return Savings(None, None, None)
  fall = _from_there_on(wrong[: start + 1, start] == 0)
  pairs = [(bits[i] + bits[j]) / 2 for i, j in zip(*np.nonzero(wrong == 0), strict=True) if i <= j]
  return Savings(float(bits[start]), float(bits[start] - bits[fall]), float(min(pairs)))


def _from_there_on(good: np.ndarray) -> int | None:
  """The least index from which on all are good, None if the last is not."""
  if not good[-1]:
    return None
  bad = np.flatnonzero(~good)
  return int(bad[-1]) + 1 if len(bad) else 0


def needed(outputs: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> float | None:
  """The least width from which on no input is wrong when the `chosen` experts (`[E]` bool) alone are quantized.

  None if even the greatest width leaves errors; 0 is never returned, the grid begins at one bit.
  """
  nobody = np.zeros_like(chosen)
  wrong = errors(outputs, labels, nobody, chosen)[:, 0]
  start = _from_there_on(wrong == 0)
  return None if start is None else float(quantization.BITS[start])
