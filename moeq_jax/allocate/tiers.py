"""The per-layer rule of "router norm change + MaxVar" (arXiv 2604.06515), as in the paper and as in its official code.

Every layer gets the same counts. Experts are ranked, those at the top of the list get the high bit-width, and experts
with a very wide weight distribution are moved up. The variants differ as follows:

  counts   three levels, averages between `high - 2D/3` and `high - D/3` (D = high - low): the paper asks for no more
           low than middle experts, the code stops promoting by another condition and may break that
  rerank   paper: at least zeta times, repeated until stable; code: more than zeta times, one pass from the bottom of
           the list, after which several promoted experts stand in reversed order
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Variant = Literal["paper", "code"]


def order(score: np.ndarray, descending: bool = False) -> np.ndarray:
  """Experts of each layer from the first to get high precision to the last; equal scores keep the order of experts.

  Args:
    score: `[..., E]`. The paper ranks ascending: a small change of router norm comes first.
    descending: large scores first, as for frequency and gate weight.

  Returns:
    `[..., E]` int64.

  Raises:
    ValueError: a score that is not finite (names its index).
  """
  score = np.asarray(score, np.float64)
  for index in np.argwhere(~np.isfinite(score))[:1]:
    raise ValueError(f"the score of expert {tuple(index.tolist())} is {score[tuple(index)]}; scores must be finite")
  return np.argsort(-score if descending else score, axis=-1, kind="stable")


def rerank(order: np.ndarray, maxvar: np.ndarray, zeta: float = 3.0, variant: Variant = "paper") -> np.ndarray:
  """Moves experts of much larger MaxVar above those of smaller MaxVar.

  Paper (its re-ranking step): a lower-ranked expert whose MaxVar is at least zeta times that of a higher-ranked one is
  moved above it, until no such pair is left. Inserting expert after expert, each above the first one that it has to
  pass, ends there and keeps the order of experts that are moved to the same place. Code: each expert, from the bottom
  of the original list to its top, is moved to the first place whose MaxVar is less than 1/zeta of its own, if that is
  above it. Both leave no violated pair.

  Args:
    order: `[E]`, experts from the first to get high precision to the last.
    maxvar: `[E]` by expert; the largest variance among the rows of its first matrix; not negative.
    zeta: how many times larger, at least 1; equal experts never pass each other.
    variant: `"paper"` or `"code"`.

  Returns:
    `[E]` int64, the new order.

  Raises:
    ValueError: zeta below 1, a MaxVar that is negative or not finite, an unknown variant, or an order that is not a
      permutation of the experts.
  """
  _check_variant(variant)
  order, maxvar = np.asarray(order), np.asarray(maxvar, np.float64)
  _check_orders(order[None], len(maxvar))
  if not zeta >= 1:
    raise ValueError(f"zeta is {zeta}; it must be at least 1")
  for expert in np.flatnonzero(~(np.isfinite(maxvar) & (maxvar >= 0)))[:1]:
    raise ValueError(f"MaxVar of expert {expert} is {maxvar[expert]}; a variance must be finite and not negative")
  ranked = _insert_from_top(order, maxvar, zeta) if variant == "paper" else _lift_from_bottom(order, maxvar, zeta)
  return np.array(ranked, np.int64)


def counts_two(k: int, average: float, low: int, high: int) -> tuple[int, int]:
  """How many of a layer's k experts get the low and the high width: `(n_low, n_high)`.

  The share of the high width is (average - low) / (high - low); half an expert is rounded to the even number. The
  realised average differs from the one asked for where the share of k is not a whole number, and may exceed it.

  Raises:
    ValueError: an average outside [low, high], or widths that do not ascend.
  """
  _check_average(k, average, (low, high))
  high_count = round((average - low) / (high - low) * k)
  return k - high_count, high_count


def counts_three(
  k: int, average: float, low: int, mid: int, high: int, variant: Variant = "paper"
) -> tuple[int, int, int]:
  """How many of a layer's k experts get each of three equally spaced widths: `(n_low, n_mid, n_high)`.

  It starts with two levels around `mid`; turning two middle experts into a high and a low one keeps the average. With
  D = high - low, how many pairs are turned depends on the average:

    above high - D/3               as many as possible (most experts at `high`)
    from high - 2D/3 to high - D/3 paper: as many as keep n_low <= n_mid; code: until fewer middle experts than turned
                                   pairs would be left
    below high - 2D/3              none (fewest experts at `low`)

  Raises:
    ValueError: widths that are not equally spaced or do not ascend, an average outside [low, high], or an unknown
      variant.
  """
  _check_variant(variant)
  _check_average(k, average, (low, mid, high))
  if high - mid != mid - low:
    raise ValueError(f"three levels need equally spaced widths, not {low}, {mid}, {high}")
  if average >= mid:
    mids, highs = counts_two(k, average, mid, high)
    lows = 0
  else:
    lows, mids = counts_two(k, average, low, mid)
    highs = 0
  spread = (high - low) / 3
  if average > high - spread:
    turned = mids // 2
  elif average < high - 2 * spread:
    turned = 0
  else:
    turned = (mids - lows) // 3 if variant == "paper" else mids // 3
  return lows + turned, mids - 2 * turned, highs + turned


def assign(orders: np.ndarray, counts: Sequence[int], levels: Sequence[int]) -> np.ndarray:
  """Bits of every expert: the first experts of each order get the highest level, the last the lowest.

  Args:
    orders: `[L, E]`, experts of each layer from the first to get high precision to the last.
    counts: experts of a layer per level, together E.
    levels: bits, in the order of `counts` (which need not be sorted).

  Returns:
    `[L, E]` int64.

  Raises:
    ValueError: counts that do not fit, or an order that is not a permutation (names the layer).
  """
  orders = np.asarray(orders)
  _check_orders(orders, orders.shape[1])
  if len(counts) != len(levels) or len(set(levels)) != len(levels) or min(counts) < 0:
    raise ValueError(f"counts {tuple(counts)}, levels {tuple(levels)}: there must be one count for each of different "
                     "levels")
  if sum(counts) != orders.shape[1]:
    raise ValueError(f"counts {tuple(counts)} sum to {sum(counts)}, but a layer has {orders.shape[1]} experts")
  ranked = sorted(zip(levels, counts, strict=True), reverse=True)
  by_rank = np.repeat([level for level, _ in ranked], [count for _, count in ranked])
  bits = np.empty(orders.shape, np.int64)
  np.put_along_axis(bits, orders, np.broadcast_to(by_rank, orders.shape), axis=1)
  return bits


def _insert_from_top(order: np.ndarray, maxvar: np.ndarray, zeta: float) -> list[int]:
  ranked: list[int] = []
  for expert in order.tolist():
    own = maxvar[expert]
    passed = (place for place, other in enumerate(ranked) if own >= zeta * maxvar[other] and own > maxvar[other])
    ranked.insert(next(passed, len(ranked)), expert)
  return ranked


def _lift_from_bottom(order: np.ndarray, maxvar: np.ndarray, zeta: float) -> list[int]:
  ranked = order.tolist()
  for expert in reversed(order.tolist()):
    place = next((p for p, other in enumerate(ranked) if zeta * maxvar[other] < maxvar[expert]), None)
    if place is not None and ranked.index(expert) > place:
      ranked.remove(expert)
      ranked.insert(place, expert)
  return ranked


def _check_variant(variant: str) -> None:
  if variant not in ("paper", "code"):
    raise ValueError(f"unknown variant {variant!r}; it is 'paper' or 'code'")


def _check_average(k: int, average: float, levels: tuple[int, ...]) -> None:
  if k < 1 or list(levels) != sorted(set(levels)):
    raise ValueError(f"tiers need at least one expert and ascending widths, not {k} experts and widths {levels}")
  if not levels[0] <= average <= levels[-1]:
    raise ValueError(f"an average of {average} bits is out of the possible range [{levels[0]}, {levels[-1]}] of the "
                     f"levels {levels}; choose other levels or another budget")


def _check_orders(orders: np.ndarray, experts: int) -> None:
  for layer, row in enumerate(orders):
    if sorted(row.tolist()) != list(range(experts)):
      raise ValueError(f"the order of layer {layer} is not a permutation of {experts} experts: {row.tolist()}")
