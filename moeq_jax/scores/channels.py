"""Scores and costs of rows: how sensitive is each channel of each expert?

An implementation of the method described in the abstract of "Automated Fine-Grained Mixture-of-Experts Quantization"
(Findings of ACL 2025, 1386), with a documented design where the paper's details were not available
(docs/channelwise.md). A *row* is an output channel of a matrix, as papers write it: a column of our `[K, N]`; with
`axis="neurons"` the rows of down are its inputs instead (`moeq_jax.channels`).

  statistical   S = alpha K V + (1 - alpha) O from weights alone (`statistical`)
  fisher        M sum_j F_cj (w_cj - w_hat_cj)^2 from one forward and one backward pass (`fisher_error`)

with the matrix multiplier M = (tr F / mean)^eta (AM/GM of the input's eigenvalues)^zeta (`multiplier`).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import channels, registry

KINDS = ("kurtosis", "max_median", "singular")
# GPTQ moves its errors to where ill-conditioned inputs do not see them
ZETA = {"rtn": 1.0, "hqq": 1.0, "gptq": 0.0, "gptq_official": 0.0}
_STEPS = 30  # of the power iteration
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Everything a score of channels may look at.

  Attributes:
    errors: of every channel at every width.
    experts: per layer `{projection: [E, K, N]}`.
    stats: calibration statistics, or `None` without data.
  """

  errors: channels.ChannelErrors
  experts: Sequence[Mapping[str, Any]]
  stats: channels.ChannelStats | None = None


# ---------------------------------------------------------------------------------------------------------------------
# From weights
# ---------------------------------------------------------------------------------------------------------------------


def statistical(evidence: Evidence, kind: str = "kurtosis", alpha: float = 0.5) -> np.ndarray:
  """`S_c = alpha K_c V_c + (1 - alpha) O_c` of every row, `[L, E, J]`; no data, no gradients.

  V is the variance of the row's weights, O the share of them more than three standard deviations from the row's mean, K
  one of

    kurtosis     fourth central moment by squared variance (3 for Gaussian weights)
    max_median   largest by median absolute weight
    singular     one more than the share of the row's squares that lies along the matrix's top singular direction

  each divided by its mean over the rows of the matrix, so that an average row has `S = 1`. A secondary source gives the
  formula and calls K a condition number, which one row does not have; hence the choice. A row of equal weights (of
  zeros) needs no bits: its score is 0. Where a whole matrix has a mean of zero (no outlier anywhere), all its rows are
  average.

  Raises:
    ValueError: an unknown kind, an alpha outside [0, 1], or weights that are not finite.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown kind {kind!r}{registry.did_you_mean(str(kind), KINDS)}; it is one of {', '.join(KINDS)}")
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha is {alpha}; it is a share, in [0, 1]")
  layers = []
  for layer, experts in enumerate(evidence.experts):
    parts = []
    for name in evidence.errors.projections:
      w = jnp.asarray(experts[name], jnp.float32)
      part = np.asarray(_statistical(kind, alpha, channels.along(name, evidence.errors.axis), w), np.float64)
      finite = np.asarray(jnp.isfinite(w).all(axis=(1, 2))) & np.isfinite(part).all(axis=1)
      for expert in np.flatnonzero(~finite)[:1]:
        raise ValueError(f"layer {layer}, {name} of expert {expert}: its weights are not finite, or too large to be"
                         " squared in float32; the checkpoint is damaged")
      parts.append(part)
    layers.append(np.concatenate(parts, axis=1))
  return np.stack(layers)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _statistical(kind: str, alpha: float, along: int, w: jax.Array) -> jax.Array:
  """`[E, K, N]` -> `[E, rows]`."""

  def one(w: jax.Array) -> jax.Array:
    rows = w.T if along else w
    centred = rows - jnp.mean(rows, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=1)
    varies = jnp.ptp(rows, axis=1) > 0
    outside = jnp.square(centred) > 9 * variance[:, None]
    shares = jnp.mean(outside.astype(jnp.float32), axis=1)
    relative = lambda values: _relative(jnp.where(varies, values, 0.0))
    score = alpha * relative(_kind(kind, rows, centred, variance)) * relative(variance) + (1 - alpha) * relative(shares)
    return jnp.where(varies, score, 0.0)

  return jax.lax.map(one, w)


def _relative(values: jax.Array) -> jax.Array:
  """By their mean; ones where that is zero."""
  mean = jnp.mean(values)
  return jnp.where(mean > 0, values / jnp.where(mean > 0, mean, 1.0), 1.0)


def _kind(kind: str, rows: jax.Array, centred: jax.Array, variance: jax.Array) -> jax.Array:
  """K of every row, before it is divided by its mean; finite where a row varies."""
  if kind == "kurtosis":
    deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    return jnp.mean((centred / deviation[:, None]) ** 4, axis=1)
  if kind == "max_median":
    median = jnp.median(jnp.abs(rows), axis=1)
    floor = 1e-3 * jnp.sqrt(jnp.mean(jnp.square(rows), axis=1))  # a row that is mostly zeros
    return jnp.max(jnp.abs(rows), axis=1) / jnp.maximum(jnp.maximum(median, floor), jnp.finfo(jnp.float32).tiny)
  norms = jnp.sum(jnp.square(rows), axis=1)
  direction = _top_direction(rows)
  return 1 + jnp.square(jnp.matmul(rows, direction, precision="highest")) / jnp.where(norms > 0, norms, 1.0)


def _top_direction(rows: jax.Array) -> jax.Array:
  """The right singular vector of the largest singular value, by power iteration from the heaviest row."""
  scaled = rows / jnp.maximum(jnp.max(jnp.abs(rows)), jnp.finfo(jnp.float32).tiny)
  unit = lambda v: v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(jnp.float32).tiny)
  step = lambda _, v: unit(jnp.matmul(jnp.matmul(scaled, v, precision="highest"), scaled, precision="highest"))
  start = unit(scaled[jnp.argmax(jnp.sum(jnp.square(scaled), axis=1))])
  return jax.lax.fori_loop(0, _STEPS, step, start)


# ---------------------------------------------------------------------------------------------------------------------
# From one pass
# ---------------------------------------------------------------------------------------------------------------------


def fisher_traces(stats: channels.ChannelStats, projections: Sequence[str]) -> np.ndarray:
  """Trace of the Fisher matrix of every projection of every expert, per calibration token, `[L, E, P]`: by K-FAC the
  sum of squared gradients times the sum of squared inputs, over the expert's tokens."""
  tokens = np.maximum(stats.tokens, 1) * stats.total_tokens
  traces = [stats.inputs(name).sum(-1, dtype=np.float64) * stats.gradients(name).sum(-1, dtype=np.float64)
            for name in projections]
  return np.stack(traces, axis=-1) / tokens[..., None]


