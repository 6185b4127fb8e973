"""The quantize benchmark compares equals: both sides end with the same errors."""

import json

import pytest

from moeq_jax.bench import quantize


def test_both_sides_reach_the_same_error(capsys):
  result = quantize.run(rows=128, columns=32, group=64, repeats=1)
  assert [(r["codec"], r["bits"]) for r in result["results"]] == [(c, b) for c in quantize.CODECS for b in (2, 4)]
  for row in result["results"]:
    assert row["squared_error"] == pytest.approx(row["numpy_squared_error"], rel=0.01)
    assert row["ratio_to_numpy"] == pytest.approx(row["weights_per_second"] / row["numpy_weights_per_second"])
  assert json.loads(json.dumps(result)) == result
  assert "openblas" in capsys.readouterr().out or result["machine"]["blas"]
