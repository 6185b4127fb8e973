"""Experts in blocks of neurons, each block with widths of its own.

The F neurons of an expert can be put into any order: columns of gate and up, and rows of down alike. The expert
computes the same, so the order costs nothing when it runs. Sorted by how sensitive they are (`allocate.blocks.order`),
neurons that need the same width lie together, and a block of them is a unit that storage and kernels know: a stripe of
columns of gate and up, a K-block of rows of down (`qtensor.py`).

  gate, up [D, F]   F in NB stripes          down [F, D]   F in NB K-blocks of whole scale groups
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, channels, codecs, qtensor


def sort_experts(experts: Mapping[str, Any], orders: np.ndarray) -> dict[str, np.ndarray]:
  """The experts of a layer with their neurons in another order; they compute the same.

  Args:
    experts: `{projection: [E, K, N]}`.
    orders: `[E, F]`, a permutation for every expert.
  """
  axis = {"gate": orders[:, None, :], "up": orders[:, None, :], "down": orders[:, :, None]}
  return {name: np.take_along_axis(np.asarray(w), axis[name], axis=1 if name == "down" else 2)
          for name, w in experts.items()}


def sort_expert(expert: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
  """`sort_experts` of one expert, `{projection: [K, N]}`, whose `order` is `[F]`."""
  return {name: w[order] if name == "down" else w[:, order] for name, w in expert.items()}


def sort_stats(stats: artifacts.Stats, orders: Sequence[np.ndarray]) -> artifacts.Stats:
  """What calibration would have seen of the sorted experts; `orders` is `[L, E, F]`."""
  orders, sorted_fields = np.asarray(orders), {}
  if stats.moment_mid is not None:
    rows = np.take_along_axis(stats.moment_mid, orders[..., :, None], axis=2)
    sorted_fields["moment_mid"] = np.take_along_axis(rows, orders[..., None, :], axis=3)
  for name in ("grad_sq_gate", "grad_sq_up"):
    if (values := getattr(stats, name)) is not None:
      sorted_fields[name] = np.take_along_axis(values, orders, axis=2)
  return dataclasses.replace(stats, **sorted_fields)


def down_block(block: int, group: int) -> int:
  """Rows of down that have one width: a block of neurons, but at least a scale group.

  Raises:
    ValueError: a block that is not in `channels.BLOCKS`, or no scale group of its own for blocks (`group = 0`).
  """
  if block not in channels.BLOCKS:
    raise ValueError(f"block={block!r} is not one of {channels.BLOCKS} neurons")
  if not group:
    raise ValueError("group=0: one scale over all rows of down leaves its blocks without scales of their own; take"
                     " group=32, 64 or 128")
  return max(block, group)


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: codecs.Codec, w: jax.Array, bits: jax.Array, moment: jax.Array | None) -> codecs.Encoded:
  return jax.vmap(codec.encode, in_axes=(0, 0, None if moment is None else 0))(w, bits, moment)


def encode_layer(experts: Mapping[str, Any], bits: Mapping[str, np.ndarray], moments: Mapping[str, Any], *,
                 codec: codecs.Codec) -> dict[str, tuple[codecs.Encoded, np.ndarray]]:
  """Encodes a layer's sorted experts at the widths of a plan.

  Args:
    experts: `{projection: [E, K, N]}`, sorted, finite.
    bits: `{projection: [E, NB]}`, the width of every block; NB may differ between projections.
    moments: `{projection: [E, K, K]}` second moments of the inputs, of the sorted experts; read by codecs with data.
    codec: the codec; GPTQ feeds errors of one block back into the next, whatever their widths.

  Returns:
    `{projection: (codes, widths [E, KB, NS])}`, what `pack_layer` takes.

  Raises:
    ValueError: a number of blocks that does not divide the neurons, or K-blocks of down that cut a scale group.
  """
  found = {}
  for name, w in experts.items():
    w, wanted = jnp.asarray(w, jnp.float32), np.asarray(bits[name], np.int32)
    codec.check_widths(np.unique(wanted).tolist())
    codecs.check_finite(w, name)
    groups = group_widths(name, wanted, w.shape[1:], codec.group)
    moment = jnp.asarray(moments[name], jnp.float32) if codec.needs_moment else None
    encoded = jax.tree.map(np.asarray, _encode(codec, w, jnp.asarray(groups), moment))
    found[name] = encoded, channels.grid(name, wanted)
  return found


def group_widths(name: str, bits: np.ndarray, shape: tuple[int, int], group: int) -> np.ndarray:
  """The widths of blocks of neurons as codecs take them.

  Args:
    name: of the projection.
    bits: `[..., NB]`.
    shape: `(K, N)` of the projection.
    group: rows that share a scale.

  Returns:
    `[..., 1, N]` of gate and up, `[..., G, 1]` of down; `[..., 1, 1]` of a single block.

  Raises:
    ValueError: a number of blocks that does not divide the neurons, or K-blocks of down that cut a scale group.
  """
  neurons, blocks = shape[name != "down"], bits.shape[-1]
  _check_blocks(name, neurons, blocks, group)
  if blocks == 1:
    return bits[..., None]
  if name == "down":
    return np.repeat(bits, neurons // blocks // group, axis=-1)[..., None]
  return np.repeat(bits, neurons // blocks, axis=-1)[..., None, :]


def _check_blocks(name: str, neurons: int, blocks: int, group: int) -> None:
  if neurons % blocks:
    raise ValueError(f"{name}: {blocks} blocks do not divide {neurons} neurons; choose another block size")
  if name == "down" and blocks > 1 and (not group or (neurons // blocks) % group):
    raise ValueError(f"down: blocks of {neurons // blocks} neurons cut a scale group of {group or neurons} rows; take"
                     " larger blocks, or a smaller group")


def pack_layer(encoded: Mapping[str, tuple[codecs.Encoded, np.ndarray]], group: int, *,
               most: int | None = None) -> dict[str, qtensor.QTensor]:
  """Packs what `encode_layer` gave.

  Args:
    encoded: by projection.
    group: rows of K that share a scale.
    most: bits to which buffers are padded, so that one compiled program serves every plan; None: exact buffers.
  """
  packed = {}
  for name, (codes, bits) in encoded.items():
    capacity = None if most is None else qtensor.packed_rows(np.full_like(bits, most), codes.codes.shape, group)
    packed[name] = qtensor.pack(codes.codes, bits, codes.scale, codes.zero, group=group, capacity=capacity)
  return packed
