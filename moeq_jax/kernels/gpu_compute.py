"""The computing warpgroups of the Hopper kernel (`gpu_kernel.py`): from packed bytes to sums in registers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from moeq_jax.kernels import gpu_unpack, gpu_view
from moeq_jax.kernels.gpu_view import HopperWeights

HALF = gpu_view.COLUMNS // 2  # of the columns of a tile, for one warpgroup


@dataclasses.dataclass(frozen=True)
class Item:
  """One piece of work.

  Attributes:
    w: the weights, of which the kernel reads sizes here; its arrays are in memory of the device.
    config: the `gpu_kernel.Config` of the launch.
    shared: buffers and barriers in shared memory, by name.
    expert: of the task, a scalar.
    tile: its first tile of 128 columns.
    task: number of the task.
    split: which part of K.
    rows: slice of the rows of the task in the padded rows.
  """

  w: HopperWeights
  config: Any
  shared: dict[str, Any]
  expert: jax.Array
  tile: jax.Array
  task: jax.Array
  split: jax.Array
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


class Columns(NamedTuple):
  """Which columns of a piece of work a warpgroup computes: `half` of column tile `tile` of the piece."""

  tile: jax.Array
  half: Any


def block(item, warpgroup, mine, bits, _first, _base, low, high, carry):
  """The steps `low` to `high` (not included) of a K-block of width `bits`, a scalar: one branch for each width.

  `carry` is `y [64, rows]` float32 in the WGMMA layout and how many slots of the rings of steps, rows and weights have
  been read.
  """
  widths = item.w.widths
  choice = sum((bits > b).astype(jnp.int32) for b in widths[:-1])
  steps = _steps_scaled_after if item.config.scale == "after" else _steps_scaled_before
  branches = [functools.partial(steps, item, warpgroup, mine, b, low, high) for b in widths]
  return lax.switch(choice, branches, carry)


def _read(item: Item, mine: Columns, planes: Sequence[int], count: jax.Array) -> dict[int, jax.Array]:
  """The next chunks of the ring in registers, `[64, width]` int8 by plane; their slots are given back, behind a fence:
  bytes are read through the generic proxy and overwritten through the asynchronous one."""
  read, taken = {}, []
  for index, plane in enumerate(planes):
    taken.append(item.filled("chunk", count + index))
    source = item.shared["chunks"].at[taken[-1], mine.tile, mine.half]
    read[plane] = plgpu.load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X)
  plgpu.commit_smem()
  for place in taken:
    item.release("chunk", place)
  return read


def _operand(item: Item, *args: Any) -> jax.Array:
  make = gpu_unpack.in_registers if item.config.operand == "registers" else gpu_unpack.in_interpreter
  return make(*args)


def _multiply(item: Item, warpgroup: jax.Array, operand: jax.Array, x: Any, acc: Any) -> None:
  """Starts `acc [64, rows] += operand [64, width] @ x [rows, width]^T`."""
  if item.config.operand == "shared":
    place = item.shared["operand"].at[warpgroup]
    place[...] = operand
    plgpu.commit_smem()
    operand = place
  plgpu.wgmma(acc, operand, x.T)
  if item.config.operand == "shared":
    plgpu.wgmma_wait(0)  # before the operand is written again


def _affine(item, slot, mine, u, field):
  """Scale and zero of the group of a field, `[64]` float32 each."""
  w, group = item.w, 0
  if w.grouped:
    row = field.eighth * w.eighth
    inside = lax.rem(u, jnp.int32(w.fragments)) * w.width
    group = row // w.group if w.fragments == 1 else lax.div(row + inside, jnp.int32(w.group))
  refs = (item.shared["affine"].at[slot, mine.tile, 2 * group + which, mine.half] for which in (0, 1))
  return [plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32) for ref in refs]


def _steps_scaled_after(item, warpgroup, mine, bits, low, high, carry):
  """Adds the steps `low` to `high` of one K-block of width `bits` to `y [64, rows]` float32, in the WGMMA layout.

  Products of codes are kept apart until their scale is known to be another: neighbouring eighths of one group are one
  sum. Several such sums are multiplied at a time (`Config.sums`) before the first is scaled.
  """
  config, shared = item.config, item.shared
  shape = HALF, config.rows
  size = 1 if bits == 16 else item.w.together

  def step(u: jax.Array, carry: Any) -> Any:
    y, step_count, x_count, chunk_count = carry
    slot = item.filled("step", step_count)
    whole = item.filled("x", x_count) if config.eighths == gpu_view.EIGHTHS else None
    for planes, fields in gpu_unpack.batches(bits):
      read = _read(item, mine, planes, chunk_count)
      chunk_count += len(planes)
      parts = [fields[i:i + size] for i in range(0, len(fields), size)]
      for start in range(0, len(parts), config.sums):
        now = parts[start:start + config.sums]

        def scope(*accs: Any, now=now, read=read, x_count=x_count) -> Any:
          taken = []
          for acc, part in zip(accs, now, strict=True):
            for field in part:
              if whole is None:
                taken.append(item.filled("x", x_count + len(taken)))
              x = shared["x"].at[taken[-1], 0] if whole is None else shared["x"].at[whole, field.eighth]
              _multiply(item, warpgroup, _operand(item, field, read, config.exact), x, acc)
          plgpu.wgmma_wait(0)
          for place in taken:
            item.release("x", place)
          return [acc[...] for acc in accs]

        found = pl.run_scoped(scope, *(plgpu.ACC(shape, jnp.float32) for _ in now))
        if whole is None:
          x_count += sum(len(part) for part in now)
        for part, product in zip(now, found, strict=True):
          y = _scaled(item, slot, mine, u, part, product, bits, y)
    plgpu.commit_smem()  # as in `_read`, for scales, zeros and sums
    item.release("step", slot)
    if whole is not None:
      item.release("x", whole)
      x_count += 1
    return y, step_count + 1, x_count, chunk_count

  return lax.fori_loop(low, high, step, carry)


def _scaled(item, slot, mine, u, part, product, bits, y):
  """`[64, rows]` float32: y plus `scale * (multiplier * product - (zero - offset) * sums)`, or plus 16-bit products.

  Args:
    item: piece of work.
    slot: of the ring of steps, with scales, zeros and sums of rows.
    mine: columns of this warpgroup.
    u: step inside the K-block.
    part: the fields that were multiplied, of one scale.
    product: `[64, rows]` float32.
    bits: width.
    y: `[64, rows]` float32.
  """
  if bits == 16:
    return y + product
  shape = HALF, item.config.rows
  field = gpu_unpack.centred(part[0]) if item.config.exact else part[0]
  scale, zero = _affine(item, slot, mine, u, field)
  sums = item.shared["sums"].at[slot, field.eighth // item.w.together]
  sums = lax.broadcast_in_dim(plgpu.load(sums, layout=plgpu.Layout.WGMMA.reduce(0)), shape, (1,))
  factor, addend = (lax.broadcast_in_dim(a, shape, (0,))
                    for a in (scale * field.multiplier, scale * (field.offset - zero)))
  return addend * sums + (factor * product + y)


def _steps_scaled_before(item, warpgroup, mine, bits, low, high, carry):
  """The same with weights scaled in bfloat16 before they are multiplied, all into one sum."""
  config, shared = item.config, item.shared
  y, *counts = carry

  def scope(acc: Any) -> Any:
    def step(u: jax.Array, counts: Any) -> Any:
      step_count, x_count, chunk_count = counts
      slot = item.filled("step", step_count)
      whole = item.filled("x", x_count) if config.eighths == gpu_view.EIGHTHS else None
      last = None
      for planes, fields in gpu_unpack.batches(bits):
        read = _read(item, mine, planes, chunk_count)
        chunk_count += len(planes)
        for field in map(gpu_unpack.centred, fields):
          pair = None
          if bits < 16:
            scale, zero = _affine(item, slot, mine, u, field)
            pair = [a.astype(jnp.bfloat16) for a in (scale * field.multiplier, scale * (field.offset - zero))]
          operand = _operand(item, field, read, True, pair)
          place = item.filled("x", x_count) if whole is None else None
          x = shared["x"].at[place, 0] if whole is None else shared["x"].at[whole, field.eighth]
          _multiply(item, warpgroup, operand, x, acc)
          if whole is None:
            if last is not None:
              plgpu.wgmma_wait(1)
              item.release("x", last)
            last = place
            x_count += 1
      plgpu.wgmma_wait(0)
      item.release("x", last if whole is None else whole)
      plgpu.commit_smem()  # as in `_read`, for scales and zeros
      item.release("step", slot)
      if whole is not None:
        x_count += 1
      return step_count + 1, x_count, chunk_count

    counts_after = lax.fori_loop(low, high, step, tuple(counts))
    return acc[...], counts_after

  part, counts = pl.run_scoped(scope, plgpu.ACC((HALF, config.rows), jnp.float32))
  return y + part, *counts


def store_transposed(config: Any, part: Any, y: jax.Array) -> None:
  """`part [rows, 64] = y^T` in shared memory; for float32 without the compiler's own store, which cannot."""
  if config.operand == "shared" or y.dtype != jnp.float32:
    part.T[...] = y
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
  def store(_: Any, ref: Any, value: mgpu.FragmentedArray) -> None:
    single = value.to_layout(mgpu.fragmented_array.WGMMA_LAYOUT_ACC_32BIT)  # one value at a time: rows are apart
    single.store_untiled(mgpu.utils.memref_transpose(ref, (1, 0)), optimized=False)

  store(part, y)
