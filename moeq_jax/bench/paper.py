"""`bench paper`: what the allocation of arXiv 2604.06515 costs at Mixtral-8x7B's shape, from disk to bits."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress
from moeq_jax.bench import _mixtral_files, stream

LAYERS = 32  # of the real model, to which the time is extrapolated
LIMIT_SECONDS, LIMIT_GIB = 60.0, 2.0
PUBLISHED = {"pmq_seconds": 2227, "pmq_gb": 110}  # the paper's own figures for its peer, GPU memory


def run(layers: int = 3, directory: str = "", shrink: int = 1) -> dict[str, Any]:
  """Router norms, MaxVar and the plan of a checkpoint of Mixtral-8x7B's shape, read from disk in a process of its own.

  The checkpoint has true layers (hidden 4096, ffn 14336, 8 experts, bfloat16, 2.7 GiB each) of random weights, four
  million numbers repeated from another place and with another scale in every tensor; all bytes are on disk, and what
  the system keeps of them in memory is given up before the clock starts. MaxVar reads the gate projection of every
  expert, a third of the experts' bytes, one at a time. It takes 2.9 GB of disk a layer; all of it is deleted
  afterwards.

  Besides, for the estimates of a dry run: one expert's forward pass in float32 on 2,048 rows, and reading and hashing.

  Args:
    layers: on disk, at least 1; the time of 32 is extrapolated in proportion.
    directory: where the checkpoint goes; by default the system's place for temporary files.
    shrink: divides all widths; 1 is the true shape.

  Returns:
    Seconds measured and for 32 layers, peak resident memory, both limits (60 s, 2 GiB), and the rates.

  Raises:
    ValueError: no layer.
    OSError: too little room on the disk.
    RuntimeError: a process failed; holds what it printed.
  """
  if layers < 1:
    raise ValueError(f"layers={layers}: at least 1 is needed")
  with tempfile.TemporaryDirectory(dir=directory or None) as place:
    root, config = Path(place), _mixtral_files.config(layers, shrink)
    needed = sum(2 * stream.count(tensors) for tensors in _mixtral_files.shapes(config))
    if shutil.disk_usage(root).free < 1.1 * needed:
      raise OSError(f"{root}: the benchmark takes {needed / 1e9:.1f} GB of disk; make room, name another place by"
                    " --directory=DIR, or take fewer --layers")
    with progress.bar("bench paper", 4) as advance:
      _mixtral_files.write(root, config, holes=False)
      advance("checkpoint written")
      forget(root)
      allocation = stream.part("paper", root)
      advance("allocation")
      forget(root)
      digest = stream.part("digest", root)
      advance("digest")
      forward = stream.part("forward", root)
      advance("forward")
  seconds = allocation["open_seconds"] + allocation["plan_seconds"] * LAYERS / layers
  result = {"benchmark": "paper", "layers": layers, "shrink": shrink, "random_weights": True,
            "checkpoint_gb": needed / 1e9, "allocation": allocation, "seconds_32_layers": seconds,
            "peak_gib": allocation["peak_gib"], "limit_seconds": LIMIT_SECONDS, "limit_gib": LIMIT_GIB,
            "within_limits": seconds <= LIMIT_SECONDS and allocation["peak_gib"] <= LIMIT_GIB,
            "published": PUBLISHED, "digest": digest, "forward": forward, "cores": os.cpu_count()}
  _show(result)
  return result


def forget(directory: Path) -> None:
  """Has the system write a directory's files out and give up what it keeps of them, where it can be asked to."""
  for path in directory.glob("*.safetensors"):
    with path.open("rb") as file:
      os.fsync(file.fileno())
      if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _show(result: dict[str, Any]) -> None:
  table = rich_table.Table("what", "seconds", "32 layers", "peak GiB", title=f"{result['cores']} cores, random weights")
  allocation, forward, digest = (result[name] for name in ("allocation", "forward", "digest"))
  table.add_row(f"norms, MaxVar and plan of {result['layers']} layers",
                f"{allocation['open_seconds'] + allocation['plan_seconds']:.2f}", f"{result['seconds_32_layers']:.1f}",
                f"{result['peak_gib']:.2f}")
  table.add_row("published, of PMQ (GPU memory)", "", str(PUBLISHED["pmq_seconds"]), f"{PUBLISHED['pmq_gb']} GB")
  table.add_row(f"read and hashed, {digest['gb_per_second']:.2f} GB/s", f"{digest['seconds']:.1f}", "", "")
  table.add_row(f"an expert's forward, {forward['rows']} rows, {forward['gflops']:.0f} GFLOP/s",
                f"{forward['seconds']:.2f}", "", "")
  rich_console.Console().print(table)
