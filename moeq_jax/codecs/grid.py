"""The grid that every codec rounds to: groups along K, one bf16 scale and one bf16 zero each, and the range search.

A weight `[K, N]` is cut along K into `G = ceil(K / group)` groups (`group = 0`: all of K; the last group may be short).
Each group of each column has a scale and a zero, and a weight becomes an integer code:

  code  = clip(round(w / scale + zero), 0, 2^bits - 1)
  w_hat = (code - zero) * scale

Scale and zero are rounded to bf16 *before* the codes are computed, so that the codes belong to the numbers that are
stored. The zero is a real number, not a code; a group of equal weights is stored as the negative of its zero.

The grid has two kinds. `affine`, above, is free in scale and zero. `ct` is the symmetric integer grid of the
compressed-tensors format: the zero is exactly `2^(bits - 1)`, so that a weight is an integer from `-2^(bits - 1)` to
`2^(bits - 1) - 1` times its scale, and only the scale is searched for.

The number of bits is data: nothing here depends on it statically, and one compilation serves every width. It is one
number for the whole matrix, or one for every group of every column (`[G, N]`, or what broadcasts to it): the finest
thing that can have a width of its own, because its codes share a scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTHS = (1, 2, 3, 4, 8)
GROUPS = (0, 32, 64, 128)

# Share of the range that a clipping search may cut off at either end, by bits (0 to 8): few levels want a deep cut.
DEEPEST_CUT = (0.9, 0.9, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.04)
CUT_LIMITS = (-0.1, 0.98)

# The smallest scale that the search of the symmetric grid tries, as a share of the one that clips nothing, by bits.
SMALLEST_SCALE = (0.05, 0.05, 0.05, 0.08, 0.15, 0.35, 0.6, 0.8, 0.92)


class Encoded(NamedTuple):
  """A matrix as codes; leading (expert) dimensions are allowed.

  Attributes:
    codes: `[K, N]` uint8 in `[0, 2^bits - 1]`.
    scale: `[G, N]` bfloat16, positive.
    zero: `[G, N]` bfloat16, in units of codes.
  """

  codes: jax.Array
  scale: jax.Array
  zero: jax.Array


def check_group(group: int) -> None:
  """Raises `ValueError` unless `group` is one of `GROUPS` (0 = one group over all of K)."""
  if type(group) is not int or group not in GROUPS:
    raise ValueError(f"group={group!r} is not one of {GROUPS} (0 means all of K, one scale per column)")


def check_kind(kind: str) -> None:
  """Raises `ValueError` unless `kind` is one of the grids, the keys of `SEARCH`."""
  if kind not in SEARCH:
    raise ValueError(f"grid={kind!r} is neither 'affine' nor 'ct' (the symmetric integers of compressed-tensors)")


def infer_group(rows: int, groups: int) -> int:
  """The group size (0 = all) of a matrix of `rows` rows with `groups` scales per column; unique for `GROUPS`.

  Raises:
    ValueError: no supported group size cuts `rows` rows into that many groups.
  """
  if groups == 1:
    return 0
  for group in GROUPS[1:]:
    if -(-rows // group) == groups:
      return group
  raise ValueError(f"{groups} scales per column fit no group size of {GROUPS} for a matrix of {rows} rows")


def per_group(bits: jax.Array | int, groups: int, columns: int) -> jax.Array:
  """The width of every group, to be scanned over: `[G]` of a scalar, `[G, 1, N]` of what broadcasts to `[G, N]`.

  Raises:
    ValueError: widths that are neither a scalar nor broadcast to `[G, N]`.
  """
  bits = jnp.asarray(bits, jnp.int32)
  if bits.ndim == 0:
    return jnp.full(groups, bits)
  if bits.ndim != 2 or any(size not in (1, whole) for size, whole in zip(bits.shape, (groups, columns), strict=True)):
    raise ValueError(f"widths of shape {bits.shape} for {groups} groups of {columns} columns: give one number, [G, 1],"
                     " [1, N] or [G, N]")
  return jnp.broadcast_to(bits, (groups, columns))[:, None]


def top_code(bits: jax.Array) -> jax.Array:
  """The largest code, `2^bits - 1`, as float32 of the shape of `bits`."""
  return (jnp.left_shift(1, jnp.asarray(bits, jnp.int32)) - 1).astype(jnp.float32)


def to_storage(x: jax.Array) -> jax.Array:
  """Rounds float32 to the nearest bf16 value, still as float32.

  A cast there and back would not do: XLA may elide the pair.
  """
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def quantize(x: jax.Array, scale: jax.Array, zero: jax.Array, top: jax.Array) -> jax.Array:
  """Codes of `x` on a grid, as float32 integers; ties go to the even code."""
  return jnp.clip(jnp.round(x / scale + zero), 0.0, top)


def affine(low: jax.Array, high: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scale and zero (bf16 values in float32) of the grid that spans `[low, high]`; the scale of a flat range is 1."""
  scale = to_storage((high - low) / top)
  scale = jnp.where(scale > 0, scale, 1.0)
  return scale, to_storage(-low / scale)


