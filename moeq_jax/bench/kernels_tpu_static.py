"""What the TPU kernel costs by the compiler's own count: instruction bundles per tile of weights, and bytes to copy.

No TPU is needed and none is measured: libtpu compiles the work on one tile for the chip named, and its bundles are
counted. A bundle takes a cycle unless a unit makes it wait, so these are lower bounds, to be read as estimates; the
cycles of a copy follow from bytes, published bandwidth and clock.
"""

import dataclasses
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress, qtensor
from moeq_jax.bench import _tpu_compile, _tpu_worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Published figures: bytes per second of HBM, cycles per second (that of v6e follows from its peak)."""

  bandwidth: float
  clock: float

  def cycles(self, size: float) -> float:
    """Cycles to copy `size` bytes."""
    return size / self.bandwidth * self.clock


CHIPS = {"v5e": Chip(bandwidth=0.819e12, clock=1.5e9), "v6e": Chip(bandwidth=1.64e12, clock=1.75e9)}
PREFILL = 256  # rows of a row tile
ROW_TILES = (1, 2, 4)  # row tiles of a visit; only the first dequantizes
FEW_SPAN, PREFILL_SPAN = 4, 2  # K-tiles of 512 rows that the kernel computes without a loop
BOUND = 1.1  # what prefill may cost, as a multiple of plain bfloat16


def run(k_tile: int = 512, columns: int = 512, group: int = 128, rows: int = 16) -> dict[str, Any]:
  """Bundles of one tile of weights per width and chip, beside the cycles of its copy and beside plain bfloat16.

  Args:
    k_tile, columns: size of the tile of weights.
    group: rows that share a scale.
    rows: rows when they are few.

  Returns:
    A JSON-able dictionary with one entry per chip and width under `results`; counts are per K-tile.

  Raises:
    RuntimeError: libtpu is missing, or a kernel does not compile.
  """
  if _tpu_compile.missing():
    raise RuntimeError(_tpu_compile.missing())
  jobs, found = _jobs(k_tile, columns, group, rows), []
  with progress.bar("kernels_tpu_static", len(jobs)) as advance:
    for result in _tpu_worker.results(jobs):
      if "error" in result:
        raise RuntimeError(str(result))
      found.append(result)
      advance(f"{result['chip']}, {result['way']} at {result['bits']} bits")
  result = {"benchmark": "kernels_tpu_static", "k_tile": k_tile, "columns": columns, "group": group, "rows": rows,
            "estimates": True, "results": _entries(found, k_tile, columns, group)}
  _show(result)
  return result


def _jobs(k_tile: int, columns: int, group: int, rows: int) -> list[dict[str, Any]]:
  jobs = []
  for chip in CHIPS:
    for bits in (0, *qtensor.WIDTHS):  # 0: plain bfloat16
      for few, way in ((True, "after"), (False, "before"), (False, "reused")):
        if bits or way != "reused":
          jobs.append({"job": "tile", "chip": chip, "bits": bits or 16, "rows": rows if few else PREFILL,
                       "way": way if bits else "bfloat16", "k_tile": k_tile, "columns": columns, "group": group,
                       "span": FEW_SPAN if few else PREFILL_SPAN})
  return jobs


def _entries(found: list[dict[str, Any]], k_tile: int, columns: int, group: int) -> list[dict[str, Any]]:
  counts = {(r["chip"], r["way"], r["bits"], r["rows"] < PREFILL): r["bundles"] / r["span"] for r in found}
  entries = []
  for chip, figures in CHIPS.items():
    few, plain = (counts[chip, "bfloat16", 16, many] for many in (True, False))
    for bits in qtensor.WIDTHS:
      scales = 0 if bits == 16 else 4 * columns * k_tile // group
      once, first = counts[chip, "before", bits, False], counts[chip, "reused", bits, False]
      ratios = {tiles * PREFILL: (once if tiles == 1 else first + (tiles - 1) * plain) / (tiles * plain)
                for tiles in ROW_TILES}
      entries.append({
        "chip": chip, "bits": bits, "copy_cycles": figures.cycles(k_tile * columns * bits / 8 + scales),
        "few_rows_bundles": counts[chip, "after", bits, True], "few_rows_bfloat16": few,
        "prefill_bundles": once, "prefill_bfloat16": plain,
        "prefill_ratios": {str(rows): ratio for rows, ratio in ratios.items()}})
  return entries


def _show(result: dict[str, Any]) -> None:
  rows = [str(tiles * PREFILL) for tiles in ROW_TILES]
  table = rich_table.Table(
    title=f"estimates: bundles per {result['k_tile']} x {result['columns']} weights, group {result['group']}",
    caption=f"few rows: {result['rows']}; prefill: row tiles of {PREFILL}; then ratios to bfloat16 by rows of a visit")
  for heading in ("chip", "bits", "copy, cycles", "few rows", "(bfloat16)", "bound by", "prefill", "(bfloat16)", *rows):
    table.add_column(heading, justify="left" if heading in ("chip", "bound by") else "right")
  for row in result["results"]:
    bound = "copy" if row["copy_cycles"] >= row["few_rows_bundles"] else "bundles"
    table.add_row(
      row["chip"], str(row["bits"]), f"{row['copy_cycles']:.0f}", f"{row['few_rows_bundles']:.0f}",
      f"{row['few_rows_bfloat16']:.0f}", bound, f"{row['prefill_bundles']:.0f}", f"{row['prefill_bfloat16']:.0f}",
      *(f"{row['prefill_ratios'][count]:.2f}x" for count in rows))
  rich_console.Console(width=120).print(table)
