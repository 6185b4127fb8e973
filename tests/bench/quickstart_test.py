"""The quickstart benchmark reads what the run left, and does not hide that a run failed."""

import subprocess
from pathlib import Path

import pytest

from moeq_jax.bench import quickstart


def _fake(status: int):
  def run(command, env, **_):
    workdir = Path(next(a for a in command if a.startswith("--workdir=")).removeprefix("--workdir="))
    (workdir / "timings.jsonl").write_text('{"seconds": 1.5, "stage": "open"}\n{"seconds": 2.5, "stage": "encode"}\n')
    (workdir / "rows.jsonl").write_text("{}\n" * 4)
    assert "JAX_COMPILATION_CACHE_DIR" not in env
    return subprocess.CompletedProcess(command, status)

  return run


def test_plans_and_stages_come_from_the_run(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
  monkeypatch.setattr(quickstart.subprocess, "run", _fake(0))
  result = quickstart.run()
  assert result["plans"] == 3  # the first row is full precision
  assert result["stages"] == {"open": 1.5, "encode": 2.5}


def test_a_failed_run_is_an_error(monkeypatch):
  monkeypatch.setattr(quickstart.subprocess, "run", _fake(2))
  with pytest.raises(RuntimeError, match="status 2"):
    quickstart.run()
