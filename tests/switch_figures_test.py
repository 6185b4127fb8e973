"""Tables of the Switch track: means and deviations over seeds, and differences paired over the same pairs."""

import numpy as np
import pytest

from experiments import switch_figures
from moeq_jax.evaluate import perplexity
from moeq_jax.switch_track import measure

CHANGE, FREQUENCY = "tiers(router_norm_change, zeta=0)", "tiers(frequency, zeta=0)"


def seed(shift: float) -> switch_figures.Run:
  """Four pairs; two random draws, of which one writes summaries."""
  rows, examples = [], {}

  def add(method: str, draw: int, losses: list[float], rouge2: list[float]) -> None:
    name = f"{method}@{draw}"
    scores = np.zeros((len(rouge2), 3))
    scores[:, 1] = rouge2
    examples[name] = measure.Examples(np.array(losses) + shift, scores, 0, 1.0)
    rows.append({"id": name, "method": method, "budget": 2.5, "loss_delta": float(np.mean(losses)) + shift})

  add(CHANGE, 0, [1.0, 2.0, 3.0, 6.0], [0.1, 0.2])
  add(FREQUENCY, 0, [1.0, 1.0, 2.0, 2.0], [0.2, 0.5])
  add("random", 0, [2.0, 2.0, 2.0, 2.0], [0.3, 0.3])
  add("random", 1, [4.0, 2.0, 2.0, 0.0], [])
  return {"rows": rows, "examples": examples, "summary": {}}


RUNS = [seed(0.0), seed(1.0)]


def row_of(text: str, label: str) -> str:
  return next(line for line in text.splitlines() if line.startswith(f"| {label} |"))


def test_a_table_has_means_and_deviations_over_seeds_and_draws():
  table = switch_figures.table(RUNS, "loss_delta", 2)
  assert row_of(table, "norm change") == f"| norm change | 3.50 ± {np.sqrt(0.5):.2f} |"
  assert row_of(table, "random (mean of draws)").startswith("| random (mean of draws) | 2.50")


def test_differences_are_each_order_minus_norm_change_paired_over_pairs():
  table = switch_figures.paired_table(RUNS, "loss", 3)
  delta, stderr = perplexity.paired(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 6]))
  assert delta < 0 and row_of(table, "frequency") == f"| frequency | {delta:+.3f} ± {1.96 * stderr:.3f} |"
  delta, stderr = perplexity.paired(np.array([3.0, 2, 2, 1]), np.array([1.0, 2, 3, 6]))  # the mean of both draws
  assert row_of(table, "random (mean of draws)").endswith(f"| {delta:+.3f} ± {1.96 * stderr:.3f} |")
  assert "norm change |" not in table.split("\n", 2)[2].split("random")[0].replace("| frequency", "")
  points = switch_figures.paired_table(RUNS, "rouge2", 1, 100)  # of the draw that wrote
  assert row_of(points, "frequency").startswith("| frequency | +20.0") and "+15.0" in row_of(
      points, "random (mean of draws)")


def test_a_folder_without_runs_is_named_before_anything_is_written(tmp_path):
  with pytest.raises(SystemExit, match="one_bit: no folder with rows.jsonl"):
    switch_figures.main(["", str(tmp_path), "one_bit"])
