"""`bench kernels` on a CPU: ratios come from its times, errors are those of the methods, and the figure is a PNG."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeq_jax.bench import kernels


def test_a_small_table(monkeypatch, tmp_path: Path, capsys):
  monkeypatch.setattr(kernels, "MATMULS", {"small": (3, 128, 192), "other": (2, 128, 64)})
  monkeypatch.setattr(kernels, "WIDTHS", {"2": (2,), "mixed": (1, 8, 3)})
  monkeypatch.setattr(kernels, "ROWS", (2, 9))
  found = kernels.run(rounds=1, shape="small", figure=str(tmp_path / "a.png"))
  assert [(row["shape"], row["widths"], row["rows"]) for row in found["results"]] == [
      ("small", widths, rows) for widths in ("2", "mixed") for rows in (2, 9)]
  for row in found["results"]:
    times, ratios, errors = row["milliseconds"], row["ratio_to_dense"], row["errors"]
    assert set(times) == set(ratios) == {"exact", "int8", kernels.DENSE, "ragged_dot bf16", "numpy f32"}
    assert all(ratios[name] == pytest.approx(times[name] / times[kernels.DENSE]) for name in times)
    assert errors["numpy f32"] < 1e-6 < errors["exact"] < 5e-3 < errors["int8"] < 2e-2
    assert 0 < row["share_of_limit"]
  assert json.loads(json.dumps(found, default=float))["benchmark"] == "kernels"
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  assert "small" in capsys.readouterr().out


def test_the_dense_loop_is_the_product_and_is_given_its_best_tile():
  weights = kernels._weights((3, 128, 64), (4,))
  case = kernels._case("x", "4", 20, weights, "zipf")
  wanted = kernels._exact(case)
  for tile in kernels._row_tiles(case):
    y = np.asarray(kernels._dense_loop(case.x, case.dense, case.sizes, tile), np.float64)
    assert np.linalg.norm(y - wanted) < 1e-2 * np.linalg.norm(wanted)
  assert kernels._row_tiles(case) == [8, 16, 20]
  times = kernels._times({f"{kernels.DENSE} 1": lambda: sum(range(300_000)), f"{kernels.DENSE} 2": lambda: None}, 3)
  assert list(times) == [kernels.DENSE]
  assert times[kernels.DENSE] < 0.5


@pytest.mark.parametrize("options", [{"shape": "mixtral"}, {"routing": "even"}])
def test_unknown_names_are_refused(options: dict[str, str]):
  with pytest.raises(ValueError, match=next(iter(options.values()))):
    kernels.run(**options)
