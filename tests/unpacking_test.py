"""Reading packed bytes: any blocks of any widths, anywhere in the buffer, by one program, to the last bit."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import qtensor, unpacking
from tests import conformance

LAYOUTS = {  # (shape, group, K-blocks, stripes), columns of a tile
  "whole": (((2, 192, 96), 64, 1, 1), 32),
  "stripes of 16": (((2, 192, 96), 32, 1, 6), 48),
  "K-blocks of 32": (((2, 128, 48), 32, 4, 1), 48),
  "both, neither whole": (((2, 500, 99), 32, 4, 3), 99),
  "K-blocks of 16, one group": (((2, 64, 64), 0, 4, 2), 64),
}


def moved(q: qtensor.QTensor, order: np.ndarray) -> qtensor.QTensor:
  """The same weights with the blocks of the buffer in another order, and bytes of no block between them."""
  buffer = np.full((1, q.bits.size * (2 * q.k_block + 1), q.buffer.shape[2]), 0xA5, np.uint8)
  offset, first = np.zeros_like(q.offset), 0
  for block in order:
    place = np.unravel_index(block, q.bits.shape)
    rows = q.k_block * int(q.bits[place]) // 8
    buffer[0, first : first + rows] = q.buffer[0, q.offset[place] :][:rows]
    offset[place], first = first, first + rows + 1
  return dataclasses.replace(q, buffer=buffer, offset=offset)


@functools.cache
def tiles(width: int, dtype: Any, codes: bool) -> Any:
  read = unpacking.codes if codes else unpacking.columns
  return jax.jit(lambda q, index, column: read(q, index, column, width, jnp.dtype(dtype)))


@pytest.mark.parametrize("name", LAYOUTS)
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_any_arrangement_is_read_by_one_program(name: str, data: st.DataObject):
  (shape, group, k_blocks, stripes), width = LAYOUTS[name]
  count = shape[0] * k_blocks * stripes
  bits = data.draw(st.lists(st.sampled_from(qtensor.WIDTHS), min_size=count, max_size=count))
  order = data.draw(st.permutations(range(count)))
  made = conformance.packed(np.reshape(bits, (shape[0], k_blocks, stripes)), shape, group, len(set(bits)))
  q = moved(made.q, np.array(order))
  q.validate()
  padded = q.blocks[2] * q.buffer.shape[2]
  for index in range(shape[0]):
    found, exact = [], []
    for column in range(0, padded, width):
      found.append(tiles(width, np.float32, False)(q, index, column))
      codes, scale, zero = (np.asarray(a, np.float64)
                            for a in tiles(width, ml_dtypes.bfloat16, True)(q, index, column))
      entries = len(codes) // len(scale)
      exact.append((codes - zero.repeat(entries, 0)) * scale.repeat(entries, 0))
    wanted = made.values[index]
    np.testing.assert_array_equal(np.concatenate(found, 1)[:, : shape[2]], wanted.astype(np.float32))
    np.testing.assert_allclose(np.concatenate(exact, 1)[: shape[1], : shape[2]], wanted, rtol=1e-6, atol=1e-6)
  for codes, dtype in ((False, np.float32), (True, ml_dtypes.bfloat16)):
    assert tiles(width, dtype, codes)._cache_size() <= len(LAYOUTS)


def test_bfloat16_weights_are_rounded_once_from_float32():
  made = conformance.packed(np.array([[[2, 3], [8, 16]]]), (1, 128, 64), 32)
  codes = made.codes[0].astype(np.float32)
  scale, zero = (np.asarray(a, np.float32)[0].repeat(32, 0) for a in (made.q.scale, made.q.zero))
  wanted = np.where(conformance.widths(made.q.bits, (1, 128, 64), 32)[0] == 16, made.values[0], (codes - zero) * scale)
  found = tiles(64, ml_dtypes.bfloat16, False)(made.q, 0, 0)
  np.testing.assert_array_equal(found, wanted.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_codes_in_8_bits_leave_16_bit_blocks_out():
  bits = np.array([[[16, 3], [8, 16]]])
  made = conformance.packed(bits, (1, 128, 64), 32)
  wide = conformance.widths(bits, (1, 128, 64), 32)[0] == 16
  codes, scale, zero = (np.asarray(a, np.float64) for a in tiles(64, np.int8, True)(made.q, 0, 0))
  assert not codes[wide].any()
  found = (codes - zero.repeat(32, 0)) * scale.repeat(32, 0)
  np.testing.assert_allclose(found, np.where(wide, 0, made.values[0]), rtol=1e-6, atol=1e-6)
