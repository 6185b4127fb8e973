"""The functions of a model, compiled: what all stages share that run a model block by block.

`functions` is what a model gives to stages (`models.decoder.Functions`), one object for all models of a kind, so that
blocks of one structure share a compilation, whichever stage asked first. A state is a pytree of arrays.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=0)
def embed(functions: Any, top: Any, batch: Any) -> Any:
  """The state before the first block."""
  return functions.embed(top, batch)


@functools.partial(jax.jit, static_argnums=0)
def block(functions: Any, block: Any, state: Any) -> tuple[Any, Any]:
  """The state after a block, and its routing (`None` for a dense block)."""
  return functions.block(block, state)


@functools.partial(jax.jit, static_argnums=0)
def sequence_losses(functions: Any, top: Any, state: Any, batch: Any) -> jax.Array:
  """Mean loss of each sequence in nats, `[B]`, from the state after the last block."""
  return jnp.mean(functions.losses(functions.head(top, state), batch), axis=-1)


def sparse(functions: Any, blocks: Sequence[Any]) -> list[int]:
  """The places of the blocks that are MoE layers; layer `l` of statistics, errors and plans is `blocks[sparse[l]]`."""
  return [place for place, item in enumerate(blocks) if functions.sparse(item)]
