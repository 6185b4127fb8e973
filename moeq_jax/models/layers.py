"""What the layers of all models share: matmul, norm, feed-forward network."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

SMALLEST = 32

Tap = Callable[[str, jax.Array], jax.Array]


def no_tap(name: str, value: jax.Array) -> jax.Array:
  """The default tap: leaves the value as it is."""
  del name
  return value


def size_class(size: int) -> int:
  """The smallest power of two that holds `size`, at least `SMALLEST`: one compiled program serves all of a class."""
  return max(SMALLEST, 1 << (size - 1).bit_length())


def normal(rngs: nnx.Rngs, *shape: int, deviation: float = 0.02, dtype: jnp.dtype) -> nnx.Param:
  """A parameter of normal numbers with this standard deviation."""
  return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, dtype))


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
  """Root-mean-square norm over the last axis, in float32, back in the dtype of `x`."""
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  gain = weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (normed * gain).astype(x.dtype)


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x @ w` for `[..., K]` and `[K, N]` (`w` in any dtype; computed in that of `x`).

  The gradient of `w` is summed in float32: more exact, and XLA:CPU has no fast bfloat16 path for a transposed left
  operand.
  """
  return x @ w.astype(x.dtype)


def _dense_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  rows = lambda a: a.reshape(-1, a.shape[-1]).astype(jnp.float32)
  return dy @ w.astype(dy.dtype).T, (rows(x).T @ rows(dy)).astype(w.dtype)


dense.defvjp(lambda x, w: (dense(x, w), (x, w)), _dense_backward)


def unembed(h: jax.Array, weight: jax.Array) -> jax.Array:
  """Logits `[..., V]`, float32, of states `[..., D]` by `[V, D]`.

  A single row gets a second one beside it: XLA:CPU takes six times as long for one row of a transposed product.
  """
  rows = h.reshape(-1, h.shape[-1])
  padded = jnp.pad(rows, ((0, len(rows) == 1), (0, 0)))
  return dense(padded, weight.T)[: len(rows)].astype(jnp.float32).reshape(*h.shape[:-1], -1)


def swiglu(weights: Mapping[str, jax.Array], rows: jax.Array, tap: Tap = no_tap) -> jax.Array:
  """A gated feed-forward network, `down(silu(gate(x)) * up(x))` (GLU variants, eq. 6).

  Args:
    weights: `{"gate": [D, F], "up": [D, F], "down": [F, D]}` in any dtype.
    rows: `[R, D]` in the compute dtype.
    tap: called as `tap(name, value)` for `gate`, `up`, `mid` (input of down) and `down`; returns the value.

  Returns:
    `[R, D]`.
  """
  gate, up = tap("gate", dense(rows, weights["gate"])), tap("up", dense(rows, weights["up"]))
  return tap("down", dense(tap("mid", jax.nn.silu(gate) * up), weights["down"]))


class FeedForward(nnx.Module):
  """A dense SwiGLU network of width `ffn`: `gate`, `up` `[D, F]`, `down` `[F, D]`."""

  def __init__(self, hidden: int, ffn: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.gate = normal(rngs, hidden, ffn, dtype=dtype)
    self.up = normal(rngs, hidden, ffn, dtype=dtype)
    self.down = normal(rngs, ffn, hidden, dtype=dtype)

  def __call__(self, rows: jax.Array) -> jax.Array:
    """`[T, D] -> [T, D]`."""
    return swiglu({name: getattr(self, name)[...] for name in ("gate", "up", "down")}, rows)
