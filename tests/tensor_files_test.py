"""Tensors in safetensors files: the same arrays as the library reads, part by part; every lie is an error by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax import tensor_files
from moeq_jax.tensor_files import INDEX, SINGLE, TensorFiles, TensorFilesError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  drawn = lambda *shape: rng.normal(size=shape)
  return {
      "bf16": drawn(5, 4, 3).astype(ml_dtypes.bfloat16), "f16": drawn(7).astype(np.float16),
      "f32": drawn(2, 3).astype(np.float32), "f64": drawn(1), "i64": np.array(-7), "u8": np.arange(5, dtype=np.uint8),
      "bool": np.array([True, False, True]), "none": np.zeros((0, 6), np.float32),
  }


def header(file: Path) -> tuple[dict[str, Any], bytes]:
  """The parsed header of a file, and its payload."""
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, infos: Any, payload: bytes, length: int | None = None) -> None:
  """Writes a file with this header (JSON-able, or bytes), whatever it says."""
  text = infos if isinstance(infos, bytes) else json.dumps(infos).encode()
  file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def fails(path: Path, *said: str, one: bool = False) -> None:
  with pytest.raises(TensorFilesError) as caught:
    TensorFiles.open_file(path) if one else TensorFiles.open(path)
  for part in (str(path), *said):
    assert part in str(caught.value), str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
  tensors = arrays()
  for part, shard in enumerate(SHARDS):
    safetensors.numpy.save_file({name: tensors[name] for name in sorted(tensors)[part::2]}, tmp_path / shard)
  places = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
  (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
  return tmp_path


def edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
  index = json.loads((directory / INDEX).read_text())
  change(index)
  (directory / INDEX).write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def same(found: np.ndarray, expected: np.ndarray) -> None:
  assert found.dtype == expected.dtype and found.shape == expected.shape
  assert found.tobytes() == expected.tobytes()


def test_every_type_is_read_as_the_library_reads_it(tmp_path: Path):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE, metadata={"format": "pt"})
  files = TensorFiles.open(tmp_path)
  expected = safetensors.numpy.load_file(tmp_path / SINGLE)
  assert set(files) == set(expected) and len(files) == len(expected)
  for name, array in expected.items():
    same(files.read(name), array)
    assert files[name].nbytes == array.nbytes and files[name].file == tmp_path / SINGLE
  assert files.nbytes == sum(a.nbytes for a in expected.values()) and files.files == (tmp_path / SINGLE,)


def test_the_library_reads_what_an_empty_header_or_padding_says_alike(tmp_path: Path):
  write(tmp_path / SINGLE, b"{}" + b" " * 6, b"")
  assert not TensorFiles.open(tmp_path) and not safetensors.numpy.load_file(tmp_path / SINGLE)


@given(st.data())
def test_a_part_is_what_numpy_cuts_out(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
  shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
  array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  path = tmp_path_factory.getbasetemp() / "part.safetensors"
  safetensors.numpy.save_file({"before": np.ones(3, np.uint8), "x": array}, path)
  row, cut = st.integers(-shape[0], shape[0] - 1), st.slices(shape[0]).filter(lambda s: s.step in (None, 1))
  inner = st.slices(shape[1]).filter(lambda s: s.step in (None, 1))
  index = data.draw(st.one_of(row, cut, st.tuples(row, inner)))
  same(TensorFiles.open_file(path).read("x", index), array[index])


def test_a_part_costs_only_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  safetensors.numpy.save_file({"x": np.zeros((64, 100), np.float32)}, tmp_path / SINGLE)
  files, sizes, empty = TensorFiles.open(tmp_path), [], np.empty
  monkeypatch.setattr(np, "empty", lambda size, *rest: sizes.append(size) or empty(size, *rest))
  files.read("x", 3)
  files.read("x", slice(2, 4))
  files.read("x", (5, slice(0, 0)))
  assert sizes == [400, 800, 0]


@pytest.mark.parametrize(("index", "error"), [(5, IndexError), (-6, IndexError), (slice(0, 4, 2), IndexError)])
def test_rows_that_are_not_there_or_not_in_one_piece(tmp_path: Path, index: Any, error: type[Exception]):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE)
  with pytest.raises(error):
    TensorFiles.open(tmp_path).read("bf16", index)


def test_memory_is_its_own(tmp_path: Path):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE)
  found = TensorFiles.open(tmp_path).read("f32")
  (tmp_path / SINGLE).write_bytes(b"\xff" * 5000)
  same(found, arrays()["f32"])
  found[0] = 1


def test_a_file_cut_after_it_was_opened(tmp_path: Path):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE)
  files = TensorFiles.open(tmp_path)
  last = max(files, key=lambda name: files[name].end)
  (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-1])
  with pytest.raises(TensorFilesError, match=f"ends in the middle of tensor {last}"):
    files.read(last)
  (tmp_path / SINGLE).unlink()
  with pytest.raises(TensorFilesError, match="No such file"):
    files.read(last)


def test_shards_are_read_through_their_index_or_without(sharded: Path):
  for _ in range(2):
    files = TensorFiles.open(sharded)
    for name, array in arrays().items():
      same(files.read(name), array)
    (sharded / INDEX).unlink(missing_ok=True)
  assert files.files == tuple(sharded / shard for shard in SHARDS)


def test_links_to_elsewhere_are_followed(sharded: Path, tmp_path_factory: pytest.TempPathFactory):
  blobs = tmp_path_factory.mktemp("blobs")
  for number, file in enumerate(sorted(sharded.iterdir())):
    file.rename(blobs / str(number))
    file.symlink_to(os.path.relpath(blobs / str(number), sharded))
  same(TensorFiles.open(sharded).read("f32"), arrays()["f32"])


# ---------------------------------------------------------------------------------------------------------------------
# Headers that lie
# ---------------------------------------------------------------------------------------------------------------------


def edit_entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
  return lambda infos: infos | {"f32": infos["f32"] | changes}


def drop(infos: dict[str, Any], name: str) -> dict[str, Any]:
  return {key: info for key, info in infos.items() if key != name}


@pytest.mark.parametrize(("change", "said"), [
    (edit_entry(dtype="F8_E9"), "tensor f32 has the type F8_E9"),
    (edit_entry(dtype=["F32"]), "tensor f32 has the type"),
    (edit_entry(dtype="F16"), "tensor f32 of type F16 and shape [2, 3] cannot have 24 bytes"),
    (edit_entry(shape=[3, 3]), "shape [3, 3] cannot have 24 bytes"),
    (edit_entry(shape=[-2, -3]), "the shape of tensor f32 is [-2, -3]"),
    (edit_entry(shape=[2.0, 3]), "the shape of tensor f32"),
    (edit_entry(shape=[True, 6]), "the shape of tensor f32"),
    (edit_entry(shape="23"), "the shape of tensor f32"),
    (edit_entry(shape=[1] * 40 + [6]), "the shape of tensor f32"),
    (edit_entry(shape=[2**63, 2]), "the shape of tensor f32"),
    (edit_entry(shape=[2**32, 2**32, 6]), "cannot have 24 bytes"),
    (edit_entry(shape=[0, 2**40], data_offsets=[0, 0]), "belong to no tensor"),
    (edit_entry(shape=[0, 2**39, 2**39], data_offsets=[0, 0]), "cannot have 0 bytes"),
    (edit_entry(data_offsets=[24, 0]), "the data_offsets of tensor f32 are [24, 0]"),
    (edit_entry(data_offsets=[-24, 0]), "the data_offsets of tensor f32 are [-24, 0]"),
    (edit_entry(data_offsets=[0, 24, 48]), "the data_offsets of tensor f32"),
    (edit_entry(data_offsets=[10**9, 10**9 + 24]), "tensor f32 ends at byte"),
    (edit_entry(data_offsets=[10**30, 10**30 + 24]), "the data_offsets of tensor f32"),
    (edit_entry(data_offsets=[0, 24]), "overlaps"),
    (edit_entry(extra=1), "tensor f32 is not described by dtype, shape and data_offsets"),
    (lambda infos: infos | {"f32": 3}, "tensor f32 is not described"),
    (lambda infos: infos | {"f32": drop(infos["f32"], "shape")}, "tensor f32 is not described"),
    (lambda infos: drop(infos, "f32"), "belong to no tensor"),
    (lambda infos: infos | {"__metadata__": {"a": 1}}, "__metadata__ is not text"),
    (lambda infos: infos | {"__metadata__": "text"}, "__metadata__ is not text"),
    (lambda infos: [infos], "the header is no JSON object"),
    (lambda infos: b" " + json.dumps(infos).encode(), "the header is no JSON object"),
    (lambda infos: json.dumps(infos).encode()[:-1], "not valid JSON"),
    (lambda infos: json.dumps(infos).encode()[:-1] + b',"f32":{}}', "f32 is there twice"),
    (lambda infos: json.dumps(infos).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"').encode(),
     "dtype is there twice"),
    (lambda infos: json.dumps(infos).replace("[2, 3]", "[NaN, 3]").encode(), "NaN is no number"),
    (lambda infos: json.dumps(infos).replace("[2, 3]", f"[{'9' * 5000}, 3]").encode(), "not valid JSON"),
    (lambda infos: json.dumps(infos).replace("f32", "f\xff").encode("latin-1"), "not valid JSON"),
    (lambda infos: json.dumps(infos).replace("f32", "\\ud800").encode(), "not valid JSON"),
    (lambda infos: b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    (lambda infos: b'{"a":[' + b"0," * tensor_files.MOST_VALUES + b"0]}", "more than 2000000 values"),
])
def test_a_header_that_lies(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE)
  infos, payload = header(tmp_path / SINGLE)
  write(tmp_path / SINGLE, infos, payload)
  TensorFiles.open(tmp_path)  # as it is, it is fine
  write(tmp_path / SINGLE, change(infos), payload)
  fails(tmp_path / SINGLE, said, "quantized" if "has the type" in said else "copy it again", one=True)


@pytest.mark.parametrize(("data", "said"), [
    (b"", "it has 0 bytes"), (b"\0" * 7, "it has 7 bytes"), (b"\0" * 8, "the header is no JSON object"),
    ((2**64 - 1).to_bytes(8, "little") + b"{}", f"should have {2**64 - 1} bytes"),
    ((3).to_bytes(8, "little") + b"{}", "should have 3 bytes, the file has 10"),
])
def test_a_header_longer_than_its_file(tmp_path: Path, data: bytes, said: str):
  (tmp_path / SINGLE).write_bytes(data)
  fails(tmp_path / SINGLE, said, "truncated or damaged", one=True)


def test_a_header_that_is_too_long(tmp_path: Path):
  with (tmp_path / SINGLE).open("wb") as file:
    file.write((tensor_files.MOST_HEADER + 1).to_bytes(8, "little") + b"{")
    file.truncate(tensor_files.MOST_HEADER + 100)
  fails(tmp_path / SINGLE, "more than 100000000", one=True)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_file_of_another_length_than_its_header_says(tmp_path: Path, change: Callable[[bytes], bytes]):
  safetensors.numpy.save_file(arrays(), tmp_path / SINGLE)
  (tmp_path / SINGLE).write_bytes(change((tmp_path / SINGLE).read_bytes()))
  fails(tmp_path / SINGLE, "truncated or damaged", one=True)


# ---------------------------------------------------------------------------------------------------------------------
# Directories that lie
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_to_read(tmp_path: Path):
  fails(tmp_path / "nowhere", "no such directory")
  fails(tmp_path, "no model*.safetensors", "safetensors only")
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  fails(tmp_path, "pytorch_model.bin is pickle, which can run any program and is never opened")


def test_a_pipe_is_no_file(tmp_path: Path):
  os.mkfifo(tmp_path / SINGLE)
  fails(tmp_path, "no model*.safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..\\x.safetensors",
                                  "..", "", ".safetensors", "model.bin", "x\0.safetensors", "c:x.safetensors", 3, None,
                                  ["model.safetensors"]])
def test_an_index_that_names_other_files(sharded: Path, name: Any):
  safetensors.numpy.save_file(arrays(), sharded.parent / SINGLE)
  edit_index(sharded, lambda index: index["weight_map"].update(f32=name))
  said = "places tensor f32 in .*no safetensors file of this directory.*do not trust"
  with pytest.raises(TensorFilesError, match=said):
    TensorFiles.open(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1}',
                                  '{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}'])
def test_an_index_that_is_none(sharded: Path, text: str):
  (sharded / INDEX).write_text(text)
  with pytest.raises(TensorFilesError, match="index.json: cannot be read.*copy it again"):
    TensorFiles.open(sharded)


def test_a_missing_shard_is_named_with_what_it_should_hold(sharded: Path):
  (sharded / SHARDS[1]).unlink()
  names = sorted(arrays())[1::2]
  with pytest.raises(TensorFilesError) as caught:
    TensorFiles.open(sharded)
  held = f"{len(names)} tensors ({', '.join(names[:3])}, ...)"
  for said in (str(sharded / SHARDS[1]), held, "missing", "copy it again"):
    assert said in str(caught.value)
  (sharded / INDEX).unlink()
  with pytest.raises(TensorFilesError, match=f"{SHARDS[1]}: this shard of 2 is missing"):
    TensorFiles.open(sharded)


def test_a_tensor_in_the_index_alone_or_in_the_shard_alone(sharded: Path):
  edit_index(sharded, lambda index: index["weight_map"].update(more=SHARDS[0]))
  with pytest.raises(TensorFilesError, match=f"{SHARDS[0]}: tensor more is missing, {INDEX} places it there"):
    TensorFiles.open(sharded)
  edit_index(sharded, lambda index: [index["weight_map"].pop(name) for name in ("more", "f32")])
  with pytest.raises(TensorFilesError, match=f"tensor f32 is there, {INDEX} does not place it there"):
    TensorFiles.open(sharded)


def test_a_tensor_in_two_shards(sharded: Path):
  tensors = safetensors.numpy.load_file(sharded / SHARDS[0])
  twice = safetensors.numpy.load_file(sharded / SHARDS[1]) | {"bf16": tensors["bf16"]}
  safetensors.numpy.save_file(twice, sharded / SHARDS[1])
  with pytest.raises(TensorFilesError, match="tensor bf16 is there.*may stand in two shards"):
    TensorFiles.open(sharded)
  (sharded / INDEX).unlink()
  with pytest.raises(TensorFilesError, match=f"{SHARDS[1]}: tensor bf16 stands in {SHARDS[0]}, too"):
    TensorFiles.open(sharded)


def test_a_truncated_shard_is_named(sharded: Path):
  file = sharded / SHARDS[1]
  file.write_bytes(file.read_bytes()[:-3])
  with pytest.raises(TensorFilesError, match=f"{SHARDS[1]}: cannot be read .*truncated"):
    TensorFiles.open(sharded)


def test_two_checkpoints_in_one_directory(sharded: Path):
  safetensors.numpy.save_file(arrays(), sharded / SINGLE)
  with pytest.raises(TensorFilesError, match="has both model.safetensors and an index"):
    TensorFiles.open(sharded)
  (sharded / INDEX).unlink()
  assert {entry.file.name for entry in TensorFiles.open(sharded).values()} == {SINGLE}


def test_names_in_messages_are_short_and_plain():
  assert tensor_files.shown("model.embed") == "model.embed"
  assert tensor_files.shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
  assert len(tensor_files.shown("x" * 10**6)) == 120
