"""What experiments/granularity.py plans with: every expert at every width, and what that costs each channel."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, channels, codecs, progress
from moeq_jax.allocate import blocks as block_plans
from moeq_jax.encode import candidates, neurons
from moeq_jax.encode import channels as channel_errors
from moeq_jax.scores import channels as scores

WIDTHS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Coded:
  """One projection of one layer at every width.

  Attributes:
    codes: `[W, E, ...]`.
    errors: `{axis of K and N: {"weight", "fisher": [E, channels along it, W]}}`, as in `ChannelErrors`.
  """

  codes: codecs.Encoded
  errors: dict[int, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Bank:
  """All experts at every width, and what that costs each channel.

  Attributes:
    experts: per layer `{projection: [E, K, N]}`, what was encoded.
    coded: per layer and projection.
    moments: calibration, for encoding again.
    costs: `{axis: table of channels}`, Fisher x error in nats.
  """

  experts: list[dict[str, Any]]
  coded: list[dict[str, Coded]]
  moments: artifacts.Stats
  costs: dict[str, channels.BlockCosts]


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: codecs.Codec, bits: jax.Array, w: jax.Array, moment: jax.Array,
            gradients: jax.Array) -> tuple[codecs.Encoded, dict[int, jax.Array], dict[int, jax.Array]]:
  """Codes of experts `[E, K, N]`, and squared errors and Fisher costs along K (0) and N (1), `[E, channels]` each."""
  encoded = jax.vmap(codec.encode, in_axes=(0, None, 0))(w, bits, moment)
  squared = jnp.square(codecs.decode(encoded, codec.group, w.shape[1]) - w)
  weighted = 0.5 * squared * jnp.diagonal(moment, axis1=1, axis2=2)[:, :, None] * gradients[:, None, :]
  return encoded, {a: squared.sum(2 - a) for a in (0, 1)}, {a: weighted.sum(2 - a) for a in (0, 1)}


def encode(w: np.ndarray, name: str, layer: int, stats: artifacts.Stats, codec: codecs.Codec) -> Coded:
  """Encodes one projection of a layer's experts `[E, K, N]` at every width; `stats` after `shrink_unrouted`."""
  tokens = np.maximum(stats.tokens[layer], 1)[:, None] * stats.total_tokens
  moment = jnp.asarray(getattr(stats, candidates.MOMENT[name])[layer])
  gradients = jnp.asarray(getattr(stats, f"grad_sq_{name}")[layer])
  each = [jax.tree.map(np.asarray, _encode(codec, jnp.int32(b), jnp.asarray(w, jnp.float32), moment, gradients))
          for b in WIDTHS]
  codes, weight, fisher = zip(*each, strict=True)
  return Coded(codecs.Encoded(*(np.stack(part) for part in zip(*codes, strict=True))),
               {a: {"weight": np.stack([one[a] for one in weight], -1),
                    "fisher": np.stack([one[a] / tokens for one in fisher], -1).astype(np.float32)} for a in (0, 1)})


def bank_of(experts: Sequence[Mapping[str, Any]], coded: Sequence[Mapping[str, Coded]], stats: artifacts.Stats,
            codec: codecs.Codec, order: np.ndarray | None = None) -> Bank:
  """The bank with its tables of costs; `order` `[L, E, F]` says how neurons were sorted."""
  shapes, costs = {name: tuple(w.shape[1:]) for name, w in experts[0].items()}, {}
  for axis in channels.AXES:
    layers = [{kind: np.concatenate([coded[name].errors[channels.along(name, axis)][kind]
                                     for name in candidates.names(bank)], axis=1) for kind in ("weight", "fisher")}
              for bank, coded in zip(experts, coded, strict=True)]
    errors = channel_errors.error_table(layers, shapes, widths=WIDTHS, codec=codec, axis=axis)
    table = scores.as_cost("fisher_error(zeta=0)", scores.Evidence(errors, experts, channel_stats(stats)))
    costs[axis] = dataclasses.replace(table, order=order)
  return Bank(list(experts), list(coded), stats, costs)


def encode_all(experts: Sequence[Mapping[str, Any]], stats: artifacts.Stats, codec: codecs.Codec) -> Bank:
  """Encodes every expert at every width.

  Args:
    experts: per layer, `{projection: [E, K, N]}`.
    stats: calibration with moments.
    codec: the codec.
  """
  ready = candidates.shrink_unrouted(stats)
  coded = []
  with progress.bar(f"encode {codec}", len(experts)) as advance:
    for layer, bank in enumerate(experts):
      coded.append({name: encode(bank[name], name, layer, ready, codec) for name in candidates.names(bank)})
      advance()
  return bank_of(experts, coded, ready, codec)


def in_order(bank: Bank, codec: codecs.Codec) -> Bank:
  """The bank of the same experts with their neurons sorted, dearest first. Columns do not depend on each other, so gate
  and up keep their codes; down is encoded again, since other neurons share scales."""
  order = block_plans.order(bank.costs["neurons"])
  stats = neurons.sort_stats(bank.moments, order)
  experts, coded = [], []
  for layer, (weights, before) in enumerate(zip(bank.experts, bank.coded, strict=True)):
    experts.append(neurons.sort_experts(weights, order[layer]))
    found = {}
    for name, one in before.items():
      if name == "down":
        found[name] = encode(experts[-1][name], name, layer, stats, codec)
        continue
      codes = codecs.Encoded(*(np.take_along_axis(part, order[None, layer, :, None], axis=3) for part in one.codes))
      columns = {kind: np.take_along_axis(values, order[layer, :, :, None], axis=1)
                 for kind, values in one.errors[1].items()}
      found[name] = Coded(codes, {1: columns})
    coded.append(found)
  return bank_of(experts, coded, stats, codec, order)


def channel_stats(stats: artifacts.Stats) -> channels.ChannelStats:
  """The vectors that scores of channels read, from whole moments. Spectra are not made: they are NaN, which no score
  takes without an error."""
  diagonal = lambda moment: np.diagonal(moment, axis1=2, axis2=3)
  nothing = np.full((*stats.tokens.shape, len(channels.SIDES), 3), np.nan)
  same = {f.name: getattr(stats, f.name) for f in dataclasses.fields(artifacts.Stats) if "moment" not in f.name}
  return channels.ChannelStats(**same, input_sq=diagonal(stats.moment_in), mid_sq=diagonal(stats.moment_mid),
                               condition=nothing, log_am_gm=nothing, damping=0.0)
