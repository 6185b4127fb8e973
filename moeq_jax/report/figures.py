"""Figures as self-contained SVG text and PNG bytes, equal for equal input; and the two figures of loss against size.

Colours are Okabe and Ito's (safe for colour-blind readers): one hue for each family of methods, inside a family a shade
and a marker for each method. Text stays text, in the font that matplotlib brings along.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import colors, figure, lines, style, ticker

from moeq_jax.report import points as points_lib

Point = points_lib.Point

STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#9aa0a6",
  "axes.grid": True,
  "axes.labelcolor": "#3c4043",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11.0,
  "axes.titleweight": "bold",
  "font.family": ["DejaVu Sans"],
  "font.size": 10.0,
  "grid.color": "#e8eaed",
  "legend.frameon": False,
  "legend.fontsize": 9.0,
  "savefig.dpi": 144,
  "svg.fonttype": "none",
  "svg.hashsalt": "moeq_jax",
  "text.color": "#202124",
  "text.parse_math": False,
  "xtick.color": "#5f6368",
  "xtick.labelsize": 9.0,
  "ytick.color": "#5f6368",
  "ytick.labelsize": 9.0,
}
# The first and the last shade of each family; members get shades between them.
FAMILY_COLORS = {
  "uniform": ("#000000", "#000000"),
  "random": ("#7a7a7a", "#a8a8a8"),
  "tiers": ("#c24e00", "#e69f00"),
  "knapsack": ("#00507d", "#56b4e9"),
  "measured": ("#009e73", "#66c5ab"),
}
OTHER_COLORS = ("#a3417a", "#cc79a7")
MARKERS = "osD^vP*X<>ph"


@dataclasses.dataclass(frozen=True)
class Picture:
  """One figure: its name (also its file's), what it shows, the SVG element and the PNG file's bytes."""

  name: str
  caption: str
  svg: str
  png: bytes


@dataclasses.dataclass(frozen=True)
class Look:
  """How one method is drawn."""

  color: str
  marker: str
  linestyle: str = "-"
  linewidth: float = 1.6


def settled() -> contextlib.AbstractContextManager:
  """A context in which matplotlib has this module's style, whatever the user's settings are."""
  return style.context(["default", STYLE])


def picture(name: str, caption: str, fig: figure.Figure) -> Picture:
  """Renders `fig`; call it inside `settled()`. No dates, no random ids: equal figures give equal bytes."""
  if fig.get_layout_engine() is not None:  # find the layout once, not again for each format
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
  png, svg = io.BytesIO(), io.BytesIO()
  fig.savefig(png, format="png", metadata={"Software": None})
  fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
  return Picture(name, caption, _inline(svg.getvalue().decode(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
  """The `<svg>` element alone, as wide as its place allows, with ids that no other figure of the page has."""
  svg = svg[svg.index("<svg") :]
  width = float(re.search(r'\swidth="([\d.]+)pt"', svg)[1])
  size = f'<svg style="max-width:{1.36 * width:.0f}px;min-width:{0.85 * width:.0f}px"'

  def own_ids(tag: re.Match) -> str:
    tag = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])
    return size + re.sub(r'\s(width|height)="[\d.]+pt"', "", tag)[4:] if tag.startswith("<svg") else tag

  return re.sub(r"<[^>]*>", own_ids, svg)


def clean(text: str, longest: int = 44) -> str:
  """A label without unprintable characters, shortened in the middle where it is long."""
  text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
  return text if len(text) <= longest else text[: longest // 2] + "…" + text[-(longest - longest // 2 - 1) :]


def looks(points: Sequence[Point]) -> dict[str, Look]:
  """How each method is drawn: hue by family; shade and marker by place in the family."""
  families: dict[str, list[str]] = {}
  for point in points:
    members = families.setdefault(point.family, [])
    if point.method not in members:
      members.append(point.method)
  found = {}
  for family, members in families.items():
    first, last = (np.array(colors.to_rgb(c)) for c in FAMILY_COLORS.get(family, OTHER_COLORS))
    for i, method in enumerate(members):
      color = colors.to_hex(first + (last - first) * i / max(len(members) - 1, 1))
      found[method] = Look(color, MARKERS[i % len(MARKERS)], ("-", "--")[i % 2], 2.6 if family == "uniform" else 1.6)
  return found


def loss(points: Sequence[Point], full_loss: float | None, name: str) -> Picture:
  """Held-out loss and its increase (log scale) against effective bits: a line for each method, a band for its draws.

  Args:
    points: of one setting.
    full_loss: loss in full precision, nats per token; drawn as a line where given.
    name: of the picture.
  """
  with settled():
    fig = figure.Figure(figsize=(11.5, 5.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    styles = looks(points)
    for method, look in styles.items():
      line = [p for p in points if p.method == method]
      _line(left, line, "loss", look)
      _line(right, [p for p in line if (p.mean("loss_delta") or 0) > 0], "loss_delta", look)
    hidden = _focus(left, [v for p in points if (v := p.mean("loss")) is not None], full_loss)
    left.set(title="Held-out loss", xlabel="effective bits per expert weight", ylabel="nats per token")
    right.set(title="Increase over full precision, log scale", xlabel="effective bits per expert weight")
    if right.has_data():
      right.set_yscale("log")
      log_ticks(right.yaxis)
    _legend(fig, styles, full_loss is not None)
    return picture(name, _loss_caption(points, hidden), fig)


def log_ticks(axis) -> None:
  """Labels a logarithmic axis with plain numbers: 1, 2 and 5 of each decade, of many decades only 1."""
  low, high = axis.get_view_interval()
  subs = (1.0,) if high > 1e3 * max(low, 1e-300) else (1.0, 2.0, 5.0)
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
  axis.set_minor_formatter(ticker.NullFormatter())


def _line(axes, line: list[Point], field: str, look: Look) -> None:
  """One method's line through its means, and the band between its least and greatest draws."""
  line = [p for p in line if p.mean(field) is not None and p.mean("effective_bits") is not None]
  line.sort(key=lambda p: p.mean("effective_bits"))
  if not line:
    return
  x = [p.mean("effective_bits") for p in line]
  front = 4 if line[0].family == "uniform" else 3
  axes.plot(
    x, [p.mean(field) for p in line], color=look.color, marker=look.marker, linestyle=look.linestyle,
    linewidth=look.linewidth, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6, zorder=front,
  )  # fmt: skip
  if any(len(p.rows) > 1 for p in line):
    low, high = zip(*(p.span(field) for p in line), strict=True)
    axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0, zorder=1)


