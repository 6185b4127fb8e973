"""Spoilt checkpoints: each is read as its files say, or refused by an error that names it.

Never a crash, a hang, a wrong tensor, or memory beyond the files and a fixed allowance. `fuzz_mutations.py` spoils
them, `fuzz_worker.py` reads them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeq_jax import runs
from tests import fuzz_mutations, fuzz_worker

# In header, index, config, lengths and offsets: 2130; the rest flips payload, in plain safetensors and in containers.
COUNTS = {"header_bytes": 300, "header_length": 150, "lengths": 250, "header_entries": 400, "header_tensor": 300,
          "index": 300, "shards": 30, "config": 400, "payload": 120, "container": 150}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
  command = [sys.executable, "-m", "tests.fuzz_worker", str(tmp_path_factory.mktemp("fuzz")), json.dumps(COUNTS)]
  environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, cwd=runs.ROOT, capture_output=True, text=True, check=False,
                        timeout=1800)  # far more than it takes: the machine may be busy
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_no_mutant_is_read_wrongly_or_breaks_anything(found: dict):
  assert sum(COUNTS.values()) >= 2000
  assert sum(count for kind, count in COUNTS.items() if kind not in ("payload", "container")) >= 1500
  assert not found["failures"], "\n".join(f"{kind} {number}: {what}" for kind, number, what in found["failures"])
  assert {kind: sum(outcomes.values()) for kind, outcomes in found["outcomes"].items()} == COUNTS


def test_mutants_are_neither_all_refused_nor_all_fine(found: dict):
  """The mutations reach behind the first check: some leave a checkpoint that is still right, most do not."""
  outcomes = found["outcomes"]
  for kind in ("header_entries", "header_tensor", "index", "config"):
    assert outcomes[kind]["right"] >= 5 and outcomes[kind]["refused"] >= COUNTS[kind] // 2, (kind, outcomes[kind])
  assert outcomes["header_length"] == {"refused": COUNTS["header_length"]}
  assert outcomes["lengths"] == {"refused": COUNTS["lengths"]}


def test_flips_in_the_payload_are_caught_by_our_own_container_alone(found: dict):
  assert found["outcomes"]["container"] == {"refused": COUNTS["container"]}
  assert found["outcomes"]["payload"]["as it says"] > COUNTS["payload"] // 2  # plain safetensors cannot know


def test_the_worker_notices_a_wrong_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  fuzz_worker.place(tmp_path / "a", fuzz_worker.bases(tmp_path)[0])
  pristine = fuzz_worker.read(tmp_path / "a")
  assert fuzz_worker.outcome(tmp_path / "a", pristine) == "right"
  read = fuzz_worker.read
  monkeypatch.setattr(fuzz_worker, "read", lambda d: {name: np.flip(array) for name, array in read(d).items()})
  with pytest.raises(AssertionError, match="other tensors than the files say"):
    fuzz_worker.outcome(tmp_path / "a", pristine)
  monkeypatch.setattr(fuzz_worker, "read", lambda d: 1 / 0)
  assert "ZeroDivisionError" in fuzz_worker.attempt(lambda: fuzz_worker.outcome(tmp_path / "a", pristine))


def test_the_worker_notices_what_does_not_end():
  program = ("import signal; from tests import fuzz_worker; fuzz_worker.SECONDS = 0.2; "
             "signal.signal(signal.SIGPROF, fuzz_worker._hangs)\n"
             "def forever():\n  while True: pass\n"
             "print(fuzz_worker.attempt(forever), fuzz_worker.attempt(lambda: 'right'))")
  done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
                        cwd=runs.ROOT, capture_output=True, text=True, check=True, timeout=120)
  assert done.stdout.startswith("FAILED") and "TimeoutError: more than 0.2 s" in done.stdout
  assert done.stdout.endswith(" right\n")


def test_the_worker_bounds_memory():
  """What is beyond the files and the allowance fails; half of the allowance is there to be used."""
  program = ("import numpy as np; from tests import fuzz_worker; fuzz_worker.limit_memory(0); "
             "take = lambda size: len(np.ones(size, np.uint8)); print(take(fuzz_worker.ALLOWANCE // 2), "
             "fuzz_worker.attempt(lambda: str(take(2 * fuzz_worker.ALLOWANCE))))")
  done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
                        cwd=runs.ROOT, capture_output=True, text=True, check=True, timeout=120)
  assert done.stdout.startswith(f"{fuzz_worker.ALLOWANCE // 2} FAILED") and "MemoryError" in done.stdout


def test_a_number_stands_for_one_mutant():
  header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  files = {"model.safetensors": fuzz_mutations.joined(header, b"\0" * 4)}
  for kind in ("header_bytes", "header_entries", "lengths"):
    mutate = fuzz_mutations.KINDS[kind]
    made = [[mutate(np.random.default_rng([0, i]), files) for i in range(20)] for _ in range(2)]
    assert made[0] == made[1] and sum(mutant != files for mutant in made[0]) >= 15
