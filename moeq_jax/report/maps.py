"""Bit maps: the bits of every expert (layers x experts) under a selection of plans, as small multiples."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import colors, figure, patches

from moeq_jax.report import figures

SHOWN_BUDGETS = (2.0, 2.5)
COLUMNS = 3
# The page of maps in inches: width of the figure, of a map and of a column; room above the first map, under and left of
# each map, and for the key below all.
WIDTH, MAP, COLUMN = 11.5, 3.15, 3.76
TOP, UNDER, LEFT, KEY = 0.3, 0.54, 0.4, 0.24


def shown_budgets(plans: Sequence[Mapping[str, Any]]) -> list[float]:
  """The budgets whose maps are shown at once: 2.0 and 2.5 where there are such plans, else the middle two."""
  budgets = budgets_of(plans)
  middle = max(0, (len(budgets) - 2) // 2)
  return [b for b in budgets if b in SHOWN_BUDGETS] or budgets[middle : middle + 2]


def budgets_of(plans: Sequence[Mapping[str, Any]]) -> list[float]:
  """The budgets of the plans, ascending."""
  return sorted({float(plan["budget"]) for plan in plans if plan.get("budget") is not None})


def bit_maps(plans: Sequence[Mapping[str, Any]], widths: Sequence[int], budget: float,
             rows_are: str = "projections differ a layer has a row for each, gate, up and down in this order",
             ) -> figures.Picture:
  """The maps of all plans at one budget, one for each method (the first draw where it has several).

  Args:
    plans: mappings with `method`, `budget` and `bits` (`[L][E]` or `[L][E][P]`, whole numbers).
    widths: candidate widths; they and the bits of all plans make the scale, the same for every budget.
    budget: average nominal bits asked for.
    rows_are: what the caption says of layers with several rows: "Where ...".
  """
  chosen: dict[str, np.ndarray] = {}
  for plan in plans:
    if plan.get("budget") is not None and float(plan["budget"]) == budget:
      chosen.setdefault(str(plan["method"]), _bits(plan))
  levels = sorted({int(w) for w in widths} | {int(b) for plan in plans for b in np.unique(_bits(plan))})
  palette = colors.ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 1.0, len(levels))))
  heights = [_height(*bits.shape) for bits in chosen.values()]
  rows = -(-len(chosen) // COLUMNS)
  pitch = max(heights) + UNDER
  with figures.settled():
    fig = figure.Figure(figsize=(WIDTH, TOP + rows * pitch + KEY))
    axes = _in_inches(fig)
    for i, (method, bits) in enumerate(chosen.items()):
      corner = LEFT + i % COLUMNS * COLUMN, TOP + i // COLUMNS * pitch
      _map(axes, corner, heights[i], np.searchsorted(levels, bits), palette)
      axes.text(corner[0], corner[1] - 0.06, figures.clean(method, 38), fontsize=9.5, fontweight="bold", va="bottom")
      _mean_bits(axes, corner, heights[i], bits)
    _key(axes, TOP + rows * pitch - 0.12, levels, palette)
    caption = (
      f"Bits of every expert at {budget} bits asked, one map for each method: rows are layers with experts, columns "
      "are experts; the numbers on the right are the mean bits of the layer. Darker means more bits."
    )
    if any(bits.shape[1] > 1 for bits in chosen.values()):
      caption += f" Where {rows_are}."
    if len(chosen) < sum(plan.get("budget") is not None and float(plan["budget"]) == budget for plan in plans):
      caption += " A method with several draws is shown by its first."
    return figures.picture(f"bits-{budget:g}".replace(".", "_"), caption, fig)


def _bits(plan: Mapping[str, Any]) -> np.ndarray:
  """The bits of a plan as `[L, rows of a layer, E]`: one row, or one for each projection."""
  bits = np.asarray(plan["bits"])
  if bits.ndim not in (2, 3) or bits.size == 0:
    raise ValueError(f"report.json: the bits of {plan.get('method')!r} have shape {bits.shape}, not (layers, experts)"
                     " or (layers, experts, projections)")  # fmt: skip
  return bits[:, None] if bits.ndim == 2 else bits.swapaxes(1, 2)


def _height(layers: int, rows: int, experts: int) -> float:
  """The height of a map: square experts; where a layer has several rows, twice that, for flat ones."""
  return float(np.clip(MAP * layers * min(rows, 2) / experts, 0.5, 3.2))


def _in_inches(fig: figure.Figure) -> mpl_axes.Axes:
  """Bare axes over the whole figure whose units are inches from its upper left corner."""
  axes = fig.add_axes((0, 0, 1, 1), frameon=False)
  axes.set_axis_off()
  axes.set(xlim=(0, fig.get_figwidth()), ylim=(fig.get_figheight(), 0), autoscale_on=False)
  return axes


def _map(axes, corner: tuple[float, float], height: float, index: np.ndarray, palette: colors.Colormap) -> None:
  """One map with its upper left corner at `corner`; `index[L, rows, E]` numbers the levels."""
  (x, y), (layers, _, experts) = corner, index.shape
  axes.imshow(index.reshape(-1, experts), cmap=palette, vmin=-0.5, vmax=palette.N - 0.5,
              extent=(x, x + MAP, y + height, y), aspect="auto", interpolation="none")  # fmt: skip
  if layers <= 12 and experts <= 64:
    axes.hlines(y + height * np.arange(1, layers) / layers, x, x + MAP, color="white", linewidth=0.8)
    axes.vlines(x + MAP * np.arange(1, experts) / experts, y, y + height, color="white", linewidth=0.8)
  _labels(axes, corner, height, layers, experts)


def _labels(axes, corner: tuple[float, float], height: float, layers: int, experts: int) -> None:
  """Numbers of layers and experts at the edges of one map."""
  x, y = corner
  grey = {"fontsize": 8, "color": "#5f6368"}
  for layer in _ticks(layers):
    axes.text(x - 0.06, y + height * (layer + 0.5) / layers, f"{layer}", ha="right", va="center", **grey)
  for expert in _ticks(experts):
    axes.text(x + MAP * (expert + 0.5) / experts, y + height + 0.05, f"{expert}", ha="center", va="top", **grey)
  if x == LEFT:
    axes.text(x - 0.3, y + height / 2, "layer", ha="center", va="center", rotation=90, **grey)
  axes.text(x + MAP, y + height + 0.05, "expert", ha="left", va="top", **grey)


def _mean_bits(axes, corner: tuple[float, float], height: float, bits: np.ndarray) -> None:
  """The mean bits of every layer, to the right of the map, where there is room for them."""
  layers = len(bits)
  for layer, mean in enumerate(bits.mean((1, 2)) if layers <= 12 else ()):
    axes.text(corner[0] + MAP + 0.05, corner[1] + height * (layer + 0.5) / layers, f"{mean:.2f}", fontsize=7.5,
              color="#3c4043", va="center")  # fmt: skip


def _ticks(count: int) -> range:
  """Numbers from 0 in whole steps, at most 8 of them."""
  step = 1
  while -(-count // step) > 8:
    step *= 2
  return range(0, count, step)


def _key(axes, y: float, levels: Sequence[int], palette: colors.Colormap) -> None:
  """A swatch with its number of bits for each level."""
  axes.text(LEFT, y + 0.1, "bits", fontsize=9.5, va="center")
  for i, level in enumerate(levels):
    axes.add_patch(patches.Rectangle((LEFT + 0.45 + 0.62 * i, y), 0.26, 0.2, color=palette(i), linewidth=0))
    axes.text(LEFT + 0.77 + 0.62 * i, y + 0.1, f"{level}", fontsize=9.5, va="center")
