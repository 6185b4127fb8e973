"""The container: equal bytes for equal values, nothing lost, and no damage goes unseen."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import container, qtensor, shards
from tests import conformance

META = {"plan": [2, 3], "codec": "rtn(group=64)", "nested": {"b": None, "a": 1.5}}
WORKER = '''
import sys
from tests import container_test
container_test.container.save(sys.argv[1], container_test.example(), container_test.META)
'''


def example() -> dict:
  """Two QTensors, one of them sharded and padded, and plain arrays of several types."""
  rng = np.random.default_rng(0)
  return {
    "layers.0.gate": conformance.packed((1, 2, 3, 16), (4, 100, 9), 32, capacity=1000).q,
    "layers.0.down": shards.shard(conformance.packed((2, 8), (2, 256, 6)).q, 2, "k"),
    "router": rng.normal(size=(4, 8)).astype(np.float32),
    "embedding": jax.numpy.asarray(rng.normal(size=(5, 3)), jax.numpy.bfloat16),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "scalar": np.array(7, np.int64),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("container") / "experts.safetensors"
  container.save(path, example(), META)
  return path


def assert_equal(loaded: dict, wanted: dict) -> None:
  assert set(loaded) == set(wanted)
  for name, value in wanted.items():
    if isinstance(value, qtensor.QTensor):
      np.testing.assert_array_equal(qtensor.dequantize(loaded[name]), qtensor.dequantize(value))
      np.testing.assert_array_equal(qtensor.unpack(loaded[name]), qtensor.unpack(value))
      assert loaded[name].shape == value.shape
    else:
      assert loaded[name].dtype == value.dtype
      np.testing.assert_array_equal(loaded[name], value)


def test_everything_comes_back(saved: Path):
  tensors, meta = container.load(saved)
  assert meta == META
  assert_equal(tensors, example())


def test_capacity_padding_is_not_written(saved: Path):
  tensors, _ = container.load(saved)
  gate = tensors["layers.0.gate"]
  assert gate.buffer.shape[1] == qtensor.used_rows(gate) == qtensor.used_rows(example()["layers.0.gate"]) < 1000


def test_the_payload_is_what_the_accounting_says(tmp_path: Path):
  tensors = {name: value for name, value in example().items() if isinstance(value, qtensor.QTensor)}
  container.save(tmp_path / "a", tensors, {})
  data = (tmp_path / "a").read_bytes()
  assert len(data) - 8 - int.from_bytes(data[:8], "little") == qtensor.stored_bytes(*tensors.values())


def test_the_safetensors_library_reads_it(saved: Path):
  arrays = safetensors.numpy.load_file(saved)
  assert arrays["layers.0.gate.scale"].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(arrays["router"], example()["router"])


def test_two_processes_write_the_same_bytes(saved: Path, tmp_path: Path):
  root = Path(__file__).resolve().parents[1]
  for seed in ("1", "2"):
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path / seed)], env=environment, check=True)
    assert (tmp_path / seed).read_bytes() == saved.read_bytes()


def test_order_and_padding_do_not_change_the_bytes(saved: Path, tmp_path: Path):
  loaded, meta = container.load(saved)
  container.save(tmp_path / "again", dict(reversed(loaded.items())), dict(reversed(meta.items())))
  assert (tmp_path / "again").read_bytes() == saved.read_bytes()


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_changed_byte_never_changes_a_value(saved: Path, tmp_path: Path, place: float, change: int):
  data = bytearray(saved.read_bytes())
  data[int(place * len(data))] ^= change
  (tmp_path / "damaged").write_bytes(data)
  try:
    tensors, meta = container.load(tmp_path / "damaged")
  except container.ContainerError as error:
    assert "damaged" in str(error)
  else:  # white space in the header
    assert meta == META
    assert_equal(tensors, example())


def test_a_damaged_tensor_is_named(saved: Path, tmp_path: Path):
  data = bytearray(saved.read_bytes())
  place = data.index(example()["router"].tobytes())
  data[place] ^= 1
  (tmp_path / "damaged").write_bytes(data)
  with pytest.raises(container.ContainerError, match="damaged: router does not match its checksum.*write it again"):
    container.load(tmp_path / "damaged")


@pytest.mark.parametrize(("old", "new"), [
  (b"rtn(group=64)", b"rtn(group=32)"), (rb'\"k_tile\": 128', rb'\"k_tile\": 256')])
def test_changed_metadata_is_found(saved: Path, tmp_path: Path, old: bytes, new: bytes):
  data = saved.read_bytes()
  assert old in data
  (tmp_path / "damaged").write_bytes(data.replace(old, new, 1))
  with pytest.raises(container.ContainerError, match="metadata key 'moeq' does not match its checksum"):
    container.load(tmp_path / "damaged")


@pytest.mark.parametrize("left", [0, 5, 100, -1, -500])
def test_a_truncated_file_is_named_with_its_tensor(saved: Path, tmp_path: Path, left: int):
  data = saved.read_bytes()
  (tmp_path / "short").write_bytes(data[:left])
  last = sorted(safetensors.numpy.load_file(saved))
  with pytest.raises(container.ContainerError, match="short: .* is not whole .*write it again") as caught:
    container.load(tmp_path / "short")
  assert any(name in str(caught.value) for name in last) == (left < 0)


def test_a_missing_file_is_named():
  with pytest.raises(container.ContainerError, match="nowhere.safetensors: no such file; run the stage"):
    container.load("nowhere.safetensors")


def test_a_foreign_file_is_refused(tmp_path: Path):
  safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "foreign")
  with pytest.raises(container.ContainerError, match="metadata key 'moeq' cannot be read"):
    container.load(tmp_path / "foreign")


def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(container, "_VERSION", 2)
  container.save(tmp_path / "later", {"a": conformance.packed(2, (2, 64, 8), 0).q}, META)
  monkeypatch.undo()
  for read in (container.load, container.load_meta):
    with pytest.raises(container.ContainerError, match="later: is a container of version 2, .* reads version 1: read"):
      read(tmp_path / "later")


def test_a_broken_tensor_is_not_written(tmp_path: Path):
  q = conformance.packed(2, (2, 64, 8), 0).q
  q.offset[:] = 0
  with pytest.raises(ValueError, match="down: blocks overlap"):
    container.save(tmp_path / "a", {"down": q}, {})
  assert not list(tmp_path.iterdir())


def test_two_tensors_of_one_name_are_refused(tmp_path: Path):
  tensors = {"a": conformance.packed(2, (2, 64, 8), 0).q, "a.bits": np.zeros(3)}
  with pytest.raises(ValueError, match=r"two tensors are called a\.bits"):
    container.save(tmp_path / "a", tensors, {})


def test_a_failed_save_leaves_the_old_file(saved: Path, tmp_path: Path):
  path = tmp_path / "kept"
  path.write_bytes(saved.read_bytes())
  before = hashlib.sha256(path.read_bytes()).digest()
  with pytest.raises(ValueError, match="not JSON compliant"):
    container.save(path, example(), {"loss": float("nan")})
  assert hashlib.sha256(path.read_bytes()).digest() == before
  assert list(tmp_path.iterdir()) == [path]
