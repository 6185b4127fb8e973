"""What `bench stream` runs in processes of its own: `python -m moeq_jax.bench._stream_parts PART DIRECTORY`.

Each part prints one JSON object as its last line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import codecs, workspace
from moeq_jax.encode import stream
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
  """Opens a checkpoint, scores its routers and plans bits; reads no expert."""
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


PARTS = {"gptq": gptq, "routers": routers}

if __name__ == "__main__":
  print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]))), flush=True)
