"""Quantized models on disk: bytes that agree with the bits reported, and files that give the same model back."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import artifacts, container, qtensor
from moeq_jax.assemble import apply
from moeq_jax.export import native
from moeq_jax.models import convert
from tests import tiny


def moeq_small() -> list[dict[str, qtensor.QTensor]]:
  """Random experts of moeq-small's shape (5 layers of 16, 256 x 256, group 64), half of them at 2 bits, half at 3."""
  rng = np.random.default_rng(0)
  draw = lambda: artifacts.Codes(
      rng.integers(0, 4, (2, 16, 256, 256)).astype(np.uint8), np.ones((2, 16, 4, 256), ml_dtypes.bfloat16),
      np.ones((2, 16, 4, 256), ml_dtypes.bfloat16))
  codes = artifacts.LayerCodes(draw(), draw(), draw(), errors={})
  return [apply.pack_layer(codes, rng.permutation([2, 3] * 8), widths=(2, 3), group=64) for _ in range(5)]


def others() -> dict[str, np.ndarray]:
  tensors = convert.tensors(tiny.model(), tiny.CONFIG.num_local_experts)
  return {name: value for name, value in tensors.items() if ".experts." not in name}


def test_stored_bytes_are_within_two_percent_of_the_effective_bits(tmp_path: Path):
  packed = moeq_small()
  found = native.sizes(packed, {})
  assert found["nominal_bits"] == 2.5
  assert found["effective_bits"] == 2.5 + 32 / 64
  assert found["effective_bits"] <= found["stored_bits"] <= 1.02 * found["effective_bits"]
  path = native.save(tmp_path, packed, {}, {}, {})
  weights = 5 * 16 * 3 * 256 * 256
  assert found["effective_bits"] <= 8 * path.stat().st_size / weights <= 1.02 * found["effective_bits"]
  assert path.stat().st_size == pytest.approx(found["file_mb"] * 1e6, rel=0.005)


def test_all_other_tensors_count_in_the_file(tmp_path: Path):
  packed, rest = tiny.packed(), others()
  bare, found = native.sizes(packed, {}), native.sizes(packed, rest)
  assert found["file_mb"] - bare["file_mb"] == pytest.approx(2e-6 * sum(a.size for a in rest.values()))
  assert found["stored_bits"] == bare["stored_bits"]
  path = native.save(tmp_path, packed, rest, {}, {})
  payload = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
  assert payload == pytest.approx(found["file_mb"] * 1e6, rel=1e-3)


def test_sized_buffers_are_no_larger_on_disk(tmp_path: Path):
  exact = native.save(tmp_path / "exact", tiny.packed(), {}, {}, {})
  sized = native.save(tmp_path / "sized", tiny.packed(sized=True), {}, {}, {})
  assert exact.read_bytes() == sized.read_bytes()
  assert native.sizes(tiny.packed(sized=True), {}) == native.sizes(tiny.packed(), {})


def test_a_model_comes_back_with_the_same_logits(tmp_path: Path):
  packed, rest = tiny.packed(), others()
  meta = {"plan": {"bits": tiny.PLAN.tolist()}, "codec": "rtn(group=32)"}
  path = native.save(tmp_path / "q", packed, rest, {"config.json": b"{}", "tokenizer.json": b"[]"}, meta)
  assert sorted(p.name for p in path.parent.iterdir()) == sorted(["config.json", "tokenizer.json", native.FILE])
  assert (path.parent / "config.json").read_bytes() == b"{}"
  tensors, back = container.load(path)
  assert back == json.loads(json.dumps(meta))
  layers = [{name: tensors[f"layers.{l}.experts.{name}"] for name in artifacts.PROJECTIONS} for l in range(2)]
  np.testing.assert_array_equal(tiny.logits(layers), tiny.logits(packed))
  assert set(tensors) == set(rest) | set(native.named(packed))
  for name, value in rest.items():
    assert tensors[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(tensors[name], value)


def test_equal_input_gives_equal_bytes(tmp_path: Path):
  paths = [native.save(tmp_path / name, tiny.packed(), others(), {}, {"a": 1}) for name in "ab"]
  assert paths[0].read_bytes() == paths[1].read_bytes()
