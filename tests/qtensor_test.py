"""QTensor: packing is lossless, values are those of the formula, and every bit and byte is accounted for."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import qtensor
from tests import conformance
from tests.conformance import packed


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int], int]:
  """Widths per block, a shape with odd sizes, and a group."""
  k_blocks, stripes = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
  K = draw(st.integers(1, 300)) if k_blocks == 1 else draw(st.integers(257, 400))
  shape = draw(st.integers(1, 4)), K, draw(st.integers(1, 3) if stripes == 1 else st.sampled_from([5, 6, 9]))
  count = shape[0] * k_blocks * stripes
  bits = draw(st.lists(st.sampled_from(qtensor.WIDTHS), min_size=count, max_size=count))
  return np.reshape(bits, (shape[0], k_blocks, stripes)), shape, draw(st.sampled_from([0, 32, 64, 128]))


@hypothesis.given(problems(), st.integers(0, 2**32), st.integers(0, 500))
def test_unpacking_gives_back_the_codes(problem, seed: int, spare: int):
  bits, shape, group = problem
  made = packed(bits, shape, group, seed, capacity=qtensor.packed_rows(bits, shape, group) + spare)
  made.q.validate()
  np.testing.assert_array_equal(qtensor.unpack(made.q), made.codes)
  assert qtensor.used_rows(made.q) == made.q.buffer.shape[1] - spare


@hypothesis.settings(max_examples=6)
@hypothesis.given(problems(), st.integers(0, 2**32))
def test_dequantizing_equals_the_formula(problem, seed: int):
  made = packed(*problem, seed)
  assert conformance.difference(qtensor.dequantize(made.q), made.values) < 1e-6


@pytest.mark.parametrize("bits", qtensor.WIDTHS)
def test_every_width_in_every_group(bits: int):
  for shape, group in (((2, 256, 33), 64), ((2, 1408, 3), 128), ((3, 77, 5), 32), ((1, 1000, 4), 0)):
    made = packed(bits, shape, group)
    np.testing.assert_array_equal(qtensor.unpack(made.q), made.codes)
    assert np.any(made.codes == 2**bits - 1) or bits == 16


def test_dequantizing_under_jit_compiles_once_for_all_widths():
  shape = (3, 128, 20)
  run = jax.jit(qtensor.dequantize)
  for bits in (1, (2, 3, 4), (8, 16, 1)):
    made = packed(bits, shape, capacity=qtensor.packed_rows(16, shape, 64))
    assert conformance.difference(run(made.q), made.values) < 1e-6
  assert run._cache_size() == 1


def test_sixteen_bits_are_the_weights_themselves():
  made = packed(16, (2, 100, 7))
  np.testing.assert_array_equal(np.asarray(qtensor.dequantize(made.q, jnp.bfloat16), np.float64), made.values)


def test_dequantized_type_is_rounded_once():
  made = packed(8, (2, 128, 9))
  rounded = np.asarray(qtensor.dequantize(made.q)).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(qtensor.dequantize(made.q, jnp.bfloat16), rounded)


def test_mixed_widths_waste_no_row():
  made = packed((1, 2, 3, 4, 8, 16), (6, 256, 9))
  assert made.q.buffer.shape == (1, 256 * 34 // 8, 9)
  np.testing.assert_array_equal(made.q.offset.ravel(), np.cumsum([0, 32, 64, 96, 128, 256]))


def test_it_is_a_pytree_that_may_be_abstract():
  q = packed((2, 3), (2, 128, 9)).q
  abstract = jax.eval_shape(lambda q: q, q)
  assert abstract.shape == q.shape == (2, 128, 9)
  assert len(jax.tree.leaves(q)) == 5
  out = jax.eval_shape(qtensor.dequantize, abstract)
  assert (out.shape, out.dtype) == ((2, 128, 9), jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Bits and bytes
# ---------------------------------------------------------------------------------------------------------------------


def test_bits_and_bytes_of_a_plain_case():
  q = packed((2, 2, 4, 8), (4, 256, 64), group=64).q
  assert qtensor.nominal_bits(q) == 4
  assert qtensor.effective_bits(q) == 4 + 32 / 64
  codes, scales, index = 4 * 256 * 64 * 4 // 8, 2 * 2 * 4 * 4 * 64, 2 * 4 * 4
  assert qtensor.stored_bytes(q) == codes + scales + index


@hypothesis.given(problems())
def test_counts_equal_counts_of_single_weights(problem):
  bits, shape, group = problem
  q = packed(bits, shape, group).q
  width = conformance.widths(bits, shape, group)
  per_weight = width + np.where(width < 16, 32 * math.ceil(shape[1] / q.group) / shape[1], 0)
  assert math.isclose(qtensor.nominal_bits(q), width.mean())
  assert math.isclose(qtensor.effective_bits(q), per_weight.mean())


def test_padding_is_stored_but_not_effective_and_capacity_is_neither():
  shape = (2, 100, 9)
  tight, loose = packed(2, shape, 0).q, packed(2, shape, 0, capacity=1000).q
  assert qtensor.nominal_bits(tight) == 2
  assert qtensor.stored_bytes(tight) == 2 * 128 * 9 * 2 // 8 + 2 * 2 * 2 * 9 + 2 * 2 * 4
  for count in (qtensor.nominal_bits, qtensor.effective_bits, qtensor.stored_bytes):
    assert count(tight) == count(loose)


def test_counts_of_several_tensors_are_weighted_by_size():
  small, large = packed(8, (1, 128, 10)).q, packed(2, (3, 256, 20)).q
  weights = 128 * 10, 3 * 256 * 20
  assert math.isclose(qtensor.nominal_bits(small, large), (8 * weights[0] + 2 * weights[1]) / sum(weights))
  assert math.isclose(qtensor.effective_bits(small, large), qtensor.nominal_bits(small, large) + 0.5)
  assert qtensor.stored_bytes(small, large) == qtensor.stored_bytes(small) + qtensor.stored_bytes(large)


def test_stored_bits_of_a_real_plan_are_near_the_effective_bits():
  q = packed(np.resize((2, 3), 16), (16, 256, 256)).q
  assert qtensor.nominal_bits(q) == 2.5
  assert abs(qtensor.stored_bytes(q) * 8 / math.prod(q.shape) / qtensor.effective_bits(q) - 1) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

ONES = np.ones((2, 2, 9), ml_dtypes.bfloat16)
CODES = np.zeros((2, 128, 9), np.uint8)


@pytest.mark.parametrize(("arguments", "keywords", "said"), [
  ((CODES, 5, ONES, ONES), {}, r"widths \[5\]: choose from"),
  ((CODES, (2, 2, 2), ONES, ONES), {}, "with E = 2"),
  ((CODES, 2, ONES[:, :1], ONES), {}, r"scale has shape \(2, 1, 9\), expected \(2, 2, 9\)"),
  ((CODES, 2, ONES, ONES[:1]), {}, "zero has shape"),
  ((CODES, 2, ONES * np.float32(1.001), ONES), {}, "scale is not rounded to bfloat16"),
  ((CODES, 2, ONES * np.float32(np.nan), ONES), {}, "scale has values that are not finite"),
  ((CODES, 2, ONES, ONES * np.float32(np.inf)), {}, "zero has values that are not finite"),
  ((CODES + np.uint8(3), (2, 1), ONES, ONES), {}, "expert 1, K-block 0, stripe 0: code 3 does not fit 1 bits"),
  ((CODES, 16, ONES, ONES), {}, "pass `weights`"),
  ((CODES, 2, ONES, ONES), {"capacity": 63}, "capacity 63: the blocks need 64 rows"),
  ((CODES, 2, ONES, ONES), {"group": 50}, "group 50"),
  ((CODES.astype(np.int32), 2, ONES, ONES), {}, "expected uint8"),
])
def test_packing_refuses_what_does_not_fit(arguments, keywords, said):
  with pytest.raises(ValueError, match=said):
    qtensor.pack(*arguments, **{"group": 64, **keywords})


@pytest.mark.parametrize(("changes", "said"), [
  ({"bits": np.full((3, 1, 1), 5, np.int32)}, r"gate: widths \[5\]"),
  ({"offset": np.zeros((3, 1, 1), np.int32)}, "gate: blocks overlap"),
  ({"bits": np.full((3, 1, 1), 16, np.int32)}, "gate: blocks overlap or lie outside"),
  ({"offset": np.array([-1, 40, 80], np.int32).reshape(3, 1, 1)}, "lie outside"),
  ({"scale": np.ones((3, 2, 9), np.float32)}, "gate: scale is float32"),
  ({"zero": np.ones((3, 1, 9), ml_dtypes.bfloat16)}, r"gate: zero has shape \(3, 1, 9\), expected \(3, 2, 9\)"),
  ({"buffer": np.zeros((1, 96, 9), np.int8)}, "gate: buffer is int8"),
  ({"buffer": np.zeros((2, 96, 9), np.uint8)}, "gate: 2 shards of None"),
  ({"N": 10}, "expected"),
  ({"K": 300, "group": 300}, "expected"),
  ({"k_tile": 96}, "cuts a tile"),
  ({"k_block": 64}, "do not cover|cuts a tile"),
])
def test_validate_names_a_broken_invariant(changes, said):
  q = packed(2, (3, 128, 9)).q
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(q, **changes).validate("gate")


def test_rounded_buffers_have_few_lengths_and_the_same_weights():
  made = conformance.packed((1, 4, 4), (3, 192, 16))
  longer = qtensor.rounded(made.q)
  assert longer.buffer.shape[1] > made.q.buffer.shape[1]
  longer.validate()
  np.testing.assert_array_equal(qtensor.unpack(longer), made.codes)
  assert qtensor.used_rows(longer) == qtensor.used_rows(made.q)
  sizes = np.arange(1, 4096)
  hollow = [dataclasses.replace(made.q, buffer=np.zeros((1, size, 1), np.uint8)) for size in sizes]
  lengths = np.array([qtensor.rounded(q).buffer.shape[1] for q in hollow])
  assert (lengths >= sizes).all() and (8 * lengths <= 9 * sizes).all()
  assert len(np.unique(lengths[1023:2047])) == 9
