"""Loops inside `shard_map`: which mesh axes a value varies over is part of its type, and a carry must keep its type."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _axes(value: jax.Array) -> frozenset[str]:
  return jax.typeof(value).manual_axis_type.varying


def _extend(value: jax.Array, axes: frozenset[str]) -> jax.Array:
  return lax.pcast(value, tuple(sorted(axes - _axes(value))), to="varying")


def unify(*trees: Any) -> tuple[Any, ...]:
  """Marks every leaf as varying over all mesh axes that any leaf varies over; the gradient sums over those added."""
  axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(trees)))
  return jax.tree.map(lambda leaf: _extend(leaf, axes), trees)


def zeros(shape: Sequence[int], dtype: jnp.dtype, like: jax.Array) -> jax.Array:
  """Zeros that vary over the mesh axes that `like` varies over."""
  return _extend(jnp.zeros(shape, dtype), _axes(like))
