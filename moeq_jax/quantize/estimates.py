"""What a run will take, from shapes alone: peak memory and hours of each stage.

Hours are sizes divided by rates that were measured on 2 CPU cores: each constant says in which row of the README's
table of benchmarks it stands. They are of one machine and one shape each; a run on another machine, or on a shape far
from those, may take several times as long or as short. Memory follows what the sweeps hold at once, with the two
amounts that no formula gives (the process itself, GPTQ's work space) from the same table.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moeq_jax import codecs
from moeq_jax.quantize.needs import Needs

GIB = 2**30
BASE = int(0.28 * GIB)  # "router scores and plan of 32 such layers, experts not read": the process itself

# Weights a second from disk to disk: "a checkpoint of Mixtral-8x7B's layers", 1.409e9 weights in 56 and in 115 seconds.
STREAMED = {"rtn": 1.409e9 / 56, "hqq": 1.409e9 / 115}
# "encoding 4096 x 4096": GPTQ's weights a second where K is 4096, and less by the square of K above it, which gives the
# 92 seconds of "one expert of that shape by GPTQ" (two matrices with K = 4096, one with K = 14336).
GPTQ_RATE, GPTQ_ROWS = 9.1e6, 4096
# The same row, 4.7 GiB: beside the process and the expert, 4.5 times the moment of K = 14336.
GPTQ_MOMENTS = 4.5
# `bench paper`: an expert's forward pass in float32, and reading a checkpoint from disk and hashing it.
FLOPS, READ = 287e9, 0.69e9

SKEW = 2.0  # rows of the busiest expert, in even shares: an assumption, not a measurement
SLABS = 6  # slabs of an encoder at once, `encode/stream.SLAB` each
SLAB = 64 << 20


@dataclasses.dataclass(frozen=True)
class Amounts:
  """What an estimate depends on.

  Attributes:
    projections: `{name: (K, N)}` of an expert.
    experts: of a layer.
    layers: MoE layers.
    active: weights that a token passes, in all blocks.
    checkpoint: bytes of the tensors.
    block: bytes of the largest block without its experts, in the compute dtype.
    state, halfway, logits: bytes of all calibration batches between blocks and inside one; of one batch's logits.
    rows: bytes of one row of an expert: its input, its inner values and its output.
    tokens: of calibration, `tokens * per_token` of them spread over the experts of a layer.
    per_token: experts of a token.
    evaluation: tokens.
    bits: average bits of a weight in files.
  """

  projections: Mapping[str, tuple[int, int]]
  experts: int
  layers: int
  active: int
  checkpoint: int
  block: int
  state: int
  halfway: int
  logits: int
  rows: int
  tokens: int
  per_token: int
  evaluation: int
  bits: float

  @property
  def expert(self) -> int:
    """Weights of one expert."""
    return sum(k * n for k, n in self.projections.values())

  @property
  def weights(self) -> int:
    """Weights of all experts."""
    return self.layers * self.experts * self.expert

  @property
  def busiest(self) -> int:
    """Rows of the busiest expert."""
    return min(self.tokens, math.ceil(SKEW * self.tokens * self.per_token / self.experts))


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run: its peak of resident memory in bytes, and its hours."""

  name: str
  memory: int
  hours: float


def stages(amounts: Amounts, needs: Needs, codec: codecs.Codec, widths: int, *,
           sequential: bool = False) -> list[Stage]:
  """The stages that a run goes through.

  Args:
    amounts: sizes.
    needs: the sweeps.
    codec: the codec.
    widths: how many candidate widths, at each of which errors are measured.
    sequential: whether quantized layers are run during encoding, too.
  """
  a = amounts
  found = [Stage("open and hash", BASE, a.checkpoint / READ / 3600)]
  through, expert = 2 * a.active * a.tokens / FLOPS / 3600, _expert_memory(a)
  sweep = BASE + a.block + a.halfway + expert
  encoder = GPTQ_MOMENTS * _largest(a) if codec.needs_moment else SLABS * SLAB
  once = encode_hours(a, codec)
  if needs.forward:
    fused = needs.fused
    found.append(Stage("forward sweep" + (" and errors" if fused else ""), int(sweep + fused * encoder),
                       through + fused * widths * once))
  if needs.backward:  # the forward pass again, and two products for each of its own
    found.append(Stage("backward sweep", int(sweep + a.halfway + 4 * a.expert + a.state), 4 * through))
  if needs.errors and not needs.fused:
    held = sweep if needs.fisher else BASE + 2 * a.expert
    found.append(Stage("errors", int(held + encoder), widths * once + needs.fisher * through))
  packed = 2 * int(a.experts * a.expert * a.bits / 8)  # a layer, and its tensors on their way into a file
  if needs.rows:
    found.append(Stage("encode", int(sweep + encoder + packed), once + (1 + sequential) * through))
  else:
    found.append(Stage("encode", int(BASE + 2 * a.expert + encoder + packed), once))
  if a.evaluation:
    share = a.evaluation / max(a.tokens, 1) if a.tokens else 1.0
    held = BASE + a.block + packed + 2 * a.logits + int(min(share, 1.0) * a.halfway) + 6 * a.expert
    found.append(Stage("evaluate, before and after", int(held), 2 * 2 * a.active * a.evaluation / FLOPS / 3600))
  return found


def encode_hours(amounts: Amounts, codec: codecs.Codec) -> float:
  """Hours in which every expert is encoded once."""
  if not codec.needs_moment:
    return amounts.weights / STREAMED[codec.name] / 3600
  seconds = 0.0
  for k, n in amounts.projections.values():
    seconds += k * n / GPTQ_RATE * max(1.0, (k / GPTQ_ROWS)**2)
  inputs = {k for k, _ in amounts.projections.values()}  # gate and up share theirs
  moments = sum(2 * k * k for k in inputs) * amounts.layers * amounts.tokens * amounts.per_token / FLOPS
  return (amounts.layers * amounts.experts * seconds + moments) / 3600


def _largest(amounts: Amounts) -> int:
  """Bytes of the largest moment."""
  return max(4 * k * k for k, _ in amounts.projections.values())


def _expert_memory(amounts: Amounts) -> int:
  """An expert as stored and in float32, and its rows."""
  return 6 * amounts.expert + amounts.busiest * amounts.rows


def as_json(found: list[Stage]) -> list[dict[str, Any]]:
  """Stages for a JSON line."""
  return [{"stage": s.name, "peak_gib": round(s.memory / GIB, 2), "hours": round(s.hours, 3)} for s in found]
