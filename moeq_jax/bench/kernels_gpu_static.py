"""What the compiler makes of the Hopper kernel, with no GPU: registers, spills and instructions of every launch.

XLA's CUDA plugin compiles each launch for a described H100 and says what ptxas found. A spill would mean that
registers go through memory; nothing here is a time.
"""

from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress
from moeq_jax.bench import _gpu_compile
from moeq_jax.kernels import shapes

DECODE, PREFILL = 16, 8192  # rows of a launch


def cases(layers: str) -> list[dict[str, Any]]:
  """One job per layer, distinct shape of a projection, and number of rows."""
  found = []
  for layer in layers.split(","):
    projections = {shape: name for name, shape in shapes.LAYERS[layer].matmuls().items()}.values()
    found += [{"layer": layer, "projection": name, "rows": rows} for name in projections for rows in (DECODE, PREFILL)]
  return found


def run(layers: str = ",".join(shapes.LAYERS)) -> dict[str, Any]:
  """Compiles the launches of the named layers: half a minute each.

  Args:
    layers: names of `kernels.shapes.LAYERS`, with commas.

  Returns:
    A JSON-able dictionary with one entry per launch under `results`.

  Raises:
    RuntimeError: the plugin is missing, or a launch does not compile.
  """
  if _gpu_compile.missing():
    raise RuntimeError(_gpu_compile.missing())
  jobs, found = cases(layers), []
  with progress.bar("kernels_gpu_static", len(jobs)) as advance:
    for job in jobs:
      found.append(_gpu_compile.launch(**job))
      if "error" in found[-1]:
        raise RuntimeError(str(found[-1]))
      advance(f"{job['layer']}, {job['projection']}, {job['rows']} rows")
  result = {"benchmark": "kernels_gpu_static", "results": found}
  _show(found)
  return result


def _show(found: list[dict[str, Any]]) -> None:
  table = rich_table.Table(title="launches compiled for a described H100 (sm_90a), all widths in one kernel")
  for heading in ("layer", "matmul", "rows", "rows of a task", "scales", "registers", "spilled bytes", "wgmma",
                  "shuffles"):
    table.add_column(heading, justify="left" if heading in ("layer", "matmul", "scales") else "right")
  for row in found:
    table.add_row(row["layer"], row["projection"], str(row["rows"]), str(row["config"]["rows"]), row["config"]["scale"],
                  str(row["registers"]), str(row["spill_stores"] + row["spill_loads"]), str(row["wgmma"]),
                  str(row["shuffle"]))
  rich_console.Console(width=120).print(table)
