"""Plans by blocks of neurons beside plans of whole experts in one comparison, on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from moeq_jax import artifacts, channels, data, qtensor, registry, results, runs
from moeq_jax.encode import channels as encode_channels
from tests import tiny

BLOCK, SAME = "knapsack(fisher_error(zeta=0), block=32)", "knapsack(fisher_error(zeta=0), block=32, constraint=expert)"
WHOLE = "knapsack(fisher_error)"
METHODS = ("uniform", WHOLE, BLOCK, SAME, "knapsack(weight_mse, block=16)")


def config(checkpoint: Path, **changes) -> ml_collections.ConfigDict:
  fields = dict(
      file="configs/quickstart.py", task="compare", seed=0, checkpoint=str(checkpoint), compute_dtype="float32",
      codec="rtn(group=32)", widths=tiny.WIDTHS, budgets=(2.0, 2.5), methods=METHODS, draws=1, scores=(), export=(),
      domains=("code", "wiki"), length=tiny.LENGTH, batch=4, calibration=4, evaluation=4,
      damage=dict(sequences=0, bits=2))
  return ml_collections.ConfigDict(fields | changes)


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
  """Runs a comparison in one work directory."""
  root = tmp_path_factory.mktemp("compare")
  checkpoint = tiny.checkpoint(root / "checkpoint")
  documents = [*tiny.documents(6, 1), *tiny.documents(6, 2, "code")]

  def compare(name: str = "run", **changes) -> Path:
    with pytest.MonkeyPatch.context() as patch:
      for purpose in ("calibration", "held_out"):
        patch.setattr(data, purpose, lambda: documents)
      runs.execute(config(checkpoint, **changes), root / name)
    return root / name

  return compare


@pytest.fixture(scope="module")
def workdir(compare: Callable[..., Path]) -> Path:
  return compare()


@pytest.fixture(scope="module")
def rows(workdir: Path) -> dict[tuple[str, float], results.Row]:
  return {(row["method"], row["budget"]): row for row in results.read(workdir / "rows.jsonl")}


def test_blocks_of_one_expert_that_share_a_width_are_the_expert(rows: dict):
  """Two ways to the same optimum: errors of neurons summed up, and errors of whole matrices."""
  for budget in (2.0, 2.5):
    whole, same = rows[WHOLE, budget], rows[SAME, budget]
    assert same["predicted"] == pytest.approx(whole["predicted"], rel=1e-4)
    assert same["nominal_bits"] == pytest.approx(whole["nominal_bits"], abs=0.04)  # ties
    assert same["effective_bits"] - same["nominal_bits"] == pytest.approx(
        whole["effective_bits"] - whole["nominal_bits"] + same["permutation_bits"])


def test_a_finer_plan_s_bound_is_at_most_the_expert_plan_s_value(rows: dict):
  for budget in (2.0, 2.5):
    fine, whole = rows[BLOCK, budget], rows[WHOLE, budget]
    assert fine["lower_bound"] <= fine["predicted"] < whole["predicted"]
    assert fine["nominal_bits"] <= budget and (fine["constraint"], whole["constraint"]) == ("none", "expert")


def test_rows_count_the_order_and_are_compared_with_uniform(rows: dict, workdir: Path):
  order = 16 / (3 * tiny.CONFIG.hidden_size)
  for (method, _), row in rows.items():
    if "block" in method:
      assert (row["block"], row["permutation_bits"]) == (16 if "16" in method else 32, order)
      assert row["effective_bits"] == pytest.approx(row["nominal_bits"] + 1.0 + order)  # groups of 32: one bit
      assert row["vs_uniform"] is not None and np.isfinite(row["kl"])
  report = (workdir / "report.html").read_text()
  assert "knapsack(fisher_error(zeta=0), block=32)" in report


def test_the_same_command_measures_nothing_again(workdir: Path, compare: Callable[..., Path],
                                                monkeypatch: pytest.MonkeyPatch):
  before = (workdir / "rows.jsonl").read_bytes()
  monkeypatch.setattr(encode_channels, "encode_layer", None)
  monkeypatch.setattr(qtensor, "pack", None)
  assert compare() == workdir and (workdir / "rows.jsonl").read_bytes() == before
  plan = artifacts.load_arrays(workdir / "costs-fisher_error-zeta=0-block-32.npz")[1]
  assert plan["type"] == channels.BlockCosts.__name__


@pytest.mark.parametrize(("changes", "said"), [
    ({"methods": ("uniform", "knapsack(output_error, block=32)")}, "unknown score of channels 'output_error'"),
    ({"methods": ("knapsack(fisher_error, block=33)",)}, "block=33 is not one of"),
    ({"methods": ("knapsack(fisher_error, block=64)",)}, "do not divide the 96 neurons .* take block=16 or 32"),
    ({"methods": (BLOCK,), "codec": "rtn(group=0)"}, "group=0: one scale over all rows of down"),
    ({"methods": (BLOCK,), "codec": "gptq(group=32)", "sequential": True}, "config.sequential: knapsack"),
    ({"methods": (BLOCK,), "export": ((BLOCK, 2.5),)}, "configs/quantize.py --config.block=N writes such models"),
])
def test_mistakes_are_named(compare: Callable[..., Path], changes: dict, said: str):
  with pytest.raises(ValueError, match=said):
    compare(registry.safe_name(said), **changes)
