"""Quantization of the two-layer model in a dense basis, and its error, own token and cross-talk apart.

In token coordinates most weights would be zero or alone in their row; models have dense weights. So the experts are
rotated into a random orthonormal basis, rounded there, and rotated back to be evaluated. Routers stay as they are, so
the routing does not change and the output is a sum over experts of terms that depend on one expert's width only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.theory import two_layer

# Levels of the uniform grid, half a bit apart from 1 bit to 8.
LEVELS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BITS = tuple(float(np.log2(levels)) for levels in LEVELS)


def basis(seed: int, dim: int, draw: int = 0) -> np.ndarray:
  """A random orthonormal basis: `[D, D]` float32, column t is token t.

  All bases of one D are the orthogonal factor of one Gaussian matrix, with columns in an order and with signs that are
  drawn for each seed and draw: each is uniform (Haar), at the price of one factorization.
  """
  rng = np.random.default_rng((seed, dim, draw))
  return _factor(dim)[:, rng.permutation(dim)] * rng.choice(np.float32([-1, 1]), dim)


@functools.lru_cache(1)
def _factor(dim: int) -> np.ndarray:
  factor, upper = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, dim), np.float32))
  return factor * np.where(np.diag(upper) < 0, np.float32(-1), np.float32(1))


def common_range(dense: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One range, and so one step, for all experts: the least and the greatest weight, each `[1, 1, 1]`."""
  return dense.min(keepdims=True), dense.max(keepdims=True)


def row_range(dense: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A range for every neuron, as quantizers have in practice: `[E, 1, F]` each, of `dense` `[E, D, F]`."""
  return dense.min(1, keepdims=True), dense.max(1, keepdims=True)


QUANTIZERS = {"common": common_range, "row": row_range}


def round_to_grid(dense: jax.Array, low: jax.Array, high: jax.Array, levels: jax.Array | int) -> jax.Array:
  """The nearest of `levels` equally spaced values from `low` to `high`; at most half a step away inside the range."""
  step = jnp.maximum((high - low) / (levels - 1), 1e-30)
  return low + step * jnp.clip(jnp.round((dense - low) / step), 0, levels - 1)


@functools.partial(jax.jit, static_argnames="quantizer")
def quantized(experts: jax.Array, turn: jax.Array, levels: jax.Array, quantizer: str) -> jax.Array:
  """The experts at every width, in token coordinates.

  Args:
    experts: `[E, D, F]`, token coordinates.
    turn: `[D, D]`, from `basis`.
    levels: `[W]`.
    quantizer: a key of `QUANTIZERS`.

  Returns:
    `[W, E, D, F]`.
  """
  dense = jnp.einsum("dt,etf->edf", turn, experts)
  low, high = QUANTIZERS[quantizer](dense)
  rounded = jax.vmap(lambda n: round_to_grid(dense, low, high, n))(levels)
  return jnp.einsum("dt,wedf->wetf", turn, rounded)


class Parts(NamedTuple):
  """What each expert adds to the output, at every width and, as the last, in full precision; `[W + 1, E, B]` each.

  Attributes:
    own: from its own token, where the expert keeps it.
    other: from all other tokens that it keeps: under expert choice every expert takes J tokens of every input.
  """

  own: np.ndarray
  other: np.ndarray


@jax.jit
def _parts(experts: jax.Array, router: jax.Array, setting: two_layer.Setting, tokens: jax.Array) -> Parts:
  chosen, gates = two_layer.route(router, tokens, setting.kept)
  mine = chosen == setting.own_feature()[:, None, None]

  def split(experts: jax.Array) -> Parts:
    terms = two_layer.weigh(experts, setting, chosen, gates)
    return Parts((terms * mine).sum(-1), (terms * ~mine).sum(-1))

  return jax.lax.map(split, experts)


def parts(params: two_layer.Params, setting: two_layer.Setting, tokens: jax.Array, rounded: jax.Array) -> Parts:
  """The parts of the output for `tokens` `[B, S]`, with the experts `rounded` `[W, E, D, F]` and in full precision."""
  every = jnp.concatenate([rounded, params.experts[None]])
  return Parts(*(np.asarray(part) for part in _parts(every, params.router, setting, tokens)))


def relative_errors(params: two_layer.Params, setting: two_layer.Setting, rounded: jax.Array) -> np.ndarray:
  """(h_q - h) / h of the own token of every relevant expert: `[W, E]`, NaN for irrelevant experts and for h = 0."""
  own = setting.own_feature()
  rows = np.asarray(rounded)[:, np.arange(setting.experts), own]
  full = np.maximum(np.asarray(params.experts)[np.arange(setting.experts), own], 0).mean(-1)
  return np.maximum(rows, 0).mean(-1) / np.where((own >= 0) & (full > 0), full, np.nan) - 1
