"""What deployability costs: the section has the rows' numbers, and stays away where there is nothing to compare."""

from pathlib import Path

import numpy as np
import pytest

from moeq_jax import report, results
from moeq_jax.report import deployability, points
from tests import report_test

COSTS = {"per_layer": 9.0, "expert": 6.0, "none": 4.0}  # in no order
INCREASES = {"per_layer": 0.06, "expert": 0.03, "none": 0.02}


def rows(**changes) -> list[dict]:
  """Full precision, uniform, and one score under three constraints at 2 bits and under one at 3 bits."""
  made = [report_test._full(), report_test._row("uniform", "uniform", 2.0, 0.1)]
  for constraint, cost in COSTS.items():
    name = "knapsack(output_error)" if constraint == "expert" else f"knapsack(output_error, constraint={constraint})"
    more = {"cost": cost, "vs_uniform": INCREASES[constraint] - 0.1, "vs_uniform_ci95": 0.004} | changes
    made.append(report_test._row(name, "knapsack", 2.0, INCREASES[constraint], id=constraint, constraint=constraint,
                                 **more))
  made.append(report_test._row("knapsack(output_error)", "knapsack", 3.0, 0.01, constraint="expert", cost=1.0))
  return made


def losses(name: str) -> np.ndarray:
  return 3 + INCREASES[name] + np.random.default_rng(0).normal(0, 0.1, 12) * (1 + 20 * INCREASES[name])


def table(made: list[dict], **known: np.ndarray):
  return deployability.table(points.aggregate(made), known)


def test_constraints_of_one_score_and_budget_stand_side_by_side():
  found = table(rows(), **{name: losses(name) for name in COSTS})
  assert [group.title for group in found.groups] == ["knapsack(output_error) at 2.0 bits asked"]
  lines = {line.method: line.cells for line in found.groups[0].lines}
  assert list(lines) == ["none", "expert", "per_layer"]
  for name, cells in lines.items():
    difference = losses(name) - losses("none")
    paired = f"{difference.mean():+.4f} ± {1.96 * difference.std(ddof=1) / np.sqrt(12):.4f}"
    increase = INCREASES[name]
    assert cells == (
        "2.000", f"{COSTS[name]:g}", f"{COSTS[name] / 4:.2f}×", f"{increase:+.4f}", f"{0.002 + 0.04 * increase:.4f}",
        f"{increase / 0.02:.2f}×", "–" if name == "none" else paired, f"{increase - 0.1:+.4f} ± 0.0040")


def test_what_is_not_known_is_left_out():
  bare = table(rows(cost=None, loss_delta_ci95=None, vs_uniform=None)).groups[0]
  cells = {line.method: line.cells for line in bare.lines}["expert"]
  assert cells == ("2.000", "–", "–", "+0.0300", "–", "1.50×", "–", "–")
  without_free = table([row for row in rows() if row.get("constraint") != "none"]).groups[0]
  assert {line.cells[place] for line in without_free.lines for place in (2, 5, 6)} == {"–"}


@pytest.mark.parametrize("kept", [("expert",), ()])
def test_one_constraint_alone_is_no_comparison(kept: tuple[str, ...]):
  assert table([row for row in rows() if row["family"] != "knapsack" or row["constraint"] in kept]) is None


def test_other_options_and_settings_are_not_mixed():
  made = rows()
  widths = [dict(row, method=row["method"].replace("output_error", "output_error, widths=(2, 4)"), id=f"w{i}")
            for i, row in enumerate(made) if row["family"] == "knapsack"]
  other = [dict(row, codec="gptq(group=64)", id=f"g{i}") for i, row in enumerate(made) if row["family"] == "knapsack"]
  titles = [group.title for group in table(made + widths + other).groups]
  assert sorted(titles) == sorted([
      f"{method} at 2.0 bits asked, {codec}(group=64)" for codec, methods in {
          "rtn": ("knapsack(output_error)", "knapsack(output_error, widths=(2, 4))"),
          "gptq": ("knapsack(output_error)",)}.items() for method in methods])


def test_the_section_appears_on_the_page_with_the_paired_differences(tmp_path: Path):
  for name in COSTS:
    results.append(tmp_path / "losses.jsonl",
                   {"id": name} | {f"sequence_{i:06d}": float(x) for i, x in enumerate(losses(name))})
  page = report_test._write(tmp_path, rows(), {})
  shown = page.tables["deployability-table"]
  assert tuple(shown[0]) == deployability.HEADER and len(shown) == 2 + len(COSTS)
  expected = {line.method: line.cells for line in table(rows(), **{n: losses(n) for n in COSTS}).groups[0].lines}
  assert {line[0]: tuple(line[1:]) for line in shown[2:]} == expected
  assert page.ids.count("deployability") == 1 and ("a", "href", "#deployability") in page.attributes
  text = (tmp_path / "report.md").read_text()
  assert "## What deployability costs" in text and expected["per_layer"][6] in text
  (tmp_path / "rows.jsonl").unlink()
  alone = report_test._write(tmp_path, [row for row in rows() if row.get("constraint") in (None, "expert")], {})
  assert "deployability" not in alone.ids and "deployability-table" not in alone.tables
  assert "#deployability" not in Path(report.write(tmp_path)).read_text()
