"""`bench stream`: memory and time of streaming quantization at Mixtral-8x7B's shape."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import progress
from moeq_jax.bench import _mixtral_files

LAYERS = 32  # of the real model, to which times are extrapolated
FACTOR, ADDED = 1.6, 2 << 30  # the limit on memory: so many times one layer's bytes, and so much more
ROOM = 1.5  # of disk, in units of the checkpoint
CODECS = ("rtn(group=64)", "hqq(group=64)")


def run(layers: int = 2, budget: float = 2.0, directory: str = "", shrink: int = 1) -> dict[str, Any]:
  """Quantizes a checkpoint of Mixtral-8x7B's shape by the command that users give, one process for each codec.

  The checkpoint has true layers (hidden 4096, ffn 14336, 8 experts, 32 query and 8 key-value heads, bfloat16) and a
  small vocabulary. Its weights are random: four million normal numbers, repeated from another place and with another
  scale in every tensor. Time and memory do not depend on the values; the quality of the codes is not looked at. It
  takes 6 GB of disk for two layers, and half as much again while it is quantized; all of it is deleted afterwards.

  Besides, in processes of their own: one expert of that shape by GPTQ on 2,048 random rows; and router scores and a
  plan of a checkpoint with all 32 layers whose experts are holes in its files: only zeros could be read from them.

  Args:
    layers: of the checkpoint that is quantized, at least 2.
    budget: bits of every expert weight.
    directory: where the checkpoints go; by default the system's place for temporary files.
    shrink: divides all widths; 1 is the true shape.

  Returns:
    Peak resident memory of each process with the limit (1.6 times one layer's bytes plus 2 GiB), seconds a layer
    (behind the first, which compiles), and their extrapolation to 32 layers.

  Raises:
    ValueError: fewer than 2 layers.
    OSError: too little room on the disk.
    RuntimeError: a process failed; holds what it printed, its errors stand above.
  """
  if layers < 2:
    raise ValueError(f"layers={layers}: at least 2 are needed, the first is slower because it compiles")
  with tempfile.TemporaryDirectory(dir=directory or None) as place:
    root, config = Path(place), _mixtral_files.config(layers, shrink)
    needed = ROOM * sum(2 * count(tensors) for tensors in _mixtral_files.shapes(config))
    if shutil.disk_usage(root).free < needed:
      raise OSError(f"{root}: the benchmark takes {needed / 1e9:.1f} GB of disk; make room, or name another place by"
                    " --directory=DIR")
    with progress.bar("bench stream", len(CODECS) + 3) as advance:
      began = time.monotonic()
      total = _mixtral_files.write(root / "checkpoint", config, holes=False)
      made = time.monotonic() - began
      advance("checkpoint written")
      results = []
      for codec in CODECS:
        results.append(_quantize(root, codec, budget, layers))
        advance(codec)
      gptq = part("gptq", root / "checkpoint")
      advance("gptq, one expert")
      shutil.rmtree(root / "checkpoint")
      _mixtral_files.write(root / "holes", _mixtral_files.config(LAYERS, shrink), holes=True)
      routers = part("routers", root / "holes")
      advance("routers")
  layer_bytes = sum(2 * count(tensors) for tensors in list(_mixtral_files.shapes(config))[1:2])
  limit = (FACTOR * layer_bytes + ADDED) / 2**30
  result = {"benchmark": "stream", "layers": layers, "shrink": shrink, "bits": budget, "random_weights": True,
            "checkpoint_gb": total / 1e9, "checkpoint_seconds": made, "layer_gib": layer_bytes / 2**30,
            "limit_gib": limit, "within_limit": all(row["peak_gib"] <= limit for row in [*results, gptq]),
            "results": results, "gptq_expert": gptq, "routers": routers, "cores": os.cpu_count()}
  _show(result)
  return result


def count(tensors: dict[str, tuple[int, ...]]) -> int:
  """Weights in tensors of these shapes."""
  return sum(map(math.prod, tensors.values()))


def child(command: Sequence[str]) -> tuple[str, float, float]:
  """Runs a process without a compilation cache: what it printed, its seconds, and its peak resident memory in GiB."""
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  began = time.monotonic()
  with tempfile.TemporaryFile("w+") as output:
    child = subprocess.Popen(command, env=environment, stdout=output)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    output.seek(0)
    printed = output.read()
  if child.returncode:
    raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}\n{printed}")
  return printed, seconds, usage.ru_maxrss / 2**20


def _quantize(root: Path, codec: str, budget: float, layers: int) -> dict[str, Any]:
  """One codec by the command line, every expert at the same width."""
  workdir = root / "work"
  _, seconds, peak = child([
      sys.executable, "-m", "moeq_jax.main", "run", "--config=configs/quantize.py:data_free",
      f"--config.checkpoint={root / 'checkpoint'}", f"--config.budget={budget}", "--config.method=uniform",
      f"--config.codec={codec}", f"--workdir={workdir}"])
  lines = (workdir / "timings.jsonl").read_text().splitlines()
  stages = {row["stage"]: row["seconds"] for row in map(json.loads, lines)}
  files = sorted((workdir / "quantized").glob("layer-*"))
  written, times = sum(file.stat().st_size for file in files), [file.stat().st_mtime for file in files]
  shutil.rmtree(workdir)
  each = (times[-1] - times[0]) / (layers - 1)
  return {"codec": codec, "peak_gib": peak, "seconds": seconds, "stages": stages, "seconds_per_layer": each,
          "seconds_32_layers": LAYERS * each, "written_gb": written / 1e9}


def part(name: str, directory: Path) -> dict[str, Any]:
  """One of `_stream_parts`."""
  printed, seconds, peak = child([sys.executable, "-m", "moeq_jax.bench._stream_parts", name, str(directory)])
  return {"peak_gib": peak, "process_seconds": seconds} | json.loads(printed.splitlines()[-1])


def _show(result: dict[str, Any]) -> None:
  table = rich_table.Table("what", "seconds", "32 layers", "peak GiB", "limit",
                           title=f"Mixtral-8x7B's shape, random weights, {result['cores']} cores: a layer is"
                                 f" {result['layer_gib']:.2f} GiB")
  limit = f"{result['limit_gib']:.2f}"
  for row in result["results"]:
    table.add_row(f"{row['codec']}, {result['bits']:g} bits, a layer", f"{row['seconds_per_layer']:.1f}",
                  f"{row['seconds_32_layers'] / 60:.0f} min", f"{row['peak_gib']:.2f}", limit)
  gptq, routers = result["gptq_expert"], result["routers"]
  table.add_row("gptq, one expert", f"{gptq['seconds']:.1f}", "", f"{gptq['peak_gib']:.2f}", limit)
  table.add_row("router scores and plan, 32 layers", f"{routers['open_seconds'] + routers['plan_seconds']:.2f}", "",
                f"{routers['peak_gib']:.2f}", limit)
  rich_console.Console().print(table)
