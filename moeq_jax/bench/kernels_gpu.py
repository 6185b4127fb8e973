"""The grouped matmul on a Hopper GPU: ceilings, correctness, then a table over shapes, widths and peers, in one call.

A timed program makes eight calls, each with rows and weights of its own, and the L2 cache is overwritten before it, so
that no weights are found there. Two times are taken: `seconds` by the host's clock, with what the host does between
launches, and `device_seconds`, the sum of the durations of all device activities of a call in jax's profile. That
leaves out the gaps between them, a microsecond or so each, which a peer's replayed CUDA graph has. Data is random,
since zeros draw less power and run at higher clocks. The roofline of a row is its bytes (packed weights and scales of
experts with rows, rows in, rows out) at the bandwidth measured at the start, of a copy or of reading alone, whichever
is higher, or its products at the matmul rate measured there, whichever takes longer; its share is that of
`device_seconds`.

All mixes of widths are run by one compiled program: their buffers have the length that the widest needs. Every row is
printed as soon as it is measured, so that a call that is cut off loses nothing.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import planar, progress
from moeq_jax.bench import _hopper_peers
from moeq_jax.kernels import api, pallas_gpu, shapes
from moeq_jax.qtensor import QTensor

MIXES = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "8": (8,), "1-4": (1, 2, 3, 4), "2.5": (2, 2, 2, 4),
         "all": (1, 2, 3, 4, 8, 16)}
GROUP = 128
FLUSHED_BYTES = 240 << 20  # four times the L2 cache
CALLS = _hopper_peers.CALLS
LAYERS = "mixtral-8x7b,switch-base-64"


def run(
  layers: str = LAYERS, tokens: str = "1,16,64,512,4096", mixes: str = "2,3,4,1-4,2.5", routing: str = "uniform",
  repeats: int = 30, peers: bool = True,
) -> dict[str, Any]:
  """Ceilings, correctness and times on the Hopper GPU that jax finds.

  Args:
    layers: names of `kernels.shapes.LAYERS`, with commas; the up projection of each is measured.
    tokens: tokens per call, with commas; rows are tokens times top-k.
    mixes: names of widths, with commas: a width, `1-4` for all of them in turn, `2.5` for three experts of 2 bits to
      one of 4.
    routing: one of `kernels.shapes.ROUTINGS`.
    repeats: timed batches of calls; their median counts.
    peers: whether other kernels are measured beside.

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
  result["errors"] = _errors()
  worst = max(entry["relative_error"] for entry in result["errors"])
  if not worst < 1e-2:
    raise RuntimeError(f"kernels_gpu: relative error {worst:.3g} is not below 1e-2, so nothing is timed: "
                       f"{result['errors']}")
  cases = [(name, int(count)) for name in listed(layers) for count in listed(tokens)]
  with progress.bar("kernels_gpu", len(cases)) as advance:
    for name, count in cases:
      for row in _case(name, count, listed(mixes), routing, repeats, peers, result["skipped"]):
        result["results"].append(_against(row, result["ceilings"]))
        print(json.dumps(result["results"][-1]), flush=True)
      advance(f"{name}, {count} tokens")
  _show(result)
  return result


def listed(value: Any) -> list[str]:
  """Names from an option: the command line turns `1,16` into a tuple and `2.5` into a number."""
  return value.split(",") if isinstance(value, str) else [str(v) for v in np.atleast_1d(np.array(value, object))]


