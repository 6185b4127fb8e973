"""Round to nearest (RTN) with a clipping search: the codec without data, and the yardstick for the other two.

Every group of every column gets the clipped range of least squared error (`grid.SEARCH`), and every weight goes to the
nearest level of it.
"""

import dataclasses

import jax

from moeq_jax.codecs import grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Options of RTN.

  Attributes:
    group: rows of K that share a scale: 32, 64, 128, or 0 for all of K.
    grid: `affine`, or `ct`, the symmetric integers of the compressed-tensors format.
  """

  group: int = 64
  grid: str = "affine"

  def __post_init__(self) -> None:
    grid.check_group(self.group)
    grid.check_kind(self.grid)


def encode(w: jax.Array, bits: jax.Array, moment: jax.Array | None, spec: Spec) -> grid.Encoded:
  """Encodes one matrix; jittable, and vmappable over experts.

  Args:
    w: `[K, N]` float32, finite.
    bits: int32 scalar in `grid.WIDTHS`, or one of them for every group, see `grid.per_group`; may be traced.
    moment: not used.
    spec: static options.
  """
  del moment

  slabs, valid = grid.split(w, spec.group)

  def encode_group(group: tuple[jax.Array, jax.Array | None, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, valid, bits = group
    scale, zero = grid.SEARCH[spec.grid](x, valid, bits)
    return grid.quantize(x, scale, zero, grid.top_code(bits)), scale, zero

  widths = grid.per_group(bits, len(slabs), w.shape[1])
  return grid.join(*jax.lax.map(encode_group, (slabs, valid, widths)), rows=w.shape[0])
