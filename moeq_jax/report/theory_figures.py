"""The figures of the task `theory`; bars are 95% intervals over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from moeq_jax.report import figures, theory
from moeq_jax.theory import quantization, two_layer

Row = Mapping[str, Any]
COLORS = {"frequent": "#00507d", "rare": "#c24e00", "irrelevant": "#7a7a7a"}
LOOKS = (("o", "#00507d"), ("^", "#56b4e9"), ("s", "#c24e00"), ("D", "#009e73"), ("v", "#a3417a"), ("P", "#7a7a7a"))
REGION = "B(alpha=0.1, margin=0.05)"


def pictures(rows: Sequence[Row]) -> list[figures.Picture]:
  """The figures for which there are rows."""
  with figures.settled():
    made = (activation(rows), curves(rows), regions(rows), dimension(rows))
    return [picture for picture in made if picture is not None]


def _grouped(rows: Iterable[Row]) -> dict[str, list[tuple[two_layer.Setting, list[Row]]]]:
  """Settings that were quantized and differ in alpha only, by a name."""
  found: dict[str, list] = {}
  for spec, members in theory.by_spec(rows).items():
    if "max_variance_ratio" in members[0]:
      setting = two_layer.Setting.parse(spec)
      stop = "first 100%" if setting.margin == 0 else f"margin {setting.margin:g}"
      found.setdefault(f"{setting.design}, d = {setting.dim}, {stop}", []).append((setting, members))
  return found


def _points(axes, number: int, name: str, x: Sequence[float], found: Sequence[tuple[float, float]]) -> None:
  """Means with their intervals, in the look of group `number` and a little beside the others."""
  marker, color = LOOKS[number % len(LOOKS)]
  middle, half = zip(*found, strict=True)
  axes.errorbar(np.array(x) + 0.05 * (number - 1.5), middle, yerr=half, fmt=marker, color=color, label=name,
                markersize=6, capsize=2, linewidth=1.2, zorder=3)


def activation(rows: Sequence[Row]) -> figures.Picture | None:
  """Ratio of activations, and shift in bits, against what is predicted."""
  grouped = _grouped(rows)
  if not grouped:
    return None
  fig = figure.Figure(figsize=(12.5, 4.6), layout="constrained")
  panels = fig.subplots(1, 3)
  for number, (name, members) in enumerate(grouped.items()):
    x = [math.log2(theory.predicted_ratio(setting)) for setting, _ in members]
    ratios = [theory.mean_and_half_width([theory.log_ratio(r, learned=False) for r in found]) for _, found in members]
    _points(panels[0], number, name, x, [pair or (math.nan, math.nan) for pair in ratios])
    for axes, quantizer in zip(panels[1:], theory.QUANTIZERS, strict=True):
      _points(axes, number, name, x, [theory.shift(part, quantizer, theory.HIGH_RESOLUTION) for _, part in members])
  for axes in panels:
    axes.plot([1.5, 4.6], [1.5, 4.6], color="#000000", linewidth=1.2, linestyle="--", label="theory")
    axes.set(xlabel="log2((1 - alpha) / alpha)", ylim=(-0.6, 5.2))
  panels[0].set(title="Activation, frequent / rare", ylabel="log2 of the ratio")
  panels[1].set(title="Bits that rare need more: common step", ylabel="shift in bits, at 4 to 8 bits")
  panels[2].set(title="Bits that rare need more: per row")
  panels[0].legend(loc="upper left")
  return figures.picture("theory-activation", "Activation ratio and shift in bits against the prediction.", fig)


def curves(rows: Sequence[Row]) -> figures.Picture | None:
  """Relative error of the own token against bits, for rare and frequent experts."""
  members = theory.by_spec(rows).get(REGION)
  if not members:
    return None
  fig = figure.Figure(figsize=(9, 4.2), layout="constrained")
  for axes, (quantizer, name) in zip(fig.subplots(1, 2, sharey=True), theory.QUANTIZERS.items(), strict=True):
    for kind in ("frequent", "rare"):
      squares = np.array([[row[f"square_{quantizer}_{kind}_{w:02d}"] for w in range(len(quantization.BITS))]
                          for row in members])
      axes.plot(quantization.BITS, np.sqrt(squares.mean(0)), color=COLORS[kind], marker="o", markersize=4, label=kind)
    axes.set(yscale="log", xlabel="bits", title=name.capitalize())
    figures.log_ticks(axes.yaxis)
  fig.axes[0].set_ylabel("relative error of h(own token), RMS")
  fig.axes[0].legend()
  return figures.picture("theory-errors", f"Relative error of own-token activations, {REGION}.", fig)


def regions(rows: Sequence[Row], spec: str = REGION) -> figures.Picture | None:
  """Share of models without an error in the plane of (b_l, b_h): rule and reverse, cross-talk in and out."""
  grids = {(r["quantizer"], r["ranked"], r["source"], r["order"]): r for r in rows
           if r["kind"] == "grid" and r["spec"] == spec}
  if not grids:
    return None
  columns = (("relevant", "own", "own-token error only"), ("relevant", "all", "whole error"),
             ("all", "all", "whole error, irrelevant ranked too"))
  predicted = math.log2(theory.predicted_ratio(two_layer.Setting.parse(spec)))
  fig = figure.Figure(figsize=(11.5, 7.2), layout="constrained")
  for line, order in zip(fig.subplots(2, 3, sharex=True, sharey=True), ("small", "large"), strict=True):
    for axes, (ranked, source, name) in zip(line, columns, strict=True):
      image = _region(axes, grids["common", ranked, source, order], predicted)
      axes.set_title(f"{order} Lambda high\n{name}", fontsize=10)
    line[0].set_ylabel("b_l, bits of the others")
  for axes in fig.axes[3:]:
    axes.set_xlabel("b_h, bits of the chosen half")
  fig.colorbar(image, ax=fig.axes, label="share of models without an error", shrink=0.7)
  return figures.picture("theory-region", f"Error-free pairs of widths, common step, {spec}.", fig)


def _region(axes, row: Row, predicted: float):
  """One plane, with lines at equal widths and at the predicted distance."""
  free = np.array([line.split() for line in row["free"].split(";")], np.float64) / row["draws"]
  edges = np.append(np.array(quantization.BITS) - 0.25, quantization.BITS[-1] + 0.25)
  image = axes.pcolormesh(edges, edges, free, cmap="cividis", vmin=0, vmax=1)
  axes.plot([1, 8], [1, 8], color="#d00000", linewidth=1.0)
  axes.plot([1 + predicted, 8], [1, 8 - predicted], color="#d00000", linewidth=1.2, linestyle="--")
  axes.grid(visible=False)
  axes.set(xlim=(0.75, 8.25), ylim=(0.75, 8.25), aspect="equal")
  return image


def dimension(rows: Sequence[Row]) -> figures.Picture | None:
  """Lambda against d, with slopes."""
  found = theory.families(rows)
  if not found:
    return None
  fig = figure.Figure(figsize=(max(6.5, 4.3 * len(found)), 4.4), layout="constrained")
  for axes, (name, by_dim) in zip(np.atleast_1d(fig.subplots(1, len(found))), found.items(), strict=True):
    dims = sorted(by_dim)
    for kind, color in COLORS.items():
      pairs = [theory.mean_and_half_width(row[f"lambda_{kind}"] for row in by_dim[d]) for d in dims]
      middle, half = np.array(pairs).T
      label = f"{kind}: slope {theory.slope(by_dim, f'lambda_{kind}'):.2f}"
      axes.errorbar(dims, middle, yerr=np.minimum(half, 0.9 * np.abs(middle)), color=color, marker="o", markersize=5,
                    capsize=2, label=label)
      if kind == "irrelevant":
        axes.plot(dims, middle[0] * np.sqrt(dims[0] / np.array(dims)), color=color, linestyle="--", linewidth=1,
                  label="slope -1/2")
    axes.set(xscale="log", yscale="log", xlabel="d", ylabel="Lambda")
    axes.set_title(name.replace(", equal", ",\nequal"), fontsize=10)
    axes.set_xticks(dims, [str(d) for d in dims])
    figures.log_ticks(axes.yaxis)
    axes.set_xticks([], minor=True)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8), fontsize=8)
  return figures.picture("theory-dimension", "Lambda against d.", fig)
