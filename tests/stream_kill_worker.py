"""Streams tiny quantizations, killed again and again; `stream_kill_test.py` starts it and reads its record.

As in `kill_worker.py`, one process loads everything and forks a child for each attempt.
"""

import functools
import json
import sys
import warnings
from pathlib import Path

import ml_collections

from moeq_jax import data, runs
from tests import tiny
from tests.kill_worker import Kill, attempt

# Where each chain of attempts is killed, in the order of a run; a file's first write, unless it is there already.
KILLS = {
    "planned": (
        ("state-00001.npz", "part"), ("layer-00001.npz", "whole"), ("state-00002.npz", "synced"),
        ("layer-00001.npz", "part"), ("layer-00000.npz", "synced"), ("layer-00001.moeq.safetensors", "part"),
        ("moeq.json", "synced"), ("quantized.npz", "whole"), ("report.json", "part")),
    "sequential": (("state-00001.npz", "part"), ("layer-00001.moeq.safetensors", "synced")),
}
SETTINGS = {
    "planned": ("budget=2.5", "codec=gptq(group=32)", "widths=(1, 2, 4)"),
    "sequential": ("budget=2", "codec=gptq(group=32)", "method=uniform", "sequential=True", "evaluation.sequences=0"),
}


def config(checkpoint: str, name: str) -> ml_collections.ConfigDict:
  """One of `SETTINGS`, small."""
  overrides = (f"checkpoint={checkpoint}", f"length={tiny.LENGTH}", "calibration.sequences=4", *SETTINGS[name])
  return runs.load_config("configs/quantize.py:smoke", [f"--config.{override}" for override in overrides])


def main(root: Path) -> None:
  """Writes `record.json`: one entry per attempt; `root` holds `checkpoint` and receives the work directories."""
  documents = [*tiny.documents(6, 1), *tiny.documents(6, 2, "code")]
  versions = runs.versions()
  data.calibration = data.held_out = lambda: documents
  runs.versions = lambda: versions  # a commit made meanwhile is no difference between two runs
  record = []
  for name, kills in KILLS.items():
    make = functools.partial(config, name=name)
    record.append(attempt(root, root / f"{name}-undisturbed", Kill(), 0, make))
    for file, phase in kills:
      record.append(attempt(root, root / name, Kill(file=file, phase=phase), 0.5, make))
    record.append(attempt(root, root / name, Kill(), 0, make))
  (root / "record.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  main(Path(sys.argv[1]))
