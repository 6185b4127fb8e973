"""The grouped matmul on a Hopper GPU: ceilings, correctness, then a table over shapes, widths and peers, in one call.

Times are of whole jitted calls on the device, several calls in flight, divided by their number. Weight sets rotate, so
that none is found in the L2 cache, and the data is random, since zeros draw less power and run at higher clocks. The
roofline of a row is its bytes (packed weights and scales of experts with rows, rows in, rows out) at the copy bandwidth
measured at the start, or its products at the matmul rate measured there, whichever takes longer.
"""

import functools
import importlib
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import planar, progress
from moeq_jax.kernels import api, pallas_gpu, ragged, shapes
from moeq_jax.qtensor import QTensor

MIXES = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "8": (8,), "1-4": (1, 2, 3, 4), "2.5": (2, 2, 2, 4)}
GROUP = 128
ROTATED_BYTES = 240 << 20  # four times the L2 cache
MAX_SETS = 16
LAYERS = "mixtral-8x7b,switch-base-64"


def run(
  layers: str = LAYERS, tokens: str = "1,16,64,512,4096", mixes: str = "2,3,4,1-4,2.5", routing: str = "uniform",
  repeats: int = 30,
) -> dict[str, Any]:
  """Ceilings, correctness and times on the Hopper GPU that jax finds.

  Args:
    layers: names of `kernels.shapes.LAYERS`, with commas; the up projection of each is measured.
    tokens: tokens per call, with commas; rows are tokens times top-k.
    mixes: names of widths, with commas: a width, `1-4` for all of them in turn, `2.5` for three experts of 2 bits to
      one of 4.
    routing: one of `kernels.shapes.ROUTINGS`.
    repeats: timed batches of calls; their median counts.

  Returns:
    A JSON-able dictionary: `ceilings`, `errors`, `results` with one entry per case, `skipped` with every peer that did
    not run and why. Without a Hopper GPU only `skipped`, and no time at all.
  """
  result = {"benchmark": "kernels_gpu", "routing": routing, "repeats": repeats, "machine": _machine(), "ceilings": {},
            "errors": [], "results": [], "skipped": {}}
  refusal = pallas_gpu.supports((8, 8, 1024, 1024), (jnp.dtype(jnp.bfloat16), None), jax.default_backend())
  if refusal is not None:
    result["skipped"]["pallas_gpu"] = refusal
    return result
  result["ceilings"] = _ceilings(repeats)
  result["errors"] = [_error(mix) for mix in MIXES]
  worst = max(entry["relative_error"] for entry in result["errors"])
  if not worst < 1e-2:
    raise RuntimeError(f"kernels_gpu: relative error {worst:.3g} is not below 1e-2, so nothing is timed: "
                       f"{result['errors']}")
  cases = [(name, int(count)) for name in layers.split(",") for count in tokens.split(",")]
  with progress.bar("kernels_gpu", len(cases)) as advance:
    for name, count in cases:
      result["results"] += _case(name, count, mixes.split(","), routing, repeats, result["ceilings"], result["skipped"])
      advance(f"{name}, {count} tokens")
  _show(result)
  return result


