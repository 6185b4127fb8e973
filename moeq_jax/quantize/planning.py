"""From what the sweeps measured to bits: evidence, costs, the plan, and what other constraints would cost."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeq_jax import artifacts, channels, registry, scores
from moeq_jax.allocate import blocks as allocate_blocks
from moeq_jax.allocate import constraints, methods, problem
from moeq_jax.quantize import blocks, measure
from moeq_jax.quantize.subject import Arrays, Subject
from moeq_jax.scores import channels as channel_scores


def evidence(subject: Subject, stats: artifacts.Stats, errors: artifacts.ErrorTable,
             routers: np.ndarray, before: np.ndarray | None = None) -> scores.Evidence:
  """What scores look at; experts are read from disk when a score asks for them. `before`: the routers before training,
  where they are known."""
  return scores.Evidence(stats, errors, routers, before, measure.Experts(subject))


def routers(subject: Subject) -> np.ndarray:
  """The routers of all layers, `[L, E, D]` float32."""
  return np.stack([np.asarray(subject.source.router(layer), np.float32) for layer in subject.sparse])


def plan(subject: Subject, method: str, found: scores.Evidence, inputs: Mapping[str, str], budget: float,
         seed: int) -> methods.Candidate:
  """The plan that `method` makes; the first draw of a random one.

  Args:
    subject: the checkpoint.
    method: spec of a method.
    found: the evidence.
    inputs: digests of what the evidence was made from; costs are kept under a key of them.
    budget: average nominal bits per expert weight.
    seed: of random methods.
  """
  ask = methods.Inputs(
      widths=found.errors.widths, shape=(len(subject.sparse), subject.source.experts), draws=1, seed=seed,
      block_cost=functools.partial(block_cost, subject, found, inputs),
      cost=functools.partial(cost, subject, found, inputs),
      sensitivity=functools.partial(_sensitivity, subject, found, inputs))
  chosen = methods.candidates(method, budget, ask)[0]
  artifacts.write_json(subject.run.path / "plan.json", chosen.plan.as_json())
  if isinstance(chosen.plan, channels.BlockPlan):
    chosen.plan.save(subject.run.path / "plan.npz")
  return chosen


def cost(subject: Subject, found: scores.Evidence, inputs: Mapping[str, str], spec: str) -> artifacts.CostTable:
  """The cost table of a score, kept in `costs-SCORE.npz`."""
  key = subject.key("costs", {"score": registry.canonical(spec), "kind": "cost"}, **inputs)
  name = f"costs-{registry.filename(spec)}.npz"
  return subject.run.product(name, key, artifacts.CostTable.load, lambda: scores.as_cost(spec, found))


def block_cost(subject: Subject, found: channel_scores.Evidence, inputs: Mapping[str, str], spec: str,
               block: int) -> channels.BlockCosts:
  """The costs of blocks of neurons in order, kept in `costs-SCORE-block-N.npz`."""
  key = subject.key("costs", {"score": registry.canonical(spec), "kind": "blocks", "block": block}, **inputs)
  name = f"costs-{registry.filename(spec)}-block-{block}.npz"
  return subject.run.product(name, key, channels.BlockCosts.load, lambda: blocks.costs(found, spec, block))


def _sensitivity(subject: Subject, found: scores.Evidence, inputs: Mapping[str, str], spec: str) -> np.ndarray:
  """`[L, E]`, higher = more sensitive, kept in `score-SCORE.npz`."""
  key = subject.key("costs", {"score": registry.canonical(spec), "kind": "order"}, **inputs)
  make = lambda: Arrays({"sensitivity": scores.sensitivity(spec, found)})
  return subject.run.product(f"score-{registry.filename(spec)}.npz", key, Arrays.load, make).values["sensitivity"]


def constraint_costs(subject: Subject, method: str, found: scores.Evidence, inputs: Mapping[str, str],
                     chosen: artifacts.Plan) -> list[dict[str, Any]]:
  """The least cost under every constraint at the plan's budget; nothing for methods without costs.

  Args:
    subject, method, found, inputs: as for `plan`.
    chosen: the plan.

  Returns:
    `constraint`, `predicted`, `ratio` (to the chosen plan's cost) and `bits` (average used) of each.
  """
  score, widths = methods.score_of(method), registry.parse(method).kwargs.get("widths")
  if chosen.predicted is None or score is None:
    return []
  if block := methods.block_of(method):
    table = block_cost(subject, found, inputs, score, block)
    return blocks.constraint_costs(allocate_blocks.restricted(table, widths or table.widths), chosen)
  table = cost(subject, found, inputs, score)
  rows, table = [], constraints.restricted(table, widths or table.widths)
  for name in constraints.CONSTRAINTS:
    best = problem.plan(table, chosen.budget, name)
    bits = best.by_projection(len(table.projections)).reshape(-1, len(table.projections))
    average = float((bits * np.array(table.sizes)).sum() / (len(bits) * sum(table.sizes)))
    rows.append({"constraint": name, "predicted": best.predicted, "bits": average,
                 "ratio": best.predicted / chosen.predicted if chosen.predicted else None})
  return rows
