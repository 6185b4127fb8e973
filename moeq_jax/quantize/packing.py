"""Packs a layer's experts one by one, so that unpacked codes of one expert are in memory, not of all."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moeq_jax import channels, codecs, qtensor


def pack_expert(encoded: Mapping[str, codecs.Encoded], bits: Mapping[str, int | np.ndarray],
                group: int) -> dict[str, qtensor.QTensor]:
  """The projections of one expert, each a QTensor `[1, K, N]`; `bits` is one width of each, or those of its blocks of
  neurons, `[NB]`."""
  packed = {}
  for name, codes in encoded.items():
    code, scale, zero = (np.asarray(part)[None] for part in (codes.codes, codes.scale, codes.zero))
    widths = channels.grid(name, np.atleast_1d(bits[name])[None])
    packed[name] = qtensor.pack(code, widths, scale, zero, group=group)
  return packed


def join(experts: Sequence[qtensor.QTensor]) -> qtensor.QTensor:
  """One QTensor of all experts: the same bytes as if they had been packed together.

  Args:
    experts: unsharded, all of one shape `[1, K, N]`, in order.
  """
  rows = np.cumsum([0, *(q.buffer.shape[1] for q in experts)])[:-1]
  fields = {name: np.concatenate([getattr(q, name) for q in experts]) for name in ("bits", "scale", "zero")}
  offset = np.concatenate([q.offset + int(row) for q, row in zip(experts, rows, strict=True)]).astype(np.int32)
  buffer = np.concatenate([q.buffer for q in experts], axis=1)
  return dataclasses.replace(experts[0], buffer=buffer, offset=offset, **fields)


def widened(packed: Mapping[str, qtensor.QTensor], rows: Mapping[str, int]) -> dict[str, qtensor.QTensor]:
  """A layer's projections with their buffers padded to `rows`: equal shapes, so one program serves all layers."""
  pad = lambda q, most: np.pad(q.buffer, ((0, 0), (0, most - q.buffer.shape[1]), (0, 0)))
  return {name: dataclasses.replace(q, buffer=pad(q, rows[name])) for name, q in packed.items()}


def join_layer(experts: Sequence[Mapping[str, qtensor.QTensor]]) -> dict[str, qtensor.QTensor]:
  """`{projection: QTensor}` of a layer, from those of its experts in order."""
  return {name: join([expert[name] for expert in experts]) for name in experts[0]}
