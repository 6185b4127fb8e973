"""The feed-forward block of a Mixture of Experts, from the router's choice to the weighted sum, over `grouped_matmul`.

Rows are sorted by expert, go through gate and up, the activation and down, and are weighted, put back and summed. A
back-end may do gate and up in one sweep (`Backend.gated`); everything else is the same for all of them.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moeq_jax.kernels import api, cpu, cpu_loop, varying
from moeq_jax.qtensor import QTensor

# where one sweep saves time (docs/kernels.md): at least so many rows, and so many weights of an expert's gate
LEAST_ROWS, LEAST_WEIGHTS = 16, 1 << 19


class Routed(Protocol):
  """What the router decided.

  Attributes:
    experts: `[T, k]` int32, the experts of each row.
    weights: `[T, k]`, what their outputs are multiplied with.
    group_sizes: `[E]` int32, how often each expert stands in `experts`.
  """

  experts: jax.Array
  weights: jax.Array
  group_sizes: jax.Array


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """`x[order]` for a permutation; the gradient is a gather by `inverse`, not a scatter."""
  del inverse
  return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def moe_ffn(x: jax.Array, routing: Routed, gate: api.Weights | None, up: api.Weights, down: api.Weights, *,
            backend: str | None = None, activations: str = "exact") -> jax.Array:
  """`y[t] = sum over k of weights[t, k] * expert(experts[t, k], x[t])`.

  An expert is `down(silu(gate(x)) * up(x))`, or `down(relu(up(x)))` without a gate (Switch Transformer).

  Args:
    x: `[T, D]` float32 or bfloat16.
    routing: of these rows; `models.moe.Routing` is one.
    gate, up: `[E, D, F]`, array or QTensor; gate may be None.
    down: `[E, F, D]`, array or QTensor.
    backend, activations: as for `grouped_matmul`.

  Returns:
    `[T, D]` in the dtype of x. Differentiable in reverse mode in `x`, in the routing's weights, and in arrays.

  Raises:
    ValueError: shapes that do not fit together, and what `grouped_matmul` raises.
  """
  _check(x, routing, gate, up, down)
  choice = {"backend": backend, "activations": activations}
  top_k, sizes = routing.experts.shape[1], routing.group_sizes
  with jax.named_scope("route"):
    order = jnp.argsort(routing.experts.reshape(-1), stable=True)
    inverse = jnp.argsort(order)
  with jax.named_scope("experts"):
    rows = permute(jnp.repeat(x, top_k, axis=0), order, inverse)
    if gate is None:
      mid = jax.nn.relu(api.grouped_matmul(rows, up, sizes, **choice))
    else:
      mid = _gated(rows, gate, up, sizes, **choice)
    weights = permute(routing.weights.reshape(-1), order, inverse).astype(x.dtype)
    out = api.grouped_matmul(mid, down, sizes, **choice) * weights[:, None]
  with jax.named_scope("combine"):
    return jnp.sum(permute(out, inverse, order).reshape(len(x), top_k, down.shape[2]), axis=1)


def _check(x: Any, routing: Routed, gate: Any, up: Any, down: Any) -> None:
  """Raises a ValueError that names what does not fit."""
  experts, D, F = up.shape if len(up.shape) == 3 else (None, None, None)
  rows = x.shape[0] if x.ndim == 2 else None
  k = routing.experts.shape[-1] if routing.experts.ndim == 2 else None
  for name, shape, wanted, letters in (
      ("up", up.shape, (experts, D, F), "[E, D, F]"), ("x", x.shape, (rows, D), "[T, D]"),
      ("gate", (experts, D, F) if gate is None else gate.shape, (experts, D, F), "[E, D, F]"),
      ("down", down.shape, (experts, F, D), "[E, F, D]"), ("experts", routing.experts.shape, (rows, k), "[T, k]"),
      ("weights", routing.weights.shape, (rows, k), "[T, k]"),
      ("group_sizes", routing.group_sizes.shape, (experts,), "[E]")):
    if tuple(shape) != wanted:
      raise ValueError(f"moe_ffn: {name} has shape {tuple(shape)}, not {letters} = {wanted} beside x {x.shape} and up"
                       f" {up.shape}")


def _gated(rows: jax.Array, gate: api.Weights, up: api.Weights, sizes: jax.Array, *, backend: str | None,
           activations: str) -> jax.Array:
  """`silu(rows gate) * (rows up)`, in one sweep where the back-end of both can."""
  if one_sweep_pays(rows, gate, up):
    name = api.choose(rows, gate, backend, activations=activations)
    if api.BACKENDS[name].gated and name == api.choose(rows, up, backend, activations=activations):
      sizes = api.checked(sizes, rows, gate)
      rows, (gate, up), sizes = varying.unify(rows, jax.tree.map(jnp.asarray, (gate, up)), sizes)
      return _one_sweep(name, rows, (gate, up), sizes)
  return _two_products(rows, gate, up, sizes, backend, activations)


def one_sweep_pays(rows: jax.Array, gate: api.Weights, up: api.Weights) -> bool:
  """Whether gate and up, `[E, D, F]`, can be swept together, and there is enough of both to gain by it."""
  packed = isinstance(gate, QTensor) and isinstance(up, QTensor) and cpu_loop.alike(gate, up)
  return packed and len(rows) >= LEAST_ROWS and gate.K * gate.N >= LEAST_WEIGHTS


def _two_products(rows: jax.Array, gate: api.Weights, up: api.Weights, sizes: jax.Array, backend: str | None,
                  activations: str) -> jax.Array:
  product = lambda w: api.grouped_matmul(rows, w, sizes, backend=backend, activations=activations)
  return cpu.swiglu(product(gate), product(up))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_sweep(backend: str, rows: jax.Array, weights: tuple[QTensor, QTensor], sizes: jax.Array) -> jax.Array:
  run = lambda rows, weights, sizes: api.BACKENDS[backend].gated(rows, *weights, sizes, rows.dtype)
  return api.refuse_batched_weights(run)(rows, weights, sizes)


def _forward(backend: str, rows: jax.Array, weights: tuple[QTensor, QTensor], sizes: jax.Array) -> Any:
  return _one_sweep(backend, rows, weights, sizes), (rows, weights, sizes)


def _backward(backend: str, saved: Any, dy: jax.Array) -> Any:
  """Both inner products are computed again: keeping them would cost what the sweep saved."""
  rows, (gate, up), sizes = saved
  activations = api.BACKENDS[backend].activations
  return jax.vjp(lambda x: _two_products(x, gate, up, sizes, backend, activations), rows)[1](dy)[0], None, None


_one_sweep.defvjp(_forward, _backward)
