"""Packs the codes that a plan chose, and puts them into a model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, qtensor


def pack_layer(codes: artifacts.LayerCodes, bits: np.ndarray, *, widths: Sequence[int], group: int,
               sized: bool = False) -> dict[str, qtensor.QTensor]:
  """One layer's experts at the plan's widths, packed.

  Args:
    codes: the layer's codes at all `widths`.
    bits: `[E]`, each one of `widths`.
    widths: candidate bits, in the order of `codes`.
    group: rows of K that share a scale; 0 = all.
    sized: pad buffers to the size of the widest plan, so that one compiled program serves every plan.

  Returns:
    `{"gate", "up", "down"}`.

  Raises:
    ValueError: a width that was not encoded, named with its expert.
  """
  for expert, width in enumerate(bits):
    if width not in widths:
      raise ValueError(f"expert {expert}: the plan wants {width} bits, encoded were {tuple(widths)}; add the width to"
                       " config.widths, or make the plan again")
  index = np.array([list(widths).index(width) for width in bits])
  packed = {}
  for name in artifacts.PROJECTIONS:
    chosen = getattr(codes, name).choose(index)
    capacity = qtensor.packed_rows(max(widths), chosen.codes.shape, group) if sized else None
    packed[name] = qtensor.pack(chosen.codes, bits, chosen.scale, chosen.zero, group=group, capacity=capacity)
  return packed


def quantized_blocks(functions: Any, blocks: Sequence[Any], packed: Sequence[dict[str, qtensor.QTensor]]) -> list[Any]:
  """The model's blocks with packed experts in place of the full-precision ones."""
  on_device = [jax.tree.map(jnp.asarray, layer) for layer in packed]
  return [functions.with_experts(block, layer) for block, layer in zip(blocks, on_device, strict=True)]
