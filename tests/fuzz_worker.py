"""Opens and reads spoilt checkpoints, in a process of its own with little memory: `fuzz_worker DIR COUNTS [NUMBER]`.

COUNTS is JSON, how many mutants of each kind. The last line printed is JSON: outcomes by kind, and failures. With
NUMBER only that mutant of every kind is tried.
"""

import collections
import json
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moeq_jax import container, qtensor, tensor_files
from moeq_jax.models import convert, names
from tests import fuzz_mutations
from tests.golden import checkpoints

ALLOWANCE = 64 << 20  # bytes beyond the files
SECONDS = 5  # of processor time for one mutant: a busy machine is no hang; who only waits meets the test's own limit
ERRORS = convert.CheckpointError, tensor_files.TensorFilesError
ONE_FILE, FUSED, SHARDED = "mixtral_tied", "qwen2_moe_window", "switch_crowded"

Tensors = dict[str, np.ndarray]


def bases(root: Path) -> list[fuzz_mutations.Files]:
  """The files of valid checkpoints: one file by expert, one fused, three shards with an index."""
  for name in (ONE_FILE, FUSED, SHARDED):
    checkpoints.write(name, root / name)
  tensors = {name: checkpoints.tensors(root / name) for name in (FUSED, SHARDED)}
  checkpoints.save(root / FUSED, checkpoints.fused(tensors[FUSED]))
  checkpoints.save(root / SHARDED, {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors[SHARDED].items()}, shards=3)
  return [{path.name: path.read_bytes() for path in sorted((root / name).iterdir())}
          for name in (ONE_FILE, FUSED, SHARDED)]


def read(directory: Path) -> Tensors:
  """Everything in a checkpoint, by the names of the layout by expert."""
  checkpoint = convert.open_checkpoint(directory)
  found: Tensors = {}
  for l in (None, *range(checkpoint.layers)):
    found |= checkpoint.others(l)
  for l in checkpoint.sparse_layers:
    for e in range(checkpoint.experts):
      weights, called = checkpoint.expert(l, e), names.expert_names(checkpoint.config, l, e)
      found |= {called[projection]: weight.T for projection, weight in weights.items()}
  return found


def reference(directory: Path) -> Tensors:
  """The same, as the safetensors library reads it; fails where the library does."""
  found: Tensors = {}
  for path in sorted(directory.glob("*.safetensors")):
    found |= safetensors.numpy.load_file(path)
  for name in [name for name in found if name.endswith(".experts.gate_up_proj")]:
    stem = name.removesuffix(".gate_up_proj")
    both, down = found.pop(name), found.pop(f"{stem}.down_proj")
    for e in range(len(both)):
      gate, up = np.split(both[e], 2)
      found |= {f"{stem}.{e}.gate_proj.weight": gate, f"{stem}.{e}.up_proj.weight": up,
                f"{stem}.{e}.down_proj.weight": down[e]}
  return found


def equal(a: Tensors, b: Tensors) -> bool:
  """Whether every tensor of `a` is in `b` with the same bytes."""
  return all(name in b and a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and
             a[name].tobytes() == b[name].tobytes() for name in a)


def outcome(directory: Path, pristine: Tensors) -> str:
  """What comes of a checkpoint: `refused`, `right`, or `as it says` where its files consistently say something else.

  Raises:
    AssertionError: it was read as something else than it says.
  """
  try:
    found = read(directory)
  except ERRORS as error:
    assert str(directory) in str(error) and len(str(error)) < 2000, f"a poor message: {str(error)[:500]}"
    return "refused"
  said = reference(directory)
  assert equal(found, said), "other tensors than the files say"
  return "right" if equal(found, pristine) else "as it says"


def place(directory: Path, files: fuzz_mutations.Files) -> None:
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  for name, data in files.items():
    (directory / name).write_bytes(data)


def mutants(root: Path, counts: dict[str, int], only: int | None) -> Iterator[tuple[str, int, str]]:
  """Tries every mutant: its kind, its number and its outcome."""
  valid, directory = bases(root), root / "mutant"
  pristine = []
  for files in valid:
    place(directory, files)
    pristine.append(read(directory))
    assert outcome(directory, pristine[-1]) == "right"
  limit_memory(max(sum(map(len, files.values())) for files in valid))
  for place_in_table, (kind, mutate) in enumerate(fuzz_mutations.KINDS.items()):
    for i in range(counts.get(kind, 0)) if only is None else [only]:
      base = 2 if kind in ("index", "shards") else i % len(valid)
      place(directory, mutate(np.random.default_rng([place_in_table, i]), valid[base]))
      yield kind, i, attempt(lambda base=base: outcome(directory, pristine[base]))


def containers(root: Path, count: int, only: int | None) -> Iterator[tuple[str, int, str]]:
  """Bytes flipped anywhere in a container of ours: its checksums must notice."""
  rng, path = np.random.default_rng(0), root / "container.safetensors"
  scale = np.ones((2, 1, 8), ml_dtypes.bfloat16)
  packed = qtensor.pack(rng.integers(0, 4, (2, 32, 8)).astype(np.uint8), 2, scale, scale, group=0)
  container.save(path, {"experts": packed, "norm": rng.normal(size=40).astype(np.float32)}, {"plan": [2, 2]})
  data = path.read_bytes()
  for i in range(count) if only is None else [only]:
    rng = np.random.default_rng([99, i])
    first = 0 if i % 3 else 8 + len(fuzz_mutations.split(data)[0])
    path.write_bytes(fuzz_mutations.flipped(rng, data, first, len(data)))
    changed = path.read_bytes() != data
    yield "container", i, attempt(lambda changed=changed: container_outcome(path, changed))


def container_outcome(path: Path, changed: bool) -> str:
  try:
    container.load(path)
  except container.ContainerError:
    return "refused"
  assert not changed, "a changed byte was not noticed"
  return "right"


def attempt(run: Any) -> str:
  """The outcome, or what went wrong beginning with `FAILED`."""
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    return run()
  except BaseException:
    return f"FAILED {traceback.format_exc()[-1500:]}"
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(size: int) -> None:
  """No more address space than is in use, plus `size`, plus the allowance."""
  used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + size + ALLOWANCE,) * 2)


def _hangs(*_: Any) -> None:
  raise TimeoutError(f"more than {SECONDS} s of processor time")


def main(root: Path, counts: dict[str, int], only: int | None) -> dict[str, Any]:
  signal.signal(signal.SIGPROF, _hangs)
  found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  failures = []
  for kind, number, came in (*mutants(root, counts, only), *containers(root, counts.get("container", 0), only)):
    found[kind][came.split(" ", 1)[0] if came.startswith("FAILED") else came] += 1
    if came.startswith("FAILED"):
      failures.append([kind, number, came])
  return {"outcomes": found, "failures": failures[:5]}


if __name__ == "__main__":
  with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    print(json.dumps(main(Path(folder), json.loads(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)))
