"""What experiments/granularity.py found, over all its points: comparisons, a table, figures.

Losses of the same sequences are averaged over calibration sets before two arms are compared, so an interval is over
sequences and holds for these calibration sets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import figure, ticker
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import artifacts, results, runs
from moeq_jax.evaluate import perplexity
from moeq_jax.report import figures

COLORS = {"gate": "#7a7a7a", "up": "#00507d", "down": "#c24e00"}
BASES = {"none": "", "hadamard": ", rotated"}
LOOKS = {"uniform": ("#000000", "o"), "thresholds": ("#c24e00", "v"),
         "thresholds fisher": ("#e69f00", "<"), "expert": ("#56b4e9", "s"),
         "expert sorted": ("#9cc9e8", "D"), "projection": ("#0072b2", "^"), "block 64": ("#009e73", "P"),
         "block 32": ("#33ab8b", "X"), "block 16": ("#66c5ab", "X"), "channel": ("#a3417a", "*")}
# Arm, and what it is held against.
PAIRS = (("uniform", "expert"), ("projection", "expert"), ("block 64", "expert"), ("block 16", "expert"),
         ("channel", "expert"), ("thresholds", "expert"), ("expert sorted", "expert"), ("block 64", "projection"),
         ("block 64", "expert sorted"), ("thresholds", "uniform"), ("thresholds fisher", "uniform"),
         ("thresholds fisher", "expert"), ("channel", "projection"), ("channel", "block 64"))

Key = tuple[str, str, str, str, float]  # model, codec, rotation, arm, budget
Losses = dict[Key, dict[int, np.ndarray]]  # by calibration set


def read_losses(points: Sequence[Path]) -> Losses:
  """Increases of the loss `[sequences]`, by what was measured and by calibration set."""
  losses: Losses = {}
  for point in points:
    for row in results.read(point / "losses.jsonl"):
      key = (row["model"], row["codec"], row["rotation"], row["arm"], row["budget"])
      losses.setdefault(key, {})[row["seed"]] = results.numbered(row, "sequence_")
  return losses


def read_rows(points: Sequence[Path]) -> list[results.Row]:
  """The rows of all points, with ids that say which point they are of."""
  rows = [row for point in points for row in results.read(point / "rows.jsonl")]
  return [row | {"id": f"{row['model']}@{row['rotation']}@set {row['seed']}: {row['id']}"} for row in rows]


def compare(losses: Losses) -> list[results.Row]:
  """One row for every pair of arms that both have been measured: mean difference, 95% interval, that of each set."""
  found = []

  def add(what: str, model: str, codec: str, rotation: str, budget: float, ours: Key, theirs: Key) -> None:
    sets = sorted(losses.get(ours, {}).keys() & losses.get(theirs, {}).keys())
    if not sets:
      return
    sides = [np.array([losses[key][number] for number in sets]) for key in (ours, theirs)]
    delta, stderr = perplexity.paired(*(side.mean(axis=0) for side in sides))
    each = (sides[0] - sides[1]).mean(axis=1)
    found.append({"id": f"{model}@{codec}@{rotation}@{budget:g}: {what}", "model": model, "codec": codec,
                  "rotation": rotation, "budget": budget, "what": what, "difference": delta, "ci95": 1.96 * stderr,
                  "sets": len(sets), **{f"set_{i}": float(x) for i, x in zip(sets, each, strict=True)}})

  points = sorted({(model, codec, rotation, budget) for model, codec, rotation, _, budget in losses})
  for model, codec, rotation, budget in points:
    for pair in (*PAIRS, ("only down", "only up"), ("only down", "only gate")):
      keys = [(model, codec, rotation, arm, budget) for arm in pair]
      add(" - ".join(pair), model, codec, rotation, budget, *keys)
    if rotation == "none":
      for arm in sorted({k[3] for k in losses if k[0] == model and k[1] == codec and k[4] == budget}):
        keys = [(model, codec, basis, arm, budget) for basis in ("hadamard", "none")]
        add(f"{arm}: rotated - not", model, codec, "both", budget, *keys)
  return found


def summarise(directory: Path, points: Sequence[Path]) -> None:
  """Writes comparisons.jsonl, all.jsonl (those and the rows of all points) and figures/ into `directory`, and prints a
  table; directory and points as `runs.points` gives them."""
  losses, stamp = read_losses(points), {"config_hash": runs.hash_of(points)}
  path = directory / "comparisons.jsonl"
  path.unlink(missing_ok=True)
  shown = rich_table.Table("model", "codec", "basis", "bits", "what", "nats", "of each set")
  for row in compare(losses):
    results.append(path, row | stamp)
    sets = " ".join(f"{x:+.4f}" for x in results.numbered(row, "set_"))
    shown.add_row(row["model"], row["codec"], row["rotation"], f"{row['budget']:g}", row["what"],
                  f"{row['difference']:+.4f} ± {row['ci95']:.4f}", sets)
  rich_console.Console(width=160).print(shown)
  (directory / "all.jsonl").unlink(missing_ok=True)
  for row in [*read_rows(points), *results.read(path)]:
    results.append(directory / "all.jsonl", row)
  (directory / "figures").mkdir(exist_ok=True)
  with figures.settled():
    if any(key[3] in LOOKS for key in losses):
      loss_figure(losses).savefig(directory / "figures" / "granularity.png")
    files = [artifacts.load_arrays(file) for point in points if (file := point / "outliers.npz").is_file()]
    if files:
      outlier_figure(files).savefig(directory / "figures" / "channel-outliers.png")


def loss_figure(losses: Losses) -> figure.Figure:
  """Loss against effective bits, the mean of calibration sets: a column for each model and codec, a row for a basis."""
  panels = sorted({key[:2] for key in losses if key[3] in LOOKS})
  bases = [rotation for rotation in BASES if any(key[2] == rotation for key in losses)]
  fig = figure.Figure(figsize=(4.4 * len(panels), 3.3 * len(bases) + 0.7), layout="constrained")
  grid, shown = fig.subplots(len(bases), len(panels), squeeze=False, sharex="col", sharey="col"), {}
  for row, rotation in zip(grid, bases, strict=True):
    for axes, (model, codec) in zip(row, panels, strict=True):
      for arm, (color, marker) in LOOKS.items():
        points = sorted((key[4], np.mean([*values.values()])) for key, values in losses.items()
                        if key[:4] == (model, codec, rotation, arm))
        if points:
          shown[arm], = axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, linewidth=1.3)
      axes.set_title(f"{model}, {codec.partition('(')[0]}{BASES[rotation]}")
      axes.set(yscale="log", ylabel="nats per token above full precision")
      _plain_numbers(axes)
  for axes in grid[-1]:
    axes.set_xlabel("bits per weight: codes, widths, order")
  arms = [arm for arm in LOOKS if arm in shown]
  fig.legend([shown[arm] for arm in arms], arms, loc="outside lower center", ncols=len(arms))
  return fig


def _plain_numbers(axes: axes_lib.Axes) -> None:
  """Ticks of a logarithmic axis as they are read: 0.02, 3, 50."""
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_formatter(ticker.FuncFormatter(
      lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else ""))


def outlier_figure(files: Sequence[tuple[dict[str, np.ndarray], dict[str, Any]]]) -> figure.Figure:
  """Kurtosis and largest by median weight of channels: of every expert the median channel and the band from 1% to 99%;
  a row of panels for each model, left as it is, right rotated."""
  found = {(meta["model"], meta["rotation"]): arrays for arrays, meta in files}
  models = sorted({model for model, _ in found})
  panels = [(kind, rotation) for kind in ("kurtosis", "max_median") for rotation in BASES]
  fig = figure.Figure(figsize=(10.5, 2.9 * len(models)), layout="constrained")
  grid = fig.subplots(len(models), len(panels), squeeze=False)
  titles = {"kurtosis": "kurtosis", "max_median": "largest / median"}
  for row, model in zip(grid, models, strict=True):
    for axes, (kind, rotation) in zip(row, panels, strict=True):
      axes.set_title(f"{model}{BASES[rotation]}", fontsize=8.5)
      axes.set_xlabel("experts, by median", fontsize=8)
      axes.set_ylabel(f"{titles[kind]} of a channel", fontsize=8)
      axes.set_yscale("log")
      for name, color in COLORS.items():
        values = found.get((model, rotation), {}).get(f"{kind}_{name}")
        if values is None:
          axes.set_visible(False)
          continue
        flat = values.reshape(-1, values.shape[-1])
        low, middle, high = np.quantile(flat[np.argsort(np.median(flat, axis=1))], (0.01, 0.5, 0.99), axis=1)
        axes.plot(middle, color=color, label=name)
        axes.fill_between(np.arange(len(middle)), low, high, color=color, alpha=0.2, linewidth=0)
    for first in (0, 2):  # a kind has one scale in both bases
      shared = [axes.get_ylim() for axes in row[first:first + 2] if axes.has_data()]
      for axes in row[first:first + 2]:
        axes.set_ylim(min(low for low, _ in shared), max(high for _, high in shared))
        _plain_numbers(axes)
    row[0].legend(fontsize=7)
  return fig
