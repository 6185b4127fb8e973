"""Chunks hold every row once, and come in few sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.kernels import chunks


@given(st.integers(0, 5000))
def test_every_row_is_in_one_chunk(count: int):
  cut = list(chunks.chunks(count))
  rows = [row for place, _ in cut for row in range(place.start, place.stop)]
  assert rows == list(range(count))
  for place, size in cut:
    held = place.stop - place.start
    assert held <= size <= max(2 * held - 1, chunks.SMALLEST)


def test_sizes_are_few():
  assert {size for count in range(1, 4100) for _, size in chunks.chunks(count)} == {128, 256, 512, 1024}


def test_filled_up_with_zeros():
  rows = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
  filled = chunks.fill(rows, 5)
  np.testing.assert_array_equal(filled[:3], rows)
  assert not filled[3:].any() and filled.dtype == rows.dtype
  assert chunks.fill(rows, 3) is rows
