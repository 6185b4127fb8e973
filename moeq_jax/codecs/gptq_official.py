"""The GPTQ of the router-norm paper's official code (arXiv 2604.06515), as far as its description goes, for comparison.

It differs from GPTQ as published (`gptq.py`) in three things:

  feedback   weights are rounded in blocks of 128 rows, and inside a block errors are passed on only above 3 bits; at 3
             bits and below a block's weights are rounded to nearest, each as if the others had no error, and what
             they push to later blocks is worked out from those errors
  search     the range of a group is its minimum and maximum times one of 101 factors from 0.9 to 1.1, the one with the
             least sum of |error|^2.4
  1 bit      sign(x) times the mean magnitude of the group, sign(0) = +1, no search

`feedback=always` and `search=squared` (the search of all our codecs) turn off one difference each, so that what it
costs can be measured. Not imitated: the arithmetic in float16, the Hessian that is divided by the number of calls, and
inputs that no token excites, whose weights the official code sets to zero; here they are rounded to nearest.

The algorithm is that of Frantar et al. (2023): with U upper triangular, `U^T U` the inverse of the damped moment, row j
of a block leaves `e_j = (w_j - w_hat_j) / U_jj`, and later rows lose `U_jk e_j`. In the terms of `gptq.py`, U is the
inverse of R.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax.codecs import gptq, grid

BLOCK = 128  # rows between two matrix products, in the official code
POWER = 2.4
FEEDBACK_ABOVE = 3  # bits
FACTORS = np.array([1.0, *(1 + sign * step / 500 for sign in (1, -1) for step in range(1, 51))], np.float32)

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Options.

  Attributes:
    group: rows of K that share a scale: 32, 64 or 128.
    damping: as in `gptq.Spec`.
    feedback: inside blocks; `above3`, only above 3 bits, as in the official code, or `always`, as published.
    search: `power`, of the official code, or `squared`, of our codecs; at 1 bit `power` means sign and mean.
    grid: `affine`; there is no other one here.
  """

  group: int = 128
  damping: float = 0.01
  feedback: str = "above3"
  search: str = "power"
  grid: str = "affine"

  def __post_init__(self) -> None:
    grid.check_group(self.group)
    if not self.group:
      raise ValueError(f"group=0: the official code rounds blocks of {BLOCK} rows; take 32, 64 or 128, or gptq")
    if not 0 < self.damping <= 1:
      raise ValueError(f"damping={self.damping} is not in (0, 1]")
    if self.feedback not in ("above3", "always"):
      raise ValueError(f"feedback={self.feedback!r} is neither 'above3' nor 'always'")
    if self.search not in ("power", "squared"):
      raise ValueError(f"search={self.search!r} is neither 'power' nor 'squared'")
    if self.grid != "affine":
      raise ValueError(f"grid={self.grid!r}: gptq_official has the grid 'affine' only; take gptq")


