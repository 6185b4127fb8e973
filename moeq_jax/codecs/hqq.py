"""Half-quadratic quantization (HQQ): the zero point that suits most weights, found without data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The scale stays what it
was (that of min-max); the zero point minimises the sparsity-promoting criterion `sum |w - w_hat|^p`, p < 1, which
forgives the errors of outliers. Half-quadratic splitting adds a variable e for the forgiven part and alternates, with
a growing weight beta,

  e    <- shrink(w - w_hat),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)       (the generalised soft threshold)
  zero <- mean over the group of (code - (w - e) / scale)
  beta <- kappa beta

Two choices differ from the published description. Errors are measured in units of the scale: in the units of the
weights the same constants would forgive nothing or everything depending on how large the weights happen to be. And the
criterion is evaluated on the grid as stored (zero in bf16), group by group, and the best zero point met is kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moeq_jax.codecs import grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Options of HQQ; the defaults are the published ones.

  Attributes:
    group: rows of K that share a scale: 32, 64, 128, or 0 for all of K.
    p: exponent of the criterion, in (0, 1].
    beta: weight of the splitting at the first iteration.
    kappa: its growth per iteration.
    iterations: number of iterations; fixed.
    start: where scale and zero come from: `minmax` as published, or `search`, the clipped range of RTN, which at 1 to 4
      bits is the better scale also by the criterion of HQQ.
    grid: `affine`; the other codecs also have `ct`, whose zero cannot move.
  """

  group: int = 64
  p: float = 0.7
  beta: float = 10.0
  kappa: float = 1.01
  iterations: int = 20
  start: str = "minmax"
  grid: str = "affine"

  def __post_init__(self) -> None:
    grid.check_group(self.group)
    grid.check_kind(self.grid)
    if self.grid == "ct":
      raise ValueError("hqq(grid=ct): HQQ moves the zeros, and on the grid 'ct' they are fixed; take rtn or gptq")
    if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.iterations < 1:
      raise ValueError(f"{self}: needs 0 < p <= 1, beta > 0, kappa >= 1 and iterations >= 1")
    if self.start not in ("minmax", "search"):
      raise ValueError(f"start={self.start!r} is neither 'minmax' nor 'search'")


def encode(w: jax.Array, bits: jax.Array, moment: jax.Array | None, spec: Spec) -> grid.Encoded:
  """Encodes one matrix; jittable, and vmappable over experts.

  Args:
    w: `[K, N]` float32, finite.
    bits: int32 scalar in `grid.WIDTHS`, or one of them for every group, see `grid.per_group`; may be traced.
    moment: not used.
    spec: static options.
  """
  del moment
  return grid.encode_groups(w, bits, spec.group, functools.partial(_zero_point, spec=spec))


def _zero_point(x: jax.Array, valid: jax.Array | None, bits: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
  """Scale and half-quadratic zero, both `[1, N]`, of a group `x [g, N]`."""
  top = grid.top_code(bits)
  if spec.start == "search":
    scale, start = grid.search(x, valid, bits)
  else:
    scale, start = grid.affine(*grid.bounds(x, valid), top)
  steps = x / scale

  def iterate(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Scores the current zero, keeps it if it is the best so far, and moves to the next one."""
    zero, best, least = state
    residual = steps - (grid.quantize(x, scale, zero, top) - zero)
    magnitude = jnp.abs(residual)
    power = jnp.exp(spec.p * jnp.log(magnitude))
    criterion = grid.total(power, valid)
    best = jnp.where(criterion < least, zero, best)
    beta = spec.beta * spec.kappa ** i.astype(jnp.float32)
    kept = jnp.sign(residual) * jnp.minimum(magnitude, power / (beta * jnp.maximum(magnitude, 1e-12)))
    moved = grid.to_storage(zero - grid.total(kept, valid) / grid.count(x, valid))
    return moved, best, jnp.minimum(criterion, least)

  state = (start, start, jnp.full_like(start, jnp.inf))
  return scale, jax.lax.fori_loop(0, spec.iterations + 1, iterate, state)[1]
