"""Dequantized checkpoints: the tensors that the source has, with the weights of the quantized model, in any shards."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moeq_jax import qtensor
from moeq_jax.export import huggingface, native, shard_writer
from tests.export import small


def tensors(directory: Path) -> dict[str, np.ndarray]:
  """All tensors of a checkpoint directory; no name may stand in two shards."""
  found = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
  assert sum(map(len, found)) == len({name for shard in found for name in shard})
  return {name: array for shard in found for name, array in shard.items()}


@pytest.mark.parametrize("codec", [small.CT, small.AFFINE])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_every_tensor_is_there_as_the_source_has_it(tmp_path: Path, codec: str, dtype: str | None):
  model = small.save(tmp_path / "q", small.MIXED, codec)
  found = tensors(huggingface.save(model, tmp_path / "hf", small.names, dtype=dtype))
  weights, (blocks, top) = small.weights(model), small.others()
  kind = ml_dtypes.bfloat16 if dtype is None else dtype
  expected = {name: w.astype(kind) for name, w in weights.items()} | top
  for block in blocks:
    expected |= block
  assert set(found) == set(expected) and len(weights) == 2 * 3 * small.EXPERTS
  for name, value in expected.items():
    assert found[name].dtype == value.dtype, name
    np.testing.assert_array_equal(found[name], value, name)


def test_the_weights_are_those_that_the_model_runs_with(tmp_path: Path):
  model = small.save(tmp_path / "q", small.MIXED, small.AFFINE)
  found = tensors(huggingface.save(model, tmp_path / "hf", small.names, dtype="float32"))
  for projection, q in model.layer(2)[0].items():
    for expert, weight in enumerate(np.asarray(qtensor.dequantize(q))):
      np.testing.assert_array_equal(found[small.names(2, expert, projection)], weight.T)


def test_weights_of_16_bits_are_kept(tmp_path: Path):
  weights = np.random.default_rng(0).standard_normal((2, 64, 96)).astype(ml_dtypes.bfloat16)
  ones = np.ones((2, 2, 96), ml_dtypes.bfloat16)
  q = qtensor.pack(np.zeros(weights.shape, np.uint8), np.array([4, 16]), ones, ones, group=32, weights=weights)
  np.testing.assert_array_equal(shard_writer.Expert.of(q, 1).weights(), weights[1].astype(np.float32))
  assert (shard_writer.Expert.of(q, 0).weights() == -1).all()


@pytest.mark.parametrize("limit", [1, 30_000, 10**9])
def test_shards_hold_what_they_may(tmp_path: Path, limit: int):
  model = small.save(tmp_path / "q")
  directory = huggingface.save(model, tmp_path / "hf", small.names, shard_bytes=limit)
  whole = tensors(huggingface.save(model, tmp_path / "whole", small.names))
  found, index = tensors(directory), directory / shard_writer.INDEX
  for name, value in whole.items():
    np.testing.assert_array_equal(found[name], value)
  files = sorted(path.name for path in directory.glob("*.safetensors"))
  if limit == 10**9:
    assert files == ["model.safetensors"] and not index.exists()
    return
  count = len(files)
  assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
  assert count == len(whole) if limit == 1 else 2 < count < len(whole)
  listed = json.loads(index.read_text())
  assert listed["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
  assert listed["weight_map"] == {name: file for file in files for name in load_file(directory / file)}
  for file in files:
    shard = load_file(directory / file)
    assert len(shard) == 1 or sum(a.nbytes for a in shard.values()) <= limit


def test_other_files_are_those_of_the_source(tmp_path: Path):
  directory = huggingface.save(small.save(tmp_path / "q"), tmp_path / "hf", small.names)
  for name, content in small.FILES.items():
    assert (directory / name).read_bytes() == content
  assert len(list(directory.iterdir())) == 3


def test_equal_input_gives_equal_bytes(tmp_path: Path):
  model = small.save(tmp_path / "q")
  paths = [huggingface.save(model, tmp_path / name, small.names, shard_bytes=40_000) for name in "ab"]
  contents = [{path.name: path.read_bytes() for path in directory.iterdir()} for directory in paths]
  assert contents[0] == contents[1]


def test_it_advances_by_blocks(tmp_path: Path):
  calls: list[int] = []
  model = small.save(tmp_path / "q")
  huggingface.save(model, tmp_path / "hf", small.names, advance=lambda: calls.append(1))
  assert len(calls) == model.layers + 1


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------------------------------


def test_a_directory_with_files_is_left_alone(tmp_path: Path):
  model = small.save(tmp_path / "q")
  with pytest.raises(shard_writer.ExportError, match="is there and not empty"):
    huggingface.save(model, tmp_path / "q", small.names)
  assert native.open(tmp_path / "q").layer(1)
  (tmp_path / "empty").mkdir()
  huggingface.save(model, tmp_path / "empty", small.names)


def test_a_damaged_model_leaves_nothing(tmp_path: Path):
  model = small.save(tmp_path / "q")
  path = tmp_path / "q" / native.layer_file(2)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(native.QuantizedError, match="SHA-256"):
    huggingface.save(model, tmp_path / "hf", small.names, shard_bytes=1000)
  assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_what_a_killed_export_left_is_cleared(tmp_path: Path):
  (tmp_path / ".hf.partial").mkdir()
  (tmp_path / ".hf.partial" / "shard-00009.safetensors").write_bytes(b"old")
  huggingface.save(small.save(tmp_path / "q"), tmp_path / "hf", small.names)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "q"] and len(list((tmp_path / "hf").iterdir())) == 3


def test_names_must_tell_experts_apart(tmp_path: Path):
  with pytest.raises(shard_writer.ExportError, match="two tensors are called 'model.layers.0"):
    huggingface.save(small.save(tmp_path / "q"), tmp_path / "hf", lambda l, e, p: small.names(0, e, p), shard_bytes=999)


@pytest.mark.parametrize(("config", "dtype", "said"), [
    ({}, None, "dtype None"), ({"torch_dtype": "int8"}, None, "dtype 'int8'"), ({}, "float64", "pass dtype="),
])
def test_the_dtype_must_be_known(tmp_path: Path, config: dict, dtype: str | None, said: str):
  model = small.save(tmp_path / "q", files={"config.json": json.dumps(config).encode()})
  with pytest.raises(shard_writer.ExportError, match=said):
    huggingface.save(model, tmp_path / "hf", small.names, dtype=dtype)


def test_both_names_of_the_dtype_are_read():
  assert shard_writer.dtype_of({"torch_dtype": "float16"}, None) == np.float16
  assert shard_writer.dtype_of({"dtype": "bfloat16", "torch_dtype": "float16"}, None) == ml_dtypes.bfloat16


def test_weights_beyond_float16_are_refused(tmp_path: Path):
  codes, scale = np.full((1, 64, 8), 3, np.uint8), np.full((1, 2, 8), 2.0**16, ml_dtypes.bfloat16)
  q = qtensor.pack(codes, np.array([2]), scale, np.zeros_like(scale), group=32)
  native.save(tmp_path / "q", [{"up": q}], [{}], {}, small.FILES, {"codec": "rtn(group=32)"})
  with pytest.raises(shard_writer.ExportError, match=r"experts.0.w3.weight: a weight does not fit float16"):
    huggingface.save(native.open(tmp_path / "q"), tmp_path / "hf", small.names, dtype="float16")