def _machine() -> dict[str, Any]:
  """Device and versions that the times depend on."""
  device, versions = jax.devices()[0], {}
  for package in ("jax", "jaxlib", "tokamax", "humming-kernels", "torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {"device": device.device_kind, "platform": device.platform, "versions": versions}


def seconds(batch: Callable[[], Any], repeats: int) -> float:
  """Median over `repeats` of the time of `batch()`, divided by the calls that it makes; the L2 cache is cold."""
  flush = jax.jit(lambda a: a ^ jnp.uint8(1))
  filled = jnp.zeros(FLUSHED_BYTES, jnp.uint8)
  jax.block_until_ready(batch())
  times = []
  for _ in range(repeats):
    filled = jax.block_until_ready(flush(filled))
    started = time.perf_counter()
    jax.block_until_ready(batch())
    times.append((time.perf_counter() - started) / CALLS)
  return statistics.median(times)


def batched(run: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
  """`run(x, w, sizes)` for every x and w of two lists, as one program."""
  inner = jax.jit(run)
  return jax.jit(lambda xs, ws, sizes: [inner(x, w, sizes) for x, w in zip(xs, ws, strict=True)])


def device_seconds(batch: Callable[[], Any], repeats: int = 5) -> tuple[float, float] | None:
  """Median over `repeats` of the device time of a call of `batch()`: all its activities, and its longest kernel alone.

  None where the profile holds no device.
  """
  flush = jax.jit(lambda a: a ^ jnp.uint8(1))
  filled = jnp.zeros(FLUSHED_BYTES, jnp.uint8)
  found = []
  for _ in range(repeats):
    filled = jax.block_until_ready(flush(filled))
    with tempfile.TemporaryDirectory() as directory:
      with jax.profiler.trace(directory):
        jax.block_until_ready(batch())
      profile = jax.profiler.ProfileData.from_file(str(next(Path(directory).glob("**/*.xplane.pb"))))
    taken = collections.Counter()
    for plane in profile.planes:
      if plane.name.startswith("/device:"):
        for line in plane.lines:
          if line.name.startswith("Stream"):
            for event in line.events:
              taken[event.name] += event.duration_ns / 1e9 / CALLS
    if not taken:
      return None
    found.append((sum(taken.values()), max(taken.values())))
  return tuple(statistics.median(column) for column in zip(*found, strict=True))


def _ceilings(repeats: int) -> dict[str, float]:
  """Bandwidths of copies (read and written bytes) and of reading, and the rate of a square bfloat16 matmul."""
  data = [jnp.full((1 << 26,), n, jnp.uint32) for n in range(CALLS)]
  copies = jax.jit(lambda arrays: [a ^ jnp.uint32(1) for a in arrays])
  reads = jax.jit(lambda arrays: [jnp.max(a) for a in arrays])
  square = lambda seed: jax.random.normal(jax.random.key(seed), (8192, 8192), jnp.bfloat16)  # noqa: E731
  xs, ys = ([square(2 * seed + side) for seed in range(CALLS)] for side in (0, 1))
  matmuls = jax.jit(lambda xs, ys: [jnp.dot(x, y) for x, y in zip(xs, ys, strict=True)])
  taken = [(device_seconds(batch) or [seconds(batch, repeats)])[0]
           for batch in (lambda: copies(data), lambda: reads(data), lambda: matmuls(xs, ys))]
  return {"copy_bytes_per_second": 2 * data[0].nbytes / taken[0], "read_bytes_per_second": data[0].nbytes / taken[1],
          "bfloat16_flops_per_second": 2 * 8192**3 / taken[2]}


def weights(shape: tuple[int, int, int], bits: Sequence[int], seed: int, capacity: int = 0) -> QTensor:
  """Random packed weights `[E, K, N]`; `bits` are repeated over the experts. No code is ever made, only bytes.

  The buffer has `capacity` rows if that is more than the weights need.
  """
  experts, K, N = shape
  widths = np.resize(np.asarray(bits, np.int32), experts)
  size = planar.layout(K, N, GROUP)
  rows = size.k_block * widths.astype(np.int64) // 8
  keys = jax.random.split(jax.random.key(seed), 3)
  entries = experts, -(-K // size.group), N
  buffer = jax.random.bits(keys[0], (1, max(int(rows.sum()), capacity), size.stripe), jnp.uint8)
  scale = jax.random.uniform(keys[1], entries, jnp.float32, 0.5, 1.5).astype(jnp.bfloat16) / 64
  middle = jnp.asarray(2.0 ** (widths - 1), jnp.float32)[:, None, None]
  zero = (middle * jax.random.uniform(keys[2], entries, jnp.float32, 0.8, 1.2)).astype(jnp.bfloat16)
  blocks = jnp.asarray(widths)[:, None, None]
  offset = jnp.asarray(np.cumsum(rows) - rows, jnp.int32)[:, None, None]
  return QTensor(buffer, blocks, offset, scale, zero, K, N, size.group, size.k_tile, size.k_block)


def capacity(shape: tuple[int, int, int], mixes: Sequence[str]) -> int:
  """Rows of a buffer that holds any of `mixes`."""
  most = max(int(np.resize(MIXES[mix], shape[0]).sum()) for mix in mixes)
  return planar.layout(*shape[1:], GROUP).k_block * most // 8


def _errors(backend: str = "pallas_gpu", shape: tuple[int, int, int] = (8, 1024, 1536),
            counts: Sequence[int] = (1, 9, 64, 515)) -> list[dict[str, Any]]:
  """Relative distance to the reference back-end: every mix, several numbers of rows, experts without any.

  Random bytes are no numbers where they are 16-bit weights: there, bytes stay below 64.
  """
  run = {name: jax.jit(functools.partial(api.grouped_matmul, backend=name, out_dtype=jnp.float32))
         for name in (backend, "reference")}
  found = []
  for mix in MIXES:
    w, worst = weights(shape, MIXES[mix], seed=7, capacity=capacity(shape, list(MIXES))), 0.0
    if 16 in MIXES[mix]:  # bytes below 64 are bfloat16 of at most 0.5
      w = dataclasses.replace(w, buffer=w.buffer & 63)
    for rows in counts:
      sizes = jnp.asarray(shapes.group_sizes("zipf", rows, shape[0], seed=rows))
      x = jax.random.normal(jax.random.key(rows), (rows, shape[1]), jnp.bfloat16)
      y, wanted = (run[name](x, w, sizes) for name in (backend, "reference"))
      error = float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted))
      worst = max(worst, error if np.isfinite(error) else float("inf"))
    found.append({"mix": mix, "relative_error": worst})
  return found


def moved_bytes(w_bits: np.ndarray, shape: tuple[int, int, int], sizes: np.ndarray) -> int:
  """Bytes that a call must move: codes, scales and zeros of experts with rows (bfloat16: 16 bits), rows in and out."""
  experts, K, N = shape
  quantized = np.where(w_bits < 16, 4 * N * -(-K // GROUP), 0)
  busy = np.asarray(sizes) > 0
  return int(np.sum(busy * (K * N * w_bits // 8 + quantized)) + 2 * np.sum(sizes) * (K + N))


def _case(
  name: str, count: int, mixes: Sequence[str], routing: str, repeats: int, peers: bool, skipped: dict[str, str]
) -> Iterator[dict[str, Any]]:
  """One layer at one number of tokens: every mix of widths, then every peer that can be imported."""
  layer = shapes.LAYERS[name]
  shape, rows = layer.matmuls()["up"], count * layer.top_k
  sizes = shapes.group_sizes(routing, rows, shape[0])
  xs = [jax.random.normal(jax.random.key(seed), (rows, shape[1]), jnp.bfloat16) for seed in range(CALLS)]
  device_sizes = jnp.asarray(sizes)

  def row(kind: str, mix: str, taken: float, device: tuple[float, float] | None = None) -> dict[str, Any]:
    moved = moved_bytes(_widths(mix, shape[0]), shape, sizes)
    on_device = {} if device is None else {"device_seconds": device[0], "kernel_seconds": device[1]}
    return {"layer": name, "tokens": count, "rows": rows, "kernel": kind, "bits": mix, "seconds": taken, **on_device,
            "bytes": moved, "flops": 2 * rows * shape[1] * shape[2]}

  run = batched(functools.partial(pallas_gpu.forward, out_dtype=jnp.dtype(jnp.bfloat16)))
  for mix in mixes:
    made = [jax.jit(pallas_gpu.prepare)(weights(shape, MIXES[mix], seed, capacity(shape, mixes)))
            for seed in range(CALLS)]
    batch = functools.partial(run, xs, made, device_sizes)
    yield row("pallas_gpu", mix, seconds(batch, repeats), device_seconds(batch))
  if not peers:
    return
  dense = [jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(CALLS)]
  for peer, call in _hopper_peers.jax_peers(skipped).items():
    try:
      batch = functools.partial(batched(call), xs, dense, device_sizes)
      yield row(peer, "16", seconds(batch, repeats), device_seconds(batch))
    except Exception as error:  # a peer that fails is reported, and the table goes on
      skipped[peer] = f"{name}, {count} tokens: {type(error).__name__}: {str(error)[:200]}"
  plans = {mix: _widths(mix, shape[0]).tolist() for mix in mixes}
  for peer, mix, taken in _hopper_peers.other_peers(shape, sizes, plans, repeats, skipped):
    yield row(peer, mix, taken)


def _widths(mix: str, experts: int) -> np.ndarray:
  """`[E]` widths; `"16"` is plain bfloat16."""
  return np.resize(np.asarray(MIXES.get(mix, (16,)), np.int64), experts)


def _against(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
  """The row with its rates, and the share of the roofline that it reaches."""
  by_bytes = row["bytes"] / max(ceilings["copy_bytes_per_second"], ceilings["read_bytes_per_second"])
  by_products = row["flops"] / ceilings["bfloat16_flops_per_second"]
  roofline, taken = max(by_bytes, by_products), row.get("device_seconds", row["seconds"])
  return {**row, "bytes_per_second": row["bytes"] / taken, "flops_per_second": row["flops"] / taken,
          "roofline_seconds": roofline, "share_of_roofline": roofline / taken}


def _show(result: dict[str, Any]) -> None:
  ceilings = result["ceilings"]
  table = rich_table.Table(
    title=f"grouped matmul on {result['machine']['device']}, {result['routing']} routing",
    caption=f"copy {ceilings['copy_bytes_per_second'] / 1e12:.2f}, read {ceilings['read_bytes_per_second'] / 1e12:.2f}"
            f" TB/s, bfloat16 matmul "
            f"{ceilings['bfloat16_flops_per_second'] / 1e12:.0f} TFLOP/s; not run: {result['skipped'] or 'none'}")
  for heading in ("layer", "tokens", "kernel", "bits", "us", "on the device", "GB/s", "TFLOP/s", "of roofline"):
    table.add_column(heading, justify="left" if heading in ("layer", "kernel", "bits") else "right")
  for row in result["results"]:
    microseconds = [f"{row[name] * 1e6:.1f}" if name in row else "" for name in ("seconds", "device_seconds")]
    table.add_row(row["layer"], str(row["tokens"]), row["kernel"], row["bits"], *microseconds,
                  f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['flops_per_second'] / 1e12:.1f}",
                  f"{row['share_of_roofline']:.0%}")
  rich_console.Console().print(table)
