"""Ahead-of-time compilation by the TPU compiler, for every named shape at true size, on v5e and v6e.

Runs where libtpu is importable (`./launch.sh aot`), in a process with the environment that libtpu needs; no TPU takes
part. Compiling proves that the kernel lowers, that its tiles fit into vector memory, and what it allocates.
"""

import pytest

from moeq_jax.bench import _tpu_compile, _tpu_worker, kernels_tpu_static
from moeq_jax.kernels import shapes

pytestmark = pytest.mark.skipif(_tpu_compile.missing() is not None, reason=str(_tpu_compile.missing()))
FEW, SOME, MANY = 16, 512, 8192  # rows: in order; aligned; aligned, with reused weights


def _projections(name: str) -> list[str]:
  """One projection of each shape."""
  return list({shape: projection for projection, shape in shapes.LAYERS[name].matmuls().items()}.values())


@pytest.mark.parametrize("name", shapes.LAYERS)
@pytest.mark.parametrize("chip", _tpu_compile.CHIPS)
def test_every_named_shape_compiles(chip: str, name: str):
  jobs = [{"job": "matmul", "chip": chip, "layer": name, "projection": projection, "rows": rows}
          for projection in _projections(name) for rows in (FEW, SOME, MANY)]
  found = list(_tpu_worker.results(jobs))
  assert len(found) == len(jobs)
  for result in found:
    assert "error" not in result, result
    assert result["kernels"] == 1, result
  few = [result for result in found if result["rows"] == FEW]
  assert all(result["temporary"] < 2**20 for result in few), few  # packed weights are neither copied nor made dense


@pytest.mark.parametrize("chip", _tpu_compile.CHIPS)
def test_float32_rows_the_view_and_the_gradient_compile(chip: str):
  place = {"chip": chip, "layer": "moeq-small", "projection": "up"}
  jobs = [{"job": "matmul", "rows": rows, "dtype": "float32", **place} for rows in (FEW, MANY)]
  jobs.append({"job": "gradient", "rows": SOME, **place})
  for result in _tpu_worker.results(jobs):
    assert "error" not in result, result


def test_a_failure_of_the_compiler_is_a_result_and_not_an_end():
  job = {"job": "tile", "way": "after", "rows": 16, "bits": 2, "k_tile": 256, "columns": 128, "group": 128, "span": 1}
  wrong, right = _tpu_worker.results([{**job, "chip": "v0"}, {**job, "chip": "v5e"}])
  assert "error" in wrong
  assert right["bundles"] > 0


# Where the first weights are dequantized before anything can be multiplied, and little follows them: an expert of
# 256 x 256 (one pass of the matrix unit), one K-tile of 768 x 768, and 3 bits with 768 columns on v6e.
LOOSER = {(256, 256): 1.4, (768, 768): 1.25, (512, 768): 1.12}


def test_prefill_costs_at_most_a_tenth_more_than_bfloat16():
  """In bundles, at row tiles of 256, every width, both chips: every tile that the heuristic takes for a named shape."""
  found = kernels_tpu_static.run()
  for row in found["tiles"]:
    bound = LOOSER.get((row["k_tile"], row["columns"]), kernels_tpu_static.BOUND)
    assert max(row["prefill_ratios"].values()) <= bound, row
  assert all(max(row["prefill_ratios"].values()) <= kernels_tpu_static.BOUND for row in found["results"])
