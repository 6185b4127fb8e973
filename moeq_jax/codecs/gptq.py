"""GPTQ: rounding that pays for the error of each input with the inputs that come after it.

Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2023. Weights are rounded one input (row of `w [K, N]`) after
the other, and the rows that follow are moved so that the output error `tr(dW^T M dW)` stays as small as they can make
it. `M [K, K]` is the second moment of the inputs, damped by a share of its mean diagonal.

The published algorithm subtracts scaled errors from all later rows, by rows of a Cholesky factor of the inverse of M.
Here the same numbers come from M itself (the two are equal: Chee et al., "QuIP", 2023, on LDLQ and OPTQ). With
`M = R R^T`, R upper triangular, and `e_j = w_j - w_hat_j`,

  row k is rounded from   w_k + sum_{j<k} R_jk e_j / R_kk                                            (1)

No inverse is formed, so one float32 factorisation is enough even where M has a rank far below K. The state of the
published algorithm at the start of a group, from which the scales of that group are found, is not (1) but the least
squares answer of all the group's rows to the errors so far:

  w_group + (R_group,group)^-T (R_before,group)^T e_before                                           (2)

Feedback runs inside blocks at every width. The sum in (1) is split: rows before the block enter by one matrix product
when the block starts, rows inside it one at a time. Neither the size of a block nor the split changes the result. Where
K is large, matrices are cut once more, into panels: what came before a panel enters it by one large product.

An input that no token excites has a zero row and column in M; after damping it neither gives nor takes corrections, and
its weights are rounded to nearest, never set to zero. Where M is all zero (an expert without tokens) this holds for
every row, and the codes are those of `rtn`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moeq_jax.codecs import grid

_HIGHEST = jax.lax.Precision.HIGHEST
_DAMPING_GROWTH, _DAMPING_LIMIT = 10.0, 1e3
PANEL = 2048  # rows, about: whole groups and blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Options of GPTQ.

  Attributes:
    group: rows of K that share a scale: 32, 64, 128, or 0 for all of K.
    damping: added to the diagonal of the moment, as a share of the mean diagonal; grows tenfold until the moment can be
      factorised.
    block: rows that are corrected one by one before the next matrix product; a group is cut into blocks of this size.
    grid: `affine`, or `ct`, the symmetric integers of the compressed-tensors format.
  """

  group: int = 64
  damping: float = 0.01
  block: int = 128
  grid: str = "affine"

  def __post_init__(self) -> None:
    grid.check_group(self.group)
    grid.check_kind(self.grid)
    if not 0 < self.damping <= 1:
      raise ValueError(f"damping={self.damping} is not in (0, 1]")
    if self.block < 1 or self.group % min(self.block, self.group or self.block):
      raise ValueError(f"block={self.block} does not divide group={self.group}")


def encode(w: jax.Array, bits: jax.Array, moment: jax.Array | None, spec: Spec,
           factor: jax.Array | None = None) -> grid.Encoded:
  """Encodes one matrix; jittable, and vmappable over experts.

  Args:
    w: `[K, N]` float32, finite.
    bits: int32 scalar in `grid.WIDTHS`, or one of them for every group, see `grid.per_group`; may be traced.
    moment: `[K, K]` float32, the sum over tokens of `x x^T`; its scale does not matter. Not read if `factor` is given.
    spec: static options.
    factor: of the moment, by `factorise`; for callers that encode at several widths, or column by column.

  Raises:
    ValueError: `moment` is missing or of another shape than `[K, K]`.
  """
  rows = w.shape[0]
  if factor is None:
    factor = factorise(check_moment(moment, rows, "gptq"), spec)
  size, block = _sizes(rows, spec)
  slabs, valid = grid.split(w, size)
  widths = grid.per_group(bits, len(slabs), w.shape[1])
  encoded, error = [], None
  for first, last in _panels(slabs.shape[0], size):
    panel = factor[:last * size, first * size:last * size]
    before = None if error is None else jnp.matmul(panel[:first * size].T, error, precision=_HIGHEST)
    mask = None if valid is None else valid[first:last]
    own, parts = _encode_panel(slabs[first:last], mask, panel[first * size:], before, block, widths[first:last], spec)
    error = own if error is None else jnp.concatenate([error, own])
    encoded.append(parts)
  return grid.join(*(jnp.concatenate(parts) for parts in zip(*encoded)), rows=rows)


def check_moment(moment: jax.Array | None, rows: int, codec: str) -> jax.Array:
  """The moment, if it is one of the inputs of a matrix of `rows` rows.

  Raises:
    ValueError: it is missing or of another shape than `[rows, rows]`.
  """
  if moment is None or moment.shape != (rows, rows):
    found = "none" if moment is None else f"one of shape {moment.shape}"
    raise ValueError(f"{codec} needs the inputs' second moment [{rows}, {rows}], found {found}; calibrate, or use rtn")
  return moment


