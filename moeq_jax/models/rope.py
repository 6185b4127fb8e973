"""Rotary positions: the frequencies of every kind that a config can ask for, and the rotation itself."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Kinds, and what `rope_parameters` must and may say for each beside the base frequency.
PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                           "mscale_all_dim", "truncate")),
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions of one model.

  Attributes:
    head_dim: numbers in a head, even; the first half is turned against the second.
    theta: base frequency.
    max_positions: `max_position_embeddings` of the config.
    scaling: items of `rope_parameters`, with `rope_type`; none for the default.
  """

  head_dim: int
  theta: float
  max_positions: int
  scaling: tuple[tuple[str, Any], ...] = ()

  @functools.cached_property
  def frequencies(self) -> np.ndarray:
    """`[head_dim / 2]` float64, radians per position.

    Raises:
      ValueError: an unknown kind, or one whose parameters are missing; names them.
    """
    options = self._options()
    plain = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
    match options["rope_type"]:
      case "linear":
        return plain / options["factor"]
      case "llama3":
        return self._llama3(plain, options)
      case "yarn":
        return self._yarn(plain, options)
    return plain

  @property
  def amplitude(self) -> float:
    """What cosines and sines are multiplied with: 1, but for YaRN."""
    options = self._options()
    if options["rope_type"] != "yarn":
      return 1.0
    if (given := options.get("attention_factor")) is not None:
      return float(given)
    factor, scale, base = options["factor"], options.get("mscale"), options.get("mscale_all_dim")
    wanted = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
    return wanted(scale) / wanted(base) if scale and base else wanted(1)

  def _options(self) -> dict[str, Any]:
    options = {"rope_type": "default", "original_max_position_embeddings": self.max_positions} | dict(self.scaling)
    kind = options["rope_type"]
    if kind not in PARAMETERS:
      raise ValueError(f"rope_type {kind!r} is not supported; expected one of {', '.join(PARAMETERS)}")
    for name in PARAMETERS[kind][0]:
      if options.get(name) is None:
        raise ValueError(f"rope_type {kind!r} needs {name}, which rope_parameters lack")
    return options

  def _llama3(self, plain: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: slow turns are slowed by `factor`, fast ones kept, those between blended by turns per context."""
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / options["factor"]

  def _yarn(self, plain: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """YaRN (Peng et al., section 3.2): as Llama 3, but the blend is linear in the index of the pair."""
    context = options["original_max_position_embeddings"]

    def pair(turns: float) -> float:
      """The pair of numbers that makes so many turns over the context that the model was trained on."""
      return self.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    low, high = pair(options.get("beta_fast") or 32), pair(options.get("beta_slow") or 1)
    if options.get("truncate", True):
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, self.head_dim - 1)
    slowed = np.clip((np.arange(self.head_dim // 2) - low) / (high - low or 0.001), 0, 1)
    return (1 - slowed) * plain + slowed * plain / options["factor"]


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
  """Rotary position embedding (RoFormer, eq. 34; halves layout), computed in float32.

  Args:
    x: `[B, S, heads, head_dim]`.
    positions: `[B, S]` int32, or `[1, S]` where all rows have the same.
    rope: the frequencies.

  Returns:
    The shape and dtype of `x`.
  """
  frequencies = jnp.asarray(rope.frequencies, jnp.float32)
  angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
  cos, sin = rope.amplitude * jnp.cos(angle), rope.amplitude * jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
