"""Bases, quantizers, the split of the error, and plans of two widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_jax.theory import plans, quantization, two_layer

SETTING = two_layer.Setting.parse("B(alpha=0.2, dim=64, tokens=6, neurons=8, init=0.02)")


@pytest.fixture(scope="module")
def params() -> two_layer.Params:
  started = two_layer.start(jax.random.key(0), SETTING)
  spread = jnp.linspace(0.5, 4, SETTING.experts)[:, None, None]  # experts of different ranges
  return two_layer.Params(started.experts * spread, started.router)


def test_bases_are_orthonormal_and_differ():
  first, second, other = (quantization.basis(seed, 48, draw) for seed, draw in ((0, 0), (0, 1), (1, 0)))
  for turn in (first, second, other):
    np.testing.assert_allclose(turn.T @ turn, np.eye(48), atol=2e-6)
  assert abs(first - second).max() > 0.1
  assert abs(first - other).max() > 0.1
  np.testing.assert_array_equal(first, quantization.basis(0, 48, 0))


@pytest.mark.parametrize("name", quantization.QUANTIZERS)
@given(seed=st.integers(0, 1000), levels=st.sampled_from(quantization.LEVELS))
@settings(max_examples=25, deadline=None)
def test_no_weight_moves_by_more_than_half_a_step(name: str, seed: int, levels: int):
  dense = np.random.default_rng(seed).standard_normal((3, 20, 2)).astype(np.float32) * [[[1.0]], [[9.0]], [[0.1]]]
  low, high = (np.asarray(a) for a in quantization.QUANTIZERS[name](jnp.asarray(dense)))
  rounded = np.asarray(quantization.round_to_grid(jnp.asarray(dense), low, high, levels))
  step = np.broadcast_to((high - low) / (levels - 1), dense.shape)
  assert (abs(rounded - dense) <= step * 0.5001 + 1e-6).all()
  places = (rounded - low) / step
  np.testing.assert_allclose(places, np.round(places), atol=1e-3)
  assert len(np.unique(np.round(places))) <= levels


def test_the_common_step_is_common_and_a_row_has_its_own():
  dense = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20, 2))) * jnp.array([[[1.0]], [[9.0]], [[0.1]]])
  low, high = quantization.common_range(dense)
  assert low.size == high.size == 1
  assert (low.item(), high.item()) == (dense.min().item(), dense.max().item())
  low, high = quantization.row_range(dense)
  assert low.shape == (3, 1, 2)
  np.testing.assert_array_equal(high[:, 0], np.asarray(dense).max(1))


def test_rounding_happens_in_the_dense_basis(params: two_layer.Params):
  turn = quantization.basis(3, 64)
  found = np.asarray(quantization.quantized(params.experts, turn, jnp.asarray([4, 1 << 20]), "row"))
  dense = np.einsum("dt,etf->edf", turn, np.asarray(params.experts))
  low, high = dense.min(1, keepdims=True), dense.max(1, keepdims=True)
  plain = low + (high - low) / 3 * np.round((dense - low) / (high - low) * 3)
  np.testing.assert_allclose(found[0], np.einsum("dt,edf->etf", turn, plain), atol=1e-5)
  np.testing.assert_allclose(found[1], params.experts, atol=1e-5)


def test_parts_add_up_to_the_output_of_the_quantized_model(params: two_layer.Params):
  test = two_layer.sample(jax.random.key(5), SETTING, 200)
  rounded = quantization.quantized(params.experts, quantization.basis(0, 64), jnp.asarray([2, 8]), "common")
  parts = quantization.parts(params, SETTING, test.tokens, rounded)
  assert parts.own.shape == parts.other.shape == (3, 8, 200)
  for width, experts in enumerate([*rounded, params.experts]):
    whole = two_layer.outputs(two_layer.Params(experts, params.router), SETTING, test.tokens)
    np.testing.assert_allclose((parts.own + parts.other)[width].sum(0), whole, atol=1e-5)
  without = ~(np.asarray(test.tokens)[None] == SETTING.own_feature()[:, None, None]).any(-1)
  assert (parts.own[:, without] == 0).all()  # nothing of its own in inputs without its token
  assert (parts.own[:, :4][:, ~without[:4]] > 0).any()


def test_only_the_named_part_of_the_error_counts():
  own, other = np.arange(6.0).reshape(3, 1, 2), 10 * np.arange(6.0).reshape(3, 1, 2)
  parts = quantization.Parts(own, other)
  np.testing.assert_array_equal(plans.select(parts, "all"), own + other)
  np.testing.assert_array_equal(plans.select(parts, "own"), own + other[-1])
  np.testing.assert_array_equal(plans.select(parts, "cross"), own[-1] + other)
  for source in plans.SOURCES:
    np.testing.assert_array_equal(plans.select(parts, source)[-1], (own + other)[-1])


def test_errors_of_every_pair_against_a_loop():
  rng = np.random.default_rng(0)
  outputs, labels = rng.standard_normal((4, 5, 30)), rng.choice([-1, 1], 30)
  high, low = np.array([1, 0, 0, 1, 0], bool), np.array([0, 1, 0, 0, 1], bool)
  found = plans.errors(outputs, labels, high, low)
  for l in range(3):
    for h in range(3):
      widths = np.where(high, h, np.where(low, l, 3))
      total = sum(outputs[w, e] for e, w in enumerate(widths))
      assert found[l, h] == (labels * total <= 0).sum()


def test_the_rule_and_its_reverse_take_opposite_halves():
  change = np.array([0.5, 0.1, 0.4, 0.2, -1.0])
  ranked = np.array([1, 1, 1, 1, 0], bool)
  np.testing.assert_array_equal(plans.high_experts(change, ranked, "small"), [0, 1, 0, 1, 0])
  np.testing.assert_array_equal(plans.high_experts(change, ranked, "large"), [1, 0, 1, 0, 0])
  np.testing.assert_array_equal(plans.high_experts(change, ~ranked | ranked, "small"), [0, 1, 0, 0, 1])


def test_savings_are_read_off_a_grid():
  width = len(quantization.BITS)
  low, high = np.meshgrid(quantization.BITS, quantization.BITS, indexing="ij")
  saved = plans.savings(((high < 4) | (low < 2)).astype(int))  # free from b_h = 4 and b_l = 2 on
  assert (saved.uniform, saved.saved, saved.average) == (4.0, 2.0, 3.0)
  late = np.zeros((width, width), int)
  late[6, 6] = 1  # pairs below an error are not free, however lucky
  start = quantization.BITS[7]
  assert plans.savings(late) == plans.Savings(start, start - 1, (start + 1) / 2)
  late[12, 3] = 1  # b_l above b_h: not a plan
  assert plans.savings(late).saved == start - 1
  assert plans.savings(np.ones((width, width), int)) == plans.Savings(None, None, None)


def test_bits_that_one_kind_of_expert_needs():
  width = len(quantization.BITS)
  outputs = np.ones((width + 1, 2, 3))
  outputs[:4, 0] = -5  # expert 0 spoils everything below width number 4
  labels = np.ones(3)
  assert plans.needed(outputs, labels, np.array([True, False])) == quantization.BITS[4]
  assert plans.needed(outputs, labels, np.array([False, True])) == 1.0
  outputs[:-1, 0] = -5
  assert plans.needed(outputs, labels, np.array([True, False])) is None
