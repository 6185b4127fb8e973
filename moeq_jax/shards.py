"""Cutting a QTensor into equal shards: tensor parallelism along N (gate, up) or K (down), or expert parallelism.

A K-tile belongs to one shard, so a sharded QTensor is packed again: every shard has its own buffer and its own offsets,
and is a whole QTensor for the device that holds it. With `specs` as the `in_specs` of a `shard_map`, the body calls
`grouped_matmul` on its part; along `"n"` the outputs stand side by side, along `"k"` they are summed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import qtensor
from moeq_jax.qtensor import QTensor


def shard(q: QTensor, shards: int, axis: str) -> QTensor:
  """Cuts an unsharded QTensor into `shards` equal parts. Runs on the host.

  Args:
    q: concrete and unsharded.
    shards: number of parts.
    axis: `"n"`, `"k"` or `"expert"`.

  Returns:
    The sharded QTensor. Along K, one group over all of K becomes one group per shard, of the same scale and zero; a
    width given for all of K or N becomes the width of every shard's block.

  Raises:
    ValueError: the weight, its blocks or its groups do not divide into `shards` equal parts.
  """
  _check_divides(q, shards, axis)
  cut = qtensor.CUT[axis]
  bits = np.asarray(q.bits)
  weights = np.asarray(qtensor.dequantize(q, jnp.bfloat16)) if (bits == 16).any() else None
  fields = {"codes": qtensor.unpack(q), "bits": bits, "scale": q.scale, "zero": q.zero, "weights": weights}
  group = q.group if q.groups > 1 else 0
  parts = [qtensor.pack(**_take(fields, index, shards, cut), group=group) for index in range(shards)]
  rows = max(part.buffer.shape[1] for part in parts)
  buffer = np.concatenate([np.pad(p.buffer, ((0, 0), (0, rows - p.buffer.shape[1]), (0, 0))) for p in parts])
  joined = {f: np.concatenate([getattr(p, f) for p in parts], cut) for f in ("bits", "offset", "scale", "zero")}
  return dataclasses.replace(parts[0], buffer=buffer, axis=axis, **joined)


def _check_divides(q: QTensor, shards: int, axis: str) -> None:
  known = q.shards == 1 and axis in qtensor.CUT
  qtensor.check(known, f"shard takes an unsharded QTensor and an axis of {sorted(qtensor.CUT)}, not {axis!r}")
  cut = qtensor.CUT[axis]
  size, blocks = q.shape[cut], q.bits.shape[cut]
  block = (1, q.k_block, q.buffer.shape[2])[cut]
  even = size % shards == 0 and (blocks == 1 or (blocks % shards == 0 and blocks * block == size))
  qtensor.check(even, f"axis {axis!r}: {size} in {blocks} blocks of {block} cannot be cut into {shards} equal shards")
  groups = axis != "k" or q.groups == 1 or size // shards % q.group == 0
  qtensor.check(groups, f"axis 'k': {size} rows over {shards} shards cut a group of {q.group}; use a smaller group")


def _take(fields: dict[str, np.ndarray | None], index: int, shards: int, cut: int) -> dict[str, np.ndarray | None]:
  """Part `index` of every array; what has one entry along the cut is the same for all parts."""

  def take(array: np.ndarray | None) -> np.ndarray | None:
    one = array is None or array.shape[cut] == 1
    return array if one else np.split(np.asarray(array), shards, cut)[index]

  return {name: take(array) for name, array in fields.items()}


def specs(q: QTensor, mesh_axis: str) -> QTensor:
  """The `PartitionSpec` of every leaf of a sharded QTensor, with one shard on each device of `mesh_axis`."""
  entry = jax.P(*[None] * qtensor.CUT[q.axis], mesh_axis)
  return dataclasses.replace(q, buffer=jax.P(mesh_axis), bits=entry, offset=entry, scale=entry, zero=entry)
