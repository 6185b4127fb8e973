"""Packs the codes that a plan chose, and puts them into a model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, codecs, qtensor


def pack_layer(codes: artifacts.LayerCodes, bits: np.ndarray, *, widths: Sequence[int], group: int,
               sized: bool = False) -> dict[str, qtensor.QTensor]:
  """One layer's experts at the plan's widths, packed.

  Args:
    codes: the layer's codes at all `widths`.
    bits: `[E]` or `[E, P]`, each one of `widths`.
    widths: candidate bits, in the order of `codes`.
    group: rows of K that share a scale; 0 = all.
    sized: pad buffers to the size of the widest plan, so that one compiled program serves every plan.

  Returns:
    `{projection: QTensor}`, those of `codes`.

  Raises:
    ValueError: a width that was not encoded, named with its expert; or bits of another number of experts or
      projections.
  """
  bits = np.asarray(bits)
  first = next(iter(codes.codes.values()))
  shape = first.codes.shape[1], len(codes.codes)
  if bits.shape not in (shape, shape[:1]):
    raise ValueError(f"the plan has bits of shape {bits.shape} for {shape[0]} experts of {shape[1]} projections; it was"
                     " made for another model")
  for expert, *_ in np.argwhere(~np.isin(bits, widths))[:1]:
    raise ValueError(f"expert {expert}: the plan wants {bits[expert].tolist()} bits, encoded were {tuple(widths)}; add"
                     " the width to config.widths, or make the plan again")
  packed = {}
  for place, (name, bank) in enumerate(codes.codes.items()):
    own = bits if bits.ndim == 1 else bits[:, place]
    chosen = bank.choose(np.array([list(widths).index(width) for width in own]))
    capacity = qtensor.packed_rows(max(widths), chosen.codes.shape, group) if sized else None
    packed[name] = qtensor.pack(chosen.codes, own, chosen.scale, chosen.zero, group=group, capacity=capacity)
  return packed


def quantized_blocks(functions: Any, blocks: Sequence[Any], packed: Sequence[dict[str, qtensor.QTensor]]) -> list[Any]:
  """The model's blocks with packed experts in place of the full-precision ones; dense blocks stay as they are.

  Args:
    functions: the model's functions.
    blocks: all of them.
    packed: per MoE layer.
  """
  sparse = [place for place, block in enumerate(blocks) if functions.sparse(block)]
  placed = list(blocks)
  for place, layer in zip(sparse, packed, strict=True):
    placed[place] = functions.with_experts(blocks[place], jax.tree.map(jnp.asarray, layer))
  return placed


def quantized_routers(functions: Any, blocks: Sequence[Any], bits: int, group: int) -> list[Any]:
  """The model's blocks with every router rounded to `bits` and back; dense blocks stay as they are.

  The official code of arXiv 2604.06515 quantizes routers with the attention, at 4 bits; here each row of a router is
  rounded to nearest, with a scale for each `group` inputs (0: one for the row).
  """
  codec = codecs.get(f"rtn(group={group})")
  placed = list(blocks)
  for place, block in enumerate(blocks):
    if functions.sparse(block):
      router = jnp.asarray(functions.router(block), jnp.float32)
      encoded = codec.encode(router.T, bits)
      placed[place] = functions.with_router(block, codecs.decode(encoded, group, router.shape[1]).T)
  return placed