def conditions(stats: channels.ChannelStats, projections: Sequence[str]) -> np.ndarray:
  """Estimated log AM/GM of the eigenvalues of every projection's input Gram matrix, `[L, E, P]`.

  An expert with fewer tokens than the matrix has channels shows its number of tokens, not its inputs: it gets the mean
  of its layer's other experts, weighted by tokens, or of the whole model's where its layer has none. Where no expert of
  the model saw enough tokens for a projection, nothing is known of the others' relation to it, and all are 0, which is
  said in a warning.
  """
  found = []
  for name in projections:
    values, tokens = stats.log_am_gm[:, :, channels.SIDE[name], 1], stats.tokens.astype(np.float64)
    size = stats.inputs(name).shape[-1]
    weight = np.where(tokens >= size, tokens, 0.0)
    if not weight.any():
      log.warning("condition numbers are left out of the costs: no expert saw as many tokens as the input of %s has"
                  " channels (%d, at most %d tokens); calibrate on more text", name, size, int(tokens.max(initial=0)))
      return np.zeros((*tokens.shape, len(projections)))
    of_layer = weight.sum(1, keepdims=True)
    mean = np.where(of_layer > 0, (values * weight).sum(1, keepdims=True) / np.maximum(of_layer, 1.0),
                    (values * weight).sum() / weight.sum())
    found.append(np.where(weight > 0, values, mean))
  return np.stack(found, axis=-1)


def multiplier(stats: channels.ChannelStats, projections: Sequence[str], *, eta: float, zeta: float) -> np.ndarray:
  """`M = (tr F / mean)^eta (AM/GM)^zeta` of every projection of every expert, `[L, E, P]`; the second factor has the
  geometric mean 1 over the model, so that it moves bits without changing the scale of costs much."""
  traces = fisher_traces(stats, projections)
  mean = traces.mean()
  found = (traces / (mean if mean > 0 else 1.0)) ** eta
  if not zeta:
    return found
  logs = conditions(stats, projections)
  return found * np.exp(zeta * (logs - logs.mean()))


