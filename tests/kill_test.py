"""A comparison that is killed (SIGKILL) at any moment and started again ends with the bytes of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from moeq_jax import runs
from tests import kill_worker, tiny

KILLS = 20
NOT_COMPARED = {"log.txt", "timings.jsonl"}  # they tell of every start


def contents(directory: Path) -> dict[str, bytes]:
  """The files below `directory`, hidden ones too."""
  files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
  return {name: path.read_bytes() for name, path in files.items() if name not in NOT_COMPARED}


def run_worker(root: Path) -> list[dict]:
  """Has `kill_worker` run, with a compile cache for all attempts, and returns its record."""
  tiny.checkpoint(root / "checkpoint")
  environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  command = [sys.executable, "-m", "tests.kill_worker", str(root), str(KILLS), "0"]
  done = subprocess.run(command, env=environment, cwd=runs.ROOT, capture_output=True, text=True, check=False)
  log = root / "log.txt"
  assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
  return json.loads((root / "record.json").read_text())


def test_a_run_killed_twenty_times_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path):
  record = run_worker(tmp_path)
  expected = contents(tmp_path / "undisturbed")
  assert {"rows.jsonl", "report.json", "report.html", "report.md", "stats/stats.npz", "codes/layer-001.npz",
          "damage.npz", "errors.npz", "costs-damage.npz", "plan-uniform-2.5-draw1.json", "figures/loss.png",
          "quantized-knapsack-fisher_error-2.5/moeq.json"} <= set(expected)
  assert len(expected["rows.jsonl"].splitlines()) == 14

  killed = [entry for entry in record if entry["exit"] == -signal.SIGKILL]
  assert len(killed) == KILLS
  assert all(entry["exit"] == 0 for entry in record if entry not in killed), record
  inside = [entry for entry in killed if entry["file"]]
  assert [entry["file"] for entry in inside] == list(kill_worker.FILES)
  assert all(len(entry["partial"]) == 1 and entry["file"] in entry["partial"][0] for entry in inside), inside
  assert {entry["phase"] for entry in inside} == set(kill_worker.PHASES)

  finished = {entry["workdir"] for entry in record if entry["exit"] == 0}
  assert finished == {entry["workdir"] for entry in record}
  for name in sorted(finished):
    found = contents(tmp_path / name)
    assert sorted(found) == sorted(expected), name
    assert [file for file in expected if found[file] != expected[file]] == [], name
