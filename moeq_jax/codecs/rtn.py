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
  return grid.encode_groups(w, bits, spec.group, grid.SEARCH[spec.grid])
