"""The experiment on the Mixtral track: its points, and that its summary finds the sign that was put into the runs."""

from pathlib import Path

import numpy as np
import pytest

from experiments import mixtral_track, mixtral_track_summary
from moeq_jax import artifacts, pipeline, results, runs

CONFIG = "experiments/mixtral_track.py"


def test_every_point_changes_one_factor_and_passes_the_checks():
  points = runs.sweep_points(runs.find_config(CONFIG))
  configs = [runs.plain(runs.load_config(CONFIG, settings)) for settings in points.values()]
  for settings in points.values():
    pipeline.check(runs.load_config(CONFIG, settings))
  factors = [mixtral_track_summary.factor(config) for config in configs]
  assert sorted(factors) == ["base", "base", "calibration_set=1", "calibration_set=2", "codec=gptq(group=128)",
                             "router_bits=4", "sequential=True"]
  assert all({mixtral_track.RULE, mixtral_track.REVERSE, "uniform"} <= set(config["methods"]) for config in configs)


def test_the_light_form_has_the_same_points_without_measured_damage():
  light = "experiments/mixtral_track_light.py"
  points, whole = (list(runs.sweep_points(runs.find_config(name)).values()) for name in (light, CONFIG))
  assert [[setting for setting in point if "damage.sequences" not in setting] for point in whole] == points
  for settings in points:
    config = runs.load_config(light, settings)
    pipeline.check(config)
    assert (config.damage.sequences, config.length) == (0, 128)


def fake(folder: Path, model: str, point: str, changes: dict, rule: float, *, damage: bool = False,
         last: float = 6.5) -> None:
  """A finished run whose rule loses `rule` nats more than its reverse on every sequence; `last`: loss of the last."""
  place = folder / model / point
  config = runs.plain(runs.load_config(CONFIG)) | {"domains": ["wiki", "code"], "evaluation": 2} | changes
  artifacts.write_json(place / "config.json", config)
  base = np.array([3.0, 4.0, 5.0, last])
  values = {"full": (None, base), "uniform": (2.5, base + 0.5), mixtral_track.REVERSE: (2.5, base + 0.1),
            mixtral_track.RULE: (2.5, base + 0.1 + rule)}
  for method, (budget, loss) in values.items():
    row = {"id": method, "method": method, "budget": budget, "loss": float(loss.mean()), "loss_delta": 0.0,
           "loss_delta_ci95": 0.0, "kl": 0.0, "router_agreement": 1.0, "loss_wiki": 1.0}
    results.append(place / "rows.jsonl", row)
    results.append(place / "losses.jsonl", {"id": method} | {f"sequence_{i:06d}": x for i, x in enumerate(loss)})
  mean = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
  scores = {"router_norm_change": (-mean).tolist(), "max_var": (-mean).tolist()}  # sensitivities, as reports hold them
  measured = {"mean": mean.tolist(), "stderr": (0 * mean).tolist(), "bits": 2, "tokens": 4}
  artifacts.write_json(place / "report.json", {"damage": measured if damage else None, "scores": scores})
  artifacts.write_json(place / "finished.json", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  place = tmp_path / "track"
  fake(place, "m", "base", {}, 0.2, damage=True)
  fake(place, "m", "other-windows", {"calibration_set": 1}, -0.4)
  fake(place, "m", "router", {"router_bits": 4}, 0.3)
  (place / "m" / "unfinished").mkdir()
  return place


def test_differences_are_the_rule_minus_the_other(folder: Path, capsys: pytest.CaptureFixture):
  rows, _, differences = mixtral_track_summary.collect(folder)
  assert "unfinished: not finished" in capsys.readouterr().err
  found = {(d["factor"], d["against"]): (d["difference"], d["ci95"]) for d in differences if d["domain"] == "all"}
  assert found["base", mixtral_track.REVERSE] == pytest.approx((0.2, 0), abs=1e-9)
  assert found["router_bits=4", mixtral_track.REVERSE] == pytest.approx((0.3, 0), abs=1e-9)
  assert found["base", "uniform"] == pytest.approx((-0.2, 0), abs=1e-9)
  assert len({row["id"] for row in rows}) == len(rows) == 12
  assert {row["router_bits"] for row in rows if row["factor"] == "router_bits=4"} == {4}


def test_domains_are_told_apart():
  parts = mixtral_track_summary.parts({"domains": ["wiki", "code"], "evaluation": 2})
  assert {name: which.tolist() for name, which in parts.items()} == {
      "all": [True] * 4, "code": [True, True, False, False], "wiki": [False, False, True, True]}


def test_calibration_sets_are_averaged_and_other_factors_are_not(folder: Path):
  found = mixtral_track_summary.over_sets(folder, "m")
  assert found[mixtral_track.REVERSE] == pytest.approx((-0.1, 0, 2, 4), abs=1e-9)  # of 0.2, -0.4; not the router's 0.3


def test_only_sequences_that_all_sets_were_evaluated_on_are_averaged(folder: Path):
  fake(folder, "n", "base", {}, 0.2)
  fake(folder, "n", "other-windows", {"calibration_set": 1}, 0.4, last=7.5)
  found = mixtral_track_summary.over_sets(folder, "n")
  assert found["uniform"] == pytest.approx((-0.1, 0, 2, 3), abs=1e-9)


def test_a_norm_change_keeps_its_own_sign(folder: Path):
  ranked = {row["score"]: row for row in mixtral_track_summary.collect(folder)[1]}
  assert ranked["router_norm_change"]["inside"] == pytest.approx(1)  # the larger the change, the larger the damage
  assert ranked["max_var"]["inside"] == pytest.approx(-1)
  assert (ranked["max_var"]["layers_positive"], ranked["max_var"]["layers"]) == (0, 2)


def test_everything_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture):
  for name in ("experiments/results", "docs/figures"):
    (tmp_path / "out" / name).mkdir(parents=True)
  monkeypatch.setattr(mixtral_track_summary, "ROOT", tmp_path / "out")
  mixtral_track_summary.main(folder)
  printed = capsys.readouterr().out
  assert f"| m | base | 2.5 | {mixtral_track.REVERSE} | all | +0.2000 ± 0.0000 |" in printed
  ids = [row["id"] for row in results.read(tmp_path / "out/experiments/results/mixtral_track.jsonl")]
  assert ids == sorted(ids) and len(ids) == 12
  assert (tmp_path / "out/docs/figures/mixtral-track.png").read_bytes()[:4] == b"\x89PNG"
  with pytest.raises(ValueError, match="no finished run"):
    mixtral_track_summary.main(tmp_path / "out")
