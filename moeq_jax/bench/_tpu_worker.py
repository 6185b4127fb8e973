"""Compiles kernels for TPUs and says what came out: a process of its own, because libtpu reads its environment once.

Reads one JSON list of jobs from standard input and prints one JSON object per job. `results` starts it.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moeq_jax import qtensor
from moeq_jax.bench import _tpu_compile
from moeq_jax.kernels import pallas_tpu, shapes, tpu_tile, tpu_unpack, tpu_view

BUNDLES = "final_hlo-static-per-bundle-utilization"
NAME = "moeq_tile"
PAIRED = ("v5e",)  # chips whose words are in pairs (`tpu_view.py`)


def results(jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
  """Runs the jobs in a process of their own; the name of the function first, then its arguments.

  Raises:
    RuntimeError: the process ended before its time, with the end of what it said.
  """
  with tempfile.TemporaryDirectory() as dump, tempfile.TemporaryFile("w+") as said:
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true" if jobs[0]["job"] == "tile" else ""
    environment = {**os.environ, **_tpu_compile.ENVIRONMENT, "LIBTPU_INIT_ARGS": flags, "MOEQ_DUMP": dump}
    command = [sys.executable, "-m", "moeq_jax.bench._tpu_worker"]
    with subprocess.Popen(
      command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
    ) as process:
      process.stdin.write(json.dumps(list(jobs)))
      process.stdin.close()
      yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    if process.returncode:
      said.seek(0)
      raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {said.read()[-2000:]}")


def matmul(chip: str, layer: str, projection: str, rows: int, dtype: str = "bfloat16") -> dict[str, Any]:
  """Compiles one grouped matmul at true size, experts of all widths mixed: seconds and bytes."""
  shape = shapes.LAYERS[layer].matmuls()[projection]
  view = jax.eval_shape(_prepare(chip), _tpu_compile.abstract(shape, np.resize(qtensor.WIDTHS, shape[0])))
  x = jax.ShapeDtypeStruct((rows, shape[1]), dtype)
  config = pallas_tpu.heuristic(rows, shape[0], view)
  started = time.perf_counter()

  def run(x: jax.Array, view: tpu_view.View, sizes: jax.Array) -> jax.Array:
    return pallas_tpu.forward(x, view, sizes, x.dtype)

  compiled = _tpu_compile.compiled(chip, run, x, view, jax.ShapeDtypeStruct((shape[0],), jnp.int32))
  memory = compiled.memory_analysis()
  kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
  return {"seconds": time.perf_counter() - started, "code": memory.generated_code_size_in_bytes, "kernels": kernels,
          "temporary": memory.temp_size_in_bytes, "words": 4 * view.words.size, "config": dataclasses.asdict(config)}


def gradient(chip: str, layer: str, projection: str, rows: int) -> dict[str, Any]:
  """Compiles the gradient in the rows of a QTensor, and its view."""
  shape = shapes.LAYERS[layer].matmuls()[projection]
  q = _tpu_compile.abstract(shape, np.resize(qtensor.WIDTHS, shape[0]))
  x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in shape[1:])
  sizes = jax.ShapeDtypeStruct((shape[0],), jnp.int32)
  code = [_tpu_compile.compiled(chip, run, *args).memory_analysis().generated_code_size_in_bytes
          for run, args in ((lambda *args: pallas_tpu.backward(*args)[0], (x, q, sizes, dy)), (_prepare(chip), (q,)))]
  return {"code": code}


def _prepare(chip: str) -> Callable[..., tpu_view.View]:
  """`pallas_tpu.prepare` as it is on `chip`."""
  return functools.partial(tpu_view.prepare, paired=chip in PAIRED)


def tile(
  chip: str, way: str, rows: int, bits: int, k_tile: int, columns: int, group: int, span: int
) -> dict[str, Any]:
  """Compiles the work on some tiles of weights, all of it in vector memory, and counts its instruction bundles.

  Args:
    chip: of `_tpu_compile.CHIPS`.
    way: `"bfloat16"` (plain weights), `"after"`, `"before"`, or `"reused"` (before, and kept for more rows).
    rows: rows of the row tile.
    bits: width.
    k_tile, columns: size of a tile of weights.
    group: rows that share a scale.
    span: K-tiles, without a loop around them.

  Returns:
    `bundles` from the first to the last that does vector work; `slots` used per kind of unit.
  """
  blocks, paired = tpu_unpack.blocks(k_tile, bits), chip in PAIRED

  def body(x: Any, w: Any, grid: Any, y: Any, *kept: Any) -> None:
    for index in range(span):
      at = slice(index * k_tile, (index + 1) * k_tile)
      if way == "bfloat16":
        y[...] += tpu_tile.dot(x[:, at], w[at])
        continue
      raw, entry = w[index * blocks : (index + 1) * blocks], grid[at.start // group : at.stop // group]
      if way == "after":
        y[...] += tpu_tile.scaled_after(x[:, at], raw, entry, bits, group, paired)
        continue
      first = at.start
      for weight in tpu_tile.dequantized(raw, entry, bits, group, paired, x.dtype):
        part = slice(first, first + weight.shape[0])
        y[...] += tpu_tile.dot(x[:, part], weight)
        for scratch in kept:
          scratch[part] = weight
        first = part.stop

  K = span * k_tile
  plain = jax.ShapeDtypeStruct((K, columns), jnp.bfloat16)
  words = jax.ShapeDtypeStruct((span * blocks, 8, columns), jnp.uint32)
  run = pl.pallas_call(
    body, name=NAME, compiler_params=pltpu.CompilerParams(vmem_limit_bytes=pallas_tpu.VMEM),
    out_shape=[jax.ShapeDtypeStruct((rows, columns), jnp.float32)] + [plain] * (way == "reused"))
  for old in Path(os.environ["MOEQ_DUMP"]).iterdir():
    old.unlink()
  _tpu_compile.compiled(chip, run, jax.ShapeDtypeStruct((rows, K), jnp.bfloat16),
                        plain if way == "bfloat16" else words,
                        jax.ShapeDtypeStruct((K // group, columns), jnp.uint32))
  (dumped,) = (f for f in Path(os.environ["MOEQ_DUMP"]).iterdir() if BUNDLES in f.name and NAME in f.name)
  return count(dumped.read_text())


def count(text: str) -> dict[str, Any]:
  """What a table of slots per bundle holds; its last column is the scalar unit."""
  head, body = text.split("== UTILIZATION:")
  names = head.splitlines()[1].replace(" ", "").split(",")
  used = np.array([line.split() for line in body.split("\n") if line.strip()], int)
  busy = np.flatnonzero(used[:, : names.index("SALU")].any(1))
  return {"bundles": int(busy[-1] - busy[0] + 1), "slots": dict(zip(names, used.sum(0).tolist(), strict=True))}


def main() -> None:
  """Works off the jobs on standard input."""
  for job in json.load(sys.stdin):
    arguments = {name: value for name, value in job.items() if name != "job"}
    try:
      found = {"matmul": matmul, "gradient": gradient, "tile": tile}[job["job"]](**arguments)
    except Exception as error:  # noqa: BLE001  # whatever the compiler says is the result
      found = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
    print(json.dumps({**job, **found}), flush=True)


if __name__ == "__main__":
  main()
