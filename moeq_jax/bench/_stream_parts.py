"""What `bench stream` and `bench paper` run in processes of their own:
`python -m moeq_jax.bench._stream_parts PART DIRECTORY`.

Each part prints one JSON object as its last line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moeq_jax import codecs, workspace
from moeq_jax.encode import stream
from moeq_jax.models import convert
from moeq_jax.quantize import measure, needs, packing, planning
from moeq_jax.quantize import subject as subject_lib

GROUP, BITS = 64, 2


def gptq(directory: Path, rows: int = 2048) -> dict[str, Any]:
  """Encodes one expert by GPTQ, its inputs random rows; twice, since the first time compiles."""
  subject = subject_lib.open_source(workspace.Workdir(directory / "work"), str(directory), "float32")
  weights, rng = subject.source.expert(0, 0), np.random.default_rng(0)
  codec, sizes = codecs.get(f"gptq(group={GROUP})"), {name: w.shape[0] for name, w in weights.items()}
  x, mids = (rng.normal(size=(rows, sizes[name])).astype(np.float32) for name in ("gate", "down"))
  seconds = []
  for _ in range(2):
    began = time.monotonic()
    encoded = stream.encode_expert(weights, x, mids, dict.fromkeys(weights, BITS), codec=codec)
    packing.pack_expert(encoded, dict.fromkeys(weights, BITS), GROUP)
    seconds.append(time.monotonic() - began)
  return {"seconds": seconds[1], "first_seconds": seconds[0], "weights": sum(w.size for w in weights.values()),
          "rows": rows, "bits": BITS}


def routers(directory: Path, method: str = "tiers(router_norm, zeta=0)", budget: float = 2.5) -> dict[str, Any]:
  """Opens a checkpoint, scores its routers and plans bits; reads no expert, unless the method looks at them."""
  began = time.monotonic()
  subject = subject_lib.open_source(workspace.Workdir(directory / "work"), str(directory), "float32")
  opened = time.monotonic()
  encoding = measure.Encoding(codecs.get(f"rtn(group={GROUP})"), (1, 2, 3, 4))
  found = planning.routers(subject)
  evidence = planning.evidence(subject, measure.stats(subject, None, {}, None, found),
                               measure.error_table(subject, {}, encoding), found)
  plan = needs.candidate(method, budget, encoding.widths, evidence, seed=0).plan
  files = [entry.stat() for entry in directory.glob("*.safetensors")]
  return {"open_seconds": opened - began, "plan_seconds": time.monotonic() - opened, "method": method,
          "layers": plan.bits.shape[0], "experts": plan.bits.shape[1], "bits": float(plan.bits.mean()),
          "file_bytes": sum(s.st_size for s in files), "disk_bytes": sum(512 * s.st_blocks for s in files)}


def paper(directory: Path) -> dict[str, Any]:
  """The allocation of arXiv 2604.06515: router norms, MaxVar of every expert's gate projection, and the plan."""
  return routers(directory, "tiers(router_norm, variant=code)")


def forward(directory: Path, rows: int = 2048) -> dict[str, Any]:
  """One expert's forward pass in float32 on random rows; the median of five behind one that compiles."""
  subject = subject_lib.open_source(workspace.Workdir(directory / "work"), str(directory), "float32")
  weights = {name: jax.numpy.asarray(w.astype(np.float32)) for name, w in subject.source.expert(0, 0).items()}
  x = np.random.default_rng(0).normal(size=(rows, weights["gate"].shape[0])).astype(np.float32)
  run, seconds = jax.jit(lambda w, x: subject.functions.expert(w, x, lambda name, value: value)), []
  for _ in range(6):
    began = time.monotonic()
    jax.block_until_ready(run(weights, x))
    seconds.append(time.monotonic() - began)
  median = float(np.median(seconds[1:]))
  return {"seconds": median, "rows": rows, "gflops": 2 * rows * sum(w.size for w in weights.values()) / median / 1e9}


def digest(directory: Path) -> dict[str, Any]:
  """Reads every file of a checkpoint and hashes it, as a run does first."""
  source, began = convert.open_checkpoint(directory), time.monotonic()
  source.digest()
  seconds = time.monotonic() - began
  return {"seconds": seconds, "gb_per_second": source.files.nbytes / seconds / 1e9}


PARTS = {"gptq": gptq, "routers": routers, "paper": paper, "forward": forward, "digest": digest}

if __name__ == "__main__":
  print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]))), flush=True)
