"""Ahead-of-time compilation of the Hopper kernel, through ptxas, for a described H100; no GPU takes part."""

import pytest

from moeq_jax.bench import _gpu_compile

pytestmark = pytest.mark.skipif(_gpu_compile.missing() is not None, reason=str(_gpu_compile.missing()))


@pytest.mark.parametrize(("rows", "dtype"), [(16, "bfloat16"), (8192, "bfloat16"), (16, "float32")])
def test_launches_compile_without_spills(rows: int, dtype: str):
  found = _gpu_compile.launch("mixtral-8x7b", "up", rows, dtype)
  assert "error" not in found, found
  assert found["spill_stores"] == found["spill_loads"] == 0
  assert found["registers"] * 384 <= 65536  # a block of 384 threads fits into a multiprocessor
  assert found["wgmma"] > 0
