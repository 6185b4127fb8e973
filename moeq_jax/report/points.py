"""Rows of one method at one budget, seen as one point; and what the points say in words.

A method with several draws (random plans, uniform between its own widths) is one point: the mean over the draws, and
their range. Methods are compared only inside a `Setting`: one codec and one group size.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moeq_jax import results

Row = results.Row
# A sentence in parts: the odd ones are names of methods, to be set as code.
Sentence = tuple[str, ...]
# Two sizes are called the same if their effective bits differ by less than this share.
SAME_SIZE = 0.005


class Setting(NamedTuple):
  """The codec and the group size under which methods may be compared."""

  codec: str
  group: int

  @property
  def label(self) -> str:
    """The codec, and the group size where the codec's spec does not say it."""
    return self.codec if "group=" in self.codec else f"{self.codec}, group {self.group or 'of all rows'}"


@dataclasses.dataclass(frozen=True)
class Point:
  """The rows of one method at one budget under one setting: one row, or one for each draw."""

  method: str
  family: str
  setting: Setting
  budget: float | None
  rows: tuple[Row, ...]

  def values(self, name: str) -> list[float]:
    """The values of one field in all rows that have it."""
    return [float(row[name]) for row in self.rows if row.get(name) is not None]

  def mean(self, name: str) -> float | None:
    """Mean of a field over the draws; None if no row has it."""
    values = self.values(name)
    return sum(values) / len(values) if values else None

  def span(self, name: str) -> tuple[float, float] | None:
    """Least and greatest value of a field over the draws; None if no row has it."""
    values = self.values(name)
    return (min(values), max(values)) if values else None

  def interval(self) -> tuple[float, float] | None:
    """From the lowest to the highest end of the rows' 95% intervals of the loss increase; None without intervals."""
    rows = [row for row in self.rows if row.get("loss_delta") is not None and row.get("loss_delta_ci95") is not None]
    if not rows:
      return None
    ends = [(row["loss_delta"] - row["loss_delta_ci95"], row["loss_delta"] + row["loss_delta_ci95"]) for row in rows]
    return min(low for low, _ in ends), max(high for _, high in ends)


def full_precision(rows: Iterable[Row]) -> Row | None:
  """The first row in full precision, or None."""
  return next((row for row in rows if row.get("family") == "full"), None)


def aggregate(rows: Iterable[Row]) -> list[Point]:
  """The points of all quantized rows: by setting, then family, then method in order of appearance, then budget."""
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    if row.get("family") != "full":
      setting = Setting(str(row.get("codec", "?")), int(row.get("group") or 0))
      budget = None if row.get("budget") is None else float(row["budget"])
      key = (setting, str(row.get("family", "?")), str(row.get("method", "?")), budget)
      groups.setdefault(key, []).append(row)
  order = list(dict.fromkeys(method for _, _, method, _ in groups))

  def rank(key: tuple) -> tuple:
    setting, family, method, budget = key
    known = results.FAMILIES.index(family) if family in results.FAMILIES else len(results.FAMILIES)
    return setting, known, order.index(method), budget is not None, budget or 0.0

  return [
    Point(method, family, setting, budget, tuple(groups[setting, family, method, budget]))
    for setting, family, method, budget in sorted(groups, key=rank)
  ]


def settings(points: Iterable[Point]) -> list[Setting]:
  """The settings among the points, in order."""
  return list(dict.fromkeys(point.setting for point in points))


def by_budget(points: Iterable[Point]) -> list[tuple[float | None, list[Point]]]:
  """Points by ascending budget (without one: first), each group from the least loss to the greatest."""
  groups: dict[float | None, list[Point]] = {}
  for point in points:
    groups.setdefault(point.budget, []).append(point)
  ordered = sorted(groups, key=lambda budget: -1.0 if budget is None else budget)
  return [(budget, sorted(groups[budget], key=_loss)) for budget in ordered]


