"""How the tables of arXiv 2604.06515 count memory, so that their column can be reproduced and told apart from ours.

Their column holds, in GiB though it says GB: expert codes, 3-bit codes at ten to an int32 (3.2 bits), a float16 scale
and zero for every 128 expert weights (0.25 bit); attention at 4 bits with the same scales; embedding and output in
16 bits. Norms, routers and scales' own padding do not count. Nothing states this; it is what reproduces the cells that
can be reproduced (docs/paper.md lists them, and those that cannot).
"""

import dataclasses
from collections.abc import Mapping

PACKED = {3: 3.2}  # bits that a code of so many bits takes, where that is not the same
SCALES = 0.25
ATTENTION_BITS = 4
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Parts:
  """Parameters of a model by what becomes of them.

  Attributes:
    experts: of all routed experts.
    attention: of the attention's matrices.
    embedding: of embedding and output.
  """

  experts: int
  attention: int
  embedding: int


def packed_bits(counts: Mapping[int, float]) -> float:
  """Average bits of an expert's packed codes, without scales.

  Args:
    counts: experts of a layer (or any share of the experts) by width.

  Raises:
    ValueError: no experts.
  """
  total = sum(counts.values())
  if not total:
    raise ValueError("counts are empty: a layer has at least one expert")
  return sum(PACKED.get(bits, bits) * count for bits, count in counts.items()) / total


def memory(parts: Parts, counts: Mapping[int, float], attention_bits: float = ATTENTION_BITS) -> float:
  """The table's column "Memory (GB)", in GiB.

  Args:
    parts: the model.
    counts: experts of a layer by width, the same in every layer.
    attention_bits: of the attention's codes.

  Raises:
    ValueError: no experts.
  """
  experts = parts.experts * (packed_bits(counts) + SCALES)
  attention = parts.attention * (attention_bits + SCALES)
  return (experts / 8 + attention / 8 + 2 * parts.embedding) / GIB


def packed_bits_of(parts: Parts, gib: float, attention_bits: float = ATTENTION_BITS) -> float:
  """The other way round: which average of packed bits a cell of the column implies."""
  rest = parts.attention * (attention_bits + SCALES) / 8 + 2 * parts.embedding
  return 8 * (gib * GIB - rest) / parts.experts - SCALES
