"""The stream benchmark has the shape that it claims, reads no expert for a plan, and reports what its processes did."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeq_jax.bench import _mixtral_files, _stream_parts, stream
from moeq_jax.models import convert


def test_a_layer_has_the_size_of_mixtral():
  config = _mixtral_files.config(2)
  _, first, second = _mixtral_files.shapes(config)
  assert first["model.layers.0.block_sparse_moe.experts.7.w1.weight"] == (14336, 4096)
  assert first["model.layers.0.self_attn.k_proj.weight"] == (1024, 4096)
  count = stream.count(first)
  assert count == stream.count(second) == 8 * 3 * 4096 * 14336 + 2 * 4096**2 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 4096


def test_a_checkpoint_is_written_whole_and_never_twice_the_same_tensor(tmp_path: Path):
  config = _mixtral_files.config(2, shrink=32)
  total = _mixtral_files.write(tmp_path, config, holes=False)
  source = convert.open_checkpoint(tmp_path)
  assert sum(entry.nbytes for entry in source.files.values()) == total
  experts = [source.expert(layer, e)["gate"] for layer in range(2) for e in range(8)]
  assert len({w.tobytes() for w in experts}) == 16
  assert all(0.005 < float(np.std(w.astype(np.float32))) < 0.05 for w in experts)


def test_a_plan_by_router_norms_reads_no_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  _mixtral_files.write(tmp_path, _mixtral_files.config(3, shrink=16), holes=True)
  monkeypatch.setattr(convert.Checkpoint, "expert", None)
  found = _stream_parts.routers(tmp_path)
  assert (found["layers"], found["experts"], found["bits"]) == (3, 8, 2.5)
  assert found["disk_bytes"] < 0.2 * found["file_bytes"]
  norms = np.linalg.norm([convert.open_checkpoint(tmp_path).router(l) for l in range(3)], axis=-1)
  assert np.ptp(norms) > 0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
  """Stands in for the processes; notes their commands."""
  commands: list[list[str]] = []

  def child(command):
    commands.append(command)
    if "moeq_jax.bench._stream_parts" in command:
      return json.dumps({"seconds": 3.0, "open_seconds": 1.0, "plan_seconds": 0.5}), 4.0, 1.25
    workdir = Path(next(a for a in command if a.startswith("--workdir=")).removeprefix("--workdir="))
    checkpoint = next(a for a in command if a.startswith("--config.checkpoint=")).partition("checkpoint=")[2]
    assert len(list(Path(checkpoint).glob("*.safetensors"))) == 3
    (workdir / "quantized").mkdir(parents=True)
    (workdir / "timings.jsonl").write_text('{"seconds": 9.0, "stage": "encode"}\n')
    for layer in range(2):
      (workdir / "quantized" / f"layer-{layer:05d}.moeq.safetensors").write_bytes(bytes(500))
    return "", 20.0, 1.5

  monkeypatch.setattr(stream, "child", child)
  return commands


def test_peaks_are_held_against_the_limit(children: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture):
  result = stream.run(directory=str(tmp_path), shrink=32)
  assert list(tmp_path.iterdir()) == []
  assert [row["codec"] for row in result["results"]] == list(stream.CODECS)
  assert [row["peak_gib"] for row in result["results"]] == [1.5, 1.5] and result["results"][0]["written_gb"] == 1e-6
  layer = 2 * stream.count(list(_mixtral_files.shapes(_mixtral_files.config(2, 32)))[1])
  assert result["limit_gib"] == pytest.approx((1.6 * layer + 2**31) / 2**30) and result["within_limit"] is True
  assert result["routers"]["peak_gib"] == 1.25 and json.loads(json.dumps(result)) == result
  assert all("--config=configs/quantize.py:data_free" in command for command in children[:2])
  assert "rtn(group=64)" in capsys.readouterr().out


def test_too_much_memory_is_said(children: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(stream, "ADDED", 2**20)
  assert stream.run(directory=str(tmp_path), shrink=32)["within_limit"] is False


def test_a_full_disk_and_failed_processes_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  with pytest.raises(RuntimeError, match="status 3\nwhy"):
    stream.child(["sh", "-c", "echo why; exit 3"])
  printed, seconds, peak = stream.child(["sh", "-c", "echo $JAX_COMPILATION_CACHE_DIR; echo last"])
  assert printed == "\nlast\n" and seconds > 0 and peak > 0
  monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
  with pytest.raises(OSError, match="the benchmark takes .* GB of disk; make room"):
    stream.run(directory=str(tmp_path), shrink=32)
  with pytest.raises(ValueError, match="at least 2"):
    stream.run(layers=1)
