"""How well scores foretell measured damage: rank correlations, and a scatter for each score.

Damage is the held-out loss increase in nats per token when one expert alone is quantized, measured with a standard
error. A score is good if it ranks experts as damage does: inside a layer, which is all that a rule with equal counts
in every layer can use, and over all layers, which is what a global allocator uses.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, figure, lines, ticker
from scipy import stats

from moeq_jax.report import figures

# Above this number of experts points are small, without error bars, and one image instead of shapes.
MANY = 1000


@dataclasses.dataclass(frozen=True)
class Damage:
  """Measured damage of every expert.

  Attributes:
    mean, stderr: `[L, E]` float64, nats per token; NaN where not measured.
    bits: width at which it was measured.
    tokens: held-out tokens it was measured on.
  """

  mean: np.ndarray
  stderr: np.ndarray
  bits: int
  tokens: int

  @classmethod
  def parse(cls, data: Mapping[str, Any]) -> "Damage":
    """From `report.json`. Raises `ValueError` if mean and standard error do not fit together."""
    mean, stderr = np.array(data["mean"], np.float64), np.array(data["stderr"], np.float64)
    if mean.ndim != 2 or mean.shape != stderr.shape:
      shapes = f"damage.mean has shape {mean.shape}, damage.stderr {stderr.shape}"
      raise ValueError(f"report.json: {shapes}; both must be (layers, experts)")
    return cls(mean, stderr, int(data["bits"]), int(data["tokens"]))

  def worst_to_median(self) -> float | None:
    """The worst expert's damage divided by the median; None where the median is not positive."""
    median = float(np.nanmedian(self.mean))
    return float(np.nanmax(self.mean)) / median if median > 0 else None

  def noise_share(self) -> float:
    """Share of the variance of the means that the standard errors explain: 1 would be noise alone."""
    return float(np.nanmean(self.stderr**2) / np.nanvar(self.mean)) if np.nanvar(self.mean) > 0 else 1.0


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Spearman's rank correlation of a score with measured damage; None where a constant leaves it undefined.

  Attributes:
    score: the score's name.
    layers: one value for each layer.
    inside: mean over the layers that have one.
    over_all: over all experts of all layers at once.
  """

  score: str
  layers: tuple[float | None, ...]
  inside: float | None
  over_all: float | None


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
  """Spearman's rank correlation, average ranks for ties; None if fewer than 3 pairs are finite or one is constant."""
  good = np.isfinite(x) & np.isfinite(y)
  x, y = x[good], y[good]
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return None
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", stats.ConstantInputWarning)
    value = float(stats.spearmanr(x, y).statistic)
  return value if math.isfinite(value) else None


def agreement(name: str, score: np.ndarray, damage: Damage) -> Agreement:
  """Compares one score `[L, E]` with damage. Raises `ValueError` if its shape is another one."""
  if score.shape != damage.mean.shape:
    raise ValueError(f"report.json: score {name!r} has shape {score.shape}, damage {damage.mean.shape}")
  layers = tuple(spearman(s, d) for s, d in zip(score, damage.mean, strict=True))
  known = [value for value in layers if value is not None]
  inside = sum(known) / len(known) if known else None
  return Agreement(name, layers, inside, spearman(score.ravel(), damage.mean.ravel()))


def agreements(scores: Mapping[str, Any], damage: Damage) -> list[Agreement]:
  """All scores, the best inside layers first."""
  found = [agreement(name, np.array(score, np.float64), damage) for name, score in scores.items()]
  return sorted(found, key=lambda a: (2.0 if a.inside is None else -a.inside, a.score))


def chance(damage: Damage) -> float:
  """Half width of the range in which 95% of unrelated scores would have their mean over layers.

  Under independence Spearman's coefficient of n pairs has variance 1 / (n - 1); the mean of L layers has that over L.
  """
  layers, experts = damage.mean.shape
  return 1.96 / math.sqrt(layers * max(experts - 1, 1))


