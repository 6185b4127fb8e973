"""Sums over the rows of each expert, read off one forward and one backward pass without storing anything per token.

A tap is the identity on what flows through the model. The derivative with respect to its `total`, an array of zeros, is
the sum that it takes: of squared gradients, which the backward pass brings (`square_sum`), or of what the forward pass
shows (`carry`), which it keeps as sums, not as rows. Taps go through `jit`, `remat` (which takes forward sums when it runs
the forward pass again), `scan` (which adds up) and `shard_map`: a `total` that is the same on all devices gets the sum
over all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moeq_jax.kernels import ragged, varying

_LARGEST = float(jnp.finfo(jnp.float32).max)


def square_sum(value: jax.Array, total: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """The identity on `value`; the "gradient" of `total` is the sum of squared gradients of `value` per group.

  Args:
    value: `[T, N]` rows sorted by group.
    total: `[E, N]` float32 zeros; differentiate with respect to it.
    group_sizes: `[E]` int32.
  """
  return _square_sum(value, varying.unify(total, value, group_sizes)[0], group_sizes)


@jax.custom_vjp
def _square_sum(value, total, group_sizes):
  del total, group_sizes
  return value


def _forward(value, total, group_sizes):
  del total
  return value, group_sizes


def _backward(group_sizes, gradient):
  return gradient, group_sum(squares(gradient), group_sizes), None


_square_sum.defvjp(_forward, _backward)


def carry(value: jax.Array, totals: Any, sums: Any) -> jax.Array:
  """The identity on `value`; the "gradient" of `totals` is `sums`, which depends on no gradient.

  Args:
    value: anything that the loss depends on.
    totals: a pytree of zeros; differentiate with respect to it.
    sums: the same tree, computed in the forward pass.
  """
  totals = jax.tree.map(lambda total, own: varying.unify(total, own, value)[0], totals, sums)
  sums = jax.tree.map(lambda total, own: varying.unify(total, own)[1], totals, sums)
  return _carry(value, totals, jax.lax.stop_gradient(sums))


@jax.custom_vjp
def _carry(value, totals, sums):
  del totals, sums
  return value


_carry.defvjp(lambda value, totals, sums: (value, sums), lambda sums, gradient: (gradient, sums, None))


def squares(rows: jax.Array) -> jax.Array:
  """Squares in float32, whatever the dtype of the rows: a sum in bfloat16 stops growing at 256 times its terms.

  What is not finite, or too large to be squared, becomes the largest float32, which `group_sum` recognises.
  """
  square = jnp.square(rows.astype(jnp.float32))
  return jnp.where(square < _LARGEST, square, _LARGEST)


def group_sum(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Sums the rows of each group: `[T, N]` finite and not negative -> `[E, N]`.

  A sum that is too large for float32, or has a term that was (`squares`), is infinite, in its own group only.
  """
  owner = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
  chosen = jax.nn.one_hot(owner, group_sizes.shape[0], dtype=rows.dtype, axis=0)
  total = jnp.matmul(chosen, rows, precision="highest")
  return jnp.where(total < _LARGEST, total, jnp.inf)


def sketch(rows: jax.Array, test: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """The Gram matrix of each group's rows times test vectors: `[T, N], [N, R] -> [E, N, R]` float32."""
  rows = rows.astype(jnp.float32)
  return ragged.outer(rows, jnp.matmul(rows, test, precision="highest"), group_sizes)
