"""Log-likelihoods of given tokens: many requests of many lengths in few compiled shapes.

Requests that feed the model the same tokens (the choices of a question whose answers are one token long) share a row.
Rows are sorted by length, filled up to a size class (`size_class`), and as many of a class run together as make about
`BATCH_TOKENS` tokens. Logits are computed where they are asked for, `HEAD_TOKENS` places at a time: a whole batch of
them would be larger than all else.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import steps

BATCH_TOKENS = 2048
HEAD_TOKENS = 256
SMALLEST = 16

Row = tuple[tuple[int, ...], ...]  # the sequences that a model reads together: of a decoder one


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be scored.

  Attributes:
    row: the token sequences that the model reads: a decoder's input, or inputs and targets of an encoder-decoder.
    first: the place of the first logits that count.
    targets: the tokens that they predict, there and at the places after it.
  """

  row: Row
  first: int
  targets: tuple[int, ...]


def size_class(size: int) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `size`: above 16, less than a third of a row is filling."""
  power = max(SMALLEST, 1 << (size - 1).bit_length())
  return power * 3 // 4 if size <= power * 3 // 4 and power > SMALLEST else power


@functools.partial(jax.jit, static_argnums=0)
def _score(functions: Any, top: Any, state: Any, rows: jax.Array, places: jax.Array,
           targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probability `[n]` float32 of each target at its row and place, and whether it is the likeliest token."""
  pick = lambda stream: stream[rows, places][None]
  picked = state | {"decoder": pick(state["decoder"])} if isinstance(state, dict) else pick(state)
  logits = functions.head(top, picked)[0]
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


@functools.partial(jax.jit, static_argnums=0)
def _head(functions: Any, top: Any, state: Any) -> jax.Array:
  return functions.head(top, state)


def last_state(functions: Any, top: Any, blocks: Sequence[Any], batch: Any) -> Any:
  """The state after the last block."""
  state = steps.embed(functions, top, batch)
  for block in blocks:
    state, _ = steps.block(functions, block, state)
  return state


def logits(functions: Any, top: Any, blocks: Sequence[Any], batch: Any) -> jax.Array:
  """The logits of all places of a batch, `[B, S, V]` float32."""
  return _head(functions, top, last_state(functions, top, blocks, batch))


def _batches(rows: Sequence[Row]) -> Iterator[tuple[list[int], tuple[int, ...], int]]:
  """Indices of the rows of each batch, the size class of each of their sequences, and the rows that the batch has."""
  classes: dict[tuple[int, ...], list[int]] = {}
  for index, row in enumerate(rows):
    classes.setdefault(tuple(size_class(len(sequence)) for sequence in row), []).append(index)
  for sizes in sorted(classes, key=sum, reverse=True):  # the largest first: what does not fit fails at once
    most = 1 << max(BATCH_TOKENS // sum(sizes), 1).bit_length() - 1
    members = sorted(classes[sizes], key=lambda index: rows[index])
    for start in range(0, len(members), most):
      chosen = members[start : start + most]
      yield chosen, sizes, min(most, 1 << (len(chosen) - 1).bit_length())


def _filled(rows: Sequence[Row], sizes: tuple[int, ...], count: int, fill: Sequence[int]) -> list[np.ndarray]:
  """One array `[count, size]` for each sequence of the rows; the first row stands again where there are too few."""
  arrays = [np.full((count, size), value, np.int32) for size, value in zip(sizes, fill, strict=True)]
  for place in range(count):
    for array, sequence in zip(arrays, rows[place if place < len(rows) else 0], strict=True):
      array[place, : len(sequence)] = sequence
  return arrays


def loglikelihoods(functions: Any, top: Any, blocks: Sequence[Any], requests: Sequence[Request], *,
                   fill: Sequence[int], batch: Callable[[list[np.ndarray]], Any],
                   advance: Callable[..., None] = lambda **_: None) -> list[tuple[float, bool]]:
  """Scores requests.

  Args:
    functions, top, blocks: the model.
    requests: of any lengths, in any order.
    fill: the token that fills up each sequence of a row, on the right.
    batch: makes a batch of the model from the filled-up arrays `[B, S]` int32, one for each sequence of a row.
    advance: called as `advance(steps=n)` after `n` rows.

  Returns:
    For each request the sum of the targets' log-probabilities in nats, and whether each target was the likeliest.
  """
  rows = list(dict.fromkeys(request.row for request in requests))
  asked: dict[Row, list[int]] = {row: [] for row in rows}
  for index, request in enumerate(requests):
    asked[request.row].append(index)
  found = [(0.0, True)] * len(requests)
  for members, sizes, count in _batches(rows):
    chosen = [rows[member] for member in members]
    state = last_state(functions, top, blocks, batch(_filled(chosen, sizes, count, fill)))
    wanted = [(place, index) for place, row in enumerate(chosen) for index in asked[row]]
    nats, greedy = _score_all(functions, top, state, [(place, requests[index]) for place, index in wanted])
    for (_, index), total, best in zip(wanted, nats, greedy, strict=True):
      found[index] = (total, best)
    advance(steps=len(members))
  return found


def _score_all(functions: Any, top: Any, state: Any,
               wanted: Sequence[tuple[int, Request]]) -> tuple[list[float], list[bool]]:
  """Sums of log-probabilities, and whether all targets were the likeliest, of requests with their row in the batch."""
  items = np.array([(place, request.first + i, target) for place, request in wanted
                    for i, target in enumerate(request.targets)], np.int32).reshape(-1, 3)
  count = min(HEAD_TOKENS, size_class(len(items)))
  parts = []
  for start in range(0, max(len(items), 1), count):
    part = np.zeros((count, 3), np.int32)
    part[: len(items) - start] = items[start : start + count]
    parts.append([np.asarray(values) for values in _score(functions, top, state, *map(jnp.asarray, part.T))])
  nats, greedy = (np.concatenate(values)[: len(items)] for values in zip(*parts))
  ends = np.cumsum([len(request.targets) for _, request in wanted])[:-1]
  return ([float(part.sum(dtype=np.float64)) for part in np.split(nats, ends)],
          [bool(part.all()) for part in np.split(greedy, ends)])
