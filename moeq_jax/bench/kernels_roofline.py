"""Rooflines of one grouped matmul on TPUs and Hopper GPUs, with what the compiler counts for the TPU kernel: a figure.

Estimates, all of it: bytes of packed weights, scales and rows over a bandwidth, products over a rate, whichever takes
longer; and, for TPUs, instruction bundles over the clock where they take longer than the copy (`kernels_tpu_static`).
No device is measured here.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import figure as mpl

from moeq_jax import artifacts
from moeq_jax.bench import kernels_tpu_static
from moeq_jax.kernels import shapes
from moeq_jax.report import figures

COUNTS = Path("experiments/results/kernels_tpu_static.json")
ROWS = tuple(2.0**k for k in np.arange(0, 14.25, 0.25))  # T of the call
GROUP = 128
LINES = dict(zip((16, 8, 4, 3, 2, 1), ("#000000", "#7a7a7a", "#00507d", "#56b4e9", "#c24e00", "#e69f00"), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Bytes per second of memory and bfloat16 operations per second, and where the two come from."""

  bandwidth: float
  rate: float
  source: str


CHIPS = {
  "v5e": Chip(bandwidth=0.819e12, rate=197e12, source="published"),
  "v6e": Chip(bandwidth=1.64e12, rate=918e12, source="published"),
  "H100": Chip(bandwidth=3.35e12, rate=989e12, source="published"),
  "H200": Chip(bandwidth=4.8e12, rate=989e12, source="published"),
}


def active(rows: float, experts: int) -> float:
  """Experts that have rows, on average, when each of `rows` rows draws one evenly."""
  return experts * (1 - (1 - 1 / experts) ** rows)


def times(chip: Chip, shape: tuple[int, int, int], rows: float, bits: int) -> tuple[float, float]:
  """Seconds by bytes and seconds by products of one matmul `(E, K, N)` over `rows` rows."""
  experts, K, N = shape
  scales = 0 if bits == 16 else 4 * N * K / GROUP
  moved = active(rows, experts) * (K * N * bits / 8 + scales) + 2 * rows * (K + N)
  return moved / chip.bandwidth, 2 * rows * K * N / chip.rate


def counted(entry: dict[str, Any], shape: tuple[int, int, int], rows: int) -> float:
  """Seconds that the TPU kernel takes by its bundles or its copies, whichever is more, with even routing.

  Args:
    entry: of the results of `kernels_tpu_static`: one chip, one width.
    shape: `(E, K, N)`.
    rows: T: 16 in order, or 256, 512 or 1024 per expert.
  """
  experts, K, N = shape
  clock = kernels_tpu_static.CHIPS[entry["chip"]].clock
  tiles = K * N / (512 * 512)
  if rows == 16:
    return active(rows, experts) * tiles * max(entry["few_rows_bundles"], entry["copy_cycles"]) / clock
  each = rows // experts
  bundles = entry["prefill_ratios"][str(each)] * entry["prefill_bfloat16"] * each / kernels_tpu_static.PREFILL
  return experts * tiles * max(bundles, entry["copy_cycles"]) / clock


def run(figure: str = "docs/figures/kernels-roofline.png", layer: str = "mixtral-8x7b", counts: str = str(COUNTS),
        ) -> dict[str, Any]:
  """Draws the rooflines of one up projection at every width.

  Args:
    figure: file to write, a PNG.
    layer: of `kernels.shapes.LAYERS`.
    counts: the JSON line that `bench kernels_tpu_static` printed last.

  Returns:
    A JSON-able dictionary: the file, and rows per expert at which products take as long as bytes, per chip and width.

  Raises:
    FileNotFoundError: no file of counts.
  """
  shape = shapes.LAYERS[layer].matmuls()["up"]
  entries = json.loads(Path(counts).read_text())["results"]
  with figures.settled():
    picture = figures.picture("kernels-roofline", _title(layer, shape), draw(shape, entries, layer))
  artifacts.write_bytes(figure, picture.png)
  crossing = {name: {str(bits): crossover(chip, shape, bits) for bits in LINES} for name, chip in CHIPS.items()}
  return {"benchmark": "kernels_roofline", "estimates": True, "figure": figure, "layer": layer,
          "rows_per_expert_where_products_take_over": crossing}


def crossover(chip: Chip, shape: tuple[int, int, int], bits: int) -> float:
  """Rows per expert from which products take longer than bytes, where every expert has rows."""
  _, K, N = shape
  weights = K * N * bits / 8 + (0 if bits == 16 else 4 * N * K / GROUP)
  return weights / chip.bandwidth / (2 * K * N / chip.rate - 2 * (K + N) / chip.bandwidth)


def _title(layer: str, shape: tuple[int, int, int]) -> str:
  return f"Estimated time of the up projection of {layer} (E = {shape[0]}, {shape[1]} x {shape[2]}), even routing"


def draw(shape: tuple[int, int, int], entries: list[dict[str, Any]], layer: str) -> mpl.Figure:
  """One panel per chip: lines are rooflines per width, dashed where products decide; marks are compiler's counts."""
  fig = mpl.Figure(figsize=(9, 7.6), layout="constrained")
  fig.suptitle(_title(layer, shape) + "\nestimates, nothing is measured", fontsize=11)
  for axes, (name, chip) in zip(fig.subplots(2, 2, sharex=True, sharey=True).flat, CHIPS.items(), strict=True):
    _panel(axes, name, chip, shape, [entry for entry in entries if entry["chip"] == name])
  handles, labels = axes.get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside lower center", ncols=6)
  return fig


def _panel(axes: Any, name: str, chip: Chip, shape: tuple[int, int, int], entries: list[dict[str, Any]]) -> None:
  for bits, color in LINES.items():  # where products decide, all lines are one: the last is seen
    both = np.array([times(chip, shape, rows, bits) for rows in ROWS]) * 1e6
    axes.plot(ROWS, both.max(1), color=color, lw=1.6, label=f"{bits} bits")
  by_products = np.array([times(chip, shape, rows, 16)[1] for rows in ROWS]) * 1e6
  axes.plot(ROWS, by_products, color="#9aa0a6", lw=1, ls="--", zorder=0)
  for entry in entries:
    at = [16, *(shape[0] * int(rows) for rows in entry["prefill_ratios"])]
    axes.plot(at, [counted(entry, shape, rows) * 1e6 for rows in at], "o", ms=4, mfc="none", color=LINES[entry["bits"]])
  axes.set_title(f"{name}: {chip.bandwidth / 1e12:.2f} TB/s, {chip.rate / 1e12:.0f} TFLOP/s", fontsize=10)
  notes = [f"({chip.source})", "dashed: products alone", *["circles: compiler's counts"] * bool(entries)]
  axes.text(0.02, 0.98, "\n".join(notes), transform=axes.transAxes, va="top", fontsize=8)
  axes.set(xscale="log", yscale="log", ylim=(1, 30_000), xlabel="rows (tokens x top-k)", ylabel="microseconds")
  axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
  axes.set_yticks([1, 10, 100, 1000, 10_000], ["1", "10", "100", "1,000", "10,000"])
  axes.minorticks_off()
