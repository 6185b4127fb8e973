"""The Hopper benchmark where there is no Hopper GPU: it says so and times nothing; and its arithmetic."""

import numpy as np
import pytest

from moeq_jax import qtensor
from moeq_jax.bench import kernels_gpu


def test_without_a_hopper_gpu_nothing_is_timed():
  result = kernels_gpu.run()
  assert "for Hopper GPUs" in result["skipped"]["pallas_gpu"]
  assert not result["results"]
  assert not result["ceilings"]


@pytest.mark.parametrize("mix", kernels_gpu.MIXES)
def test_random_weights_are_valid_and_have_the_widths(mix: str):
  q = kernels_gpu.weights((8, 256, 128), kernels_gpu.MIXES[mix], seed=1)
  q.validate()
  assert sorted(set(np.asarray(q.bits).ravel())) == sorted(set(kernels_gpu.MIXES[mix]))
  assert qtensor.used_rows(q) == q.buffer.shape[1]


def test_bytes_are_those_of_busy_experts_their_scales_and_the_rows():
  moved = kernels_gpu.moved_bytes(np.array([2, 3, 16]), (3, 256, 128), np.array([5, 0, 1]))
  assert moved == 256 * 128 * 2 // 8 + 2 * 128 * 4 + 256 * 128 * 2 + 2 * 6 * (256 + 128)


def test_seconds_are_the_median_of_a_call(monkeypatch: pytest.MonkeyPatch):
  clock = iter([0, 8, 10, 90, 100, 116])
  monkeypatch.setattr(kernels_gpu.time, "perf_counter", lambda: next(clock))
  sets = []
  assert kernels_gpu.seconds(sets.append, repeats=3) == 2
  assert sets == [0, *range(24)]
