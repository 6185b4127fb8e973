"""Named shapes of real Mixture-of-Experts layers, shared by tests and benchmarks, and routings over their experts."""

import dataclasses
import fractions

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """Sizes of one MoE layer.

  Attributes:
    experts: E, number of experts.
    top_k: experts per token.
    hidden: D, size of the residual stream.
    ffn: F, inner size of an expert.
    gated: whether an expert has a gate beside up and down.
  """

  experts: int
  top_k: int
  hidden: int
  ffn: int
  gated: bool = True

  def matmuls(self) -> dict[str, tuple[int, int, int]]:
    """`(E, K, N)` of each projection, in the order of `artifacts.PROJECTIONS`."""
    up, down = (self.experts, self.hidden, self.ffn), (self.experts, self.ffn, self.hidden)
    return {"gate": up, "up": up, "down": down} if self.gated else {"up": up, "down": down}

  def scaled(self, factor: fractions.Fraction | float) -> "Layer":
    """The layer with D and F times `factor`: same aspect ratio, same experts.

    Raises:
      ValueError: D or F would not be whole.
    """
    hidden, ffn = self.hidden * fractions.Fraction(factor), self.ffn * fractions.Fraction(factor)
    if hidden.denominator != 1 or ffn.denominator != 1:
      raise ValueError(f"{self.hidden} x {self.ffn} times {factor} is not whole")
    return dataclasses.replace(self, hidden=int(hidden), ffn=int(ffn))


LAYERS = {
  "mixtral-8x7b": Layer(experts=8, top_k=2, hidden=4096, ffn=14336),
  "switch-base-64": Layer(experts=64, top_k=1, hidden=768, ffn=3072, gated=False),
  "qwen3-30b-a3b": Layer(experts=128, top_k=8, hidden=2048, ffn=768),
  "smollm2-upcycled": Layer(experts=4, top_k=2, hidden=576, ffn=1536),
  "moeq-small": Layer(experts=16, top_k=2, hidden=256, ffn=256),
}
ROUTINGS = ("uniform", "zipf", "all_to_one")


def group_sizes(routing: str, rows: int, experts: int, seed: int = 0) -> np.ndarray:
  """`[E]` int32 rows per expert, summing to `rows`.

  Args:
    routing: `"uniform"` draws every row's expert evenly; `"zipf"` with probabilities `1 / rank` in a random order of
      experts; `"all_to_one"` sends all rows to one random expert.
    rows: T, tokens times top-k.
    experts: E.
    seed: of the draw.
  """
  rng = np.random.default_rng(seed)
  weight = {
    "uniform": np.ones(experts),
    "zipf": rng.permutation(1 / np.arange(1, experts + 1)),
    "all_to_one": np.eye(experts)[rng.integers(experts)],
  }[routing]
  return rng.multinomial(rows, weight / weight.sum()).astype(np.int32)
