"""The figure of `bench kernels`: times against their limit, and ratios to the dense loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import figure

from moeq_jax import artifacts
from moeq_jax.report import figures

DENSE = "dense bf16 loop"
METHODS = {"exact": ("#0072b2", "-", "exact"), "int8": ("#d55e00", "--", "8-bit activations"),
           DENSE: ("#000000", ":", "dense bfloat16 loop")}
MARKERS = dict(zip(("2", "3", "4", "mixed"), "osD^", strict=True))


def draw(found: Mapping[str, Any], path: Path) -> None:
  """Writes a PNG: for every shape, milliseconds and the roofline above, times the dense loop below."""
  names = list(dict.fromkeys(row["shape"] for row in found["results"]))
  with figures.settled():
    fig = figure.Figure(figsize=(5.2 * len(names), 6.8), layout="constrained")
    grid = fig.subplots(2, len(names), squeeze=False, sharex=True)
    for place, name in enumerate(names):
      mine = [row for row in found["results"] if row["shape"] == name]
      _times(grid[0, place], mine, name)
      _ratios(grid[1, place], mine)
    fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    artifacts.write_bytes(path, figures.picture("kernels-cpu", "", fig).png)


def _times(axes: Any, rows: list[Mapping[str, Any]], name: str) -> None:
  """Milliseconds of the mix of widths, of the dense loop, and what the ceilings of the machine allow."""
  mixed = [row for row in rows if row["widths"] == "mixed"] or rows
  x = [row["rows"] for row in mixed]
  for method, (color, dashes, label) in METHODS.items():
    axes.plot(x, [row["milliseconds"][method] for row in mixed], dashes, color=color, marker="o", label=label)
  limit = [row["milliseconds"]["exact"] * row["share_of_limit"] for row in mixed]
  axes.plot(x, limit, "-", color="#9aa0a6", linewidth=3, label="limit: bytes copied, or products")
  axes.set(title=f"{name} {tuple(mixed[0]['experts, K, N'])}, widths 1 to 8 mixed", ylabel="milliseconds", xscale="log",
           yscale="log")
  figures.log_ticks(axes.yaxis)


def _ratios(axes: Any, rows: list[Mapping[str, Any]]) -> None:
  """Times the dense loop, at every width."""
  counts = sorted({row["rows"] for row in rows})
  for widths, marker in MARKERS.items():
    mine = sorted((row for row in rows if row["widths"] == widths), key=lambda row: row["rows"])
    for method in ("exact", "int8"):
      color, dashes, label = METHODS[method]
      axes.plot([row["rows"] for row in mine], [row["ratio_to_dense"][method] for row in mine], dashes, color=color,
                marker=marker, markersize=5, linewidth=1, label=f"{label}, {widths} bits" if mine else None)
  axes.axhline(1, color="#000000", linestyle=":")
  axes.set(xlabel="rows (tokens x experts of a token)", ylabel="times the dense bfloat16 loop", xscale="log",
           ylim=(0, None))
  axes.set_xticks(counts, [str(count) for count in counts])
  axes.minorticks_off()
  axes.legend(fontsize=7, ncols=2)