def scatter(scores: Mapping[str, Any], damage: Damage) -> figures.Picture:
  """Score against damage of every expert, a panel for each score, a colour for each layer."""
  found = agreements(scores, damage)
  columns = min(3, len(found))
  rows = -(-len(found) // columns)
  linthresh = _linear_below(damage)
  with figures.settled():
    fig = figure.Figure(figsize=(3.85 * columns, 2.75 * rows + 0.5), layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False, sharey=True)
    palette = _palette(len(damage.mean))
    for axes, item in zip(grid.ravel(), found, strict=False):
      _panel(axes, np.array(scores[item.score], np.float64), damage, palette)
      axes.set_title(f"{figures.clean(item.score, 34)}\n", fontsize=10)
      axes.text(0, 1.02, f"ρ  {_rho(item.inside)} inside layers, {_rho(item.over_all)} over all", fontsize=8.5,
                transform=axes.transAxes, color="#3c4043")  # fmt: skip
      axes.set_xlabel("score", labelpad=1)
    for axes in grid.ravel()[len(found) :]:
      axes.set_visible(False)
    for axes in grid[:, 0]:
      axes.set_ylabel("damage, nats per token")
    if linthresh is not None:
      _partly_log(grid[0, 0], damage, linthresh)
    grid[0, 0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
    _layers_key(fig, grid, palette)
    return figures.picture("damage", _caption(damage, linthresh), fig)


def _partly_log(axes, damage: Damage, linthresh: float) -> None:
  """Makes y linear up to `linthresh` and logarithmic beyond, with room for every point and its error bar."""
  axes.set_yscale("symlog", linthresh=linthresh, linscale=0.6)
  decades = 10.0 ** np.arange(math.ceil(math.log10(linthresh)), 3)
  axes.yaxis.set_major_locator(ticker.FixedLocator([0.0, *decades, *-decades]))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  low, high = np.nanmin(damage.mean - damage.stderr), np.nanmax(damage.mean + damage.stderr)
  axes.set_ylim(min(1.3 * low, -0.5 * linthresh), max(1.5 * high, linthresh))


def _rho(value: float | None) -> str:
  return "undefined" if value is None else f"{value:+.2f}"


def _linear_below(damage: Damage) -> float | None:
  """The damage at which its axis turns from linear to logarithmic; None if it is linear throughout."""
  ratio = damage.worst_to_median()
  if ratio is not None and ratio < 8:
    return None
  return max(2 * float(np.nanmedian(damage.stderr)), 1e-3 * float(np.nanmax(np.abs(damage.mean)))) or None


def _palette(layers: int) -> list:
  return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, layers)))


def _panel(axes, score: np.ndarray, damage: Damage, palette: list) -> None:
  many = damage.mean.size > MANY
  for layer, color in enumerate(palette):
    axes.errorbar(
      score[layer], damage.mean[layer], None if many else damage.stderr[layer], color=color, linestyle="none",
      elinewidth=0.9, alpha=0.85, marker=figures.MARKERS[layer % 6], markersize=2.5 if many else 4.6,
      markeredgewidth=0.0 if many else 0.4, markeredgecolor="white", rasterized=many,
    )  # fmt: skip
  positive = score[np.isfinite(score)]
  if positive.size and positive.min() > 0 and positive.max() / positive.min() > 30:
    axes.set_xscale("log")
    figures.log_ticks(axes.xaxis)
  else:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
  axes.axhline(0.0, color="#9aa0a6", linewidth=0.8, zorder=1)


def _layers_key(fig: figure.Figure, grid: np.ndarray, palette: list) -> None:
  """Which layer a point belongs to: a legend for few layers, a colour bar for many."""
  if len(palette) <= 8:
    handles = [
      lines.Line2D([], [], color=color, marker=figures.MARKERS[layer % 6], linestyle="none", label=f"layer {layer}")
      for layer, color in enumerate(palette)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(palette), handletextpad=0.1)
    return
  norm = colors.BoundaryNorm(np.arange(len(palette) + 1) - 0.5, len(palette))
  scale = matplotlib.cm.ScalarMappable(norm, colors.ListedColormap(palette))
  ticks = range(0, len(palette), -(-len(palette) // 8))
  bar = fig.colorbar(scale, ax=grid, location="right", shrink=0.9, aspect=22, label="layer", ticks=ticks)
  bar.ax.tick_params(length=0)
  bar.ax.minorticks_off()
  bar.outline.set_visible(False)


def _caption(damage: Damage, linthresh: float | None) -> str:
  caption = (
    f"Each point is one expert. Damage: held-out loss increase when that expert alone is quantized to {damage.bits} "
    f"bits, on {damage.tokens:,} tokens. ρ is Spearman's rank correlation."
  )
  if damage.mean.size <= MANY:
    caption += " Bars are one standard error."
  if linthresh is not None:
    caption += f" The axis of damage is linear up to {linthresh:.2g}, then logarithmic."
  return caption
