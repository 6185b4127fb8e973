"""A streaming run that is killed (SIGKILL) in the write of any kind of file goes on and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeq_jax import runs
from tests import stream_kill_worker, tiny
from tests.kill_test import contents


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The work directories of all attempts, after `stream_kill_worker` has run."""
  root = tmp_path_factory.mktemp("stream")
  tiny.checkpoint(root / "checkpoint")
  environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  command = [sys.executable, "-m", "tests.stream_kill_worker", str(root)]
  done = subprocess.run(command, env=environment, cwd=runs.ROOT, capture_output=True, text=True, check=False)
  log = root / "log.txt"
  assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
  return root


@pytest.mark.parametrize("name", stream_kill_worker.KILLS)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(root: Path, name: str):
  record = [entry for entry in json.loads((root / "record.json").read_text()) if entry["workdir"].startswith(name)]
  undisturbed, *killed, last = record
  assert undisturbed["exit"] == last["exit"] == 0, record
  kills = stream_kill_worker.KILLS[name]
  assert [(entry["file"], entry["phase"]) for entry in killed] == list(kills)
  assert all(entry["exit"] == -signal.SIGKILL for entry in killed), killed
  assert all(len(entry["partial"]) == 1 and entry["file"] in entry["partial"][0] for entry in killed), killed

  expected, found = contents(root / f"{name}-undisturbed"), contents(root / name)
  files = {"quantized/layer-00000.moeq.safetensors", "quantized/moeq.json", "rows.jsonl", "report.html", "plan.json"}
  assert files <= set(expected)
  assert sorted(found) == sorted(expected)
  assert [file for file in expected if found[file] != expected[file]] == []
  assert not any("states" in file or "partial" in file for file in found)
