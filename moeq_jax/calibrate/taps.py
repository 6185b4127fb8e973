"""Sums over the rows of each expert, read off one forward and one backward pass without storing anything per token.

A tap is the identity on what flows through the model. The derivative with respect to its `total`, an array of zeros, is
the sum that it takes: of squared gradients, which the backward pass brings (`square_sum`), or of what the forward pass
shows (`carry`), which it keeps as sums, not as rows. Taps go through `jit`, `remat` (which takes forward sums when it
runs the forward pass again), `scan` (which adds up) and `shard_map`: a `total` that is the same on all devices gets the
sum over all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moeq_jax.kernels import ragged, varying

TILE = 128  # rows that are summed at a time


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
  return gradient, group_squares(gradient, group_sizes), None


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


def group_squares(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Sums of the squared rows of each group: `[T, N]` sorted by group -> `[E, N]` float32.

  Squares and sums are float32 whatever the dtype of the rows: a sum in bfloat16 stops growing at 256 times its terms.
  What is too large for float32, or not a number, is so in its own group only.
  """
  return group_sums(rows, group_sizes, None)[0]


def group_sums(rows: jax.Array, group_sizes: jax.Array,
               test: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  """Sums of the squared rows of each group, `[E, N]`, and its Gram matrix times test vectors `[N, R]`, `[E, N, R]`
  float32.

  Rows are read tile by tile and each tile belongs to one group: nothing of the size of the rows is made, squared or
  not.
  """
  length = min(TILE, rows.shape[0])
  cut = ragged.tiles(group_sizes, rows.shape[0], length)
  starts, held = cut.rows[:, 0], jnp.sum(cut.valid, axis=1)

  def add(tile: jax.Array, sums: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
    total, gram = sums
    first = jnp.minimum(starts[tile], rows.shape[0] - length)
    place = first + jnp.arange(length)
    own = (place >= starts[tile]) & (place < starts[tile] + held[tile])
    x = jax.lax.dynamic_slice_in_dim(rows, first, length).astype(jnp.float32)
    x = jnp.where(own[:, None], x, 0.0)
    total = total.at[cut.expert[tile]].add(jnp.sum(jnp.square(x), axis=0))
    if gram is None:
      return total, None
    seen = jnp.matmul(x, test, precision="highest")
    return total, gram.at[cut.expert[tile]].add(jnp.matmul(x.T, seen, precision="highest"))

  shape = group_sizes.shape[0], rows.shape[1]
  total = jnp.zeros(shape, jnp.float32)
  gram = None if test is None else jnp.zeros((*shape, test.shape[1]), jnp.float32)
  rows, starts, held, cut, total, gram = varying.unify(rows, starts, held, cut, total, gram)
  return jax.lax.fori_loop(0, starts.shape[0], add, (total, gram))
