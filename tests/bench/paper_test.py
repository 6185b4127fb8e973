"""The benchmark of the paper's allocation reads only the gates, plans by the rule, and says what it took."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moeq_jax.allocate import tiers
from moeq_jax.bench import _mixtral_files, _stream_parts, paper, stream
from moeq_jax.models import convert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  directory = tmp_path_factory.mktemp("paper")
  _mixtral_files.write(directory, _mixtral_files.config(2, shrink=32), holes=False)
  return directory


def test_the_plan_is_the_rule_s_and_only_gates_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
  source, read, taken = convert.open_checkpoint(checkpoint), [], convert.Checkpoint.projection

  def projection(self, layer, expert, name):
    read.append((layer, expert, name))
    return taken(self, layer, expert, name)

  monkeypatch.setattr(convert.Checkpoint, "projection", projection)
  plans = []
  candidate = _stream_parts.needs.candidate
  monkeypatch.setattr(_stream_parts.needs, "candidate", lambda *a, **k: plans.append(candidate(*a, **k)) or plans[-1])
  found = _stream_parts.paper(checkpoint)
  assert read == [(layer, expert, "gate") for layer in range(2) for expert in range(8)]
  assert (found["layers"], found["experts"], found["bits"]) == (2, 8, 2.5)
  bits = plans[0].plan.bits
  for layer in range(2):
    order = np.argsort(np.linalg.norm(source.router(layer).astype(np.float64), axis=1), kind="stable")
    gates = [np.asarray(taken(source, layer, e, "gate"), np.float64) for e in range(8)]
    maxvar = [g[:, np.square(g).sum(0).argmax()].var(ddof=1) for g in gates]
    order = tiers.rerank(order, maxvar, 3.0, "code")
    np.testing.assert_array_equal(bits[layer], np.where(np.isin(np.arange(8), order[:4]), 3, 2))


def test_rates_are_of_what_was_done(checkpoint: Path):
  found = _stream_parts.forward(checkpoint, rows=32)
  assert found["gflops"] == pytest.approx(2 * 32 * 3 * 128 * 448 / found["seconds"] / 1e9)
  digest = _stream_parts.digest(checkpoint)
  size = convert.open_checkpoint(checkpoint).files.nbytes
  assert digest["gb_per_second"] * digest["seconds"] * 1e9 == pytest.approx(size)


def test_the_time_of_all_layers_is_extrapolated_and_held_against_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  parts = {"paper": {"open_seconds": 1.0, "plan_seconds": 5.0, "peak_gib": 1.5},
           "digest": {"seconds": 2.0, "gb_per_second": 1.2}, "forward": {"seconds": 1.0, "rows": 8, "gflops": 99.0}}
  files = []
  monkeypatch.setattr(stream, "part", lambda name, directory: files.append(
      len(list(directory.glob("*.safetensors")))) or parts[name])
  result = paper.run(layers=3, directory=str(tmp_path), shrink=32)
  assert files == [4, 4, 4] and list(tmp_path.iterdir()) == []
  assert result["seconds_32_layers"] == pytest.approx(1 + 5 * 32 / 3) and result["within_limits"] is True
  assert json.loads(json.dumps(result)) == result and "2227" in capsys.readouterr().out
  parts["paper"]["peak_gib"] = 2.1
  assert paper.run(layers=3, directory=str(tmp_path), shrink=32)["within_limits"] is False
  parts["paper"].update(peak_gib=1.5, plan_seconds=6.0)
  assert paper.run(layers=3, directory=str(tmp_path), shrink=32)["within_limits"] is False


def test_mistakes_and_a_full_disk_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  with pytest.raises(ValueError, match="at least 1"):
    paper.run(layers=0)
  monkeypatch.setattr(paper.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
  with pytest.raises(OSError, match="GB of disk; make room"):
    paper.run(directory=str(tmp_path), shrink=32)


def test_files_are_forgotten_and_unchanged(tmp_path: Path):
  (tmp_path / "a.safetensors").write_bytes(os.urandom(5000))
  before = (tmp_path / "a.safetensors").read_bytes()
  paper.forget(tmp_path)
  assert (tmp_path / "a.safetensors").read_bytes() == before