def default_zeta(codec: str) -> float:
  """The exponent of the condition for a codec's spec: ill-conditioned inputs hurt codecs that round each weight for
  itself, and are what GPTQ lives on, for which the multiplier would have the wrong sign."""
  return ZETA[registry.parse(codec).name]


def fisher_error(evidence: Evidence, zeta: float | None = None) -> np.ndarray:
  """`M sum_j F_cj (w_cj - w_hat_cj)^2 / 2` of every row at every width, `[L, E, J, W]`, F by diagonal K-FAC.

  Args:
    evidence: with stats and Fisher errors.
    zeta: exponent of the condition; by default that of the codec. With 0 the costs are nats per calibration token.

  Raises:
    ValueError: no calibration.
  """
  errors = evidence.errors
  if evidence.stats is None or errors.fisher is None:
    raise ValueError("score fisher_error of channels: no calibration, so there are no gradients; calibrate, or take"
                     " statistical")
  zeta = default_zeta(errors.codec) if zeta is None else zeta
  cost = errors.fisher.astype(np.float64)
  if zeta:
    cost *= multiplier(evidence.stats, errors.projections, eta=0.0, zeta=zeta)[..., errors.projection, None]
  return cost


def weight_error(evidence: Evidence) -> np.ndarray:
  """Squared weight error of every row at every width, `[L, E, J, W]`."""
  return evidence.errors.weight.astype(np.float64)


def statistical_error(evidence: Evidence, kind: str = "kurtosis", alpha: float = 0.5, eta: float = 1.0,
                      zeta: float | None = None) -> np.ndarray:
  """The statistical score times the matrix multiplier times the squared weight error, `[L, E, J, W]`.

  Without calibration the multiplier is 1: nothing but weights is looked at.
  """
  errors = evidence.errors
  score = statistical(evidence, kind, alpha)
  if evidence.stats is not None:
    zeta = default_zeta(errors.codec) if zeta is None else zeta
    score = score * multiplier(evidence.stats, errors.projections, eta=eta, zeta=zeta)[..., errors.projection]
  return score[..., None] * errors.weight


def router_grad_error(evidence: Evidence) -> np.ndarray:
  """The expert's router gradient norm times the squared weight error of every row at every width, `[L, E, J, W]`: the
  cost of the same name of whole experts (`scores.router.grad_error`), up to a factor, taken apart.

  Raises:
    ValueError: no calibration.
  """
  if evidence.stats is None:
    raise ValueError("score router_grad_error of channels: no calibration, so there are no gradients; calibrate, or"
                     " take weight_error")
  return evidence.stats.router_grad[..., None, None] * weight_error(evidence)


COSTS: dict[str, Callable[..., np.ndarray]] = {
    "fisher_error": fisher_error, "statistical_error": statistical_error, "weight_error": weight_error,
    "router_grad_error": router_grad_error, "weight_mse": weight_error,  # as the scores of whole experts call them
}


def check(spec: str) -> Callable[[Evidence], np.ndarray]:
  """The score that `spec` names, bound to its options.

  Raises:
    registry.SpecError: no such score or option; names the nearest.
  """
  bound = registry.Registry("score of channels", COSTS).get(spec)
  if bound.args:
    raise registry.ArgumentError(f"{spec}: options of a score are given by name, for example fisher_error(zeta=0)")
  return bound


def as_cost(spec: str, evidence: Evidence) -> channels.BlockCosts:
  """The cost table of rows that a spec names, for example `fisher_error(zeta=0)`.

  Raises:
    registry.SpecError: no such score or option; names the nearest.
    ValueError: evidence is missing, or a cost is not finite (names the place).
  """
  errors, cost = evidence.errors, check(spec)(evidence)
  for layer, expert, row, _ in np.argwhere(~np.isfinite(cost))[:1]:
    raise ValueError(f"score {spec}: not finite for {errors.projections[errors.projection[row]]} of layer {layer},"
                     f" expert {expert}; the evidence that it reads is damaged there: calibrate and encode again")
  parsed = registry.parse(spec)
  plain = default_zeta(errors.codec) if parsed.kwargs.get("zeta") is None else parsed.kwargs["zeta"]
  units = "nats" if parsed.name == "fisher_error" and plain == 0 else "arbitrary"
  return channels.BlockCosts(cost, errors.widths, registry.canonical(spec), units, errors.projections,
                             errors.projection, errors.sizes, errors.axis)
