"""The task `theory` on a small model: its rows, and a run that was killed."""

import math
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from moeq_jax import results, runs, theory_run
from moeq_jax.report import theory
from moeq_jax.theory import quantization, two_layer


@pytest.fixture(scope="module")
def config() -> ml_collections.ConfigDict:
  return runs.load_config("experiments/theory.py:smoke")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, config: ml_collections.ConfigDict) -> Path:
  made = tmp_path_factory.mktemp("theory")
  runs.execute(config, made)
  return made


def test_every_setting_has_its_rows_and_they_carry_the_config(workdir: Path, config: ml_collections.ConfigDict):
  rows = results.read(workdir / "rows.jsonl")
  seeds = [row for row in rows if row["kind"] == "seed"]
  assert len(seeds) == config.seeds * (len(config.quantized) + len(config.trained))
  assert len(rows) - len(seeds) == len(config.quantized) * 2 * len(theory_run.CASES) * 2
  assert len({row["config_hash"] for row in rows}) == 1
  assert all(row["error"] == 0 and row["margin_rare_least"] > 0 for row in seeds)
  for row in rows:
    if row["kind"] == "grid":
      cells = [int(cell) for line in row["free"].split(";") for cell in line.split()]
      assert len(cells) == 15 * 15
      assert max(cells) <= row["draws"] == config.seeds * config.bases
  assert {path.name for path in (workdir / "figures").iterdir()} == {"theory-activation.png"}
  assert "| `A(alpha=0.2, dim=64" in (workdir / "tables.md").read_text()


def test_errors_fall_with_bits_and_the_noise_of_frequent_experts_on_rare_inputs_is_cross_talk(workdir: Path):
  rows = [row for row in results.read(workdir / "rows.jsonl") if "max_variance_ratio" in row]
  assert len(rows) == 4
  for row in rows:
    assert row["max_variance_ratio"] >= row["max_variance_ratio_relevant"] >= 1
    for quantizer in ("common", "row"):
      squares = [row[f"square_{quantizer}_rare_{w:02d}"] for w in range(15)]
      assert squares[-1] < squares[6] < max(squares[:3])
      assert row[f"noise_{quantizer}_frequent_own_4"] == 0 < row[f"noise_{quantizer}_frequent_cross_4"]
      assert row[f"noise_{quantizer}_rare_own_4"] > 0
      small, large = (row[f"average_{quantizer}_relevant_own_{end}"] for end in ("small", "large"))
      assert small <= large  # rare inputs' own tokens are the hard ones: what protects them needs no more bits


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    workdir: Path, config: ml_collections.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  whole = (workdir / "rows.jsonl").read_bytes()
  rows = results.read(workdir / "rows.jsonl")
  last = rows[-1]["spec"]
  for row in rows:
    if row["spec"] != last:
      results.append(tmp_path / "rows.jsonl", row)
  results.append(tmp_path / "rows.jsonl", next(row for row in rows if row["spec"] == last))  # of an unfinished setting
  trained = []
  train = two_layer.train
  monkeypatch.setattr(two_layer, "train", lambda setting, *rest: trained.append(setting) or train(setting, *rest))
  theory_run.run(config, tmp_path)
  assert (tmp_path / "rows.jsonl").read_bytes() == whole
  assert trained == [two_layer.Setting.parse(last)]


def test_a_margin_out_of_reach_is_an_error_that_names_the_seeds(config: ml_collections.ConfigDict, tmp_path: Path):
  hard = config.copy_and_resolve_references()
  hard.update(quantized=(), trained=(config.trained[0].replace(")", ", margin=3)"),), most=10)
  with pytest.raises(ValueError, match=r"margin=3\): seeds \[0, 1\] did not reach margin 3 in config.most=10 steps"):
    theory_run.run(hard, tmp_path)
  hard.trained *= 2
  with pytest.raises(ValueError, match="each setting once"):
    theory_run.run(hard, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the tables
# ---------------------------------------------------------------------------------------------------------------------


def test_a_shift_is_recovered_from_errors_that_halve_with_every_bit():
  def row(noise: float) -> dict:
    return {f"square_common_{kind}_{w:02d}": (noise * scale * 2.0 ** -quantization.BITS[w]) ** 2
            for kind, scale in (("frequent", 1.0), ("rare", 2**1.5)) for w in range(15)}

  rows = [row(noise) for noise in (0.5, 1.0, 2.0)]
  for widths in (theory.HIGH_RESOLUTION, theory.LOW_RESOLUTION):
    assert theory.shift(rows, "common", widths) == (pytest.approx(1.5), pytest.approx(0, abs=1e-9))
  rows[0] |= {f"square_common_rare_{w:02d}": None for w in range(15)}  # of an expert that never answers its token
  middle, half = theory.shift(rows, "common", theory.HIGH_RESOLUTION)
  assert 1.5 < middle < 2  # the first seed's frequent experts still count
  assert half > 0.1


def test_a_shift_is_a_distance_in_bits_whatever_the_errors_do_with_a_bit():
  """Errors that fall faster with every bit, those of rare experts one bit later: at 2 bits they are apart by a factor
  2.4, at 8 by far more, and one bit is still the shift."""
  error = lambda bits: 2.0 ** -(bits**2 / 4)
  row = {f"square_common_{kind}_{w:02d}": error(quantization.BITS[w] - late) ** 2
         for kind, late in (("frequent", 0), ("rare", 1)) for w in range(15)}
  middle, _ = theory.shift([row, row], "common", theory.LOW_RESOLUTION)
  assert middle == pytest.approx(1, abs=0.02)  # interpolation is linear
  assert theory._distance(np.array([np.nan] * 15), 0.0, 2.0) != theory._distance(np.zeros(15), -1.0, 2.0) == 7.0


def test_slopes_and_intervals():
  rows = {d: [{"x": c * d**-0.5} for c in (1.0, 1.2, 0.8)] for d in (64, 128, 512)}
  assert theory.slope(rows, "x") == pytest.approx(-0.5)
  middle, half = theory.slope_and_half_width(rows, "x")
  assert middle == pytest.approx(-0.5)
  assert 0 < half < 0.2
  assert math.isnan(theory.slope({64: [{"x": -1.0}], 128: [{"x": 1.0}]}, "x"))
  middle, half = theory.mean_and_half_width([1.0, 2.0, 3.0, None])
  assert (middle, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-5))
  assert theory.mean_and_half_width([1.0, None]) is None


def test_settings_that_differ_in_d_only_are_a_family():
  specs = ["B(dim=128)", "B(dim=256)", "B(dim=512)", "B(dim=1024)", "A(dim=256)", "B(dim=256, router_init=0.02)",
           "B(dim=64, router_init=0.04)"]
  rows = [{"kind": "seed", "spec": spec} for spec in specs]
  found = theory.families(rows)
  assert {name: sorted(by_dim) for name, by_dim in found.items()} == {
      "B, alpha 0.1, first 100%": [128, 256, 512, 1024],
      "B, alpha 0.1, first 100%, equal router norm at the start": [64, 256, 1024]}


def test_the_page_holds_the_tables_of_the_committed_rows():
  rows = results.read(runs.ROOT / "experiments" / "results" / "theory.jsonl")
  page = (runs.ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
  for name, table in theory.TABLES.items():
    assert theory.markdown(table(rows)) in page, f"table {name} of docs/theory.md is not that of results/theory.jsonl"