def _machine() -> dict[str, Any]:
  """Device and versions that the times depend on."""
  device, versions = jax.devices()[0], {}
  for package in ("jax", "jaxlib", "tokamax", "humming-kernels", "torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {"device": device.device_kind, "platform": device.platform, "versions": versions}


def seconds(call: Callable[[int], Any], repeats: int, calls: int = 8) -> float:
  """Median over `repeats` of the time of one of `calls` calls in flight; `call(i)` takes weight set `i`."""
  jax.block_until_ready(call(0))
  times = []
  for repeat in range(repeats):
    started = time.perf_counter()
    out = [call(repeat * calls + index) for index in range(calls)]
    jax.block_until_ready(out)
    times.append((time.perf_counter() - started) / calls)
  return statistics.median(times)


def _ceilings(repeats: int) -> dict[str, float]:
  """Copy bandwidth (read and written bytes) and rate of a square bfloat16 matmul."""
  data = jnp.ones((1 << 28,), jnp.uint32)
  copy = jax.jit(lambda a: a ^ jnp.uint32(1))
  a, b = (jax.random.normal(jax.random.key(seed), (8192, 8192), jnp.bfloat16) for seed in (0, 1))
  matmul = jax.jit(jnp.dot)
  return {"copy_bytes_per_second": 2 * data.nbytes / seconds(lambda _: copy(data), repeats, 2),
          "bfloat16_flops_per_second": 2 * 8192**3 / seconds(lambda _: matmul(a, b), repeats)}


def weights(shape: tuple[int, int, int], bits: Sequence[int], seed: int) -> QTensor:
  """Random packed weights `[E, K, N]`; `bits` are repeated over the experts. No code is ever made, only bytes."""
  experts, K, N = shape
  widths = np.resize(np.asarray(bits, np.int32), experts)
  size = planar.layout(K, N, GROUP)
  rows = size.k_block * widths.astype(np.int64) // 8
  keys = jax.random.split(jax.random.key(seed), 3)
  entries = experts, -(-K // size.group), N
  buffer = jax.random.bits(keys[0], (1, int(rows.sum()), size.stripe), jnp.uint8)
  scale = jax.random.uniform(keys[1], entries, jnp.float32, 0.5, 1.5).astype(jnp.bfloat16) / 64
  middle = jnp.asarray(2.0 ** (widths - 1), jnp.float32)[:, None, None]
  zero = (middle * jax.random.uniform(keys[2], entries, jnp.float32, 0.8, 1.2)).astype(jnp.bfloat16)
  blocks = jnp.asarray(widths)[:, None, None]
  offset = jnp.asarray(np.cumsum(rows) - rows, jnp.int32)[:, None, None]
  return QTensor(buffer, blocks, offset, scale, zero, K, N, size.group, size.k_tile, size.k_block)


def _error(mix: str) -> dict[str, Any]:
  """Relative distance to the reference back-end, over several numbers of rows, some experts without any."""
  shape, worst = (8, 1024, 1408), 0.0
  w = weights(shape, MIXES[mix], seed=7)
  for rows in (1, 9, 64, 515):
    sizes = jnp.asarray(shapes.group_sizes("zipf", rows, shape[0], seed=rows))
    x = jax.random.normal(jax.random.key(rows), (rows, shape[1]), jnp.bfloat16)
    y, wanted = (jax.jit(functools.partial(api.grouped_matmul, backend=name, out_dtype=jnp.float32))(x, w, sizes)
                 for name in ("pallas_gpu", "reference"))
    worst = max(worst, float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted)))
  return {"mix": mix, "relative_error": worst if np.isfinite(worst) else float("inf")}


