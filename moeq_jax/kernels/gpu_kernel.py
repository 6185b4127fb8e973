"""The Mosaic GPU kernel: tasks of rows times tiles of 128 columns, weights in registers, rows as N of wgmma.

One block of 384 threads computes one task (at most `rows` rows of one expert) for one tile of 128 columns and one part
of K. A copying warpgroup keeps three rings of shared memory filled by TMA: packed weights, rows of x, and scales with
their zeros. Two computing warpgroups take 64 columns each: they read packed bytes into registers, mask fields out
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

from moeq_jax.kernels import gpu_unpack
from moeq_jax.kernels.gpu_view import COLUMNS, EIGHTHS, HopperWeights

CONSUMERS = 2  # warpgroups that compute; one more copies
HALF = COLUMNS // CONSUMERS
RELEASE = 4  # chunks that are given back at a time, behind one fence


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
  operand: str = "registers"


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
  """Tiling and swizzle of a shared buffer whose rows have `width` elements of `dtype`; rows of 16 bytes have none."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(width * bits, "fragment")
  tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
  return (tiling,) if swizzle == 16 else (tiling, plgpu.SwizzleTransform(swizzle))


def buffers(w: HopperWeights, config: Config, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype of every buffer in shared memory, for partial results of `dtype`."""
  needed = {
    "x": ((config.fragments, config.eighths, config.rows, w.width), jnp.bfloat16),
    "affine": ((config.steps, 2 * w.step_groups, COLUMNS), jnp.bfloat16),
    "chunks": ((config.chunks, COLUMNS, w.width), jnp.int8),
    "y": ((COLUMNS, config.rows), dtype),
  }
  if config.scale == "after":
    needed["sums"] = (config.steps, EIGHTHS, config.rows), jnp.float32
  if config.operand == "shared":
    needed["operand"] = (CONSUMERS, HALF, w.width), jnp.bfloat16
  return needed


def call(
  w: HopperWeights, config: Config, expert: jax.Array, x: jax.Array, sums: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """All tasks.

  Args:
    w: weights.
    config: sizes.
    expert: `[tasks]` int32, the expert of each task; E or more where there is none.
    x: `[steps, 8, tasks * rows, width]` bfloat16, see `gpu_view.rows_view`.
    sums: `[steps, 8, tasks * rows]` float32, the sums of `x` over its last dimension; not read if scaled before.
    dtype: of the partial results.

  Returns:
    `[splits, tasks, NS * ST * 128, rows]`, uninitialised for tasks without an expert.
  """
  tasks, tiles = expert.shape[0], w.bits.shape[2] * w.tiles
  swizzled = "x", "chunks", "operand"
  shared = {
    name: plgpu.SMEM(shape, kind, transforms=transforms(w.width, kind) if name in swizzled else ())
    for name, (shape, kind) in buffers(w, config, dtype).items()
  }
  rings = {"step": (2 if config.scale == "after" else 1, config.steps), "x": (1, config.fragments),
           "chunk": (1, config.chunks)}
  for name, (copies, slots) in rings.items():
    shared[f"{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    shared[f"{name}_empty"] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots)
  run = plgpu.kernel(
    functools.partial(_body, w, config),
    out_type=jax.ShapeDtypeStruct((config.splits, tasks, tiles * COLUMNS, config.rows), dtype),
    grid=(tiles, tasks, config.splits),
    grid_names=("tile", "task", "split"),
    num_threads=CONSUMERS + 1,
    thread_name="warpgroup",
    scratch_types=shared,
  )
  return run(expert, w.bits.reshape(-1), w.first.reshape(-1), x, sums, w.affine, w.chunks)


@dataclasses.dataclass(frozen=True)
class _Block:
  """What both kinds of warpgroup know: the static sizes, the shared buffers, and the place of this block."""

  w: HopperWeights
  config: Config
  shared: dict[str, Any]
  index: jax.Array
  tile: jax.Array
  rows: Any

  def slot(self, ring: str, count: jax.Array) -> jax.Array:
    return lax.rem(count, jnp.int32(self.shared[ring + "_full"].shape[0]))

  def filled(self, ring: str, count: jax.Array) -> jax.Array:
    """Waits until slot `count` of a ring is filled and gives its index."""
    slot = self.slot(ring, count)
    plgpu.barrier_wait(self.shared[ring + "_full"].at[slot])
    return slot

  def emptied(self, ring: str, count: jax.Array) -> jax.Array:
    """Waits until slot `count` of a ring may be filled and gives its index."""
    slot, empty = self.slot(ring, count), self.shared[ring + "_empty"]

    @pl.when(count >= empty.shape[0])
    def _():
      plgpu.barrier_wait(empty.at[slot])

    return slot

  def release(self, ring: str, slot: jax.Array) -> None:
    plgpu.barrier_arrive(self.shared[ring + "_empty"].at[slot])

  def drain(self, ring: str, count: jax.Array) -> None:
    """Waits until all slots of a ring that was filled `count` times are empty."""
    empty = self.shared[ring + "_empty"]

    def wait(index: jax.Array, _: None) -> None:
      plgpu.barrier_wait(empty.at[self.slot(ring, index)])

    lax.fori_loop(jnp.maximum(count - empty.shape[0], 0), count, wait, None)


def _body(w, config, expert, bits, first, x, sums, affine, chunks, out, /, **shared):
  experts, k_blocks, stripes = w.bits.shape
  tile, task, split, warpgroup = (lax.axis_index(name) for name in ("tile", "task", "split", "warpgroup"))
  block = _Block(w, config, shared, expert[task], tile, pl.ds(task * config.rows, config.rows))
  total = k_blocks * w.block_steps
  start, stop = (lax.div((split + more) * total, jnp.int32(config.splits)) for more in (0, 1))

  def over_blocks(run: Callable[..., Any], carry: Any) -> Any:
    """Calls `run(bits, first chunk, first step of the K-block, first and last step inside it, carry)`."""

    def one(k: jax.Array, carry: Any) -> Any:
      place = (block.index * k_blocks + k) * stripes + lax.div(tile, jnp.int32(w.tiles))
      base = k * w.block_steps
      low, high = (jnp.clip(edge - base, 0, w.block_steps) for edge in (start, stop))
      return run(bits[place], first[place], base, low, high, carry)

    return lax.fori_loop(0, k_blocks, one, carry)

  @pl.when(block.index < experts)
  def _():
    @pl.when(warpgroup == CONSUMERS)
    def _():
      plgpu.set_max_registers(40, action="decrease")
      copy = functools.partial(_copy_block, block, x, sums, affine.at[tile], chunks)
      for ring, count in zip(("step", "x", "chunk"), over_blocks(copy, (jnp.int32(0),) * 3), strict=True):
        block.drain(ring, count)

    @pl.when(warpgroup < CONSUMERS)
    def _():
      plgpu.set_max_registers(232, action="increase")
      zero = plgpu.layout_cast(jnp.zeros((HALF, config.rows), jnp.float32), plgpu.Layout.WGMMA)
      mine = pl.ds(warpgroup * HALF, HALF)
      compute = functools.partial(_compute_block, block, warpgroup, mine)
      y = over_blocks(compute, (zero, *(jnp.int32(0),) * 3))[0]
      shared["y"][mine, :] = y.astype(out.dtype)
      plgpu.commit_smem()
      target = pl.ds(tile * COLUMNS + warpgroup * HALF, HALF)
      plgpu.copy_smem_to_gmem(shared["y"].at[mine, :], out.at[split, task, target, :])
      plgpu.wait_smem_to_gmem(0)


# ---------------------------------------------------------------------------------------------------------------------
# The copying warpgroup
# ---------------------------------------------------------------------------------------------------------------------


def _copy_block(block, x, sums, affine, chunks, bits, first, base, low, high, counts):
  """Fills the rings for the steps `low` to `high` of one K-block, in the order in which they will be emptied."""
  w, config, shared = block.w, block.config, block.shared
  column = lax.rem(block.tile, jnp.int32(w.tiles))

  def copy_x(step: jax.Array, eighth: int | jax.Array, count: jax.Array) -> jax.Array:
    slot = block.emptied("x", count)
    source = x.at[step, pl.ds(eighth, config.eighths), block.rows, :]
    plgpu.copy_gmem_to_smem(source, shared["x"].at[slot], shared["x_full"].at[slot])
    return count + 1

  def one_step(u: jax.Array, counts: Any) -> Any:
    step_count, x_count, chunk_count = counts
    slot = block.emptied("step", step_count)
    full = shared["step_full"].at[slot]
    k_tile, fragment = lax.div(u, jnp.int32(w.fragments)), lax.rem(u, jnp.int32(w.fragments))
    group = block.index * w.groups
    if w.grouped:
      group += (lax.div(base, jnp.int32(w.fragments)) + k_tile) * w.step_groups
    plgpu.copy_gmem_to_smem(affine.at[pl.ds(2 * group, 2 * w.step_groups), :], shared["affine"].at[slot], full)
    if config.scale == "after":
      plgpu.copy_gmem_to_smem(sums.at[base + u, :, block.rows], shared["sums"].at[slot], full)
    if config.eighths == EIGHTHS:
      x_count = copy_x(base + u, 0, x_count)
    origin = first + k_tile * bits * w.fragments + fragment

    def one_chunk(index: jax.Array, carry: Any) -> Any:
      x_count, chunk_count, done = carry
      place = block.emptied("chunk", chunk_count)
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


# ---------------------------------------------------------------------------------------------------------------------
# The computing warpgroups
# ---------------------------------------------------------------------------------------------------------------------


def _compute_block(block, warpgroup, mine, bits, first, base, low, high, carry):
  """One branch per width, each with its own loop over the steps of a K-block."""
  del first, base
  widths = block.w.widths
  choice = sum((bits > b).astype(jnp.int32) for b in widths[:-1])
  branches = [functools.partial(_compute_steps, block, warpgroup, mine, b, low, high) for b in widths]
  return lax.switch(choice, branches, carry)


def _compute_steps(block, warpgroup, mine, bits, low, high, carry):
  """Adds the steps `low` to `high` of one K-block of width `bits` to `y [64, rows]` float32, in the WGMMA layout."""
  y, *counts = carry
  shape = HALF, block.config.rows
  if block.config.scale == "after":
    step = functools.partial(_step, block, warpgroup, mine, bits, None)
    return lax.fori_loop(low, high, step, carry)

  def scope(acc: Any) -> Any:
    step = functools.partial(_step, block, warpgroup, mine, bits, acc)
    counts_after = lax.fori_loop(low, high, lambda u, counts: step(u, (None, *counts))[1:], tuple(counts))
    return acc[...], counts_after

  part, counts = pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))
  return y + part, *counts


def _step(block, warpgroup, mine, bits, acc, u, carry):
  """All eight fragments of a step, in the order of the chunks that hold them."""
  shared, config = block.shared, block.config
  y, step_count, x_count, chunk_count = carry
  slot = block.filled("step", step_count)
  if config.eighths == EIGHTHS:
    x_slot = block.filled("x", x_count)
  read, taken = {}, []
  for index in range(bits):
    place = block.filled("chunk", chunk_count + index)
    taken.append(place)
    read[gpu_unpack.plane(bits, index)] = plgpu.load(
      shared["chunks"].at[place, mine], layout=plgpu.Layout.WGMMA_UPCAST_2X)
    for unit in gpu_unpack.units(bits, index, read):
      if config.eighths == 1:
        x_slot = block.filled("x", x_count)
      x = shared["x"].at[x_slot, unit.eighth if config.eighths == EIGHTHS else 0]
      affine = None if bits == 16 else _affine(block, slot, mine, u, unit)
      if acc is None:
        y = y + _scaled_after(block, warpgroup, slot, unit, affine, x)
      else:
        _multiply(block, warpgroup, _scaled_before(block, unit, affine), x, acc)
      if config.eighths == 1:
        block.release("x", x_slot)
        x_count += 1
    if len(taken) == RELEASE or index == bits - 1:
      plgpu.commit_smem()  # what was read here comes before what the next copy writes there
      for place in taken:
        block.release("chunk", place)
      taken = []
  block.release("step", slot)
  if config.eighths == EIGHTHS:
    block.release("x", x_slot)
    x_count += 1
  return y, step_count + 1, x_count, chunk_count + bits


def _multiply(block, warpgroup, operand, x, acc):
  """`acc [64, rows] += operand [64, width] @ x [rows, width]^T`."""
  if block.config.operand == "shared":
    place = block.shared["operand"].at[warpgroup]
    place[...] = operand
    plgpu.commit_smem()
    operand = place
  plgpu.wgmma(acc, operand, x.T)
  plgpu.wgmma_wait(0)  # before the registers of the operand are written again


def _affine(block, slot, mine, u, unit):
  """Scale and zero of the group of a unit, `[64]` bfloat16 each."""
  w, group = block.w, 0
  if w.grouped:
    row = unit.eighth * w.eighth
    inside = lax.rem(u, jnp.int32(w.fragments)) * w.width
    group = row // w.group if w.fragments == 1 else lax.div(row + inside, jnp.int32(w.group))
  refs = (block.shared["affine"].at[slot, 2 * group + which, mine] for which in (0, 1))
  return [plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)) for ref in refs]


def _scaled_after(block, warpgroup, slot, unit, affine, x):
  """`[64, rows]` float32: `scale * (multiplier * product - (zero - offset) * sums)`, or the product of weights."""
  shape = HALF, block.config.rows

  def scope(acc: Any) -> jax.Array:
    _multiply(block, warpgroup, unit.operand, x, acc)
    return acc[...]

  part = pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))
  if affine is None:
    return part
  scale, zero = (lax.broadcast_in_dim(a.astype(jnp.float32), shape, (0,)) for a in affine)
  sums = plgpu.load(block.shared["sums"].at[slot, unit.eighth], layout=plgpu.Layout.WGMMA.reduce(0))
  sums = lax.broadcast_in_dim(sums, shape, (1,))
  return scale * (part * unit.multiplier - (zero - unit.offset) * sums)


def _scaled_before(block, unit, affine):
  """`[64, width]` bfloat16 weights `(multiplier * operand + (offset - zero)) * scale`."""
  if affine is None:
    return unit.operand
  shape = HALF, block.w.width
  scale, zero = (lax.broadcast_in_dim(a, shape, (0,)) for a in affine)
  codes = unit.operand * jnp.bfloat16(unit.multiplier)
  return (codes - (zero - jnp.bfloat16(unit.offset))) * scale
