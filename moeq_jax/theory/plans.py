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
  """What a grid of errors says about one order, in bits; all None where even the greatest widths leave errors.

  A pair counts as free only if no pair b_l <= b_h that is nowhere narrower has an error: at 1 bit the grid is a sign
  times a scale, which keeps the sign of f by luck where 2 bits do not.

  Attributes:
    uniform: the least b with (b, b) free.
    saved: with b_h at `uniform`, how far b_l may fall.
    average: the least (b_l + b_h) / 2 of a free pair.
  """

  uniform: float | None
  saved: float | None
  average: float | None


def savings(wrong: np.ndarray) -> Savings:
  """Reads `Savings` off a grid of `errors`."""
  bits = np.array(quantization.BITS[: len(wrong)])
  bad = np.triu(wrong > 0)[::-1, ::-1]
  bad = np.logical_or.accumulate(np.logical_or.accumulate(bad, axis=0), axis=1)[::-1, ::-1]
  free = np.triu(~bad)
  if not free.any():
    return Savings(None, None, None)
  start = int(np.diag(free).argmax())
  low, high = np.nonzero(free)
  return Savings(float(bits[start]), float(bits[start] - bits[free[:, start].argmax()]),
                 float((bits[low] + bits[high]).min() / 2))


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