def moved_bytes(w_bits: np.ndarray, shape: tuple[int, int, int], sizes: np.ndarray) -> int:
  """Bytes that a call must move: codes, scales and zeros of experts with rows (bfloat16: 16 bits), rows in and out."""
  experts, K, N = shape
  quantized = np.where(w_bits < 16, 4 * N * -(-K // GROUP), 0)
  busy = np.asarray(sizes) > 0
  return int(np.sum(busy * (K * N * w_bits // 8 + quantized)) + 2 * np.sum(sizes) * (K + N))


def _case(
  name: str, count: int, mixes: Sequence[str], routing: str, repeats: int, ceilings: dict[str, float],
  skipped: dict[str, str],
) -> list[dict[str, Any]]:
  """One layer at one number of tokens: every mix of widths, then every peer that can be imported."""
  layer = shapes.LAYERS[name]
  shape, rows = layer.matmuls()["up"], count * layer.top_k
  sizes = shapes.group_sizes(routing, rows, shape[0])
  x, device_sizes = jax.random.normal(jax.random.key(1), (rows, shape[1]), jnp.bfloat16), jnp.asarray(sizes)
  found = []

  def add(kind: str, mix: str, bits: np.ndarray, taken: float) -> None:
    moved, flops = moved_bytes(bits, shape, sizes), 2 * rows * shape[1] * shape[2]
    roofline = max(moved / ceilings["copy_bytes_per_second"], flops / ceilings["bfloat16_flops_per_second"])
    found.append({"layer": name, "tokens": count, "rows": rows, "kernel": kind, "bits": mix, "seconds": taken,
                  "bytes": moved, "bytes_per_second": moved / taken, "flops_per_second": flops / taken,
                  "share_of_roofline": roofline / taken})

  run_view = jax.jit(functools.partial(pallas_gpu.forward, out_dtype=jnp.dtype(jnp.bfloat16)))
  for mix in mixes:
    bits = np.resize(np.asarray(MIXES[mix], np.int64), shape[0])
    made = [jax.jit(pallas_gpu.prepare)(weights(shape, MIXES[mix], seed))
            for seed in range(_sets(moved_bytes(bits, shape, sizes)))]
    add("pallas_gpu", mix, bits, seconds(lambda i, made=made: run_view(x, made[i % len(made)], device_sizes), repeats))
  dense = [jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(_sets(2 * math.prod(shape)))]
  sixteen = np.full(shape[0], 16)
  for peer, call in _jax_peers(skipped).items():
    try:
      add(peer, "16", sixteen, seconds(lambda i, call=call: call(x, dense[i % len(dense)], device_sizes), repeats))
    except Exception as error:  # a peer that fails is reported, and the table goes on
      skipped[peer] = f"{name}, {count} tokens: {type(error).__name__}: {str(error)[:200]}"
  torch_seconds = _torch_grouped(shape, sizes, repeats, skipped)
  if torch_seconds is not None:
    add("torch._grouped_mm", "16", sixteen, torch_seconds)
  return found


def _sets(size: int) -> int:
  """As many sets of `size` bytes as keep the L2 cache from holding any."""
  return min(MAX_SETS, 1 + ROTATED_BYTES // max(size, 1))


def _jax_peers(skipped: dict[str, str]) -> dict[str, Callable[..., jax.Array]]:
  """bfloat16 grouped matmuls that take `(x, w, group_sizes)`."""
  peers = {"lax.ragged_dot": jax.jit(jax.lax.ragged_dot),
           "row tiles (XLA)": jax.jit(functools.partial(ragged.matmul, tile=64))}
  try:
    mosaic = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    peers["ragged_dot_mgpu"] = jax.jit(lambda x, w, sizes: mosaic.ragged_dot(
      x, w, group_sizes=sizes, block_m=64, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4))
  except ImportError as error:
    skipped["ragged_dot_mgpu"] = str(error)
  try:
    tokamax = importlib.import_module("tokamax")
    peers["tokamax.ragged_dot"] = jax.jit(lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes))
  except ImportError as error:
    skipped["tokamax"] = str(error)
  try:
    importlib.import_module("humming")
    skipped["humming"] = "installed, but this benchmark has no adapter for its grouped layers yet"
  except ImportError as error:
    skipped["humming"] = str(error)
  return peers


_TORCH = """
import json, statistics, sys, time, torch
shape, sizes, repeats, sets = json.loads(sys.argv[1])
make = lambda *size: torch.randn(*size, dtype=torch.bfloat16, device="cuda")
offsets = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
x, w, times = make(sum(sizes), shape[1]), [make(*shape) for _ in range(sets)], []
for repeat in range(repeats + 1):
  torch.cuda.synchronize()
  started = time.perf_counter()
  for index in range(8):
    torch._grouped_mm(x, w[(repeat * 8 + index) % sets], offs=offsets)
  torch.cuda.synchronize()
  times.append((time.perf_counter() - started) / 8)
print(statistics.median(times[1:]))
"""


def _torch_grouped(
  shape: tuple[int, int, int], sizes: np.ndarray, repeats: int, skipped: dict[str, str]
) -> float | None:
  """Seconds of torch's bfloat16 grouped matmul, in a process of its own, where one with torch can be started."""
  sets = _sets(2 * math.prod(shape))
  problem = json.dumps([list(shape), np.asarray(sizes).tolist(), repeats, sets])
  child = subprocess.run([sys.executable, "-c", _TORCH, problem], capture_output=True, text=True, timeout=600)
  if child.returncode:
    skipped["torch"] = (child.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return None
  return float(child.stdout.split()[-1])


def _show(result: dict[str, Any]) -> None:
  ceilings = result["ceilings"]
  table = rich_table.Table(
    title=f"grouped matmul on {result['machine']['device']}, {result['routing']} routing",
    caption=f"copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, bfloat16 matmul "
            f"{ceilings['bfloat16_flops_per_second'] / 1e12:.0f} TFLOP/s; not run: {result['skipped'] or 'none'}")
  for heading in ("layer", "tokens", "kernel", "bits", "us", "GB/s", "TFLOP/s", "of roofline"):
    table.add_column(heading, justify="left" if heading in ("layer", "kernel", "bits") else "right")
  for row in result["results"]:
    table.add_row(row["layer"], str(row["tokens"]), row["kernel"], row["bits"], f"{row['seconds'] * 1e6:.1f}",
                  f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['flops_per_second'] / 1e12:.1f}",
                  f"{row['share_of_roofline']:.0%}")
  rich_console.Console().print(table)