def _focus(axes, values: list[float], full_loss: float | None) -> int:
  """Limits y to where methods can be told apart; returns how many points lie above. Draws full precision."""
  if not values:
    return 0
  floor = min(values) if full_loss is None else min(full_loss, *values)
  top = min(max(values), floor + 4 * (float(np.median(values)) - floor))
  room = 0.06 * ((top - floor) or abs(top) or 1.0)
  axes.set_ylim(floor - room, top + room)
  if full_loss is not None:
    axes.axhline(full_loss, color="#5f6368", linestyle=(0, (1, 1.5)), linewidth=1.4, zorder=2)
  return sum(value > top + room for value in values)


def _legend(fig: figure.Figure, styles: dict[str, Look], full: bool) -> None:
  """A legend under the axes, in the order of the families. Names are set afterwards, so that any text is allowed."""
  handles = [
    lines.Line2D([], [], color=s.color, marker=s.marker, linestyle=s.linestyle, linewidth=s.linewidth,
                 markersize=6, markeredgecolor="white", markeredgewidth=0.6)
    for s in styles.values()
  ]  # fmt: skip
  names = [clean(method) for method in styles]
  if full:
    handles.append(lines.Line2D([], [], color="#5f6368", linestyle=(0, (1, 1.5)), linewidth=1.4))
    names.append("full precision")
  if handles:
    columns = min(3, len(handles)) if max(map(len, names)) > 24 else min(4, len(handles))
    legend = fig.legend(handles, ["name"] * len(names), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
      text.set_text(name)


def _loss_caption(points: Sequence[Point], hidden: int) -> str:
  caption = "Held-out loss in nats per token over all domains. Points are plans."
  if any(len(p.rows) > 1 for p in points):
    caption += " Of several draws of a method the line is the mean, and the band runs from the least to the greatest."
  if hidden:
    lie = "points lie" if hidden > 1 else "point lies"
    caption += f" Left, {hidden} {lie} above the range shown; the right panel has all."
  lost = sum((p.mean("loss_delta") or 0) <= 0 for p in points)
  if lost:
    caption += f" Right, {lost} {'points' if lost > 1 else 'point'} without a positive increase cannot be shown."
  return caption


def increases(points: Sequence[Point], name: str) -> Picture:
  """Loss increase of every method, a panel for each budget: mean, 95% interval, and every draw as a small dot."""
  groups = [(b, [p for p in group if p.mean("loss_delta") is not None]) for b, group in points_lib.by_budget(points)]
  groups = [(budget, group) for budget, group in groups if group]
  with settled():
    columns = min(2, len(groups))
    counts = [len(group) for _, group in groups]
    heights = [max(counts[i : i + columns]) + 3.4 for i in range(0, len(groups), columns)]
    fig = figure.Figure(figsize=(5.75 * columns, 0.27 * sum(heights)), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.09)
    grid = fig.subplots(len(heights), columns, squeeze=False, height_ratios=heights).ravel()
    styles = looks(points)
    for axes, (budget, group) in zip(grid, groups, strict=False):
      _budget_panel(axes, group, styles)
      axes.set_title("no budget" if budget is None else f"{budget} bits asked")
      axes.set_xlabel("increase, nats per token", labelpad=2, fontsize=9)
    for axes in grid[len(groups) :]:
      axes.set_visible(False)
    caption = (
      "Loss increase over full precision in nats per token, best on top; bars are 95% intervals, paired over held-out "
      "sequences. Of several draws of a method each is a small dot, and the bar joins the outer ends of their "
      "intervals. The vertical line is uniform. Every panel has its own scale."
    )
    return picture(name, caption, fig)


def _budget_panel(axes, group: list[Point], styles: dict[str, Look]) -> None:
  """One row for each method, the best on top."""
  for y, point in enumerate(group):
    look, mean = styles[point.method], point.mean("loss_delta")
    if (ends := point.interval()) is not None:
      axes.plot(ends, [y, y], color=look.color, linewidth=2.0, solid_capstyle="round", alpha=0.55, zorder=2)
    if len(point.rows) > 1:
      draws = point.values("loss_delta")
      axes.scatter(draws, [y] * len(draws), s=9, color=look.color, linewidths=0, alpha=0.8, zorder=3)
    axes.plot([mean], [y], marker=look.marker, color=look.color, markersize=7, markeredgecolor="white",
              markeredgewidth=0.7, linestyle="none", zorder=4)  # fmt: skip
    if point.family == "uniform":
      axes.axvline(mean, color="#000000", linewidth=0.9, alpha=0.5, zorder=1)
  axes.set_yticks(range(len(group)), [clean(p.method, 36) for p in group])
  axes.tick_params(axis="y", length=0, labelcolor="#202124")
  axes.set_ylim(len(group) - 0.4, -0.6)
  axes.grid(axis="y", visible=False)
  axes.spines["left"].set_visible(False)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