def encode(w: jax.Array, bits: jax.Array, moment: jax.Array | None, spec: Spec,
           factor: jax.Array | None = None) -> grid.Encoded:
  """Encodes one matrix; jittable, and vmappable over experts.

  Args:
    w: `[K, N]` float32, finite.
    bits: int32 scalar in `grid.WIDTHS`, or one of them for every group, see `grid.per_group`; may be traced.
    moment: `[K, K]` float32, the sum over tokens of `x x^T`. Not read if `factor` is given.
    spec: static options.
    factor: of the moment, by `factorise`.

  Raises:
    ValueError: `moment` is missing or of another shape than `[K, K]`.
  """
  rows = w.shape[0]
  if factor is None:
    factor = factorise(gptq.check_moment(moment, rows, "gptq_official"), spec)
  columns, kept = w.shape[1], -(-rows // spec.group)
  w = jnp.pad(w, ((0, -rows % BLOCK), (0, 0)))
  widths = grid.per_group(bits, kept, columns).reshape(kept, 1, -1)  # [G, 1, 1 or N]
  widths = jnp.pad(widths, ((0, len(w) // spec.group - kept), (0, 0), (0, 0)), mode="edge")
  widths = widths.reshape(-1, BLOCK // spec.group, *widths.shape[1:])

  def encode_block(w: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    start, width = block
    own = jax.lax.dynamic_slice_in_dim(factor, start, BLOCK, axis=0)
    square = jax.lax.dynamic_slice_in_dim(own, start, BLOCK, axis=1)
    x = jax.lax.dynamic_slice_in_dim(w, start, BLOCK, axis=0)
    groups = x.reshape(-1, spec.group, columns)
    valid = (start + jnp.arange(BLOCK) < rows).reshape(-1, spec.group, 1)
    scale, zero = _scales(groups, valid if rows % BLOCK else None, width, spec)
    levels = (jnp.repeat(a[:, 0], spec.group, axis=0) for a in (width, scale, zero))
    codes, pushed = _encode_rows(x, square, *levels, spec)
    later = jnp.where(jnp.arange(w.shape[0])[None] >= start + BLOCK, own, 0.0)
    return w - jnp.matmul(later.T, pushed, precision=_HIGHEST), (codes.reshape(groups.shape), scale, zero)

  _, parts = jax.lax.scan(encode_block, w, (jnp.arange(0, w.shape[0], BLOCK), widths))
  codes, scale, zero = (part.reshape(-1, *part.shape[2:])[:kept] for part in parts)
  return grid.join(codes, scale, zero, rows=rows)


def factorise(moment: jax.Array, spec: Spec) -> jax.Array:
  """What `encode` reads of a moment `[K, K]`: U, with K filled up to whole blocks."""
  moment = jnp.pad(moment, (0, -moment.shape[0] % BLOCK))
  return _inverse(gptq.upper_factor(moment, spec.damping, BLOCK))


def _inverse(upper: jax.Array) -> jax.Array:
  """The inverse of an upper triangular matrix `[K, K]`, K whole blocks: block by block from the last."""

  def invert_block(found: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    rows = jax.lax.dynamic_slice_in_dim(upper, start, BLOCK, axis=0)
    square = jax.lax.dynamic_slice_in_dim(rows, start, BLOCK, axis=1)
    unit = (start + jnp.arange(BLOCK)[:, None] == jnp.arange(upper.shape[0])[None]).astype(jnp.float32)
    right = unit - jnp.matmul(rows, found, precision=_HIGHEST)  # the rows of this block are still zero in `found`
    own = gptq.solve_lower(square[::-1, ::-1], right[::-1])[::-1]
    return jax.lax.dynamic_update_slice_in_dim(found, own, start, axis=0), None

  starts = jnp.arange(upper.shape[0] - BLOCK, -1, -BLOCK)
  return jax.lax.scan(invert_block, jnp.zeros_like(upper), starts)[0]


def _scales(groups: jax.Array, valid: jax.Array | None, bits: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
  """Scale and zero `[G, 1, N]` of the groups `[G, g, N]` of a block; bits `[G, 1, 1 or N]`."""
  if spec.search == "squared":
    return jax.lax.map(lambda slab: grid.search(*slab), (groups, valid, bits))
  scale, zero = jax.lax.map(lambda slab: _search(*slab), (groups, valid, bits))
  size = jnp.sum(valid, axis=1, keepdims=True) if valid is not None else groups.shape[1]
  magnitude = jnp.sum(jnp.abs(groups), axis=1, keepdims=True) / jnp.maximum(size, 1)  # padding is zero
  one = grid.to_storage(2 * magnitude)
  return jnp.where(bits == 1, jnp.where(one > 0, one, 1.0), scale), jnp.where(bits == 1, 0.5, zero)


def _search(x: jax.Array, valid: jax.Array | None, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The range of a group `[g, N]` among `FACTORS` times its own; scale and zero `[1, N]`."""
  top = grid.top_code(bits)
  low, high = grid.bounds(x, valid)
  low, high = (jnp.where(jnp.isfinite(end), end, 0.0) for end in (low, high))  # a group of padding only

  def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    scale, zero = grid.affine(jnp.asarray(FACTORS)[i] * low, jnp.asarray(FACTORS)[i] * high, top)
    residual = jnp.abs((grid.quantize(x, scale, zero, top) - zero) * scale - x)
    error = grid.total(residual**POWER, valid)
    return tuple(jnp.where(error < best[0], new, old) for new, old in zip((error, scale, zero), best, strict=True))

  start = (jnp.full_like(low, jnp.inf), *grid.affine(low, high, top))
  return jax.lax.fori_loop(0, len(FACTORS), attempt, start)[1:]


def _encode_rows(x: jax.Array, square: jax.Array, bits: jax.Array, scale: jax.Array, zero: jax.Array,
                 spec: Spec) -> tuple[jax.Array, jax.Array]:
  """Encodes a block row by row.

  Args:
    x: `[b, N]`, the block's weights after what earlier blocks pushed.
    square: `[b, b]`, the block's own part of U.
    bits: `[b, 1 or N]`, of every row.
    scale, zero: `[b, N]`.
    spec: as for `encode`.

  Returns:
    codes as float32 integers, and `e`, both `[b, N]`.
  """
  signs = (bits == 1) & (spec.search == "power")
  inside = jnp.ones_like(bits) if spec.feedback == "always" else bits > FEEDBACK_ABOVE

  def encode_row(x: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    index, coefficients, s, z, top, sign, fed = row
    code = jnp.where(sign, (x[index] >= 0).astype(jnp.float32), grid.quantize(x[index], s, z, top))
    pushed = (x[index] - (code - z) * s) / coefficients[index]
    later = jnp.where(jnp.arange(x.shape[0]) > index, coefficients, 0.0)
    return x - later[:, None] * (pushed * fed)[None], (code, pushed)

  rows = (jnp.arange(x.shape[0]), square, scale, zero, grid.top_code(bits), signs, inside.astype(jnp.float32))
  _, (codes, pushed) = jax.lax.scan(encode_row, x, rows)
  return codes, pushed
