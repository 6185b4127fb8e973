"""The methods that a comparison runs: a spec string and a budget give one or several plans.

  uniform                          one width for all; between two widths, a random mix of both
  random(levels=2)                 the tiers' counts in a random order, layer by layer
  tiers(SCORE, levels=2)           the paper's rule: counts by budget, order by score, re-ranked by MaxVar
  knapsack(SCORE)                  least total cost over the whole model

The knapsack takes three options: `constraint`, which cells share one width (see `constraints.py`), `widths`, those of
`config.widths` that it may use, `knapsack(output_error, constraint=per_layer, widths=(2, 4))`, and `block`: neurons of
an expert are put in order and cut into blocks of so many, and each block of each projection has its own width (then
`constraint` is one of `blocks.CONSTRAINTS`, and the score one of `scores.channels`). The other methods give one width
to an expert.

Scores and costs arrive as functions of the score's spec, because stages do not import each other.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeq_jax import artifacts, channels, codecs, registry
from moeq_jax.allocate import blocks, constraints, problem, tiers

MAX_VAR = {"paper": "max_var", "code": "max_var(variant='code')"}


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What methods may use.

  Attributes:
    widths: candidate bits, ascending.
    shape: `(L, E)`.
    cost: spec of a score -> its `CostTable`.
    sensitivity: spec of a score -> `[L, E]`, higher = more sensitive by the claim of its source.
    draws: plans of a random method.
    seed: of random methods.
    block_cost: spec of a score of channels, and neurons of a block -> the costs of blocks of neurons in order.
  """

  widths: tuple[int, ...]
  shape: tuple[int, int]
  cost: Callable[[str], artifacts.CostTable]
  sensitivity: Callable[[str], np.ndarray]
  draws: int
  seed: int
  block_cost: Callable[[str, int], channels.BlockCosts] | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A plan to be evaluated.

  Attributes:
    plan: the plan.
    family: `uniform`, `random`, `tiers`, `knapsack` or `measured` (see `results`).
    draw: number of the draw of a random method, else `None`.
    units: of the plan's predicted cost.
  """

  plan: artifacts.Plan | channels.BlockPlan
  family: str
  draw: int | None = None
  units: str = "arbitrary"

  def file_name(self) -> str:
    """The candidate's name in files and rows."""
    draw = "" if self.draw is None else f"-draw{self.draw}"
    return f"{registry.filename(self.plan.method)}-{self.plan.budget:g}{draw}"

  def as_row(self) -> dict[str, Any]:
    """The fields of a result row that the plan decides."""
    plan = self.plan
    nats = self.units == "nats"
    certified = plan.predicted and plan.lower_bound is not None
    gap = (plan.predicted - plan.lower_bound) / plan.predicted if certified else None
    own = {}
    if isinstance(plan, channels.BlockPlan):
      own = {"block": plan.block, "permutation_bits": plan.permutation_bits(),
             "plan": artifacts.digest([artifacts.digest(plan.bits), artifacts.digest(plan.order)])}
    return {
        "id": self.file_name(), "method": plan.method, "family": self.family, "budget": plan.budget, "draw": self.draw,
        "constraint": plan.constraint, "plan": artifacts.digest(plan.bits), "cost": plan.predicted,
        "predicted": plan.predicted if nats else None, "lower_bound": plan.lower_bound if nats else None, "gap": gap,
    } | own


def _uniform(budget: float, inputs: Inputs) -> list[Candidate]:
  exact = budget in inputs.widths
  draws = [None] if exact else range(inputs.draws)
  bits = [problem.uniform(budget, inputs.widths, inputs.shape, seed=[inputs.seed, draw or 0]) for draw in draws]
  return [Candidate(artifacts.Plan(b, "uniform", budget), "uniform", draw) for b, draw in zip(bits, draws)]


