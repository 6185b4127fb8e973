"""What the TPU kernel costs by the compiler's own count: instruction bundles per tile of weights, and bytes to copy.

No TPU is needed and none is measured: libtpu compiles the work on one tile for the chip named, and its bundles are
counted. A bundle takes a cycle unless a unit makes it wait, so these are lower bounds, to be read as estimates; the
cycles of a copy follow from bytes, published bandwidth and clock.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress, qtensor
from moeq_jax.bench import _tpu_compile, _tpu_worker
from moeq_jax.kernels import pallas_tpu, shapes, tpu_view


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Published figures: bytes per second of HBM, cycles per second (that of v6e follows from its peak)."""

  bandwidth: float
  clock: float

  def cycles(self, size: float) -> float:
    """Cycles to copy `size` bytes."""
    return size / self.bandwidth * self.clock


class Tile(NamedTuple):
  """What the kernel computes without a loop: `span` K-tiles of `k_tile` rows, `columns` wide."""

  k_tile: int
  columns: int
  span: int


CHIPS = {"v5e": Chip(bandwidth=0.819e12, clock=1.5e9), "v6e": Chip(bandwidth=1.64e12, clock=1.75e9)}
TABLE = "mixtral-8x7b"  # the layer of the table
UNIT = 512 * 512  # weights that counts are given for, whatever the tile
PREFILL = 256  # rows of a row tile
ROW_TILES = (1, 2, 4)  # row tiles of a visit; only the first dequantizes
BOUND = 1.1  # what prefill may cost, as a multiple of plain bfloat16


def tile(shape: tuple[int, int, int], rows: int, group: int) -> Tile:
  """The tile that the heuristic takes for a matmul `(E, K, N)` with `rows` rows."""
  view = jax.eval_shape(functools.partial(tpu_view.prepare, paired=True), _tpu_compile.abstract(shape, 2, group))
  config = pallas_tpu.heuristic(rows, shape[0], view)
  return Tile(view.k_tile, config.columns, config.unroll)


def prefill_tiles(group: int) -> dict[Tile, list[str]]:
  """The tiles of the named shapes with `PREFILL` rows per expert, each with its matmuls (one of equal shapes)."""
  found: dict[Tile, list[str]] = {}
  for name, layer in shapes.LAYERS.items():
    for shape, projection in {shape: projection for projection, shape in layer.matmuls().items()}.items():
      found.setdefault(tile(shape, PREFILL * shape[0], group), []).append(f"{name} {projection}")
  return found


def run(group: int = 128, rows: int = 16) -> dict[str, Any]:
  """Bundles of one tile of weights per width and chip, beside the cycles of its copy and beside plain bfloat16.

  Args:
    group: rows that share a scale.
    rows: rows when they are few.

  Returns:
    A JSON-able dictionary: under `results` one entry per chip and width for the tiles of Mixtral; under `tiles` one per
    chip, width and tile of any named shape, for row tiles of 256. Counts and cycles are for 512 x 512 weights.

  Raises:
    RuntimeError: libtpu is missing, or a kernel does not compile.
  """
  if _tpu_compile.missing():
    raise RuntimeError(_tpu_compile.missing())
  tiles = prefill_tiles(group)
  few = tile(shapes.LAYERS[TABLE].matmuls()["up"], rows, group)
  jobs, counts = _jobs(few, list(tiles), group, rows), {}
  with progress.bar("kernels_tpu_static", len(jobs)) as advance:
    for result in _tpu_worker.results(jobs):
      if "error" in result:
        raise RuntimeError(str(result))
      at = Tile(*(result[field] for field in Tile._fields))
      bundles = result["bundles"] * UNIT / (at.span * at.k_tile * at.columns)
      counts[result["chip"], at, result["way"], result["bits"], result["rows"]] = bundles
      advance(f"{result['chip']}, {result['way']} at {result['bits']} bits, {at.k_tile} x {at.columns}")
  prefill = [_prefill(counts, chip, at, bits) | {"matmuls": tiles[at]}
             for chip in CHIPS for at in tiles for bits in qtensor.WIDTHS]
  result = {"benchmark": "kernels_tpu_static", "group": group, "rows": rows, "estimates": True, "few": few._asdict(),
            "results": _table(counts, few, prefill, group, rows), "tiles": prefill}
  _show(result)
  return result


