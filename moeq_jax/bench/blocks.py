"""Experts with a width for every block of neurons beside experts with one width each, at equal bytes.

Blocks are stripes of columns of gate and up, and K-blocks of rows of down (`encode/neurons.py`). Every expert has
blocks of 1, 2, 3 and 4 bits in equal numbers, in any order; beside it experts of 2 and 3 bits in turn: 2.5 bits per
weight either way, with the same scale groups, through the same door. Both are timed in turn, round after round, and
the ratio is the median of the rounds' ratios, so that other load on the machine meets both alike.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import channels, kernels, progress, qtensor
from moeq_jax.encode import neurons
from moeq_jax.kernels import cpu_int8, shapes
from moeq_jax.qtensor import QTensor

LAYERS = {
  "mixtral-like": shapes.Layer(experts=8, top_k=2, hidden=1024, ffn=3584),
  "switch-like": shapes.LAYERS["switch-base-64"],
  "moeq-small": shapes.LAYERS["moeq-small"],
}
ROWS = (2, 16, 128, 512)  # tokens times top-k
OF_EXPERTS, OF_BLOCKS = (2, 3), (4, 3, 2, 1)
ORDERS = ("shuffled", "sorted")
LEAST_SECONDS = 0.5  # of the timed pairs of a case


class Routed(NamedTuple):
  """What `kernels.moe_ffn` takes as routing."""

  experts: jax.Array
  weights: jax.Array
  group_sizes: jax.Array


def run(rounds: int = 15, shape: str = "", blocks: Sequence[int] | int = (128, 64),
        order: str = "shuffled") -> dict[str, Any]:
  """Milliseconds of products and of whole feed-forward blocks, and how much longer they take from widths per block.

  Args:
    rounds: least number of timed pairs of calls, after one that compiles; as many as fit into half a second are made.
    shape: one of `LAYERS`; all of them by default.
    blocks: neurons of a block, some of `channels.BLOCKS`.
    order: of an expert's blocks: `"shuffled"`, or `"sorted"`, the widest first.

  Returns:
    A JSON-able dictionary: `machine`, and one entry per case under `results`: milliseconds of both, their ratio, and
    the bytes of codes of both.

  Raises:
    ValueError: no such shape, block size or order, or a device that is not a CPU.
  """
  sizes = [blocks] if isinstance(blocks, int) else list(blocks)
  if shape not in ("", *LAYERS) or order not in ORDERS or not sizes or not set(sizes) <= set(channels.BLOCKS):
    raise ValueError(f"bench blocks: shape={shape!r} of {list(LAYERS)}, blocks={blocks!r} of {channels.BLOCKS},"
                     f" order={order!r} of {ORDERS}")
  if (device := jax.default_backend()) != "cpu":
    raise ValueError(f"bench blocks: it is for CPUs, and the device is a {device}; set JAX_PLATFORMS=cpu")
  chosen, results = [name for name in LAYERS if shape in ("", name)], []
  cases = {(name, block): list(_cases(LAYERS[name])) for name in chosen for block in sizes}
  with progress.bar("blocks", sum(map(len, cases.values()))) as advance:
    for (name, block), mine in cases.items():
      both = [_weights(LAYERS[name], block, of) for of in ("experts", order)]
      for part, rows, activations in mine:
        pair = [_call(LAYERS[name], weights, part, rows, activations) for weights in both]
        found = _times(pair, rounds)
        results.append({"shape": name, "part": part, "block": block, "group": both[0]["up"].group, "rows": rows,
                        "activations": activations, **found, "bytes": [_bytes(weights, part) for weights in both]})
        advance(f"{name} {part}, blocks of {block}, {rows} rows, {activations}")
  found = {"benchmark": "blocks", "rounds": rounds, "order": order, "results": results,
           "machine": {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}}
  _show(found)
  return found


def _cases(layer: shapes.Layer) -> Iterator[tuple[str, int, str]]:
  """`(part, rows, activations)`; with many rows, 8-bit activations are the exact way."""
  for part in ("up", "down", "ffn"):
    for rows in ROWS:
      for activations in ("exact", "int8") if rows <= cpu_int8.MOST_ROWS * layer.experts else ("exact",):
        yield part, rows, activations


def _weights(layer: shapes.Layer, block: int, of: str) -> dict[str, QTensor]:
  """Random packed weights by projection, with widths per expert (`of="experts"`) or per block, in one of `ORDERS`."""
  rng, group = np.random.default_rng(0), max(32, min(block, 128))
  packed = {}
  for name, (experts, K, N) in layer.matmuls().items():
    if of == "experts":
      bits = np.resize(OF_EXPERTS, (experts, 1, 1))
    else:
      count = layer.ffn // (neurons.down_block(block, group) if name == "down" else block)
      each = np.sort(np.resize(OF_BLOCKS, (experts, count)), axis=1)[:, ::-1]
      each = rng.permuted(each, axis=1) if of == "shuffled" else each
      bits = each[:, :, None] if name == "down" else each[:, None]
    mask = ((1 << bits) - 1).astype(np.uint8).repeat(K // bits.shape[1], axis=1).repeat(N // bits.shape[2], axis=2)
    codes = rng.integers(0, 256, (experts, K, N), np.uint8) & mask
    scale = (rng.uniform(0.5, 1.5, (experts, K // group, N)) / 64).astype(ml_dtypes.bfloat16)
    packed[name] = jax.tree.map(jnp.asarray, qtensor.pack(codes, bits, scale, np.ones_like(scale), group=group))
  return packed


def _bytes(weights: Mapping[str, QTensor], part: str) -> int:
  """Bytes of codes that a part reads when every expert has rows."""
  used = [q for name, q in weights.items() if part in ("ffn", name)]
  return sum(qtensor.used_rows(q) * q.buffer.shape[2] for q in used)


def _call(layer: shapes.Layer, weights: Mapping[str, QTensor], part: str, rows: int,
          activations: str) -> Callable[[], jax.Array]:
  rng, top_k = np.random.default_rng(1), layer.top_k if part == "ffn" else 1
  size = layer.ffn if part == "down" else layer.hidden
  x = jnp.asarray(rng.standard_normal((rows // top_k, size), np.float32), jnp.bfloat16)
  if part != "ffn":
    sizes = jnp.asarray(shapes.group_sizes("uniform", rows, layer.experts))
    product = jax.jit(functools.partial(kernels.grouped_matmul, activations=activations))
    return functools.partial(product, x, weights[part], sizes)
  experts = np.argsort(rng.random((len(x), layer.experts)), axis=1)[:, :top_k].astype(np.int32)
  routed = Routed(jnp.asarray(experts), jnp.full(experts.shape, 1 / top_k, jnp.bfloat16),
                  jnp.asarray(np.bincount(experts.ravel(), minlength=layer.experts).astype(np.int32)))
  block = jax.jit(functools.partial(kernels.moe_ffn, activations=activations))
  return functools.partial(block, x, routed, weights.get("gate"), weights["up"], weights["down"])


def _times(pair: list[Callable[[], jax.Array]], rounds: int) -> dict[str, Any]:
  """Median milliseconds of both, taken in turn, and the median of the rounds' ratios."""
  found: list[dict[int, float]] = []
  until = 0.0
  while len(found) <= rounds or time.perf_counter() < until:
    found.append({})
    for which in (0, 1) if len(found) % 2 else (1, 0):
      started = time.perf_counter()
      jax.block_until_ready(pair[which]())
      found[-1][which] = time.perf_counter() - started
    if len(found) == 1:  # the first compiles
      until = time.perf_counter() + LEAST_SECONDS
  experts, blocks = (np.array([seconds[which] for seconds in found[1:]]) for which in (0, 1))
  return {"milliseconds": {"experts": 1e3 * float(np.median(experts)), "blocks": 1e3 * float(np.median(blocks))},
          "ratio": float(np.median(blocks / experts)), "pairs": len(experts)}


def _show(found: Mapping[str, Any]) -> None:
  machine = found["machine"]
  table = rich_table.Table(
    title="milliseconds from widths per expert and per block, 2.5 bits a weight, bfloat16 rows",
    caption=f"{machine['cores']} cores, {machine['device']}, blocks {found['order']}; medians")
  for heading in ("shape", "part", "block", "group", "rows", "activations", "experts", "blocks", "ratio"):
    table.add_column(heading, justify="left" if heading in ("shape", "part", "activations") else "right")
  for row in found["results"]:
    times = [f"{row['milliseconds'][name]:.2f}" for name in ("experts", "blocks")]
    table.add_row(*(str(row[key]) for key in ("shape", "part", "block", "group", "rows", "activations")), *times,
                  f"{row['ratio']:.2f}")
  rich_console.Console(width=None if os.isatty(1) else 140).print(table)
