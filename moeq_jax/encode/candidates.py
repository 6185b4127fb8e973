"""Every expert at every width.

A sweep over plans needs the codes of each expert at each candidate width exactly once: a plan only chooses among them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, codecs

MOMENT = {"gate": "moment_in", "up": "moment_in", "down": "moment_mid"}


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: codecs.Codec, w: jax.Array, bits: jax.Array, moment: jax.Array) -> tuple[codecs.Encoded, jax.Array]:
  """Codes of stacked experts `[E, K, N]` at one width (a traced scalar), and what they add to the weights."""

  def one(w: jax.Array, moment: jax.Array) -> tuple[codecs.Encoded, jax.Array]:
    encoded = codec.encode(w, bits, moment)
    return encoded, codecs.decode(encoded, codec.group, w.shape[0]) - w

  return jax.vmap(one)(w, moment)


@jax.jit
def _errors(delta: jax.Array, moment: jax.Array, grad_sq: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
  """Squared weight error, output error and diagonal Fisher cost (summed over tokens) of each expert, `[E]` each."""
  squared = jnp.square(delta)
  inputs = jnp.diagonal(moment, axis1=1, axis2=2)
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  fisher = 0.5 * einsum("ek,ekn,en->e", inputs, squared, grad_sq) / jnp.maximum(tokens, 1)
  output = jnp.maximum(einsum("ekn,ekj,ejn->e", delta, moment, delta), 0.0)
  return jnp.sum(squared, (1, 2)), output, fisher


def shrink_unrouted(stats: artifacts.Stats) -> artifacts.Stats:
  """The declared policy for experts without calibration tokens: they get their layer's mean second moments, scaled to
  one token, so that a codec treats them as an average expert; their gradients stay zero."""
  values = {}
  for field in ("moment_in", "moment_mid"):
    seen = getattr(stats, field)
    values[field] = seen.copy()
    for layer, expert in stats.unrouted():
      values[field][layer, expert] = seen[layer].sum(0) / max(stats.tokens[layer].sum(), 1)
  return dataclasses.replace(stats, **values)


def encode_layer(experts: Mapping[str, Any], stats: artifacts.Stats, layer: int, *, codec: codecs.Codec,
                 widths: Sequence[int]) -> artifacts.LayerCodes:
  """Encodes one layer's experts at every width.

  Args:
    experts: `{projection: [E, K, N]}`, those that the model has.
    stats: calibration sums (after `shrink_unrouted`).
    layer: which layer of `stats`.
    codec: the codec.
    widths: candidate bits.

  Raises:
    ValueError: a weight is NaN or infinite; names layer and projection.
  """
  banks, errors, norms = {}, [], []
  tokens = jnp.asarray(stats.tokens[layer], jnp.float32)
  for name in names(experts):
    w = jnp.asarray(experts[name], jnp.float32)
    codecs.check_finite(w, f"layer {layer}, {name}")
    moment = jnp.asarray(getattr(stats, MOMENT[name])[layer])
    grad_sq = jnp.asarray(getattr(stats, f"grad_sq_{name}")[layer])
    encoded, per_width = [], []
    for bits in widths:
      codes, delta = _encode(codec, w, jnp.int32(bits), moment)
      encoded.append(jax.tree.map(np.asarray, codes))
      per_width.append([np.asarray(e, np.float64) for e in _errors(delta, moment, grad_sq, tokens)])
    banks[name] = artifacts.Codes(*(np.stack(parts) for parts in zip(*encoded)))
    errors.append(np.array(per_width))  # [W, 3, E]
    norms.append(np.asarray(jnp.sum(jnp.square(w), (1, 2)), np.float64))
  weight, output, fisher = np.array(errors).transpose(2, 3, 0, 1)  # each [E, P, W]
  table = {"weight": weight, "output": output, "fisher": fisher / stats.total_tokens, "norm": np.array(norms).T}
  return artifacts.LayerCodes(banks, table)


def names(experts: Mapping[str, Any]) -> list[str]:
  """The projections of `experts` in the order of `artifacts.PROJECTIONS`."""
  return [name for name in artifacts.PROJECTIONS if name in experts]


def error_table(layers: Sequence[artifacts.LayerCodes], *, widths: Sequence[int],
                codec: codecs.Codec) -> artifacts.ErrorTable:
  """Puts the errors of all layers together."""
  stacked = {name: np.stack([layer.errors[name] for layer in layers]) for name in layers[0].errors}
  sizes = [int(np.prod(bank.codes.shape[2:])) for bank in layers[0].codes.values()]
  return artifacts.ErrorTable(**stacked, widths=tuple(int(w) for w in widths), codec=str(codec), group=codec.group,
                              projections=tuple(layers[0].codes), sizes=tuple(sizes))