def _random(budget: float, inputs: Inputs, *, levels: int = 2) -> list[Candidate]:
  counts = tier_counts(budget, inputs.widths, inputs.shape[1], levels)
  method = str(registry.Spec("random", (), {} if levels == 2 else {"levels": levels}))
  plans = [problem.random_tiers(*inputs.shape, counts, [inputs.seed, draw]) for draw in range(inputs.draws)]
  return [Candidate(artifacts.Plan(bits, method, budget), "random", draw) for draw, bits in enumerate(plans)]


def tier_counts(budget: float, widths: Sequence[int], experts: int, levels: int,
                variant: str = "paper") -> dict[int, int]:
  """How many of a layer's experts get each width: `{width: experts}`, from the highest width to the lowest.

  Two tiers are the widths around the budget (one above and one below where the budget is itself a width); three tiers
  are the three neighbouring widths whose middle is nearest to the budget. Where the experts of a layer cannot be shared
  out so that the budget is met exactly, the nearest average is taken, which may be above it (see `tiers.counts_two`).

  Raises:
    ValueError: the candidate widths do not surround the budget, or do not allow so many levels.
  """
  below = [w for w in widths if w < budget]
  above = [w for w in widths if w > budget]
  if not below or not above:
    raise ValueError(f"tiers at {budget} bits need a width below and one above it, and config.widths is"
                     f" {tuple(widths)}: add a width, or leave out the tiers and the random plans")
  if levels == 2:
    return dict(zip((above[0], below[-1]), tiers.counts_two(experts, budget, below[-1], above[0])[::-1]))
  if levels != 3 or len(widths) < 3:
    raise ValueError(f"levels={levels}, widths {tuple(widths)}: tiers have 2 levels, or 3 with at least three widths")
  middle = min(range(1, len(widths) - 1), key=lambda i: (abs(widths[i] - budget), i))
  low, mid, high = widths[middle - 1 : middle + 2]
  return dict(zip((high, mid, low), tiers.counts_three(experts, budget, low, mid, high, variant=variant)[::-1]))


def _tiers(score: str, budget: float, inputs: Inputs, *, levels: int = 2, variant: str = "paper", zeta: float = 3.0,
           reverse: bool = False) -> list[Candidate]:
  """The rule of arXiv 2604.06515. `zeta=0` leaves the MaxVar re-ranking out; `reverse` turns the score around."""
  if variant not in MAX_VAR:
    raise ValueError(f"tiers: unknown variant {variant!r}; it is one of {', '.join(map(repr, MAX_VAR))}")
  if not isinstance(zeta, int | float):
    raise ValueError(f"tiers: zeta={zeta!r} is no number; it is 0 or at least 1")
  counts = tier_counts(budget, inputs.widths, inputs.shape[1], levels, variant)
  sensitivity = inputs.sensitivity(score) * (-1 if reverse else 1)
  orders = tiers.order(sensitivity, descending=True)
  if zeta:
    max_var = inputs.sensitivity(MAX_VAR[variant])
    orders = np.stack([tiers.rerank(o, v, zeta=zeta, variant=variant) for o, v in zip(orders, max_var)])
  options = {"levels": (levels, 2), "variant": (variant, "paper"), "zeta": (zeta, 3.0), "reverse": (reverse, False)}
  changed = {name: value for name, (value, default) in options.items() if value != default}
  method = str(registry.Spec("tiers", (score,), changed))
  bits = tiers.assign(orders, tuple(counts.values()), tuple(counts))
  return [Candidate(artifacts.Plan(bits, method, budget), "tiers")]