def _jobs(few: Tile, tiles: list[Tile], group: int, rows: int) -> list[dict[str, Any]]:
  def job(chip: str, at: Tile, way: str, bits: int, rows: int) -> dict[str, Any]:
    return {"job": "tile", "chip": chip, "way": way, "bits": bits, "rows": rows, "group": group, **at._asdict()}

  jobs = []
  for chip in CHIPS:
    for at, many, ways in ((few, rows, ("after",)), *((at, PREFILL, ("before", "reused")) for at in tiles)):
      jobs.append(job(chip, at, "bfloat16", 16, many))
      jobs += [job(chip, at, way, bits, many) for way in ways for bits in qtensor.WIDTHS]
  return jobs


def _prefill(counts: dict[tuple[Any, ...], float], chip: str, at: Tile, bits: int) -> dict[str, Any]:
  """One tile at one width: bundles, and ratios by rows of a visit."""
  plain = counts[chip, at, "bfloat16", 16, PREFILL]
  once, first = (counts[chip, at, way, bits, PREFILL] for way in ("before", "reused"))
  ratios = {str(tiles * PREFILL): (once if tiles == 1 else first + (tiles - 1) * plain) / (tiles * plain)
            for tiles in ROW_TILES}
  return {"chip": chip, **at._asdict(), "bits": bits, "prefill_bundles": once, "prefill_bfloat16": plain,
          "prefill_ratios": ratios}


def _table(counts: dict[tuple[Any, ...], float], few: Tile, prefill: list[dict[str, Any]], group: int,
           rows: int) -> list[dict[str, Any]]:
  """The entries of one layer, with few rows and with many."""
  entries = []
  for entry in prefill:
    if f"{TABLE} up" not in entry["matmuls"]:
      continue
    chip, bits = entry["chip"], entry["bits"]
    scales = 0 if bits == 16 else 4 * UNIT // group
    entries.append({
      "chip": chip, "bits": bits, "copy_cycles": CHIPS[chip].cycles(UNIT * bits / 8 + scales),
      "few_rows_bundles": counts[chip, few, "after", bits, rows],
      "few_rows_bfloat16": counts[chip, few, "bfloat16", 16, rows],
      **{key: entry[key] for key in ("prefill_bundles", "prefill_bfloat16", "prefill_ratios")}})
  return entries


def _show(result: dict[str, Any]) -> None:
  rows = [str(tiles * PREFILL) for tiles in ROW_TILES]
  table = rich_table.Table(
    title=f"estimates: bundles per 512 x 512 weights, tiles of {TABLE}, group {result['group']}",
    caption=f"few rows: {result['rows']}; prefill: row tiles of {PREFILL}; then ratios to bfloat16 by rows of a visit")
  for heading in ("chip", "bits", "copy, cycles", "few rows", "(bfloat16)", "bound by", "prefill", "(bfloat16)", *rows):
    table.add_column(heading, justify="left" if heading in ("chip", "bound by") else "right")
  for row in result["results"]:
    bound = "copy" if row["copy_cycles"] >= row["few_rows_bundles"] else "bundles"
    table.add_row(
      row["chip"], str(row["bits"]), f"{row['copy_cycles']:.0f}", f"{row['few_rows_bundles']:.0f}",
      f"{row['few_rows_bfloat16']:.0f}", bound, f"{row['prefill_bundles']:.0f}", f"{row['prefill_bfloat16']:.0f}",
      *(f"{row['prefill_ratios'][count]:.2f}x" for count in rows))
  console = rich_console.Console(width=124)
  console.print(table)
  _show_tiles(result["tiles"], console)


def _show_tiles(entries: list[dict[str, Any]], console: rich_console.Console) -> None:
  """Ratios of every tile by width: that of one row tile, and the largest of more row tiles."""
  table = rich_table.Table(
    title=f"prefill by bits, as a multiple of bfloat16: {PREFILL} rows / the largest of more rows")
  for heading in ("chip", "K-tiles", "matmuls", *map(str, qtensor.WIDTHS)):
    table.add_column(heading, justify="left" if heading == "matmuls" else "right", no_wrap=True)
  lines: dict[tuple[Any, ...], list[str]] = {}
  for entry in entries:
    key = entry["chip"], f"{entry['span']} x {entry['k_tile']} x {entry['columns']}", "\n".join(entry["matmuls"])
    once, *more = entry["prefill_ratios"].values()
    lines.setdefault(key, []).append(f"{once:.2f}/{max(more):.2f}")
  for key, cells in lines.items():
    table.add_row(*key, *cells)
  console.print(table)
