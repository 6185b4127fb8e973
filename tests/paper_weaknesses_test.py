"""The weaknesses of the paper: what is compared with what, over which calibration sets, with which sign."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import paper_weaknesses
from moeq_jax import codecs, results
from moeq_jax.evaluate import perplexity
from tests import tiny

CODEC = "rtn(group=128)"
LOSSES = {"full precision@16": [1.0, 1.0, 1.0], "uniform@2": [2.0, 3.0, 5.0],
          "uniform, routers at 4 bits@2": [2.5, 3.0, 5.5],
          "norm change@2": [4.0, 4.0, 4.0], "norm change, large first@2": [3.0, 1.0, 2.0]}


def point(place: Path, shift: float) -> Path:
  place.mkdir()
  (place / "config.json").write_text(json.dumps({"task": "experiment", "shift": shift}))
  for name, values in LOSSES.items():
    more = shift * name.startswith("norm change, large")
    results.append(place / "losses.jsonl", {"id": f"{name}@{CODEC}", **{
        f"sequence_{i:06d}": value + more for i, value in enumerate(values)}})
  (place / "correlations.json").write_text(json.dumps(
      {"router_norm, frequency": [shift, 0.5], "seed": 0, "config_hash": f"of {place.name}"}))
  return place


def test_arms_are_compared_in_pairs_after_the_mean_over_sets(tmp_path: Path, capsys: pytest.CaptureFixture):
  paper_weaknesses.summarise(tmp_path, [point(tmp_path / "a", 0.0), point(tmp_path / "b", 0.5)])
  rows = {(row["claim"], row["budget"]): row for row in results.read(tmp_path / "comparisons.jsonl")}
  assert set(rows) == {("router", 2), ("reversed", 2)}  # for which both sides are there
  found = rows["reversed", 2]
  assert found["arm"].startswith("norm change, large first@2") and found["sets"] == 2
  delta, stderr = perplexity.paired(np.array([3.25, 1.25, 2.25]), np.full(3, 4.0))
  assert (found["difference"], found["difference_ci95"]) == pytest.approx((delta, 1.96 * stderr))
  assert (found["set_0"], found["set_1"]) == (-2.0, -1.5) and found["config_hash"]
  assert rows["router", 2]["difference"] == pytest.approx(1 / 3)
  ranks = results.read(tmp_path / "correlations.jsonl")
  assert [(row["layer_0"], row["config_hash"]) for row in ranks] == [(0, "of a"), (0.5, "of b")]
  assert "router_norm, frequency: +0.00 +0.50; +0.50 +0.50" in capsys.readouterr().out


def test_every_codec_of_the_sweep_is_compared(tmp_path: Path):
  """Ids hold a codec's canonical name, whose options may stand in another order than in the config."""
  place = tmp_path / "a"
  place.mkdir()
  (place / "config.json").write_text(json.dumps({"task": "experiment"}))
  for number, name in enumerate(paper_weaknesses.CODECS):
    results.append(place / "losses.jsonl", {"id": f"uniform@2@{codecs.get(name)}", "sequence_0": float(number),
                                            "sequence_1": 2.0 * number})
  paper_weaknesses.summarise(tmp_path, [place])
  found = {row["difference"] for row in results.read(tmp_path / "comparisons.jsonl")}
  assert found == {1.5, 3.0, 4.5, 6.0, -1.5, -3.0}  # four against the first, the official one against two


def test_routers_are_rounded_and_nothing_else_is():
  blocks = list(tiny.model().blocks)
  for bits, most in ((16, 0.0), (8, 0.01), (4, 0.1)):
    for before, after in zip(blocks, paper_weaknesses.with_routers(blocks, bits), strict=True):
      for (path, one), other in zip(_leaves(before), (leaf for _, leaf in _leaves(after)), strict=True):
        error = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max()
        largest = np.abs(np.asarray(one, np.float64)).max()
        assert error <= most * largest if "router" in path else error == 0, path
        assert bits == 16 or "router" not in path or error > 0


def _leaves(tree) -> list[tuple[str, jax.Array]]:
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