def _knapsack(score: str, budget: float, inputs: Inputs, *, constraint: str | None = None,
              widths: Sequence[int] | None = None, block: int = 0) -> list[Candidate]:
  if block and block not in channels.BLOCKS:
    raise ValueError(f"knapsack: block={block!r} is not one of {channels.BLOCKS} neurons")
  if widths is not None and not (isinstance(widths, tuple | list) and all(isinstance(w, int) for w in widths)):
    raise ValueError(f"knapsack: widths={widths!r} are no bit numbers; write them like (2, 4)")
  table = inputs.block_cost(score, block) if block else inputs.cost(score)
  default = blocks.DEFAULT if block else constraints.DEFAULT
  constraint, options = constraint or default, {"block": block} if block else {}
  if constraint != default:
    options["constraint"] = constraint
  if widths is not None:
    table = (blocks if block else constraints).restricted(table, widths)
    options["widths"] = table.widths
  method = str(registry.Spec("knapsack", (table.score,), options))
  if block:
    plan = blocks.plan(table, budget, constraint, method=method)
  else:
    plan = problem.plan(table, budget, constraint, method)
  family = "measured" if registry.parse(score).name == "damage" else "knapsack"
  return [Candidate(plan, family, units=table.units)]


METHODS: dict[str, Callable[..., list[Candidate]]] = {
    "uniform": _uniform, "random": _random, "tiers": _tiers, "knapsack": _knapsack,
}

_REGISTRY = registry.Registry("method", METHODS)


def check(specs: Sequence[str], budgets: Sequence[float], widths: Sequence[int]) -> None:
  """Looks for mistakes before anything is computed.

  Raises:
    ValueError: no method or no budget, an unknown method or option, a score that is missing, widths that no codec has,
      or a budget that a method cannot meet with these widths.
  """
  if not specs or not budgets:
    raise ValueError(f"config.methods={tuple(specs)}, config.budgets={tuple(budgets)}: at least one of each is needed")
  if unknown := sorted(set(widths) - set(codecs.WIDTHS)):
    raise ValueError(f"config.widths={tuple(widths)}: no codec encodes {unknown} bits; choose from {codecs.WIDTHS}")
  for budget in budgets:
    problem.check_budget(budget, widths)
  names = artifacts.PROJECTIONS
  free = functools.partial(artifacts.CostTable, np.zeros((1, 2, len(names), len(widths))), tuple(widths),
                           units="arbitrary", projections=names, sizes=(1,) * len(names))
  rehearsal = Inputs(tuple(widths), (1, 2), cost=free, sensitivity=lambda score: np.zeros((1, 2)), draws=1, seed=0,
                     block_cost=functools.partial(_free_blocks, tuple(widths)))
  for spec in specs:
    for budget in budgets:
      candidates(spec, budget, rehearsal)


def _free_blocks(widths: tuple[int, ...], score: str, block: int) -> channels.BlockCosts:
  """Costs of zero for one block of each projection."""
  names = artifacts.PROJECTIONS
  place = np.arange(len(names))
  return channels.BlockCosts(np.zeros((1, 2, len(names), len(widths))), widths, score, "arbitrary", names, place,
                             np.ones_like(place), block=block, down_block=block)


def _bound(spec: str) -> Callable[[float, Inputs], list[Candidate]]:
  """The method that `spec` names, bound to its score and options."""
  bound = _REGISTRY.get(spec)
  wanted = list(inspect.signature(bound.func).parameters).index("budget")
  if len(bound.args) != wanted:
    takes = "one score: tiers(SCORE), knapsack(SCORE)" if wanted else "no score"
    raise registry.ArgumentError(f"{spec}: {registry.parse(spec).name} takes {takes}; options are given by name")
  return bound


def candidates(spec: str, budget: float, inputs: Inputs) -> list[Candidate]:
  """The plans of one method at one budget.

  Raises:
    ValueError: an unknown method or option, or a budget that the widths cannot meet.
  """
  problem.check_budget(budget, inputs.widths)
  return _bound(spec)(budget, inputs)


def score_of(spec: str) -> str | None:
  """The score that a method's spec names as its first argument, if any."""
  args = registry.parse(spec).args
  return args[0] if args else None


def block_of(spec: str) -> int:
  """The neurons of a block that a method's spec names; 0 where it gives bits to nothing smaller than a projection."""
  return registry.parse(spec).kwargs.get("block") or 0
