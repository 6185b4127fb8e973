"""The Mosaic GPU kernel: tasks of rows times tiles of 128 columns, weights in registers, rows as N of wgmma.

A piece of work is one task (at most `rows` rows of one expert) for one or two tiles of 128 columns and one part of K. A
block computes one piece after the other, and copies for the next begin while one is computed. A copying warpgroup keeps
three rings of shared memory filled by TMA: packed weights, rows of x, and scales with their zeros. Computing
warpgroups, two per tile, take 64 columns each: they read packed bytes into registers, make codes of them
(`gpu_unpack.py`), and multiply them as register operand A of wgmma with the rows of x as B, so few rows waste nothing
(weights are M, rows are N: the "swap" of operands known from mixed-input kernels for Hopper).

Scales are applied in one of two places. *After* the product of a fragment, in float32, with the zero taken out by the
sums of the rows: exact products of codes, and cheap for few rows. *Before* it, on the weights in bfloat16: one rounding
more, but a cost that does not grow with the rows, which is what many rows need.

Every fragment read from shared memory is fenced before its slot is given back, because the copy that overwrites it
goes through the asynchronous proxy. Sizes only come from the view and the `Config`; widths and routing are data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moeq_jax.kernels import gpu_compute, gpu_unpack
from moeq_jax.kernels.gpu_compute import HALF
from moeq_jax.kernels.gpu_view import COLUMNS, EIGHTHS, HopperWeights

# registers of a thread that copies and of one that computes, by column tiles of a block
REGISTERS = {1: (40, 232), 2: (24, 112)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes of a launch.

  Attributes:
    rows: rows of x that a task multiplies, N of wgmma: a multiple of 8 up to 256.
    splits: parts into which K is cut, each with a partial result of its own.
    scale: where weights are scaled: `"after"` the product, in float32, or `"before"`, in bfloat16.
    eighths: fragments of x that are copied at a time, 8 or 1.
    steps: slots of the ring for scales, zeros and sums of rows.
    fragments: slots of the ring for x.
    chunks: slots of the ring for weights, at least 4.
    sums: products that are under way at a time before they are scaled, for scales after the product.
    exact: whether the operand is the code itself, for rows of float32; else 128 is added to it, which costs the result
      a relative 1e-5.
    blocks: blocks of the launch; each takes one piece of work after the other.
    tiles: column tiles of a piece of work, 1 or 2 (of one stripe), each with two warpgroups that compute.
    operand: where wgmma takes the weights from: `"registers"`, or `"shared"` memory, which costs a store and a fence
      per fragment and is there because Pallas' interpreter (jax 0.11.2) has no wgmma with a register operand.
  """

  rows: int
  splits: int
  scale: str
  eighths: int
  steps: int
  fragments: int
  chunks: int
  sums: int
  exact: bool
  blocks: int
  tiles: int
  operand: str = "registers"


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
  """Tiling and, but for rows of 16 bytes, swizzle of a shared buffer whose rows have `width` elements of `dtype`."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(width * bits, "fragment")
  tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
  return (tiling,) if swizzle == 16 else (tiling, plgpu.SwizzleTransform(swizzle))


def buffers(w: HopperWeights, config: Config, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype of every buffer in shared memory, for partial results of `dtype`."""
  needed = {
    "x": ((config.fragments, config.eighths, config.rows, w.width), jnp.bfloat16),
    "affine": ((config.steps, config.tiles, 2 * w.step_groups, COLUMNS), jnp.bfloat16),
    "chunks": ((config.chunks, config.tiles, COLUMNS, w.width), jnp.int8),
    "y": ((2 * config.tiles, config.rows, HALF), dtype),
  }
  if config.scale == "after":
    needed["sums"] = (config.steps, EIGHTHS // w.together, config.rows), jnp.float32
  if config.operand == "shared":
    needed["operand"] = (2 * config.tiles, HALF, w.width), jnp.bfloat16
  return needed


def call(
  w: HopperWeights, config: Config, expert: jax.Array, x: jax.Array, sums: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """All tasks.

  Args:
    w: weights.
    config: sizes.
    expert: `[tasks + 1]` int32, the expert of each task, those without an expert last; then the number of the others.
    x: `[steps, 8, tasks * rows, width]` bfloat16, see `gpu_view.rows_view`.
    sums: `[steps, 8 / w.together, tasks * rows]` float32, the sums of `x` over its last dimension and, where two
      eighths are scaled together, over both; not read if scaled before.
    dtype: of the partial results.

  Returns:
    `[splits, tasks, rows, NS * ST * 128]`, uninitialised for tasks without an expert.
  """
  tasks, tiles, consumers = expert.shape[0] - 1, w.bits.shape[2] * w.tiles, 2 * config.tiles
  swizzled = "x", "chunks", "operand"
  shared = {
    name: plgpu.SMEM(shape, kind, transforms=transforms(w.width, kind) if name in swizzled else ())
    for name, (shape, kind) in buffers(w, config, dtype).items()
  }
  rings = {"step": (2 if config.scale == "after" else 1, config.steps), "x": (1, config.fragments),
           "chunk": (1, config.chunks)}
  for name, (copies, slots) in rings.items():
    shared[f"{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    shared[f"{name}_empty"] = plgpu.Barrier(num_arrivals=consumers, num_barriers=slots)
  blocks = min(config.blocks, tasks * (tiles // config.tiles) * config.splits)
  run = plgpu.kernel(
    functools.partial(_body, w, config, blocks),
    out_type=jax.ShapeDtypeStruct((config.splits, tasks, config.rows, tiles * COLUMNS), dtype),
    grid=(blocks,),
    grid_names=("block",),
    num_threads=consumers + 1,
    thread_name="warpgroup",
    scratch_types=shared,
  )
  return run(expert, w.bits.reshape(-1), w.first.reshape(-1), x, sums, w.affine, w.chunks)


def _body(w, config, blocks, expert, bits, first, x, sums, affine, chunks, out, /, **shared):
  _, k_blocks, stripes = w.bits.shape
  tiles, consumers = stripes * w.tiles // config.tiles, 2 * config.tiles
  block, warpgroup = (lax.axis_index(name) for name in ("block", "warpgroup"))
  total = k_blocks * w.block_steps
  items = expert[expert.shape[0] - 1] * (config.splits * tiles)

  def over_items(run: Callable[..., Any], carry: Any) -> Any:
    """Calls `run(item, carry)` for every piece of work of this block: column tiles first, then parts of K, tasks."""

    def one(index: jax.Array, carry: Any) -> Any:
      place = block + index * blocks
      outer = lax.div(place, jnp.int32(tiles))
      task, split = lax.div(outer, jnp.int32(config.splits)), lax.rem(outer, jnp.int32(config.splits))
      rows = pl.ds(task * config.rows, config.rows)
      tile = lax.rem(place, jnp.int32(tiles)) * config.tiles
      item = gpu_compute.Item(w, config, shared, expert[task], tile, task, split, rows)
      return run(item, carry)

    return lax.fori_loop(0, lax.div(items - block + blocks - 1, jnp.int32(blocks)), one, carry)

  def over_blocks(item: gpu_compute.Item, run: Callable[..., Any], carry: Any) -> Any:
    """Calls `run(bits, first chunk, step where the K-block begins, steps inside it from and up to, carry)`."""
    start, stop = (lax.div((item.split + more) * total, jnp.int32(config.splits)) for more in (0, 1))

    def one(k: jax.Array, carry: Any) -> Any:
      place = (item.expert * k_blocks + k) * stripes + lax.div(item.tile, jnp.int32(w.tiles))
      base = k * w.block_steps
      low, high = (jnp.clip(edge - base, 0, w.block_steps) for edge in (start, stop))
      return run(bits[place], first[place], base, low, high, carry)

    return lax.fori_loop(0, k_blocks, one, carry)

  @pl.when(warpgroup == consumers)
  def _():
    plgpu.set_max_registers(REGISTERS[config.tiles][0], action="decrease")

    def copy(item: gpu_compute.Item, counts: Any) -> Any:
      return over_blocks(item, functools.partial(_copy_block, item, x, sums, affine, chunks), counts)

    counts = over_items(copy, (jnp.int32(0),) * 3)
    for ring, count in zip(("step", "x", "chunk"), counts, strict=True):
      _drain(shared[ring + "_empty"], count)

  @pl.when(warpgroup < consumers)
  def _():
    plgpu.set_max_registers(REGISTERS[config.tiles][1], action="increase")
    half = lax.rem(warpgroup, jnp.int32(2)) * HALF
    mine = gpu_compute.Columns(lax.div(warpgroup, jnp.int32(2)), pl.ds(half, HALF))

    def compute(item: gpu_compute.Item, counts: Any) -> Any:
      zero = plgpu.layout_cast(jnp.zeros((HALF, config.rows), jnp.float32), plgpu.Layout.WGMMA)
      y, *counts = over_blocks(item, functools.partial(gpu_compute.block, item, warpgroup, mine), (zero, *counts))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the result before this one
      part = shared["y"].at[warpgroup]
      gpu_compute.store_transposed(config, part, y.astype(out.dtype))
      plgpu.commit_smem()
      target = pl.ds(item.tile * COLUMNS + warpgroup * HALF, HALF)
      plgpu.copy_smem_to_gmem(part, out.at[item.split, item.task, :, target])
      return tuple(counts)

    over_items(compute, (jnp.int32(0),) * 3)
    plgpu.wait_smem_to_gmem(0)


def _drain(empty: Any, count: jax.Array) -> None:
  """Waits until all slots of a ring that was filled `count` times are empty."""
  slots = empty.shape[0]

  def wait(index: jax.Array, _: None) -> None:
    plgpu.barrier_wait(empty.at[lax.rem(index, jnp.int32(slots))])

  lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, None)


# ---------------------------------------------------------------------------------------------------------------------
# The copying warpgroup
# ---------------------------------------------------------------------------------------------------------------------


def _copy_block(item, x, sums, affine, chunks, bits, first, base, low, high, counts):
  """Fills the rings for the steps `low` to `high` of one K-block, in the order in which they will be emptied."""
  w, config, shared = item.w, item.config, item.shared
  column = pl.ds(lax.rem(item.tile, jnp.int32(w.tiles)), config.tiles)
  affine = affine.at[pl.ds(item.tile, config.tiles)]

  def copy_x(step: jax.Array, eighth: int | jax.Array, count: jax.Array) -> jax.Array:
    slot = item.emptied("x", count)
    source = x.at[step, pl.ds(eighth, config.eighths), item.rows, :]
    plgpu.copy_gmem_to_smem(source, shared["x"].at[slot], shared["x_full"].at[slot])
    return count + 1

  def one_step(u: jax.Array, counts: Any) -> Any:
    step_count, x_count, chunk_count = counts
    slot = item.emptied("step", step_count)
    full = shared["step_full"].at[slot]
    k_tile, fragment = lax.div(u, jnp.int32(w.fragments)), lax.rem(u, jnp.int32(w.fragments))
    group = item.expert * w.groups
    if w.grouped:
      group += (lax.div(base, jnp.int32(w.fragments)) + k_tile) * w.step_groups
    plgpu.copy_gmem_to_smem(affine.at[:, pl.ds(2 * group, 2 * w.step_groups), :], shared["affine"].at[slot], full)
    if config.scale == "after":
      plgpu.copy_gmem_to_smem(sums.at[base + u, :, item.rows], shared["sums"].at[slot], full)
    if config.eighths == EIGHTHS:
      x_count = copy_x(base + u, 0, x_count)
    origin = first + k_tile * bits * w.fragments + fragment

    def one_chunk(index: jax.Array, carry: Any) -> Any:
      x_count, chunk_count, done = carry
      place = item.emptied("chunk", chunk_count)
      source = chunks.at[column, origin + gpu_unpack.plane(bits, index) * w.fragments]
      plgpu.copy_gmem_to_smem(source, shared["chunks"].at[place], shared["chunk_full"].at[place])
      ready = done + gpu_unpack.ready(bits, index)
      if config.eighths == 1:
        one = lambda n, count: copy_x(base + u, gpu_unpack.eighth(bits, n), count)
        x_count = lax.fori_loop(done, ready, one, x_count)
      return x_count, chunk_count + 1, ready

    x_count, chunk_count, _ = lax.fori_loop(0, bits, one_chunk, (x_count, chunk_count, jnp.int32(0)))
    return step_count + 1, x_count, chunk_count

  return lax.fori_loop(low, high, one_step, counts)
