"""Sizes are known before any work: bits for bytes, and room on the disk."""

import shutil
from pathlib import Path

import pytest

from moeq_jax import workspace
from moeq_jax.quantize import room, subject
from tests import tiny


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> subject.Subject:
  root = tmp_path_factory.mktemp("room")
  tiny.checkpoint(root / "checkpoint")
  return subject.open_source(workspace.Workdir(root / "run"), str(root / "checkpoint"), "float32")


@pytest.mark.parametrize(("text", "size"), [
    ("20GiB", 20 * 2**30), ("20 gb", 20 * 10**9), ("1.5MiB", 3 * 2**19), ("800kB", 800_000), ("1TB", 10**12),
    ("64", 64)])
def test_sizes_are_read_with_their_units(text: str, size: int):
  assert room.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "20 gibi", "-3GB", "0GB", "1e9"])
def test_what_is_no_size_is_refused(text: str):
  with pytest.raises(ValueError, match="a size is a number with a unit, for example 20GiB"):
    room.parse_bytes(text)


def test_bytes_are_those_of_the_files(opened: subject.Subject):
  directory = opened.source.directory
  sizes = room.tensor_bytes(opened)
  file = (directory / "model.safetensors").stat().st_size
  assert 0 < file - sum(sizes.values()) < 10_000  # the header
  c = tiny.CONFIG
  assert sizes["experts"] == 2 * 3 * c.hidden_size * c.intermediate_size * c.num_local_experts * c.num_hidden_layers
  assert [path.name for path in room.carried_files(directory)] == ["config.json", "tokenizer.json"]
  carried = sum(path.stat().st_size for path in room.carried_files(directory))
  assert room.other_bytes(opened) == sizes["other"] + carried


def test_only_what_a_model_needs_is_carried_along(tmp_path: Path):
  names = ("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "generation_config.json")
  for name in (*names, "model.safetensors", "pytorch_model.bin", "README.md", "log.json", ".gitattributes"):
    (tmp_path / name).write_text("x")
  assert {path.name for path in room.carried_files(tmp_path)} == set(names)


def test_a_full_disk_is_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  usage = type("usage", (), {"free": room.SPARE + 90})
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(OSError, match=r"67.1 MB of disk at most \(model 60 bytes, states 40 bytes\), 67.1 MB are free"):
    room.check_disk(tmp_path, {"model": 60, "states": 40})
  (tmp_path / "left").write_bytes(bytes(20))  # by an earlier call, counted as room
  room.check_disk(tmp_path, {"model": 60, "states": 40})
