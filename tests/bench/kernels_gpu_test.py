"""The Hopper benchmark where there is no Hopper GPU: it says so and times nothing; and its arithmetic."""

import importlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import qtensor
from moeq_jax.bench import _hopper_peers, kernels_gpu
from moeq_jax.kernels import cpu

CEILINGS = {"copy_bytes_per_second": 8e8, "read_bytes_per_second": 1e9, "bfloat16_flops_per_second": 1e9}


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


def test_seconds_are_the_median_of_a_batch_divided_by_its_calls(monkeypatch: pytest.MonkeyPatch):
  clock = iter([0, 8, 10, 90, 100, 116])
  monkeypatch.setattr(kernels_gpu.time, "perf_counter", lambda: next(clock))
  monkeypatch.setattr(kernels_gpu, "FLUSHED_BYTES", 16)
  batches = []
  monkeypatch.setattr(kernels_gpu, "CALLS", 4)
  assert kernels_gpu.seconds(lambda: batches.append(0), repeats=3) == 4
  assert len(batches) == 4


def test_a_batch_is_one_call_per_pair():
  xs, ws = [np.float32(2), np.float32(3)], [np.float32(5), np.float32(7)]
  assert kernels_gpu.batched(lambda x, w, sizes: x * w + sizes)(xs, ws, np.float32(1)) == [11, 22]


@pytest.mark.parametrize(("value", "names"), [
  ("1,16", ["1", "16"]), ((1, 16), ["1", "16"]), (4096, ["4096"]), (2.5, ["2.5"]), ((2, 2.5), ["2", "2.5"]),
  ("2,1-4", ["2", "1-4"])])
def test_lists_on_the_command_line(value: object, names: list[str]):
  assert kernels_gpu.listed(value) == names


def test_one_length_of_buffer_serves_all_mixes():
  mixes, shape = list(kernels_gpu.MIXES), (8, 256, 128)
  room = kernels_gpu.capacity(shape, mixes)
  made = [kernels_gpu.weights(shape, kernels_gpu.MIXES[mix], 1, room) for mix in mixes]
  assert {q.buffer.shape for q in made} == {(1, room, 128)}
  assert max(qtensor.used_rows(q) for q in made) == room


def test_device_seconds_are_the_sums_over_the_streams_of_devices(monkeypatch: pytest.MonkeyPatch):
  """A profile of one batch of two calls: a kernel of 6 us each, another of 1 us, and lines that repeat them."""
  event = lambda name, duration: types.SimpleNamespace(name=name, duration_ns=duration)  # noqa: E731
  line = lambda name, *events: types.SimpleNamespace(name=name, events=events)  # noqa: E731
  launches = event("kernel", 6000), event("gather", 1000), event("kernel", 6000), event("gather", 1000)
  device = types.SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #1", *launches), line("XLA Ops", *launches)])
  host = types.SimpleNamespace(name="/host:CPU", lines=[line("Stream #1", event("python", 9e9))])
  profile = types.SimpleNamespace(planes=[host, device])
  monkeypatch.setattr(kernels_gpu, "FLUSHED_BYTES", 16)
  monkeypatch.setattr(kernels_gpu, "CALLS", 2)
  monkeypatch.setattr(kernels_gpu.jax.profiler, "ProfileData", types.SimpleNamespace(from_file=lambda path: profile))
  assert kernels_gpu.device_seconds(lambda: jnp.ones(2), repeats=1) == pytest.approx((7e-6, 6e-6))
  profile.planes = [host]
  assert kernels_gpu.device_seconds(lambda: jnp.ones(2), repeats=1) is None


def test_correctness_is_checked_against_the_reference():
  """The same check with another back-end in the place of the kernel: small errors, and a broken one is seen."""
  found = kernels_gpu._errors(backend="cpu", shape=(8, 256, 128), counts=(1, 9))
  assert [entry["mix"] for entry in found] == list(kernels_gpu.MIXES)
  assert all(0 < entry["relative_error"] < 1e-2 for entry in found)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(kernels_gpu.pallas_gpu, "supports", lambda *_: None)
  monkeypatch.setattr(kernels_gpu, "_ceilings", lambda _: CEILINGS)
  monkeypatch.setattr(kernels_gpu, "_errors", lambda: [{"mix": "2", "relative_error": float("inf")}])
  with pytest.raises(RuntimeError, match="nothing is timed"):
    kernels_gpu.run()


def test_the_whole_script_at_a_small_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  """All of it but the kernel itself, in whose place the CPU back-end computes; peers are absent and named."""
  layer = kernels_gpu.shapes.Layer(experts=4, top_k=1, hidden=128, ffn=64)
  monkeypatch.setattr(kernels_gpu.shapes, "LAYERS", {"tiny": layer})
  monkeypatch.setattr(kernels_gpu, "FLUSHED_BYTES", 16)
  monkeypatch.setattr(kernels_gpu.pallas_gpu, "supports", lambda *_: None)
  monkeypatch.setattr(kernels_gpu.pallas_gpu, "prepare", lambda q: q)
  monkeypatch.setattr(kernels_gpu.pallas_gpu, "forward", cpu.forward)
  monkeypatch.setattr(kernels_gpu, "_ceilings", lambda _: CEILINGS)
  monkeypatch.setattr(kernels_gpu, "_errors", lambda: [{"mix": "2", "relative_error": 1e-3}])
  monkeypatch.setattr(_hopper_peers, "other_peers", lambda *args, **kwargs: [("humming", "2", 0.5)])
  result = kernels_gpu.run(layers="tiny", tokens=40, mixes=(2, 2.5), repeats=2)  # as the command line gives them
  rows = {(row["kernel"], row["bits"]): row for row in result["results"]}
  assert {("pallas_gpu", "2"), ("pallas_gpu", "2.5"), ("lax.ragged_dot", "16"), ("humming", "2")} <= set(rows)
  assert "tokamax.ragged_dot" in result["skipped"]
  assert rows["humming", "2"]["share_of_roofline"] == pytest.approx(rows["humming", "2"]["roofline_seconds"] / 0.5)
  assert rows["pallas_gpu", "2.5"]["bytes"] > rows["pallas_gpu", "2"]["bytes"]
  printed = capsys.readouterr().out
  assert printed.count('"layer": "tiny"') == len(result["results"])


def test_peers_in_other_processes_are_measured_or_named(monkeypatch: pytest.MonkeyPatch):
  """Children that print what the real ones print; without torch both real ones are named with the reason."""
  skipped = {}
  problem = (2, 64, 64), [1, 1], {"2": [2, 2]}, 1
  monkeypatch.setattr(_hopper_peers, "_COMMON", "import json, sys; problem = json.loads(sys.argv[1])\n")
  monkeypatch.setattr(_hopper_peers, "_TORCH", "raise RuntimeError('no device')")
  monkeypatch.setattr(_hopper_peers, "_HUMMING", "print(json.dumps({'mix': '2', 'seconds': 0.25})); "
                      "print(json.dumps({'mix': '3', 'error': 'no such width'}))")
  assert _hopper_peers.other_peers(*problem, skipped) == [("humming", "2", 0.25)]
  assert skipped == {"humming": "3: no such width", "torch._grouped_mm": "RuntimeError: no device"}
  for code in ("_COMMON", "_TORCH", "_HUMMING"):
    compile(getattr(importlib.reload(_hopper_peers), code), code, "exec")
