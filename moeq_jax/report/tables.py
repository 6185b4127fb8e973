"""The tables of the report as plain text cells: results, accounting, agreement, every row; and the terminal's table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from moeq_jax import results
from moeq_jax.report import damage as damage_lib
from moeq_jax.report import figures
from moeq_jax.report import points as points_lib

Row = results.Row
Point = points_lib.Point
ABSENT = "–"
FULL_COLOR = "#5f6368"
# Columns of the table of every row; loss_<domain> and nats_per_byte_<domain> come behind.
ROW_FIELDS = (
  "id", "method", "family", "codec", "group", "budget", "draw", "nominal_bits", "effective_bits", "stored_bits",
  "file_mb", "loss", "perplexity", "loss_delta", "loss_delta_ci95", "vs_uniform", "vs_uniform_ci95", "kl",
  "router_agreement", "constraint", "cost", "predicted", "lower_bound", "gap", "seed", "config_hash",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a table: the method's name, its colour, its cells, and whether it is the best of its group."""

  method: str
  color: str
  cells: tuple[str, ...]
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
  """Lines that may be compared with each other, and what they have in common."""

  title: str
  lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text: its header, and its lines in groups."""

  header: tuple[str, ...]
  groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the terminal's table: its header, its cell for a point, and the least width of console that has it."""

  header: str
  cell: Callable[[Point], str]
  least_width: int = 0


def number(value: float | None, form: str = ".4f") -> str:
  """A number in the given format, or a dash if there is none."""
  return ABSENT if value is None else format(value, form)


def plain(value: Any) -> str:
  """Any JSON value in a line of text."""
  if isinstance(value, Mapping):
    return "; ".join(f"{name}: {plain(item)}" for name, item in value.items())
  if isinstance(value, (list, tuple)):
    return ", ".join(plain(item) for item in value)
  if value is None:
    return ABSENT
  if isinstance(value, bool):
    return "yes" if value else "no"
  return format(value, ".6g") if isinstance(value, float) else str(value)


def domains(rows: Sequence[Row]) -> list[str]:
  """Names of the domains with a loss of their own, in order of appearance."""
  prefix, others = "loss_", ("loss_delta", "loss_delta_ci95")
  names = [name for row in rows for name in row if name.startswith(prefix) and name not in others]
  return [name.removeprefix(prefix) for name in dict.fromkeys(names)]


def _share(value: float | None) -> str:
  return ABSENT if value is None else f"{100 * value:.1f}%"


def _of_quantized(point: Point, name: str, form: str) -> str:
  """A field that says nothing about full precision itself."""
  return ABSENT if point.family == "full" else number(point.mean(name), form)


TERMINAL_COLUMNS = (
  Column("nominal", lambda p: number(p.mean("nominal_bits"), ".2f"), 92),
  Column("effective", lambda p: number(p.mean("effective_bits"), ".2f")),
  Column("MB", lambda p: number(p.mean("file_mb"), ".1f"), 92),
  Column("loss", lambda p: number(p.mean("loss"))),
  Column("increase", lambda p: _of_quantized(p, "loss_delta", "+.4f")),
  Column("± 95%", lambda p: ABSENT if len(p.rows) > 1 else _of_quantized(p, "loss_delta_ci95", ".4f"), 80),
  Column("KL", lambda p: number(p.mean("kl")), 92),
  Column("router", lambda p: _share(p.mean("router_agreement")), 92),
)