def _sizes(rows: int, spec: Spec) -> tuple[int, int]:
  """Rows of a group, padding included, and of a block."""
  block = min(spec.block, spec.group or rows)
  return spec.group or -(-rows // block) * block, block


def _panels(count: int, size: int) -> list[tuple[int, int]]:
  """Cuts `count` pieces of `size` rows into panels of whole pieces: the first piece of each, and the one after it."""
  step = max(PANEL // size, 1)
  return [(first, min(first + step, count)) for first in range(0, count, step)]


def _encode_panel(slabs: jax.Array, valid: jax.Array | None, factor: jax.Array, before: jax.Array | None, block: int,
                  bits: jax.Array, spec: Spec) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Encodes a panel group by group.

  Args:
    slabs: `[G, g, N]`, the groups of the panel.
    valid: `[G, g, 1]` bool, false on padding, or None.
    factor: `[G g, G g]`, the panel's own part of R.
    before: `[G g, N]`, the sum in (1) over the rows before the panel; None where there are none.
    block: rows per block.
    bits: `[G]` or `[G, 1, N]`.
    spec: as for `encode`.

  Returns:
    errors `w - w_hat` `[G g, N]`; codes `[G, g, N]`, scale and zero `[G, 1, N]`, all float32.
  """
  groups, size, columns = slabs.shape
  pulls = None if before is None else before.reshape(slabs.shape)

  def encode_group(error: jax.Array, group: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    index, x, mask, pull, width = group
    panel = square = factor
    if groups > 1:
      panel = jax.lax.dynamic_slice_in_dim(factor, index * size, size, axis=1)
      square = jax.lax.dynamic_slice_in_dim(panel, index * size, size, axis=0)
    if groups == 1 and pull is None:  # nothing came before
      pull, state = jnp.zeros_like(x), x
    else:
      inside = jnp.matmul(panel.T, error, precision=_HIGHEST)
      pull = inside if pull is None else pull + inside
      state = x + solve_lower(square.T, pull)
    scale, zero = grid.SEARCH[spec.grid](state, mask, width)
    top = jnp.broadcast_to(grid.top_code(width), scale.shape)
    codes, own = _encode_blocks(x, pull, square, block, (scale, zero, top))
    return jax.lax.dynamic_update_slice_in_dim(error, own, index * size, axis=0), (codes, scale, zero)

  nothing = jnp.zeros((groups * size, columns), jnp.float32)
  return jax.lax.scan(encode_group, nothing, (jnp.arange(groups), slabs, valid, pulls, bits))


def factorise(moment: jax.Array, spec: Spec) -> jax.Array:
  """What `encode` reads of a moment `[K, K]`: its `upper_factor`, with K filled up to whole groups."""
  rows = moment.shape[0]
  size, block = _sizes(rows, spec)
  return upper_factor(jnp.pad(moment, (0, -rows % size)), spec.damping, block)


def upper_factor(moment: jax.Array, damping: float, block: int) -> jax.Array:
  """The upper triangular R with `R R^T = M / m + d I`, m the mean diagonal of the inputs that were excited.

  Args:
    moment: `[K, K]` float32, positive semidefinite up to rounding.
    damping: the first d; ten times more until the factor is finite.
    block: rows that are factorised between two matrix products; divides K.

  Returns:
    `[K, K]` float32; not finite only where `moment` is not.
  """
  rows = moment.shape[0]
  diagonal = jnp.diagonal(moment)
  mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(diagonal > 0), 1)
  mean = jnp.where(mean > 0, mean, 1.0)
  panels = [(first * block, last * block) for first, last in _panels(rows // block, block)]

  def flipped(start: int, stop: int, more: jax.Array) -> jax.Array:
    """Rows `start` to `stop` of the damped moment turned by half a circle, from column `start` on."""
    part = moment[rows - stop:rows - start, :rows - start][::-1, ::-1]
    return part / mean + more * jnp.eye(*part.shape, dtype=jnp.float32)

  def attempt(more: jax.Array) -> list[jax.Array]:
    """U with `U^T U` the damped and turned moment, panel by panel: each from its diagonal on."""
    done: list[jax.Array] = []
    for start, stop in panels:
      part = flipped(start, stop, more)
      for (origin, _), upper in zip(panels, done):
        part -= jnp.matmul(upper[:, start - origin:stop - origin].T, upper[:, start - origin:], precision=_HIGHEST)
      done.append(_cholesky(part, block))
    return done

  def unusable(state: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
    finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in state[1]])
    return ~jnp.all(finite) & (state[0] < _DAMPING_LIMIT)

  def retry(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
    more = state[0] * _DAMPING_GROWTH
    return more, attempt(more)

  nothing = [jnp.full_like(moment, jnp.nan, shape=(stop - start, rows - start)) for start, stop in panels]
  _, upper = jax.lax.while_loop(unusable, retry, (jnp.float32(damping / _DAMPING_GROWTH), nothing))
  columns = [jnp.pad(part.T[::-1, ::-1], ((0, start), (0, 0))) for (start, _), part in zip(panels, upper)]
  return jnp.concatenate(columns[::-1], axis=1)


def _cholesky(matrix: jax.Array, block: int) -> jax.Array:
  """The first R rows of the upper triangular U with `U^T U = M`, from those of M: `[R, K] -> [R, K]`, R at most K.

  NaN where there is none. Written with matrix products, as the rest of the codec: LAPACK's factorisation of a stack of
  small matrices stalls for seconds when its threads share their cores with others, and its last bits depend on their
  number.
  """
  columns = jnp.arange(matrix.shape[1])

  def factorise_block(upper: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    above = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=1)
    rows = jax.lax.dynamic_slice_in_dim(matrix, start, block, axis=0)
    rows -= jnp.matmul(above.T, upper, precision=_HIGHEST)

    def factorise_row(done: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
      index, rest = row
      coefficients = jax.lax.dynamic_index_in_dim(done, start + index, axis=1, keepdims=False)
      rest = jnp.where(columns < start + index, 0.0, rest - jnp.matmul(coefficients, done, precision=_HIGHEST))
      return done.at[index].set(rest / jnp.sqrt(rest[start + index])), None

    done, _ = jax.lax.scan(factorise_row, jnp.zeros_like(rows), (jnp.arange(block), rows))
    return jax.lax.dynamic_update_slice_in_dim(upper, done, start, axis=0), None

  starts = jnp.arange(0, matrix.shape[0], block)
  return jax.lax.scan(factorise_block, jnp.zeros_like(matrix), starts)[0]


def solve_lower(lower: jax.Array, right: jax.Array) -> jax.Array:
  """Solves `lower @ x = right` row by row: `[g, g]`, `[g, N]` -> `[g, N]`; the upper triangle is not read."""

  def solve_row(x: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    index, coefficients, value = row
    return x.at[index].set((value - jnp.matmul(coefficients, x, precision=_HIGHEST)) / coefficients[index]), None

  return jax.lax.scan(solve_row, jnp.zeros_like(right), (jnp.arange(right.shape[0]), lower, right))[0]


def _encode_blocks(
    x: jax.Array, pull: jax.Array, square: jax.Array, block: int, levels: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Encodes a group `x [g, N]` block by block.

  Args:
    x: original weights of the group.
    pull: `[g, N]`, the sum in (1) over the rows before the group.
    square: `[g, g]`, the group's own part of R.
    block: rows per block; divides g.
    levels: scale, zero and the largest code, `[1, N]`.

  Returns:
    codes as float32 integers and errors `w - w_hat`, both `[g, N]`.
  """
  if block == x.shape[0]:
    return _encode_rows(x, pull, square, levels)

  def encode_block(error: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    panel = jax.lax.dynamic_slice_in_dim(square, start, block, axis=1)
    inside = jax.lax.dynamic_slice_in_dim(panel, start, block, axis=0)
    x_block, pull_block = (jax.lax.dynamic_slice_in_dim(a, start, block, axis=0) for a in (x, pull))
    pull_block += jnp.matmul(panel.T, error, precision=_HIGHEST)
    codes, own = _encode_rows(x_block, pull_block, inside, levels)
    return jax.lax.dynamic_update_slice_in_dim(error, own, start, axis=0), codes

  error, codes = jax.lax.scan(encode_block, jnp.zeros_like(x), jnp.arange(0, x.shape[0], block))
  return codes.reshape(x.shape), error


def _encode_rows(
    x: jax.Array, pull: jax.Array, square: jax.Array, levels: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Encodes a block row by row, each from (1); shapes as in `_encode_blocks`."""
  scale, zero, top = (level[0] for level in levels)

  def encode_row(error: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    index, weights, pulled, coefficients = row
    pulled += jnp.matmul(coefficients, error, precision=_HIGHEST)
    code = grid.quantize(weights + pulled / coefficients[index], scale, zero, top)
    return error.at[index].set(weights - (code - zero) * scale), code

  error, codes = jax.lax.scan(encode_row, jnp.zeros_like(x), (jnp.arange(x.shape[0]), x, pull, square.T))
  return codes, error
