"""From bytes to bits: which average width makes a packed model fit."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from moeq_jax import planar

# What headers take beside the payload: names, offsets and checksums of a packed tensor and of the few unpacked ones
# that come with it (1.4 KB for each packed one, 0.3 KB for each other one, as `container` writes them), the plan in an
# indented manifest (up to 13 characters a cell), and all else.
TENSOR_MARGIN, CELL_MARGIN, MODEL_MARGIN = 4096, 16, 65536


class BudgetError(ValueError):
  """A budget that no plan meets."""


def bits_for_bytes(total_bytes: int, other_bytes: int, shapes: Sequence[tuple[int, int, int]], group: int, *,
                   widths: Sequence[int]) -> float:
  """The largest average of nominal bits at which every plan fits, whichever experts get the bits.

  Counted are the packed codes with K padded to whole blocks, scale and zero of every group (2 + 2 bytes), width and
  offset of every expert (4 + 4 bytes) as `qtensor.stored_bytes` does, the other tensors, and a margin for headers.

  Args:
    total_bytes: what the quantized model may take on disk, and about what it takes in memory.
    other_bytes: everything that is not quantized.
    shapes: `(E, K, N)` of every quantized tensor: each projection of each MoE layer.
    group: rows of K that share a scale; 0 = all.
    widths: candidate bits, ascending.

  Returns:
    Nominal bits per expert weight, at most the largest width, rounded down to whole 1/10000.

  Raises:
    BudgetError: not even the smallest width fits; says how many bytes it takes.
  """
  fixed = other_bytes + margin(shapes) + sum(map(_scales, shapes, [group] * len(shapes)))
  weights = np.array([math.prod(shape) for shape in shapes], dtype=object)
  padded = np.array([e * planar.layout(k, n, group).k_block * n for e, k, n in shapes], dtype=object)
  least = math.ceil(Fraction(widths[0] * int(padded.sum()), 8)) + fixed
  if least > total_bytes:
    raise BudgetError(f"{_size(total_bytes)} hold no plan: with all experts at width {widths[0]} the model takes"
                      f" {_size(least)} ({least} bytes), {_size(other_bytes)} of them not quantized; allow more"
                      " memory, or add a smaller width")
  worst = max(Fraction(p, w) for p, w in zip(padded.tolist(), weights.tolist(), strict=True))
  above = 8 * (total_bytes - least) / (worst * int(weights.sum()))
  return min(math.floor((widths[0] + above) * 10_000) / 10_000, float(widths[-1]))


def margin(shapes: Sequence[tuple[int, int, int]]) -> int:
  """Bytes set aside for headers and metadata of a model with these quantized tensors."""
  return MODEL_MARGIN + sum(TENSOR_MARGIN + CELL_MARGIN * experts for experts, _, _ in shapes)


def _size(count: int) -> str:
  return f"{count / 2**30:.2f} GiB" if count >= 2**26 else f"{count / 2**20:.2f} MiB"


def _scales(shape: tuple[int, int, int], group: int) -> int:
  """Bytes of scales, zeros, widths and offsets of one packed tensor."""
  experts, k, n = shape
  return experts * (4 * n * -(-k // planar.layout(k, n, group).group) + 8)
