"""Sums of squared gradients per expert and channel, read off a backward pass without storing per-token gradients."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def square_sum(value: jax.Array, total: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """The identity on `value`; the "gradient" of `total` is the sum of squared gradients of `value` per group.

  Args:
    value: `[T, N]` rows sorted by group.
    total: `[E, N]` float32 zeros; differentiate with respect to it.
    group_sizes: `[E]` int32.
  """
  del total, group_sizes
  return value


def _forward(value, total, group_sizes):
  del total
  return value, group_sizes


def _backward(group_sizes, gradient):
  return gradient, group_sum(jnp.square(gradient.astype(jnp.float32)), group_sizes), None


square_sum.defvjp(_forward, _backward)


def group_sum(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Sums the rows of each group: `[T, N]` -> `[E, N]`."""
  owner = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
  return jax.nn.one_hot(owner, group_sizes.shape[0], dtype=rows.dtype, axis=0) @ rows
