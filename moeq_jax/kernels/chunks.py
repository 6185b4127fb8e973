"""Rows in chunks of few sizes: an expert sees any number of rows, and every new number would be a new program."""

from collections.abc import Iterator

import numpy as np

LARGEST, SMALLEST = 1024, 128


def chunks(count: int) -> Iterator[tuple[slice, int]]:
  """Cuts `count` rows into chunks of at most `LARGEST`.

  Yields:
    Where the chunk stands among the rows, and its size once it is filled up: a power of two, at least `SMALLEST`.
  """
  for start in range(0, count, LARGEST):
    stop = min(start + LARGEST, count)
    yield slice(start, stop), max(SMALLEST, 1 << (stop - start - 1).bit_length())


def fill(rows: np.ndarray, size: int) -> np.ndarray:
  """`rows`, filled up with zeros to `size`."""
  if len(rows) == size:
    return rows
  filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
  filled[:len(rows)] = rows
  return filled
