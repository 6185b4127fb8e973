"""Which expert meets which rows: the list of visits that a TPU kernel walks along, and rows laid out for it.

Two layouts. *In order*: rows stay where they are, every visit computes all of them and keeps those of its expert; one
visit per expert that has rows, nothing is moved. *Aligned*: every expert's rows start at a multiple of 16 (the rows of
a bfloat16 tile), so that a visit copies exactly its rows and writes no other expert's; experts with many rows have
several visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 16  # rows of a tile of bfloat16


class Visits(NamedTuple):
  """A list of visits, of static length; int32, all of them.

  Attributes:
    expert: `[V]`.
    start: `[V]` first row, of the layout that the kernel sees.
    stop: `[V]` row after the last.
    count: `[1]` visits that there are, at least 1; entries from there on are never read.
  """

  expert: jax.Array
  start: jax.Array
  stop: jax.Array
  count: jax.Array


def in_order(group_sizes: jax.Array, total: int) -> Visits:
  """One visit per expert that has rows. `total` is the static number of rows."""
  experts = group_sizes.shape[0]
  length = max(1, min(experts, total))
  expert = jnp.nonzero(group_sizes > 0, size=length, fill_value=0)[0].astype(jnp.int32)
  end = jnp.cumsum(group_sizes).astype(jnp.int32)[expert]
  count = jnp.maximum(jnp.sum(group_sizes > 0), 1).astype(jnp.int32)
  return Visits(expert, end - group_sizes[expert], end, count[None])


def aligned_rows(experts: int, total: int) -> int:
  """Static bound on the rows of the aligned layout."""
  return -(-(total + (ROWS - 1) * min(experts, total)) // ROWS) * ROWS


def aligned(group_sizes: jax.Array, total: int, chunk: int) -> tuple[Visits, jax.Array, jax.Array]:
  """Visits of at most `chunk` rows (a multiple of 16), and the aligned layout.

  Args:
    group_sizes: `[E]` int32, summing to `total`.
    total: T.
    chunk: most rows of a visit.

  Returns:
    The visits, with starts at multiples of 16; the source of every aligned row, `[aligned_rows(E, T)]` int32 (any row
    where there is none); and the aligned position of every row, `[T]` int32.
  """
  experts = group_sizes.shape[0]
  end = jnp.cumsum(group_sizes)
  room = -(-group_sizes // ROWS) * ROWS
  first = jnp.cumsum(room) - room
  begin = end - group_sizes
  row = jnp.arange(total)
  owner = jnp.minimum(jnp.searchsorted(end, row, side="right"), experts - 1)
  position = first[owner] + row - begin[owner]
  slot = jnp.arange(aligned_rows(experts, total))
  tenant = jnp.minimum(jnp.searchsorted(first + room, slot, side="right"), experts - 1)
  source = jnp.clip(begin[tenant] + slot - first[tenant], 0, total - 1)
  chunks = -(-group_sizes // chunk)
  last = jnp.cumsum(chunks)
  visit = jnp.arange(max(1, min(experts, total) + total // chunk))
  expert = jnp.minimum(jnp.searchsorted(last, visit, side="right"), experts - 1)
  start = first[expert] + (visit - (last - chunks)[expert]) * chunk
  stop = jnp.minimum(start + chunk, (first + group_sizes)[expert])
  count = jnp.maximum(last[-1:], 1)
  visits = Visits(*(a.astype(jnp.int32) for a in (expert, start, stop, count)))
  return visits, source.astype(jnp.int32), position.astype(jnp.int32)
