"""What a method reads, found by having it plan bits for a toy model and watching.

A sweep through a large model takes minutes to hours, so only those run that the method needs: `uniform` with a codec
without data reads nothing, the error of the weights needs the weights, a gradient needs a forward and a backward pass.
Nothing has to be declared: a score that somebody adds is watched like the others.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeq_jax import artifacts, channels, codecs, registry, scores
from moeq_jax.allocate import methods
from moeq_jax.quantize import blocks
from moeq_jax.scores import channels as channel_scores

# Fields of Stats that come without a pass over text; that need a backward pass; that streaming never has.
_FREE = {"router_norm"}
_BACKWARD = {"router_grad", "grad_sq_gate", "grad_sq_up", "grad_sq_down", "gradients"}
_NEVER = {"moment_in", "moment_mid"}
_LAYERS, _EXPERTS, _HIDDEN, _FFN = 2, 4, 8, 6


@dataclasses.dataclass(frozen=True)
class Needs:
  """The sweeps that a plan needs, and whether encoding needs text too.

  Attributes:
    forward: calibration text goes through the model.
    backward: and derivatives go back.
    errors: every expert is encoded at every width.
    fisher: with squared gradients, so after the backward sweep.
    rows: the codec sees the experts' inputs.
  """

  forward: bool
  backward: bool
  errors: bool
  fisher: bool
  rows: bool

  @property
  def text(self) -> bool:
    """Whether there must be calibration text."""
    return self.forward or self.rows

  @property
  def fused(self) -> bool:
    """Whether errors are measured while the forward sweep holds each expert."""
    return self.errors and self.forward and not self.fisher


class _Watched:
  """A value that notes which of its fields are read, and refuses those that will not be there."""

  def __init__(self, name: str, value: Any, never: set[str]):
    self._name, self._value, self._never, self.read = name, value, never, set()

  def __getattr__(self, field: str) -> Any:
    if field in self._never:
      raise ValueError(f"reads {self._name}.{field}, which streaming does not keep (it is of the size of the model);"
                       " take another score, or compare methods on a model that fits into memory"
                       " (configs/quickstart.py)")
    self.read.add(field)
    return getattr(self._value, field)


def of(method: str, budget: float, widths: Sequence[int], codec: codecs.Codec, projections: Sequence[str],
       routers_init: bool, text: bool = True) -> Needs:
  """What `method` needs.

  Args:
    method: spec of a method of allocation.
    budget: average nominal bits per expert weight.
    widths: candidate bits.
    codec: the codec.
    projections: those that the model's experts have.
    routers_init: whether the routers before training are known.
    text: whether there is calibration text; some scores of neurons do without where there is none.

  Raises:
    ValueError: an unknown method or score, a budget that cannot be met, or a score that reads what streaming does not
      have.
  """
  score = methods.score_of(method)
  if score and registry.parse(score).name == "damage":
    raise ValueError("score damage runs the whole model once for every expert, which streaming does not; take"
                     " router_grad_error or fisher_error, or configs/quickstart.py for a model that fits into memory")
  if methods.block_of(method):
    stats, errors = _Watched("stats", _channel_stats(), set()), _channel_errors(codec, widths, projections)
    errors = _Watched("errors", errors, set())
    evidence = channel_scores.Evidence(errors, [_experts(projections)] * _LAYERS, stats if text else None)
  else:
    stats, errors = _Watched("stats", _stats(), _NEVER), _errors(codec, widths, projections)
    errors = _Watched("errors", errors, set())
    evidence = _evidence(stats, errors, projections, routers_init)
  try:
    candidate(method, budget, widths, evidence, seed=0)
  except registry.SpecError:
    raise
  except ValueError as error:
    raise ValueError(f"config.method={method}: {error}") from None
  measured = errors.read & {"weight", "output", "fisher", "norm"}
  backward = bool(stats.read & _BACKWARD) or "fisher" in measured
  rows = codec.needs_moment
  forward = bool(stats.read - _FREE) or backward or "output" in measured or (rows and bool(measured))
  return Needs(forward, backward, bool(measured), "fisher" in measured, rows)


def candidate(method: str, budget: float, widths: Sequence[int], evidence: scores.Evidence | channel_scores.Evidence,
              seed: int) -> methods.Candidate:
  """The plan that a method makes of the evidence, of neurons for blocks of them; the first draw of a random one."""
  inputs = methods.Inputs(
      widths=tuple(widths),
      shape=() if isinstance(evidence, channel_scores.Evidence) else evidence.routers.shape[:2],
      block_cost=lambda spec, block: blocks.costs(evidence, spec, block),
      cost=lambda spec: scores.as_cost(spec, evidence),
      sensitivity=lambda spec: scores.sensitivity(spec, evidence),
      draws=1,
      seed=seed,
  )
  return methods.candidates(method, budget, inputs)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The toy model
# ---------------------------------------------------------------------------------------------------------------------


def _random(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).uniform(0.5, 1.5, shape)


def _stats() -> artifacts.Stats:
  each = _random(_LAYERS, _EXPERTS)
  ffn, hidden = _random(_LAYERS, _EXPERTS, _FFN), _random(_LAYERS, _EXPERTS, _HIDDEN)
  return artifacts.Stats(
      tokens=np.ones((_LAYERS, _EXPERTS), np.int64), gate_weight=each, router_norm=each, router_grad=each,
      moment_in=None, moment_mid=None, grad_sq_gate=ffn, grad_sq_up=ffn, grad_sq_down=hidden,
      total_tokens=_EXPERTS, batches=1)


def _errors(codec: codecs.Codec, widths: Sequence[int], projections: Sequence[str]) -> artifacts.ErrorTable:
  error = _random(_LAYERS, _EXPERTS, len(projections), 1) * 4.0 ** -np.array(widths)
  return artifacts.ErrorTable(
      weight=error, output=error, fisher=error, norm=_random(_LAYERS, _EXPERTS, len(projections)), widths=tuple(widths),
      codec=str(codec), group=codec.group, projections=tuple(projections),
      sizes=(_HIDDEN * _FFN,) * len(projections))


def _evidence(stats: Any, errors: Any, projections: Sequence[str], routers_init: bool) -> scores.Evidence:
  routers = _random(_LAYERS, _EXPERTS, _HIDDEN).astype(np.float32)
  experts = [_experts(projections)] * _LAYERS
  return scores.Evidence(stats, errors, routers, 0.5 * routers if routers_init else None, experts)


def _experts(projections: Sequence[str]) -> dict[str, np.ndarray]:
  shapes = {name: (_FFN, _HIDDEN) if name == "down" else (_HIDDEN, _FFN) for name in projections}
  return {name: _random(_EXPERTS, *shape).astype(np.float32) for name, shape in shapes.items()}


def _channel_stats() -> channels.ChannelStats:
  plain, summary = _stats(), np.full((_LAYERS, _EXPERTS, 2, 3), 2.0)
  same = ("tokens", "gate_weight", "router_norm", "router_grad", "grad_sq_gate", "grad_sq_up", "grad_sq_down",
          "total_tokens", "batches")
  return channels.ChannelStats(
      **{name: getattr(plain, name) for name in same}, input_sq=_random(_LAYERS, _EXPERTS, _HIDDEN),
      mid_sq=_random(_LAYERS, _EXPERTS, _FFN), condition=summary, log_am_gm=summary, damping=0.01)


def _channel_errors(codec: codecs.Codec, widths: Sequence[int], projections: Sequence[str]) -> channels.ChannelErrors:
  projection, sizes = channels.units([(_FFN, _HIDDEN)] * len(projections))
  error = _random(_LAYERS, _EXPERTS, len(sizes), 1) * 4.0 ** -np.array(widths)
  return channels.ChannelErrors(error, error, tuple(widths), str(codec), codec.group, tuple(projections), projection,
                                sizes)
