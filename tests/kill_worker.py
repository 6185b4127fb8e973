"""Runs a small comparison, killed again and again; `kill_test.py` starts it and reads the record that it leaves.

One process loads everything and forks a child for each attempt, so that an attempt does not begin with the imports;
no backend of JAX runs in the parent. A chain of attempts goes on in one work directory until one of them reaches the
end; then the next chain begins in another, until there were enough kills. The last chain is run to its end.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from moeq_jax import artifacts, data, pipeline, runs
from tests import tiny

PHASES = ("part", "whole", "synced")  # how far a write has come: part of the bytes, all of them, all synced
FILES = ("stats.npz", "layer-000.npz", "layer-001.npz", "damage.npz", "costs-damage.npz", "plan-random-2.5-draw1.json",
         "rows.jsonl", "rows.jsonl", "layer-00001.moeq.safetensors", "report.json", "report.html")  # in order
METHODS = ("uniform", "random", "tiers(router_norm_change)", "knapsack(fisher_error)", "knapsack(damage)")


@dataclasses.dataclass(frozen=True)
class Kill:
  """When to kill: so many seconds after the start, or in the given phase of the first write of the given file."""

  seconds: float | None = None
  file: str | None = None
  phase: str | None = None


def config(checkpoint: str) -> ml_collections.ConfigDict:
  """A comparison with every stage, small."""
  return ml_collections.ConfigDict(dict(
      file="configs/quickstart.py", task="compare", seed=0, checkpoint=checkpoint, compute_dtype="float32",
      codec="gptq(group=32)", widths=tiny.WIDTHS, budgets=(2.0, 2.5), methods=METHODS, draws=2,
      scores=("router_norm_change", "fisher_error"),
      export=(("knapsack(fisher_error)", 2.5),), domains=("code", "wiki"), length=tiny.LENGTH, batch=4, calibration=4,
      evaluation=4, damage=dict(sequences=4, bits=2)))


def stop() -> None:
  """Kills this process."""
  os.kill(os.getpid(), signal.SIGKILL)


def watch_writes(kill: Kill, fraction: float) -> None:
  """Has this process killed in the write that `kill` names; `fraction` is the part of the file that is then there."""
  atomic_path, replace = artifacts.atomic_path, os.replace

  @contextlib.contextmanager
  def watched(path: str | os.PathLike) -> Iterator[Path]:
    with atomic_path(path) as temporary:
      yield temporary
      if Path(path).name == kill.file and kill.phase != "synced":
        if kill.phase == "part":
          os.truncate(temporary, max(1, int(fraction * temporary.stat().st_size)))
        stop()

  def watched_replace(source: str | os.PathLike, target: str | os.PathLike) -> None:
    if Path(target).name == kill.file:
      stop()
    replace(source, target)

  artifacts.atomic_path, os.replace = watched, watched_replace


def partial(workdir: Path) -> set[str]:
  """The files of which a killed process left a part, or the whole under a temporary name."""
  return {path.name for path in workdir.rglob(".*.partial") if path.stat().st_size}


def attempt(root: Path, workdir: Path, kill: Kill, fraction: float, config: Callable[..., Any] = config) -> dict:
  """Runs `config(checkpoint)` in a forked child; says how it ended, and which files it left half written."""
  began, before = time.monotonic(), partial(workdir)
  child = os.fork()
  if not child:
    status = 1
    try:
      log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
      os.dup2(log, 1)
      os.dup2(log, 2)
      watch_writes(kill, fraction)
      runs.execute(config(str(root / "checkpoint")), workdir)
      status = 0
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(status)
  timer = threading.Timer(kill.seconds or 600, os.kill, (child, signal.SIGKILL))
  timer.start()
  _, status = os.waitpid(child, 0)
  timer.cancel()
  return dataclasses.asdict(kill) | {
      "workdir": workdir.name, "exit": os.waitstatus_to_exitcode(status), "took": time.monotonic() - began,
      "partial": sorted(partial(workdir) - before),
  }


def main(root: Path, kills: int, seed: int) -> None:
  """Writes `record.json`: one entry per attempt.

  Args:
    root: holds `checkpoint`; receives the work directories.
    kills: how many times to kill: once in each of `FILES`, the other times at random moments.
    seed: of the moments.
  """
  documents = [*tiny.documents(6, 1), *tiny.documents(6, 2, "code")]
  versions = runs.versions()
  data.calibration = data.held_out = lambda: documents
  runs.versions = lambda: versions  # a commit made meanwhile is no difference between two runs
  rng = random.Random(seed)
  record = [attempt(root, root / name, Kill(), 0) for name in ("cold", "undisturbed")]
  latest = record[-1]["took"] / 2  # most attempts begin with some of the work done
  phases = rng.sample(PHASES * len(FILES), len(FILES))
  writes = dict(zip(sorted(rng.sample(range(kills), len(FILES))), map(Kill, [None] * len(FILES), FILES, phases)))
  killed = chain = 0
  while killed < kills:
    kill = writes.get(killed) or Kill(seconds=rng.uniform(0, latest))
    record.append(attempt(root, root / f"chain{chain}", kill, rng.random()))
    if record[-1]["exit"] == -signal.SIGKILL:
      killed += 1
    elif chain < kills:
      latest, chain = min(latest, record[-1]["took"] / 2), chain + 1
    else:
      raise RuntimeError(f"too many runs came to their end: {kill} kills none of them")
  record.append(attempt(root, root / f"chain{chain}", Kill(), 0))
  (root / "record.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
