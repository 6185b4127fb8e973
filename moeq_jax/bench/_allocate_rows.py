"""How fast millions of expert rows get their bits, beside the largest such instance that HiGHS finishes.

The instance is synthetic, in the shape of Mixtral-8x7B: an expert has 14,336 rows of 4,096 weights in gate and in up
and 4,096 rows of 14,336 in down; 32 layers of 8 experts have 8,388,608 rows. Costs are those of `allocate.Case`.
"""

import resource
import statistics
import time
from typing import Any

import numpy as np
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress
from moeq_jax.allocate import knapsack
from moeq_jax.bench import allocate

ROWS = (4096,) * (2 * 14336) + (14336,) * 4096
FIRST_UNITS = 4096  # that HiGHS is given; then twice as many, again and again


def run(units: int, repeats: int, highs_seconds: float) -> dict[str, Any]:
  """The large instance, then HiGHS on ever larger ones until one takes more than `highs_seconds`."""
  with progress.bar("allocate", 3) as advance:
    cost, weight, budget = _instance(units)
    advance("instance made")
    ours = _solved(cost, weight, budget, repeats)
    del cost, weight
    advance(f"{ours['seconds']:.2f} s")
    theirs = _largest_for_highs(units, highs_seconds)
    advance()
  result = {"benchmark": "allocate", "case": "expert rows of Mixtral-8x7B", "repeats": repeats,
            "highs_limit_seconds": highs_seconds, "machine": allocate.machine(), "large": ours, "highs": theirs}
  _show(result)
  return result


def _instance(units: int) -> tuple[np.ndarray, np.ndarray, int]:
  """The rows of as many experts as give `units` rows; a part of one expert is a mix of all its rows."""
  if units < len(ROWS):
    return allocate.Case("rows", units, sizes=ROWS[::len(ROWS) // units]).instance(0)
  return allocate.Case("rows", units, sizes=ROWS).instance(0)


def _solved(cost: np.ndarray, weight: np.ndarray, budget: int, repeats: int, method: str = "auto") -> dict[str, Any]:
  """Median seconds behind a first call, the certified gap, and the peak memory of the process so far."""
  seconds = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    solution = knapsack.solve(cost, weight, budget, method)
    seconds.append(time.perf_counter() - started)
  used = int(np.take_along_axis(weight, solution.choice[:, None], axis=1).sum())
  return {"units": len(cost), "choices": cost.shape[1], "method": solution.method,
          "seconds": statistics.median(seconds[1:]) if repeats else seconds[0], "first_seconds": seconds[0],
          "value": solution.value, "bound": solution.bound, "relative_gap": solution.gap,
          "unused_budget": budget - used, "share_of_budget_unused": (budget - used) / budget,
          "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _largest_for_highs(most: int, limit: float) -> list[dict[str, Any]]:
  """HiGHS and both methods of the knapsack on instances of 4,096, 8,192, ... units, up to the first unfinished one."""
  rows, units = [], FIRST_UNITS
  while units <= most:
    problem = _instance(units)
    value, status, seconds = allocate.highs(*problem, limit)
    row = {"units": units, "highs_seconds": seconds, "highs_status": status, "highs_value": value}
    row["lagrangian"], row["exact"] = (_solved(*problem, 1, method) for method in ("lagrangian", "exact"))
    rows.append(row)
    if status != "optimal":
      break
    units *= 2
  return rows


def _show(result: dict[str, Any]) -> None:
  large, machine = result["large"], result["machine"]
  table = rich_table.Table(
      title="rows of experts: seconds, and how far from the optimum at most", box=box.SIMPLE, pad_edge=False,
      caption=f"{machine['cores']} cores, median of {result['repeats']} after a first call of"
              f" {large['first_seconds']:.1f} s; HiGHS of scipy {machine['scipy']}, at most"
              f" {result['highs_limit_seconds']:g} s; peak memory of the process {large['peak_gib']:.2f} GiB")
  for heading in ("units", "method", "seconds", "certified gap", "above HiGHS"):
    table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
  table.add_row(f"{large['units']:,}", large["method"], f"{large['seconds']:.2f}", f"{large['relative_gap']:.1e}", "")
  for row in result["highs"]:
    limit = "" if row["highs_status"] == "optimal" else ">"
    table.add_row(f"{row['units']:,}", "HiGHS", f"{limit}{row['highs_seconds']:.2f}", row["highs_status"], "")
    for method in ("lagrangian", "exact"):
      own = row[method]
      above = f"{own['value'] / row['highs_value'] - 1:.1e}" if row["highs_status"] == "optimal" else ""
      table.add_row("", method, f"{own['seconds']:.3f}", f"{own['relative_gap']:.1e}", above)
  rich_console.Console().print(table)
