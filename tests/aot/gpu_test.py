"""Ahead-of-time compilation of the Hopper kernel, through ptxas, for a described H100; no GPU takes part."""

import pytest

from moeq_jax.bench import _gpu_compile

pytestmark = pytest.mark.skipif(_gpu_compile.missing() is not None, reason=str(_gpu_compile.missing()))


@pytest.mark.parametrize(("rows", "dtype", "threads", "spilled"), [
  (16, "bfloat16", 640, 32), (128, "bfloat16", 384, 0), (8192, "bfloat16", 384, 0), (16, "float32", 384, 0)])
def test_launches_compile_almost_without_spills(rows: int, dtype: str, threads: int, spilled: int):
  """The launch for up to 8 rows has 640 threads; its branch of 3 bits spills 20 bytes."""
  found = _gpu_compile.launch("mixtral-8x7b", "up", rows, dtype)
  assert "error" not in found, found
  assert max(found["spill_stores"], found["spill_loads"]) <= spilled
  assert found["registers"] * threads <= 65536  # a block fits into a multiprocessor
  assert found["wgmma"] > 0
