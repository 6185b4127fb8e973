"""How fast the knapsack finds the optimum, beside HiGHS (scipy.optimize.milp) on the same instances.

Up to 131,072 units those are the cases below, solved exactly; above, the rows of experts by the Lagrangian method
(`_allocate_rows.py`).

The instances are synthetic: cost of unit u at b bits = size * s_u * 4^-b * noise, with s lognormal (sigma 1.5) and
noise lognormal (sigma 0.3), so that costs are neither convex in b nor always falling.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import scipy
from rich import box
from rich import console as rich_console
from rich import table as rich_table
from scipy import optimize, sparse

from moeq_jax import progress
from moeq_jax.allocate import knapsack

HIGHS_SECONDS = 60.0
EQUAL = 1e-9  # relative difference of two optima: HiGHS stops at an absolute gap of 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
  """One kind of instance.

  Attributes:
    name: what is special about it.
    units: how many.
    average: bits per weight.
    widths: candidate bits.
    sizes: sizes of the units, repeated; empty = drawn from 1 to a million.
    ties: all units have the same costs.
    seeds: one instance each.
  """

  name: str
  units: int
  average: float = 2.5
  widths: tuple[int, ...] = (1, 2, 3, 4)
  sizes: tuple[int, ...] = (1,)
  ties: bool = False
  seeds: tuple[int, ...] = (0,)

  def instance(self, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """`(cost [U, B], weight [U, B], budget)`."""
    random = np.random.default_rng(seed)
    sizes = np.resize(self.sizes, self.units) if self.sizes else random.integers(1, 10**6, self.units)
    widths = np.array(self.widths)
    scale = sizes / sizes.mean() * np.exp(random.normal(0, 1.5, self.units))
    cost = scale[:, None] * 4.0**-widths[None] * np.exp(random.normal(0, 0.3, (self.units, len(widths))))
    cost = np.repeat(cost[:1], self.units, axis=0) if self.ties else cost
    return cost, sizes[:, None] * widths[None], math.floor(self.average * int(sizes.sum()))


CASES = (
  Case("equal units", 4096, seeds=(0, 1, 2, 3, 4)),
  Case("48 x 256 experts", 12288, seeds=(0, 1, 2)),
  Case("48 x 256 x 3 matrices", 36864, seeds=(0, 1)),
  Case("sizes 2, 2, 7", 2048, sizes=(2, 2, 7), seeds=(0, 1)),
  Case("one in 64 of size 9", 4096, average=2.1, sizes=(1,) * 63 + (9,)),
  Case("widths 1, 2, 3, 4, 8", 2048, average=3.3, widths=(1, 2, 3, 4, 8)),
  Case("equal costs", 1024, average=2.3, ties=True),
  Case("unrelated sizes", 2048, sizes=(), seeds=(0, 1)),
)


def run(units: int | None = None, repeats: int = 5, highs_seconds: float = HIGHS_SECONDS) -> dict[str, Any]:
  """Seconds to the proven optimum, for the knapsack and for HiGHS in the same run, and whether both agree.

  With more than 131,072 units, seconds to a solution with a certified gap, for one instance of so many expert rows, and
  HiGHS on the largest instance of that kind that it finishes (8388608: the rows of all experts of Mixtral-8x7B).

  The knapsack's time is the median of `repeats` calls after a first one, which may compile and is given apart; HiGHS
  runs once, with a relative gap of zero.

  Args:
    units: units of every instance, instead of each case's own number.
    repeats: timed calls of the knapsack per instance.
    highs_seconds: HiGHS stops here; the row then says so and its ratio is a lower bound.

  Returns:
    A JSON-able dictionary with one entry per instance under `results`.
  """
  if units is not None and units > knapsack.EXACT_UNITS:
    from moeq_jax.bench import _allocate_rows

    return _allocate_rows.run(units, repeats, highs_seconds)
  cases = [dataclasses.replace(case, units=units or case.units) for case in CASES]
  pairs = [(case, seed) for case in cases for seed in case.seeds]
  results = []
  with progress.bar("allocate", len(pairs)) as advance:
    for case, seed in pairs:
      results.append(_compare(case, seed, repeats, highs_seconds))
      advance(case.name)
  result = {"benchmark": "allocate", "repeats": repeats, "highs_limit_seconds": highs_seconds, "machine": machine(),
            "equal": sum(row["equal"] is True for row in results),
            "compared": sum(row["equal"] is not None for row in results),
            "least_ratio": min(row["ratio_to_highs"] for row in results),
            "most_seconds": max(row["seconds"] for row in results), "results": results}
  _show(result)
  return result


def highs(cost: np.ndarray, weight: np.ndarray, budget: int, limit: float) -> tuple[float | None, str, float]:
  """The same problem as an integer program.

  Args:
    cost: `[U, B]`.
    weight: `[U, B]`.
    budget: the largest sum of chosen weights.
    limit: seconds.

  Returns:
    `(value or None, "optimal" | "time limit" | message, seconds of the solver)`.
  """
  units, choices = cost.shape
  rows = sparse.vstack([sparse.csr_array(weight.reshape(1, -1).astype(np.float64)),
                        sparse.kron(sparse.eye_array(units), np.ones((1, choices)), format="csr")], format="csr")
  limits = optimize.LinearConstraint(rows, np.r_[-np.inf, np.ones(units)], np.r_[float(budget), np.ones(units)])
  with _quiet():
    started = time.perf_counter()
    found = optimize.milp(cost.reshape(-1), constraints=limits, integrality=np.ones(cost.size), bounds=(0, 1),
                          options={"mip_rel_gap": 0.0, "time_limit": limit})
    seconds = time.perf_counter() - started
  status = {0: "optimal", 1: "time limit"}.get(found.status, found.message)
  if found.x is None:
    return None, status, seconds
  return math.fsum(cost[np.arange(units), found.x.reshape(units, choices).argmax(axis=1)]), status, seconds


def _compare(case: Case, seed: int, repeats: int, highs_seconds: float) -> dict[str, Any]:
  cost, weight, budget = case.instance(seed)
  seconds = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    solution = knapsack.solve(cost, weight, budget)
    seconds.append(time.perf_counter() - started)
  optimum, status, taken = highs(cost, weight, budget, highs_seconds)
  median = statistics.median(seconds[1:])
  used = int(weight[np.arange(len(weight)), solution.choice].sum())
  equal = used <= budget and math.isclose(solution.value, optimum, rel_tol=EQUAL) if status == "optimal" else None
  return {"case": case.name, "units": case.units, "choices": len(case.widths), "average": case.average, "seed": seed,
          "seconds": median, "first_seconds": seconds[0], "highs_seconds": taken, "highs_status": status,
          "ratio_to_highs": taken / median, "value": solution.value, "highs_value": optimum, "equal": equal,
          "relative_gap": (solution.value - solution.bound) / abs(solution.value), "unused_budget": budget - used}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what HiGHS prints from C, whatever its options, out of standard output: the last line there is the result."""
  sys.stdout.flush()
  output, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  try:
    yield
  finally:
    ctypes.CDLL(None).fflush(None)
    os.dup2(output, 1)
    os.close(output)
    os.close(nowhere)