def _groups(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
  """The points by setting and budget, with a title for each group."""
  found = points_lib.settings(points)
  groups = []
  for setting in found:
    where = f", {setting.label}" if len(found) > 1 else ""
    for budget, group in points_lib.by_budget(p for p in points if p.setting == setting):
      groups.append((("no budget" if budget is None else f"{budget} bits asked") + where, group))
  return groups


def _with_full(points: Sequence[Point], full: Row | None) -> list[tuple[str, list[Point]]]:
  """The groups, with full precision as the first where there is such a row."""
  if full is None:
    return _groups(points)
  whole = Point(str(full.get("method", "full")), "full", points_lib.Setting("", 0), None, (full,))
  return [("full precision", [whole]), *_groups(points)]


def result_table(points: Sequence[Point], full: Row | None) -> Table:
  """One line for each point, by budget, best first; full precision on top."""
  header = (
    "method", "nominal bits", "effective bits", "file, MB", "loss", "increase", "± 95%, or range of draws",
    "against uniform, ± 95%", "perplexity", "KL", "router agreement",
  )  # fmt: skip
  styles = figures.looks(points)
  groups = []
  for title, group in _with_full(points, full):
    winner = points_lib.best(group) if len(group) > 1 else None
    lines = (Line(p.method, _color(styles, p), _result_cells(p), p is winner) for p in group)
    groups.append(Group(title, tuple(lines)))
  return Table(header, tuple(groups))


def _color(styles: Mapping[str, figures.Look], point: Point) -> str:
  return FULL_COLOR if point.family == "full" else styles[point.method].color


def _result_cells(point: Point) -> tuple[str, ...]:
  return (
    number(point.mean("nominal_bits"), ".3f"),
    number(point.mean("effective_bits"), ".3f"),
    number(point.mean("file_mb"), ".2f"),
    number(point.mean("loss")),
    _of_quantized(point, "loss_delta", "+.4f"),
    ABSENT if point.family == "full" else _spread(point),
    against_uniform(point),
    number(point.mean("perplexity"), ".3f"),
    number(point.mean("kl")),
    _share(point.mean("router_agreement")),
  )


def domain_table(points: Sequence[Point], full: Row | None) -> Table | None:
  """Loss and perplexity of every domain, in nats per token and per byte of text; None if rows have no domains."""
  rows = [row for point in points for row in point.rows] + ([full] if full else [])
  names = domains(rows)
  kinds = [("loss", "loss_"), ("nats per byte", "nats_per_byte_")]
  header = ("method", *(f"{kind}, {name}" for kind, _ in kinds for name in names))
  groups = []
  for title, group in _with_full(points, full):
    lines = (Line(p.method, "", tuple(number(p.mean(prefix + n)) for _, prefix in kinds for n in names)) for p in group)
    groups.append(Group(title, tuple(lines)))
  return Table(header, tuple(groups)) if names else None


def _spread(point: Point) -> str:
  """Half of the increase's 95% interval; of several draws, the range of the increase and their number."""
  if len(point.rows) > 1 and (span := point.span("loss_delta")):
    return f"{span[0]:.4f} to {span[1]:.4f} ({len(point.rows)})"
  ci = point.mean("loss_delta_ci95")
  return ABSENT if ci is None else f"± {ci:.4f}"


def against_uniform(point: Point) -> str:
  """The increase over uniform widths at the same budget, with half of its 95% interval where there is one draw."""
  delta, ci = point.mean("vs_uniform"), point.mean("vs_uniform_ci95")
  several = len(point.rows) > 1 or ci is None
  return number(delta, "+.4f") + ("" if delta is None or several else f" ± {ci:.4f}")


def accounting(points: Sequence[Point], full: Row | None) -> Table:
  """Sizes for each setting and budget: bits asked, of the codes, with scales, in the file; and the whole file."""
  header = (
    "size", "nominal bits", "effective bits", "stored bits", "stored against effective", "file, MB",
    "file against full",
  )  # fmt: skip
  groups = []
  if full is not None and full.get("file_mb") is not None:
    cells = (ABSENT, ABSENT, ABSENT, ABSENT, f"{full['file_mb']:.2f}", "1.00×")
    groups.append(Group("", (Line("full precision", FULL_COLOR, cells),)))
  lines = []
  for title, group in _groups(points):
    stored = [r["stored_bits"] / r["effective_bits"] - 1 for p in group for r in p.rows if _has_sizes(r)]
    worst = max(stored, key=abs, default=None)
    smaller = [full["file_mb"] / mb for p in group for mb in p.values("file_mb")] if groups else []
    cells = (
      *(_span(group, name, ".3f") for name in ("nominal_bits", "effective_bits", "stored_bits")),
      ABSENT if worst is None else f"{100 * worst:+.2f}%",
      _span(group, "file_mb", ".2f"),
      ABSENT if not smaller else f"{sum(smaller) / len(smaller):.2f}× smaller",
    )
    lines.append(Line(title, "", cells))
  return Table(header, (*groups, Group("", tuple(lines))))


def _has_sizes(row: Row) -> bool:
  return row.get("stored_bits") is not None and bool(row.get("effective_bits"))


def _span(group: Sequence[Point], name: str, form: str) -> str:
  """The range of a field over a group, or its one value."""
  values = [value for point in group for value in point.values(name)]
  low, high = (number(f(values, default=None), form) for f in (min, max))
  return low if low == high else f"{low} to {high}"


def predictions(points: Sequence[Point]) -> Table | None:
  """Predicted against measured loss increase of every row that has a prediction or a certificate; None without any."""
  groups = []
  for title, group in _groups(points):
    rows = [(p, r) for p in group for r in p.rows if r.get("predicted") is not None or r.get("lower_bound") is not None]
    cells = [
      Line(p.method, "", (*(number(r.get(n), ".5f") for n in ("predicted", "loss_delta")),
                          *(number(r.get(n), ".6g") for n in ("lower_bound", "gap"))))
      for p, r in rows
    ]  # fmt: skip
    if cells:
      groups.append(Group(title, tuple(cells)))
  header = ("method", "predicted increase, nats", "measured increase, nats", "certified lower bound on the cost", "gap")
  return Table(header, tuple(groups)) if groups else None


def agreement_table(found: Sequence[damage_lib.Agreement]) -> Table:
  """Spearman's rank correlation of every score with damage: inside layers, over all, and layer by layer.

  Of more than 12 layers only the least and the greatest value are shown.
  """
  layers = len(found[0].layers) if found else 0
  few = layers <= 12
  names = [f"layer {i}" for i in range(layers)] if few else ["least of a layer", "greatest of a layer"]
  lines = []
  for item in found:
    known = [value for value in item.layers if value is not None]
    ends = (min(known, default=None), max(known, default=None))
    values = (item.inside, item.over_all, *(item.layers if few else ends))
    lines.append(Line(item.score, "", tuple("undefined" if v is None else f"{v:+.2f}" for v in values)))
  return Table(("score", "inside layers", "over all", *names), (Group("", tuple(lines)),))


def every_row(rows: Sequence[Row]) -> Table:
  """All rows with all their fields, in the order of the file; numbers with six digits."""
  known = [name for name in ROW_FIELDS if any(name in row for row in rows)]
  header = [*known, *dict.fromkeys(name for row in rows for name in row if name not in ROW_FIELDS)]
  lines = (Line(str(row.get(header[0])), "", tuple(plain(row.get(name)) for name in header[1:])) for row in rows)
  return Table(tuple(header), (Group("", tuple(lines)),))


def terminal(rows: Sequence[Row], console: rich_console.Console) -> None:
  """Prints the rows as a table, by budget, the best of each budget marked with a star.

  Several draws of one method are one line with their mean. Loss and increase are in nats per token. All columns need
  a console of 100 columns; a narrower one gets fewer.
  """
  points, full = points_lib.aggregate(rows), points_lib.full_precision(rows)
  if not rows:
    console.print("No rows yet.")
    return
  shown = [column for column in TERMINAL_COLUMNS if console.width >= column.least_width]
  table = rich_table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
  table.add_column("method", overflow="fold")
  for column in shown:
    table.add_column(column.header, justify="right", no_wrap=True)
  for title, group in _with_full(points, full):
    winner = points_lib.best(group) if len(group) > 1 else None
    table.add_row(rich_text.Text(title, style="bold"))
    for point in group:
      draws = f" ({len(point.rows)} draws)" if len(point.rows) > 1 else ""
      name = ("* " if point is winner else "  ") + figures.clean(point.method, 60) + draws
      cells = [rich_text.Text(cell) for cell in (name, *(column.cell(point) for column in shown))]
      table.add_row(*cells, style="green" if point is winner else None)
    table.add_section()
  console.print(table)
