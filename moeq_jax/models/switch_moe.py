"""The feed-forward networks of Switch Transformer: dense, and experts of which a token visits one.

An expert takes `capacity` tokens of a sequence, in their order. Those that come later are dropped: they skip the expert
and keep their residual. Padding is never counted and never reaches an expert, wherever it stands.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moeq_jax.kernels import ffn
from moeq_jax.models import layers, moe


def _keeping(rngs: nnx.Rngs, *shape: int, dtype: jnp.dtype) -> nnx.Param:
  """Weights `[..., K, N]` that keep the size of their inputs."""
  return layers.normal(rngs, *shape, deviation=shape[-2] ** -0.5, dtype=dtype)


def feed_forward(weights: Mapping[str, jax.Array], rows: jax.Array, tap: layers.Tap = layers.no_tap) -> jax.Array:
  """A dense network or one expert, `down(relu(up(x)))`.

  Args:
    weights: `{"up": [D, F], "down": [F, D]}` in any dtype.
    rows: `[..., D]` in the compute dtype.
    tap: called as `tap(name, value)` for `up`, `mid` (input of down) and `down`; returns the value.

  Returns:
    `[..., D]`.
  """
  up = tap("up", layers.dense(rows, weights["up"]))
  return tap("down", layers.dense(tap("mid", jax.nn.relu(up)), weights["down"]))


class FeedForward(nnx.Module):
  """The network of a dense block: `up [D, F]`, relu, `down [F, D]`."""

  def __init__(self, hidden: int, ffn: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.up = _keeping(rngs, hidden, ffn, dtype=dtype)
    self.down = _keeping(rngs, ffn, hidden, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D] -> [..., D]`."""
    return feed_forward({"up": self.up[...], "down": self.down[...]}, x)


class SwitchMoE(nnx.Module):
  """Experts of which a token visits one, weighted with its probability.

  Attributes:
    router: `[E, D]`, one row an expert.
    up: `[E, D, F]` array or QTensor; down: `[E, F, D]`.
    capacity: tokens of a sequence that an expert takes.
  """

  def __init__(self, hidden: int, ffn: int, experts: int, capacity: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.capacity = capacity
    self.router = layers.normal(rngs, experts, hidden, deviation=hidden**-0.5, dtype=dtype)
    self.up = _keeping(rngs, experts, hidden, ffn, dtype=dtype)
    self.down = _keeping(rngs, experts, ffn, hidden, dtype=dtype)

  def route(self, x: jax.Array, real: jax.Array, *, dropping: bool = True,
            seen: jax.Array | None = None) -> moe.Routing:
    """Chooses an expert for each token, in float32 whatever the dtype of `x` (ties: the lower index).

    Args:
      x: `[B, S, D]`, sequences.
      real: `[B, S]` bool, false at padding.
      dropping: whether tokens beyond the capacity are dropped.
      seen: `[B, E]` int32, tokens of the same sequences that wanted each expert before; by default none.

    Returns:
      The routing of the `T = B * S` tokens. Padding and dropped tokens have an expert, too, but their weight is 0.
    """
    with jax.named_scope("route"):
      router = self.router[...].astype(jnp.float32)
      logits = jnp.matmul(x.astype(jnp.float32), router.T, precision="highest")
      routing = moe.route(logits.reshape(-1, router.shape[0]), 1, normalize=False)
      kept = real
      if dropping:
        kept &= _turns(routing.experts.reshape(real.shape), real, router.shape[0], seen) <= self.capacity
      return routing._replace(weights=routing.weights * kept.reshape(-1, 1))

  def __call__(self, rows: jax.Array, routing: moe.Routing, tap: moe.Tap = moe.no_tap) -> jax.Array:
    """`[T, D] -> [T, D]`: each row through its expert, times its weight.

    Args:
      rows: in the compute dtype, as `masked` gives them.
      routing: of these rows.
      tap: as in `moe.MoE.experts`, for the names `input`, `up`, `mid` (input of down) and `down` (before the weight).
    """
    if tap is moe.no_tap:
      return ffn.moe_ffn(rows, routing, None, moe.cast(self.up, rows.dtype), moe.cast(self.down, rows.dtype))
    with jax.named_scope("route"):
      order = jnp.argsort(routing.experts[:, 0], stable=True)
      inverse = jnp.argsort(order)
    sizes = routing.group_sizes
    with jax.named_scope("experts"):
      up = tap("up", moe.matmul(tap("input", ffn.permute(rows, order, inverse), sizes), self.up, sizes), sizes)
      down = tap("down", moe.matmul(tap("mid", jax.nn.relu(up), sizes), self.down, sizes), sizes)
    with jax.named_scope("combine"):
      return ffn.permute(down, inverse, order) * routing.weights.astype(rows.dtype)


def _turns(experts: jax.Array, real: jax.Array, count: int, seen: jax.Array | None) -> jax.Array:
  """The place of each token, from 1, among those of its sequence that want its expert; 0 for padding.

  Args:
    experts: `[B, S]`, what each token wants.
    real: `[B, S]` bool, false at padding.
    count: E.
    seen: `[B, E]`, as in `SwitchMoE.route`.
  """
  wants = jax.nn.one_hot(experts, count, dtype=jnp.int32) * real[..., None]
  total = jnp.cumsum(wants, axis=1)
  if seen is not None:
    total += seen[:, None]
  return jnp.sum(total * wants, axis=-1)


def masked(x: jax.Array, routing: moe.Routing) -> jax.Array:
  """The rows that the experts see, `[..., D] -> [T, D]`: zero where the weight is, so that sums over an expert's rows
  (second moments, gradients) are over the tokens that it works on."""
  rows = x.reshape(-1, x.shape[-1])
  return jnp.where(routing.weights > 0, rows, jnp.zeros_like(rows))