def machine() -> dict[str, Any]:
  return {"cores": os.cpu_count(), "jax": jax.__version__, "numpy": np.__version__, "scipy": scipy.__version__}


def _show(result: dict[str, Any]) -> None:
  machine = result["machine"]
  largest = max(row["relative_gap"] for row in result["results"])
  table = rich_table.Table(
      title="multiple-choice knapsack: milliseconds to the proven optimum", box=box.SIMPLE,
      pad_edge=False, collapse_padding=True,
      caption=f"{machine['cores']} cores, median of {result['repeats']} after the first; HiGHS of scipy "
              f"{machine['scipy']}, at most {result['highs_limit_seconds']:g} s; largest relative gap {largest:.0e}")
  for heading in ("instance", "units", "seed", "first", "knapsack", "HiGHS", "ratio", "equal"):
    table.add_column(heading, justify="left" if heading == "instance" else "right", no_wrap=True)
  for row in result["results"]:
    limit = "" if row["highs_status"] == "optimal" else ">"
    equal = row["highs_status"] if row["equal"] is None else "yes" if row["equal"] else "NO"
    table.add_row(row["case"], f"{row['units']} x {row['choices']}", str(row["seed"]),
                  f"{row['first_seconds'] * 1e3:.0f}", f"{row['seconds'] * 1e3:.1f}",
                  f"{limit}{row['highs_seconds'] * 1e3:.0f}",
                  f"{limit}{row['ratio_to_highs']:.0f}x", equal)
  rich_console.Console().print(table)