def split(w: jax.Array, group: int) -> tuple[jax.Array, jax.Array | None]:
  """Cuts `[K, N]` into groups `[G, g, N]`, padding the last with zeros.

  Returns:
    The groups, and `[G, g, 1]` bool that is false on padding (`None` where nothing was padded).
  """
  rows, columns = w.shape
  size = group or rows
  padding = -rows % size
  slabs = jnp.pad(w, ((0, padding), (0, 0))).reshape(-1, size, columns)
  if padding == 0:
    return slabs, None
  return slabs, (jnp.arange(rows + padding) < rows).reshape(-1, size, 1)


def join(codes: jax.Array, scale: jax.Array, zero: jax.Array, rows: int) -> Encoded:
  """Makes an `Encoded` of codes `[G, g, N]`, scale and zero `[G, 1, N]`, all float32 (the latter two bf16 values)."""
  codes = codes.reshape(-1, codes.shape[-1])[:rows].astype(jnp.uint8)
  return Encoded(codes, scale[:, 0].astype(jnp.bfloat16), zero[:, 0].astype(jnp.bfloat16))


Place = Callable[[jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]


def encode_groups(w: jax.Array, bits: jax.Array, group: int, place: Place) -> Encoded:
  """Encodes groups that do not look at each other.

  Args:
    w: `[K, N]` float32, finite.
    bits: see `per_group`; may be traced.
    group: rows of a scale, or 0 for all of K.
    place: `(x [g, N], valid, bits) -> scale, zero`, both `[1, N]`, bf16 values in float32; weights go to the nearest
      level.
  """
  slabs, valid = split(w, group)

  def encode_group(own: tuple[jax.Array, jax.Array | None, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, _, bits = own
    scale, zero = place(*own)
    return quantize(x, scale, zero, top_code(bits)), scale, zero

  widths = per_group(bits, len(slabs), w.shape[1])
  return join(*jax.lax.map(encode_group, (slabs, valid, widths)), rows=w.shape[0])


def bounds(x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Least and greatest weight of every column of a group `x [g, N]`, padding left out; two `[1, N]`."""
  low = jnp.min(x, axis=0, keepdims=True, where=valid, initial=jnp.inf)
  return low, jnp.max(x, axis=0, keepdims=True, where=valid, initial=-jnp.inf)


def total(x: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Sum of every column of a group `x [g, N]`, padding left out; `[1, N]`."""
  return jnp.sum(x, axis=0, keepdims=True, where=valid)


def count(x: jax.Array, valid: jax.Array | None) -> jax.Array | int:
  """Rows of a group that are not padding."""
  return x.shape[0] if valid is None else jnp.sum(valid)


# ---------------------------------------------------------------------------------------------------------------------
# The range search
# ---------------------------------------------------------------------------------------------------------------------


def _moves() -> np.ndarray:
  """Steps of the search `[C, 3]`: (start again from min-max?, move of the low end, move of the high end).

  Moves are in units of the deepest cut. First both ends together from min-max to the deepest cut; then rounds of
  smaller and smaller moves of one end, or of both in opposite directions, from the best range so far.
  """
  sweep = [(1.0, cut, cut) for cut in np.linspace(0.0, 1.0, 10)]
  directions = [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, 1), (1, -1)]
  local = [(0.0, 0.3 * 0.6**r * a, 0.3 * 0.6**r * b) for r in range(4) for a, b in directions]
  return np.asarray(sweep + local, np.float32)


MOVES = _moves()


class _Best(NamedTuple):
  """The best range so far of every column, all `[1, N]`: its squared error, what it cuts off, and its grid."""

  error: jax.Array
  cut_low: jax.Array
  cut_high: jax.Array
  scale: jax.Array
  zero: jax.Array


def search(x: jax.Array, valid: jax.Array | None, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Finds the clipped range of least squared error for every column of a group.

  Candidates are asymmetric: either end may move towards the mean (or slightly outward, against the rounding of the
  scale). Plain min-max is one of them, so that the result is never worse. The error is that of the codes as stored,
  with scale and zero in bf16.

  Args:
    x: `[g, N]` float32.
    valid: `[g, 1]` bool, false on padding, or `None`.
    bits: int32 scalar or `[1, N]`.

  Returns:
    scale and zero, `[1, N]` float32 holding bf16 values.
  """
  top = top_code(bits)
  low, high = bounds(x, valid)
  center = jnp.clip(total(x, valid) / count(x, valid), low, high)
  unit = jnp.asarray(DEEPEST_CUT, jnp.float32)[bits]

  def attempt(i: jax.Array, best: _Best) -> _Best:
    again, move_low, move_high = jnp.asarray(MOVES)[i]
    cut_low = jnp.clip((1 - again) * best.cut_low + move_low * unit, *CUT_LIMITS)
    cut_high = jnp.clip((1 - again) * best.cut_high + move_high * unit, *CUT_LIMITS)
    scale, zero = affine(low + cut_low * (center - low), high - cut_high * (high - center), top)
    residual = (quantize(x, scale, zero, top) - zero) * scale - x
    new = _Best(total(jnp.square(residual), valid), cut_low, cut_high, scale, zero)
    return jax.tree.map(lambda a, b: jnp.where(new.error < best.error, a, b), new, best)

  none = jnp.zeros_like(low)
  start = _Best(jnp.full_like(low, jnp.inf), none, none, *affine(low, high, top))
  best = jax.lax.fori_loop(0, len(MOVES), attempt, start)
  return best.scale, best.zero


def _ratios() -> np.ndarray:
  """Steps of the symmetric search `[C, 2]`: (start again from no clipping?, move), in units of the whole search range.

  First evenly (in the logarithm of the scale) down to the smallest scale, then smaller and smaller moves from the best.
  """
  sweep = [(1.0, move) for move in np.linspace(0.0, 1.0, 16)]
  local = [(0.0, sign * 0.5**r / 15) for r in range(1, 5) for sign in (-1, 1)]
  return np.asarray(sweep + local, np.float32)


RATIOS = _ratios()


class _BestScale(NamedTuple):
  """The best scale so far of every column, all `[1, N]`: its squared error, where the search found it, and itself."""

  error: jax.Array
  position: jax.Array
  scale: jax.Array


def search_symmetric(x: jax.Array, valid: jax.Array | None, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """As `search`, on the grid `ct`: the scale of least squared error with the zero at `2^(bits - 1)`.

  The two plain scales are candidates, the largest magnitude over `2^(bits - 1) - 1` (no weight is clipped) and over
  `(2^bits - 1) / 2` (as compressed-tensors scales), so that the result is never worse than either.
  """
  top = top_code(bits)
  zero, largest = (top + 1) / 2, jnp.maximum(*map(jnp.abs, bounds(x, valid)))
  widest = largest / jnp.maximum(zero - 1, 1)
  depth = jnp.log(jnp.asarray(SMALLEST_SCALE, jnp.float32))[bits]

  def candidate(scale: jax.Array, position: jax.Array) -> _BestScale:
    scale = to_storage(scale)
    scale = jnp.where(scale > 0, scale, 1.0)
    residual = (quantize(x, scale, zero, top) - zero) * scale - x
    return _BestScale(total(jnp.square(residual), valid), position, scale)

  def better(new: _BestScale, old: _BestScale) -> _BestScale:
    return jax.tree.map(lambda a, b: jnp.where(new.error < old.error, a, b), new, old)

  def attempt(i: jax.Array, best: _BestScale) -> _BestScale:
    again, move = jnp.asarray(RATIOS)[i]
    position = (1 - again) * best.position + move
    return better(candidate(widest * jnp.exp(position * depth), position), best)

  start = jnp.zeros_like(widest)
  best = better(candidate(largest / (top / 2), start), candidate(widest, start))
  best = jax.lax.fori_loop(0, len(RATIOS), attempt, best)
  return best.scale, jnp.broadcast_to(zero, best.scale.shape)


SEARCH = {"affine": search, "ct": search_symmetric}


# ---------------------------------------------------------------------------------------------------------------------
# Back to weights
# ---------------------------------------------------------------------------------------------------------------------


def decode(encoded: Encoded, group: int, rows: int) -> jax.Array:
  """The weights that an `Encoded` stands for.

  Args:
    encoded: codes `[..., K', N]` with `K' >= rows` (rows past `rows` are padding), scale and zero `[..., G, N]`.
    group: rows of K that share a scale; 0 = all.
    rows: K.

  Returns:
    `[..., K, N]` float32.
  """
  size = group or rows
  scale, zero = (jnp.repeat(a.astype(jnp.float32), size, axis=-2)[..., :rows, :] for a in encoded[1:])
  return (encoded.codes[..., :rows, :].astype(jnp.float32) - zero) * scale


def errors(w: jax.Array, encoded: Encoded, moment: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared error of the weights, and of the outputs on the inputs that `moment` sums up.

  Args:
    w: `[K, N]` float32.
    encoded: its codes.
    moment: `[K, K]` float32, the sum over tokens of `x x^T` (or any multiple, which scales the result).

  Returns:
    `sum (w_hat - w)^2` and `tr(dW^T M dW)` (not below zero), float32 scalars.
  """
  rows = w.shape[0]
  delta = decode(encoded, infer_group(rows, encoded.scale.shape[0]), rows) - w
  output = jnp.sum(delta * jnp.matmul(moment, delta, precision=jax.lax.Precision.HIGHEST))
  return jnp.sum(jnp.square(delta)), jnp.maximum(output, 0.0)
