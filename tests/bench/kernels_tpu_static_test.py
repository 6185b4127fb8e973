"""The static figures of the TPU kernel: how they are counted and joined. The compiler itself runs in tests/aot."""

import pytest

from moeq_jax import qtensor
from moeq_jax.bench import _tpu_compile, _tpu_worker, kernels_tpu_static
from moeq_jax.kernels import shapes

TABLE = """== CAPACTIY:
MXU, VALU, VSTORE, SALU
    4     4     1     2
== UTILIZATION:
0 0 0 2
0 1 0 0
0 0 0 1
4 3 1 0
0 0 0 2
"""


def test_bundles_are_counted_from_the_first_to_the_last_that_does_vector_work():
  assert _tpu_worker.count(TABLE) == {"bundles": 3, "slots": {"MXU": 4, "VALU": 4, "VSTORE": 1, "SALU": 5}}


def test_without_the_compiler_it_says_what_to_do(monkeypatch):
  monkeypatch.setattr(_tpu_compile, "missing", lambda: "libtpu is not installed: `./launch.sh aot`")
  with pytest.raises(RuntimeError, match="launch.sh aot"):
    kernels_tpu_static.run()


def test_ratios_are_those_of_the_counts(monkeypatch, capsys):
  counts = {"bfloat16": 100, "after": 480, "before": 130, "reused": 140}
  monkeypatch.setattr(_tpu_compile, "missing", lambda: None)
  monkeypatch.setattr(_tpu_worker, "results", lambda jobs: ({**job, "bundles": counts[job["way"]]} for job in jobs))
  result = kernels_tpu_static.run()
  assert [(r["chip"], r["bits"]) for r in result["results"]] == [(c, b) for c in ("v5e", "v6e") for b in qtensor.WIDTHS]
  four = result["results"][3]
  assert result["few"] == {"k_tile": 512, "columns": 1024, "span": 2}  # four times 512 x 512
  assert (four["few_rows_bundles"], four["few_rows_bfloat16"]) == (120, 25)
  assert (four["prefill_bundles"], four["prefill_bfloat16"]) == (32.5, 25)
  assert four["prefill_ratios"] == {"256": 1.3, "512": (140 + 100) / 200, "1024": (140 + 3 * 100) / 400}
  assert four["copy_cycles"] == pytest.approx(512 * 512 * (4 + 0.25) / 8 / 0.819e12 * 1.5e9)
  assert {matmul for row in result["tiles"] for matmul in row["matmuls"]} == {
    f"{name} {projection}" for name, layer in shapes.LAYERS.items() for projection in layer.matmuls()
    if projection != "gate" and (name, projection) != ("moeq-small", "up")}  # of the shape of another
  assert all(row["prefill_ratios"] == pytest.approx(four["prefill_ratios"]) for row in result["tiles"])
  assert "estimates" in capsys.readouterr().out


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_tiles_are_those_that_the_kernel_computes(group: int):
  """A tile times its loops is the whole matmul, padding aside, and as much as one row tile can hide behind."""
  for at, matmuls in kernels_tpu_static.prefill_tiles(group).items():
    for name, projection in (matmul.split() for matmul in matmuls):
      _, K, N = shapes.LAYERS[name].matmuls()[projection]
      assert (-(-K // 256) * 256) % (at.k_tile * at.span) == 0
      assert (-(-N // 128) * 128) % at.columns == 0
      assert at.k_tile * at.span * at.columns >= min(2**19, K * N)


def test_an_error_of_the_compiler_ends_it(monkeypatch):
  monkeypatch.setattr(_tpu_compile, "missing", lambda: None)
  monkeypatch.setattr(_tpu_worker, "results", lambda jobs: ({**job, "error": "no such tile"} for job in jobs))
  with pytest.raises(RuntimeError, match="no such tile"):
    kernels_tpu_static.run()
