"""The calibrate benchmark times three passes of two models and counts what a layer's program takes."""

import json

from moeq_jax.bench import calibrate


def test_the_passes_and_their_ratios(capfd, monkeypatch):
  monkeypatch.setattr(calibrate, "_larger", calibrate._small)
  result = calibrate.run(rounds=1, sequences=1, length=32)
  assert [row["model"] for row in result["results"]] == ["moeq-small"] * 2
  for row in result["results"]:
    assert 0 < row["seconds"]["forward"] and set(row["seconds"]) == set(calibrate.PASSES)
    assert row["layer_bytes"]["with taps"] > row["layer_bytes"]["router gradients"] > 16 * 3 * 256 * 256 * 2
    assert row["memory_over_router"] == row["layer_bytes"]["with taps"] / row["layer_bytes"]["router gradients"]
    assert row["over_router"] == row["seconds"]["with taps"] / row["seconds"]["router gradients"]
  assert json.loads(json.dumps(result)) == result
  assert "moeq-small" in capfd.readouterr().out