def best(points: Sequence[Point]) -> Point | None:
  """The point with the least mean loss; None if no point has a loss."""
  return min((p for p in points if p.mean("loss") is not None), key=_loss, default=None)


def _loss(point: Point) -> float:
  loss = point.mean("loss")
  return float("inf") if loss is None else loss


def increase(point: Point) -> str:
  """The loss increase in words: `0.0571 ± 0.0031`, or the mean if there are several draws."""
  mean, ci = point.mean("loss_delta"), point.mean("loss_delta_ci95")
  if mean is None:
    return "unknown"
  if len(point.rows) > 1:
    return f"{mean:.4f} (mean of {len(point.rows)} draws)"
  return f"{mean:.4f}" + ("" if ci is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{ci:.4f}")


def headline(points: Sequence[Point]) -> list[Sentence]:
  """One sentence for each setting and budget: the best method against uniform."""
  several = len(settings(points)) > 1
  sentences = []
  for setting in settings(points):
    for budget, group in by_budget(p for p in points if p.setting == setting):
      where = f" with {setting.label}" if several else ""
      sentences.append(_sentence(("Without a budget" if budget is None else f"At {budget} bits") + where, group))
  return [sentence for sentence in sentences if sentence]


def _sentence(opening: str, group: list[Point]) -> Sentence:
  winner = best(group)
  if winner is None:
    return ()
  uniform = best([p for p in group if p.family == "uniform"])
  if uniform is None:
    text = f" adds the least, {increase(winner)} nats per token; there is no uniform row to compare it with."
    return (f"{opening}, ", winner.method, text)
  if winner is uniform:
    other = best([p for p in group if p.family != "uniform"])
    if other is None:
      return (f"{opening} only ", uniform.method, f" was tried, which adds {increase(uniform)} nats per token.")
    text = f", which adds {increase(uniform)} nats per token; next comes "
    return (f"{opening}, nothing beats ", uniform.method, text, other.method, f", {increase(other)}.")
  text = f" adds {increase(winner)} nats per token where uniform adds {increase(uniform)}{_less(winner, uniform)}."
  start = (f"{opening}, ", winner.method, text + _sizes(winner, uniform) + _certainty(winner, uniform))
  return _joined(start, _without_measuring(winner, group))


def _joined(first: Sentence, second: Sentence) -> Sentence:
  """The two in a row; the last part of the first and the first part of the second are both text."""
  return (*first[:-1], first[-1] + second[0], *second[1:]) if second else first


def _less(winner: Point, uniform: Point) -> str:
  mine, its = winner.mean("loss_delta"), uniform.mean("loss_delta")
  if mine is None or its is None or mine <= 0:
    return ""
  return f": {100 * (1 - mine / its):.0f}% less"


def _sizes(winner: Point, uniform: Point) -> str:
  mine, its = winner.mean("effective_bits"), uniform.mean("effective_bits")
  if mine is None or its is None:
    return ""
  if abs(mine / its - 1) > SAME_SIZE:
    return f" Their sizes differ: {mine:.3f} and {its:.3f} effective bits."
  return f" Both take {mine:.2f} effective bits."


def _certainty(winner: Point, uniform: Point) -> str:
  """The paired difference with its interval; where rows have none, whether the intervals of both overlap."""
  delta, ci = winner.mean("vs_uniform"), winner.mean("vs_uniform_ci95")
  if delta is not None and ci is not None and len(winner.rows) == 1:
    return f" Paired over sequences, the difference is {delta:+.4f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{ci:.4f}."
  mine, its = winner.interval(), uniform.interval()
  if mine is None or its is None:
    return ""
  return " Their 95% intervals " + ("overlap." if mine[1] >= its[0] else "do not overlap.")


def _without_measuring(winner: Point, group: list[Point]) -> Sentence:
  """Where the winner needed every expert's damage measured: the best method that did not."""
  other = best([p for p in group if p.family != "measured"])
  if winner.family != "measured" or other is None:
    return ()
  return (" Without measured damage the best is ", other.method, f", {increase(other)}.")
