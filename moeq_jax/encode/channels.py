"""What every channel loses at every width.

Each matrix is encoded whole, once per width, as for plans of whole experts, and the error is summed per channel instead
of over all. Columns do not depend on each other in any codec, so the errors of columns are exactly those of a matrix in
which each column has its own width. Rows of K (the neurons of down) share scales with the rest of their group, and
under GPTQ they also take the errors of the rows before them: there, blocks must be whole groups, and the errors are
those of a matrix that has the same width everywhere.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, channels, codecs
from moeq_jax.encode import candidates

_EINSUM = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _errors(codec: codecs.Codec, along: int, bits: jax.Array, w: jax.Array, moment: jax.Array | None,
            inputs: jax.Array | None, gradients: jax.Array | None) -> dict[str, jax.Array]:
  """Squared error and diagonal Fisher cost (summed over tokens; with statistics only) of every channel, `[E, J]` each;
  one expert after the other."""

  def one(expert: tuple[jax.Array | None, ...]) -> dict[str, jax.Array]:
    w, moment, inputs, gradients = expert
    encoded = codec.encode(w, bits, moment)
    squared = jnp.square(codecs.decode(encoded, codec.group, w.shape[0]) - w)
    weight = {"weight": jnp.sum(squared, axis=1 - along)}
    if inputs is None:
      return weight
    if along:
      fisher = _EINSUM("k,kn->n", inputs, squared) * gradients
    else:
      fisher = _EINSUM("n,kn->k", gradients, squared) * inputs
    return weight | {"fisher": 0.5 * fisher}

  return jax.lax.map(one, (w, moment, inputs, gradients))


def encode_layer(experts: Mapping[str, Any], stats: channels.ChannelStats | None, layer: int, *,
                 codec: codecs.Codec, widths: Sequence[int], axis: str = "neurons",
                 moments: artifacts.Stats | None = None) -> dict[str, np.ndarray]:
  """Errors of one layer's channels at every width.

  Args:
    experts: `{projection: [E, K, N]}`, those that the model has.
    stats: calibration sums; without them there is no fisher.
    layer: which layer of `stats`.
    codec: the codec.
    widths: candidate bits.
    axis: one of `channels.AXES`.
    moments: calibration with moments (after `candidates.shrink_unrouted`), for a codec that needs them.

  Returns:
    `{"weight", "fisher"}`, `[E, J, W]` float32; fisher in nats per calibration token.

  Raises:
    ValueError: a weight is NaN or infinite (names layer and projection), or moments are missing.
  """
  if codec.needs_moment and moments is None:
    raise ValueError(f"{codec} looks at second moments: make them by calibrate.statistics, or take rtn or hqq")
  parts = [_projection(name, jnp.asarray(experts[name], jnp.float32), stats, layer, codec, widths, axis, moments)
           for name in candidates.names(experts)]
  return {kind: np.concatenate([part[kind] for part in parts], axis=1) for kind in parts[0]}


def _projection(name: str, w: jax.Array, stats: channels.ChannelStats | None, layer: int, codec: codecs.Codec,
                widths: Sequence[int], axis: str, moments: artifacts.Stats | None) -> dict[str, np.ndarray]:
  """`encode_layer` for one projection, `[E, K, N]`."""
  codecs.check_finite(w, f"layer {layer}, {name}")
  moment = jnp.asarray(getattr(moments, candidates.MOMENT[name])[layer]) if codec.needs_moment else None
  seen = (stats.inputs(name), stats.gradients(name)) if stats else (None, None)
  seen = [None if values is None else jnp.asarray(values[layer]) for values in seen]
  each = [_errors(codec, channels.along(name, axis), jnp.int32(bits), w, moment, *seen) for bits in widths]
  found = {kind: np.stack([np.asarray(one[kind]) for one in each], axis=-1) for kind in each[0]}
  if stats:
    tokens = np.maximum(stats.tokens[layer], 1)[:, None, None] * stats.total_tokens
    found["fisher"] = (found["fisher"] / tokens).astype(np.float32)
  return found


def error_table(layers: Sequence[Mapping[str, np.ndarray]], shapes: Mapping[str, tuple[int, int]], *,
                widths: Sequence[int], codec: codecs.Codec, axis: str = "neurons") -> channels.ChannelErrors:
  """Puts the errors of all layers together; `shapes` is `{projection: (K, N)}`."""
  names = tuple(candidates.names(shapes))
  sizes = [(shapes[name][channels.along(name, axis)], shapes[name][1 - channels.along(name, axis)]) for name in names]
  projection, weights = channels.units(sizes)
  stacked = {"fisher": None} | {kind: np.stack([layer[kind] for layer in layers]) for kind in layers[0]}
  return channels.ChannelErrors(**stacked, widths=tuple(int(w) for w in widths), codec=str(codec), group=codec.group,
                                projections=names, projection=projection, sizes=weights, axis=axis)
