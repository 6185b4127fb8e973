"""The sparse feed-forward block: router, dispatch, experts, combine.

No token is ever dropped: rows are sorted by expert and go through `kernels.grouped_matmul`, which takes plain arrays
(training, full precision) and packed `QTensor`s (quantized) alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moeq_jax.kernels import api as kernels

Tap = Callable[[str, jax.Array, jax.Array], jax.Array]


def no_tap(name: str, value: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """The default tap: leaves the value as it is."""
  del name, group_sizes
  return value


class Routing(NamedTuple):
  """What the router decided.

  Attributes:
    logits: `[T, E]` float32.
    experts: `[T, k]` int32, the chosen experts, best first.
    weights: `[T, k]` float32, softmax over the chosen logits (equals the renormalised top-k probabilities).
    group_sizes: `[E]` int32, rows of each expert.
  """

  logits: jax.Array
  experts: jax.Array
  weights: jax.Array
  group_sizes: jax.Array


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """`x[order]` for a permutation; the gradient is a gather by `inverse`, not a scatter."""
  del inverse
  return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def route(logits: jax.Array, top_k: int) -> Routing:
  """Chooses the `top_k` largest logits (ties: the lower index) and renormalises over them."""
  experts = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)[1]
  chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=logits.dtype)
  weights = jax.nn.softmax(jnp.einsum("te,tke->tk", logits, chosen, precision="highest"), axis=-1)
  return Routing(logits, experts, weights, jnp.sum(chosen, axis=(0, 1)).astype(jnp.int32))


def load_balance_loss(routing: Routing) -> jax.Array:
  """`E * sum_e f_e P_e`: share of rows times mean router probability (Switch Transformer, eq. 4); 1 when balanced."""
  experts = routing.logits.shape[-1]
  share = routing.group_sizes / jnp.sum(routing.group_sizes)
  return experts * jnp.sum(jax.lax.stop_gradient(share) * jnp.mean(jax.nn.softmax(routing.logits, -1), 0))


class MoE(nnx.Module):
  """Top-k mixture of SwiGLU experts (Mixtral).

  Attributes:
    router: `[E, D]`, one row an expert.
    gate, up: `[E, D, F]` array or QTensor; down: `[E, F, D]`.
  """

  def __init__(self, hidden: int, ffn: int, experts: int, top_k: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    def init(*shape: int) -> nnx.Param:
      return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

    self.top_k = top_k
    self.router = init(experts, hidden)
    self.gate = init(experts, hidden, ffn)
    self.up = init(experts, hidden, ffn)
    self.down = init(experts, ffn, hidden)

  def __call__(self, x: jax.Array, tap: Tap = no_tap) -> tuple[jax.Array, Routing]:
    """`[T, D] -> [T, D]`. The router runs in float32.

    Args:
      x: rows in the compute dtype.
      tap: called as `tap(name, rows, group_sizes)` on the rows sorted by expert, for the names `input`, `gate`, `up`,
        `mid` (input of down) and `down` (before the router's weight, which its gradient holds); returns the rows,
        unchanged in value.
    """
    with jax.named_scope("route"):
      router = self.router[...].astype(jnp.float32)
      routing = route(jnp.matmul(x.astype(jnp.float32), router.T, precision="highest"), self.top_k)
      order = jnp.argsort(routing.experts.reshape(-1), stable=True)
      inverse = jnp.argsort(order)
    sizes = routing.group_sizes

    def matmul(rows: jax.Array, weight: nnx.Param) -> jax.Array:
      value = weight.get_value()
      return kernels.grouped_matmul(rows, value.astype(rows.dtype) if isinstance(value, jax.Array) else value, sizes)

    with jax.named_scope("experts"):
      rows = tap("input", permute(jnp.repeat(x, self.top_k, axis=0), order, inverse), sizes)
      gate, up = tap("gate", matmul(rows, self.gate), sizes), tap("up", matmul(rows, self.up), sizes)
      mid = tap("mid", jax.nn.silu(gate) * up, sizes)
      weights = permute(routing.weights.reshape(-1), order, inverse).astype(x.dtype)
      down = tap("down", matmul(mid, self.down), sizes) * weights[:, None]
    with jax.named_scope("combine"):
      return jnp.sum(permute(down, inverse, order).reshape(*x.shape[:1], self.top_k, -1), axis=1), routing
