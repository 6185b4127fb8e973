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
from moeq_jax.kernels import ffn
from moeq_jax.models import layers

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
    weights: `[T, k]` float32, what the experts' outputs are multiplied with.
    group_sizes: `[E]` int32, rows of each expert.
  """

  logits: jax.Array
  experts: jax.Array
  weights: jax.Array
  group_sizes: jax.Array


def route(logits: jax.Array, top_k: int, normalize: bool = True) -> Routing:
  """Chooses the `top_k` largest logits (ties: the lower index).

  Args:
    logits: `[T, E]` float32.
    top_k: experts of a token.
    normalize: the weights are the softmax over the chosen logits (equals the renormalised top-k probabilities) and sum
      to one; otherwise they are the chosen entries of the softmax over all logits.
  """
  experts = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)[1]
  chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=logits.dtype)
  pick = lambda values: jnp.einsum("te,tke->tk", values, chosen, precision="highest")
  weights = jax.nn.softmax(pick(logits), axis=-1) if normalize else pick(jax.nn.softmax(logits, axis=-1))
  return Routing(logits, experts, weights, jnp.sum(chosen, axis=(0, 1)).astype(jnp.int32))


def load_balance_loss(routing: Routing) -> jax.Array:
  """`E * sum_e f_e P_e`: share of rows times mean router probability (Switch Transformer, eq. 4); 1 when balanced."""
  experts = routing.logits.shape[-1]
  share = routing.group_sizes / jnp.sum(routing.group_sizes)
  return experts * jnp.sum(jax.lax.stop_gradient(share) * jnp.mean(jax.nn.softmax(routing.logits, -1), 0))


def cast(weight: nnx.Param, dtype: jnp.dtype) -> kernels.Weights:
  """The weights of experts for rows of `dtype`: arrays in that dtype, QTensors as they are."""
  value = weight.get_value()
  return value.astype(dtype) if isinstance(value, jax.Array) else value


def matmul(rows: jax.Array, weight: nnx.Param, sizes: jax.Array) -> jax.Array:
  """Rows sorted by expert times the experts' weights: `[R, K]`, array or QTensor `[E, K, N]`, `[E]` int32 -> `[R, N]`,
  in the dtype of the rows."""
  return kernels.grouped_matmul(rows, cast(weight, rows.dtype), sizes)


class MoE(nnx.Module):
  """Top-k mixture of SwiGLU experts, with or without an expert that every token shares.

  Attributes:
    router: `[E, D]`, one row an expert.
    gate, up: `[E, D, F]` array or QTensor; down: `[E, F, D]`.
    shared: the shared expert; shared_gate: `[1, D]`, whose sigmoid weighs it. Absent where `shared_size` is 0.
  """

  def __init__(self, hidden: int, ffn: int, experts: int, top_k: int, *, normalize: bool = True, shared_size: int = 0,
               dtype: jnp.dtype, rngs: nnx.Rngs):
    self.top_k, self.normalize = top_k, normalize
    self.router = layers.normal(rngs, experts, hidden, dtype=dtype)
    self.gate = layers.normal(rngs, experts, hidden, ffn, dtype=dtype)
    self.up = layers.normal(rngs, experts, hidden, ffn, dtype=dtype)
    self.down = layers.normal(rngs, experts, ffn, hidden, dtype=dtype)
    if shared_size:
      self.shared = layers.FeedForward(hidden, shared_size, dtype=dtype, rngs=rngs)
      self.shared_gate = layers.normal(rngs, 1, hidden, dtype=dtype)

  def route(self, x: jax.Array) -> Routing:
    """Routes rows `[T, D]`, in float32 whatever their dtype."""
    with jax.named_scope("route"):
      router = self.router[...].astype(jnp.float32)
      logits = jnp.matmul(x.astype(jnp.float32), router.T, precision="highest")
      return route(logits, self.top_k, self.normalize)

  def experts(self, x: jax.Array, routing: Routing, tap: Tap = no_tap) -> jax.Array:
    """The weighted sum of what the chosen experts make of each row, `[T, D] -> [T, D]`.

    Args:
      x: rows in the compute dtype.
      routing: of these rows.
      tap: called as `tap(name, rows, group_sizes)` on the rows sorted by expert, for the names `input`, `gate`, `up`,
        `mid` (input of down) and `down` (before the router's weight, which its gradient holds); returns the rows,
        unchanged in value. Without a tap the whole block goes through `kernels.moe_ffn`.
    """
    if tap is no_tap:
      return ffn.moe_ffn(x, routing, *(cast(w, x.dtype) for w in (self.gate, self.up, self.down)))
    with jax.named_scope("route"):
      order = jnp.argsort(routing.experts.reshape(-1), stable=True)
      inverse = jnp.argsort(order)
    sizes = routing.group_sizes
    with jax.named_scope("experts"):
      rows = tap("input", ffn.permute(jnp.repeat(x, self.top_k, axis=0), order, inverse), sizes)
      gate, up = tap("gate", matmul(rows, self.gate, sizes), sizes), tap("up", matmul(rows, self.up, sizes), sizes)
      mid = tap("mid", jax.nn.silu(gate) * up, sizes)
      weights = ffn.permute(routing.weights.reshape(-1), order, inverse).astype(x.dtype)
      down = tap("down", matmul(mid, self.down, sizes), sizes) * weights[:, None]
    with jax.named_scope("combine"):
      return jnp.sum(ffn.permute(down, inverse, order).reshape(*x.shape[:1], self.top_k, -1), axis=1)

  def always(self, x: jax.Array) -> jax.Array | None:
    """What the shared expert adds to each row, `[T, D] -> [T, D]`, or None without one."""
    if not hasattr(self, "shared"):
      return None
    return jax.nn.sigmoid(layers.dense(x, self.shared_gate[...].T)) * self.shared(x)
