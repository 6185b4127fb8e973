"""What the checks share: the project's own Python, which runs our side, and Hugging Face's libraries kept offline."""

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HOME = tempfile.mkdtemp(prefix="interop-hf-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
               "HF_HOME": HOME, "TOKENIZERS_PARALLELISM": "false"}
SECONDS = 3600  # that our side may take at most, on a busy machine too
ROOT = Path(__file__).resolve().parents[2]
Ours = Callable[..., tuple[list[Any], dict[str, np.ndarray]]]


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--project-python", default=str(ROOT / ".venv" / "bin" / "python"),
                   help="the Python of the project's own environment")


@pytest.fixture(scope="session")
def project_python(request: pytest.FixtureRequest) -> str:
  return request.config.getoption("--project-python")


@pytest.fixture(scope="session")
def ours(project_python: str) -> Ours:
  """Runs jobs of `ours.py` in one process of the project's Python.

  `ours(jobs, **arrays)` gives the answers that JSON holds, one a job, and the arrays that jobs left, `{name: array}`.
  """
  def run(jobs: list[dict[str, Any]], **arrays: np.ndarray) -> tuple[list[Any], dict[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
      place = Path(folder)
      (place / "jobs.json").write_text(json.dumps(jobs, default=str))
      np.savez(place / "given.npz", **arrays)
      done = subprocess.run([project_python, "-P", str(Path(__file__).with_name("ours.py")), folder], check=False,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
      assert done.returncode == 0, done.stdout
      with np.load(place / "left.npz") as left:
        return json.loads((place / "answers.json").read_text()), dict(left)

  return run
