"""The grouped matmul of packed experts beside its peers: the table of the machine that this runs on.

On a GPU that of `kernels_gpu`. On a CPU: packed weights at several widths, exact and with activations in 8 bits,
against a loop over experts with dense bfloat16 weights (the strongest peer of the same program), `lax.ragged_dot`,
and numpy with dequantized float32 weights. They are timed in turn, round after round, so that other load on the
machine meets them alike; numpy in rounds of its own, because the threads of its BLAS keep the cores busy for a while
after each product, and `lax.ragged_dot` in fewer, because it multiplies every row by every expert. Ceilings come
first: how fast this machine copies memory and multiplies large bfloat16 matrices.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import kernels, progress, qtensor
from moeq_jax.kernels import shapes
from moeq_jax.qtensor import QTensor

MATMULS = {"mixtral-like": (8, 1024, 3584), "switch-like": (64, 768, 3072)}  # E, K, N
WIDTHS = {"2": (2,), "3": (3,), "4": (4,), "mixed": (1, 2, 3, 4, 8, 3, 2, 4)}  # over the experts, again and again
ROWS = (2, 16, 128, 512)
GROUP = 128
DENSE = "dense bf16 loop"


class Case(NamedTuple):
  """One grouped matmul.

  Attributes:
    name: of the shape, in `MATMULS`.
    widths: in `WIDTHS`.
    rows: tokens times top-k.
    x: `[T, K]` bfloat16.
    q: packed weights.
    values: `[E, K, N]` float32 numpy, what the packed weights are.
    dense: the same in bfloat16.
    sizes: `[E]` int32.
  """

  name: str
  widths: str
  rows: int
  x: jax.Array
  q: QTensor
  values: np.ndarray
  dense: jax.Array
  sizes: jax.Array


def run(rounds: int = 9, routing: str = "uniform", shape: str = "", figure: str = "") -> dict[str, Any]:
  """Milliseconds of every method on every case, medians over rounds, and ratios to the dense loop.

  Args:
    rounds: timed calls of each method, after one that compiles.
    routing: one of `shapes.ROUTINGS`.
    shape: one of `MATMULS`; all of them by default.
    figure: a PNG to draw, on a CPU.

  Returns:
    A JSON-able dictionary: `machine`, `ceilings`, and one entry per case under `results`: milliseconds and ratio to
    the dense loop by method, relative errors against float64, and the share of the limit that the exact method
    reaches: the time that its bytes (packed weights of the experts with rows, and activations) or its products would
    take at the ceilings, whichever is longer.

  Raises:
    ValueError: no benchmark for this kind of device, or no such shape or routing.
  """
  if shape not in ("", *MATMULS) or routing not in shapes.ROUTINGS:
    raise ValueError(f"bench kernels: shape={shape!r} of {list(MATMULS)}, routing={routing!r} of {shapes.ROUTINGS}")
  if (device := jax.default_backend()) == "gpu":
    from moeq_jax.bench import kernels_gpu  # what it imports takes a second

    return kernels_gpu.run(routing=routing)
  if device != "cpu":
    raise ValueError(f"bench kernels: there is no table for a {device}; set JAX_PLATFORMS=cpu for that of the CPU")
  ceilings, results = _ceilings(rounds), []
  chosen = {name: sizes for name, sizes in MATMULS.items() if shape in ("", name)}
  with progress.bar("kernels", len(chosen) * len(WIDTHS) * len(ROWS)) as advance:
    for name, sizes in chosen.items():
      for label, widths in WIDTHS.items():
        weights = _weights(sizes, widths)
        for rows in ROWS:
          case = _case(name, label, rows, weights, routing)
          results.append(_measure(case, ceilings, rounds))
          advance(f"{name} {label} bits {rows} rows")
  found = {"benchmark": "kernels", "routing": routing, "group": GROUP, "rounds": rounds,
           "machine": {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__},
           "ceilings": ceilings, "results": results}
  _show(found)
  if figure:
    from moeq_jax.bench import _kernels_figure  # matplotlib

    _kernels_figure.draw(found, Path(figure))
  return found


def _weights(shape: tuple[int, int, int], widths: tuple[int, ...]) -> tuple[QTensor, np.ndarray, jax.Array]:
  """Random packed weights whose experts have the widths in turn, and their values in float32 and in bfloat16."""
  experts, rows, columns = shape
  rng = np.random.default_rng(0)
  bits = np.resize(widths, experts)
  codes = rng.integers(0, 256, shape, np.uint8) & ((1 << bits) - 1).astype(np.uint8)[:, None, None]
  entries = experts, rows // GROUP, columns
  scale = (rng.uniform(0.5, 1.5, entries) / 2.0 ** bits[:, None, None] / 16).astype(ml_dtypes.bfloat16)
  zero = np.broadcast_to(2.0 ** (bits[:, None, None] - 1), entries).astype(ml_dtypes.bfloat16)
  q = jax.tree.map(jnp.asarray, qtensor.pack(codes, bits, scale, zero, group=GROUP))
  return q, np.asarray(qtensor.dequantize(q)), qtensor.dequantize(q, jnp.bfloat16)


def _case(name: str, widths: str, rows: int, weights: tuple[QTensor, np.ndarray, jax.Array], routing: str) -> Case:
  q, values, dense = weights
  x = np.random.default_rng(1).standard_normal((rows, q.K), np.float32).astype(ml_dtypes.bfloat16)
  sizes = shapes.group_sizes(routing, rows, q.shape[0])
  return Case(name, widths, rows, jnp.asarray(x), q, values, dense, jnp.asarray(sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------


def _methods(case: Case) -> dict[str, Callable[[], Any]]:
  x, sizes = case.x, case.sizes
  packed = {name: jax.jit(functools.partial(kernels.grouped_matmul, activations=name)) for name in ("exact", "int8")}
  dense, ragged = jax.jit(_dense_loop, static_argnums=3), jax.jit(lax.ragged_dot)
  plain = np.asarray(x, np.float32)
  ends = np.cumsum(sizes)
  experts = [(int(e), slice(int(ends[e] - sizes[e]), int(ends[e]))) for e in np.flatnonzero(sizes)]
  return {
    "exact": lambda: packed["exact"](x, case.q, sizes),
    "int8": lambda: packed["int8"](x, case.q, sizes),
    **{f"{DENSE} {tile}": functools.partial(dense, x, case.dense, sizes, tile) for tile in _row_tiles(case)},
    "ragged_dot bf16": lambda: ragged(x, case.dense, sizes),
    "numpy f32": lambda: np.concatenate([plain[rows] @ case.values[e] for e, rows in experts]),
  }


def _row_tiles(case: Case) -> list[int]:
  """Sizes of row tiles for the dense loop, which is given the best of them: one to four times an expert's mean rows."""
  mean = max(1, case.rows // case.q.shape[0])
  least = max(4, 1 << (mean - 1).bit_length())
  return sorted({min(case.rows, least << more) for more in range(3)})


def _dense_loop(x: jax.Array, w: jax.Array, sizes: jax.Array, tile: int) -> jax.Array:
  """`[T, K], [E, K, N], [E] -> [T, N]`: what one would write without a kernel, and without work for absent experts."""
  end = jnp.cumsum(sizes)

  def expert(e: jax.Array, y: jax.Array) -> jax.Array:
    mine = lax.dynamic_index_in_dim(w, e, keepdims=False)

    def rows(i: jax.Array, y: jax.Array) -> jax.Array:
      wanted = end[e] - sizes[e] + i * tile
      first = jnp.minimum(wanted, len(x) - tile)
      part = jnp.dot(lax.dynamic_slice_in_dim(x, first, tile), mine)
      old = lax.dynamic_slice_in_dim(y, first, tile)
      keep = (first + jnp.arange(tile) >= wanted)[:, None]
      return lax.dynamic_update_slice_in_dim(y, jnp.where(keep, part, old), first, axis=0)

    return lax.fori_loop(0, -(-sizes[e] // tile), rows, y)

  def unless_empty(e: jax.Array, y: jax.Array) -> jax.Array:
    return lax.cond(sizes[e] > 0, expert, lambda _, y: y, e, y)  # XLA copies an expert before it looks at its rows

  return lax.fori_loop(0, w.shape[0], unless_empty, jnp.zeros((len(x), w.shape[2]), x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def _times(methods: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """Median milliseconds of each, taken in turn."""
  seconds: dict[str, list[float]] = {name: [] for name in methods}
  for number in range(rounds + 1):
    for name, call in methods.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      if number:  # the first compiles
        seconds[name].append(time.perf_counter() - started)
  medians = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
  dense = [medians.pop(name) for name in list(medians) if name.startswith(DENSE)]
  return medians | ({DENSE: min(dense)} if dense else {})


def _ceilings(rounds: int) -> dict[str, float]:
  """Bytes a second that a copy reads, and operations a second of a large bfloat16 product."""
  block, target = np.ones(1 << 28, np.uint8), np.ones(1 << 28, np.uint8)
  square, product = jnp.ones((2048, 2048), jnp.bfloat16), jax.jit(lambda a: a @ a)
  found = _times({"copy": lambda: np.copyto(target, block), "product": lambda: product(square)}, rounds)
  return {"bytes_per_second": 1e3 * block.size / found["copy"],
          "bf16_operations_per_second": 2e3 * 2048**3 / found["product"]}


def _measure(case: Case, ceilings: Mapping[str, float], rounds: int) -> dict[str, Any]:
  methods = _methods(case)
  wanted = _exact(case)
  errors = {}
  for name, call in methods.items():
    difference = np.asarray(call(), np.float64) - wanted
    errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(wanted))
  apart = {"ragged_dot bf16": 2, "numpy f32": rounds}
  found = _times({name: call for name, call in methods.items() if name not in apart},
                 rounds * (3 if case.rows < 100 else 1))
  for name, fewer in apart.items():
    found |= _times({name: methods[name]}, min(fewer, rounds))
  active = np.asarray(case.sizes) > 0
  bits = np.asarray(case.q.bits, np.int64)[active].sum() * case.q.K * case.q.N / case.q.bits[0].size
  moved = bits / 8 + active.sum() * 4 * case.q.groups * case.q.N + 2 * case.rows * (case.q.K + case.q.N)
  limit = max(moved / ceilings["bytes_per_second"],
              2 * case.rows * case.q.K * case.q.N / ceilings["bf16_operations_per_second"])
  return {"shape": case.name, "experts, K, N": case.q.shape, "widths": case.widths, "rows": case.rows,
          "experts_with_rows": int(active.sum()), "milliseconds": found,
          "ratio_to_dense": {name: value / found[DENSE] for name, value in found.items()},
          "errors": errors, "share_of_limit": 1e3 * limit / found["exact"]}


def _exact(case: Case) -> np.ndarray:
  """`[T, N]` float64, from the values of the codes before they are rounded to bfloat16."""
  x, ends = np.asarray(case.x, np.float64), np.cumsum(case.sizes)
  return np.concatenate([x[end - size : end] @ case.values[e].astype(np.float64)
                         for e, (end, size) in enumerate(zip(ends, case.sizes, strict=True)) if size])


def _show(found: Mapping[str, Any]) -> None:
  ceilings, machine = found["ceilings"], found["machine"]
  table = rich_table.Table(
    title="grouped matmul: milliseconds, and times the dense bfloat16 loop",
    caption=f"{machine['cores']} cores, {machine['device']}, {found['routing']} routing; copies"
            f" {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, bfloat16"
            f" {ceilings['bf16_operations_per_second'] / 1e9:.0f} Gop/s")
  names = list(found["results"][0]["milliseconds"])
  for heading in ("shape", "bits", "rows", *names, "error exact", "error int8", "of the limit"):
    table.add_column(heading, justify="left" if heading == "shape" else "right")
  for row in found["results"]:
    cells = [f"{row['milliseconds'][name]:.1f} ({row['ratio_to_dense'][name]:.2f}x)" for name in names]
    errors = [f"{row['errors'][name]:.1e}" for name in ("exact", "int8")]
    table.add_row(row["shape"], row["widths"], str(row["rows"]), *cells, *errors, f"{row['share_of_limit']:.0%}")
  rich_console.Console(width=None if os.isatty(1) else 180).print(table)
