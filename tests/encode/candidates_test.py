"""Codes and errors of every expert at every width, against numpy on the decoded weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import artifacts, codecs
from moeq_jax.encode import candidates
from tests import tiny


@pytest.mark.parametrize("spec", ["rtn(group=32)", "gptq(group=32)"])
def test_errors_equal_the_formulas_on_decoded_weights(spec: str):
  layers, table = tiny.encoded(spec)
  stats = candidates.shrink_unrouted(tiny.stats())
  assert table.widths == tiny.WIDTHS and table.group == 32 and table.codec == spec
  for l, codes in enumerate(layers):
    experts = tiny.functions().experts(tiny.model().blocks[l])
    for w, bits in enumerate(tiny.WIDTHS):
      restored = tiny.decoded(codes, bits)
      for p, name in enumerate(artifacts.PROJECTIONS):
        original = np.asarray(experts[name], np.float64)
        delta = restored[name] - original
        moment = np.asarray(stats.moment_mid if name == "down" else stats.moment_in, np.float64)[l]
        inputs, outputs = np.diagonal(moment, axis1=1, axis2=2), np.asarray(getattr(stats, f"grad_sq_{name}"))[l]
        tokens = np.maximum(stats.tokens[l], 1)[:, None, None]
        fisher = 0.5 * delta**2 * inputs[:, :, None] * outputs[:, None, :] / tokens / stats.total_tokens
        expected = {"weight": (delta**2).sum((1, 2)), "fisher": fisher.sum((1, 2)),
                    "output": np.einsum("ekn,ekj,ejn->e", delta, moment, delta)}
        for field, values in expected.items():
          ours = getattr(table, field)[l, :, p, w]
          np.testing.assert_allclose(ours, values, rtol=1e-4, err_msg=f"{field} of {name} at {bits} bits")
        np.testing.assert_allclose(table.norm[l, :, p], (original**2).sum((1, 2)), rtol=1e-5)


def test_codes_fit_their_width_and_errors_fall_with_it():
  layers, table = tiny.encoded()
  for codes in layers:
    for bank in codes.codes.values():
      assert bank.codes.dtype == np.uint8 and bank.scale.dtype == jnp.bfloat16
      assert bank.codes.max(axis=(1, 2, 3)).tolist() == [2**bits - 1 for bits in tiny.WIDTHS]
  for errors in (table.weight, table.output[0]):
    assert (np.diff(errors, axis=-1) < 0).all()


def test_gptq_moves_error_from_outputs_to_weights():
  (_, nearest), (_, corrected) = tiny.encoded("rtn(group=32)"), tiny.encoded("gptq(group=32)")
  assert (corrected.output.sum((0, 1, 2)) < 0.9 * nearest.output.sum((0, 1, 2))).all()
  assert (corrected.weight.sum((0, 1, 2)) > nearest.weight.sum((0, 1, 2))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Experts without tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_unrouted_experts_get_the_mean_of_the_tokens_of_their_layer():
  stats = tiny.stats()
  tokens = stats.tokens.copy()
  moment_in, moment_mid = stats.moment_in.copy(), stats.moment_mid.copy()
  for expert in (0, 3):  # two in one layer: neither may count in the mean of the other
    tokens[0, expert], moment_in[0, expert], moment_mid[0, expert] = 0, 0, 0
  given = dataclasses.replace(stats, tokens=tokens, moment_in=moment_in, moment_mid=moment_mid)
  ready = candidates.shrink_unrouted(given)
  for before, after in ((moment_in, ready.moment_in), (moment_mid, ready.moment_mid)):
    mean = before[0].sum(0) / tokens[0].sum()
    for expert in range(tokens.shape[1]):
      expected = mean if expert in (0, 3) else before[0, expert]
      np.testing.assert_allclose(after[0, expert], expected, rtol=1e-5)
    np.testing.assert_allclose(after[tiny.UNROUTED], before[1].sum(0) / tokens[1].sum(), rtol=1e-5)
  assert not moment_in[0, 0].any() and ready.tokens[0, 0] == 0
  assert not ready.grad_sq_down[tiny.UNROUTED].any()


@pytest.mark.parametrize("spec", ["rtn(group=32)", "gptq(group=32)"])
def test_unrouted_experts_are_encoded_like_any_other(spec: str):
  layers, table = tiny.encoded(spec)
  for field in (table.weight, table.output, table.fisher):
    assert np.isfinite(field).all()
  assert table.weight[tiny.UNROUTED].min() > 0 and not table.fisher[tiny.UNROUTED].any()
  layer, expert = tiny.UNROUTED
  experts = tiny.functions().experts(tiny.model().blocks[layer])
  for bits, most in ((2, 0.25), (4, 0.02)):
    for name, restored in tiny.decoded(layers[layer], bits).items():
      original = np.asarray(experts[name], np.float64)[expert]
      assert np.sum((restored[expert] - original) ** 2) < most * np.sum(original**2), (bits, name)


# ---------------------------------------------------------------------------------------------------------------------
# Failures and cost
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bad"), [("gate", np.nan), ("down", np.inf)])
def test_weights_that_are_not_finite_are_named(name: str, bad: float):
  experts = {k: np.array(v) for k, v in tiny.functions().experts(tiny.model().blocks[1]).items()}
  experts[name][2, 3, 4] = bad
  with pytest.raises(ValueError, match=rf"layer 1, {name}.*\(2, 3, 4\)"):
    candidates.encode_layer(experts, tiny.stats(), 1, codec=codecs.get("rtn(group=32)"), widths=(2,))


def test_one_compilation_for_all_widths_and_layers():
  codec, stats = codecs.get("rtn(group=64)"), candidates.shrink_unrouted(tiny.stats())
  before = candidates._encode._cache_size()
  for layer, block in enumerate(tiny.model().blocks):
    candidates.encode_layer(tiny.functions().experts(block), stats, layer, codec=codec, widths=(1, 2, 3, 4, 8))
  assert candidates._encode._cache_size() == before + 2  # one for the shape of gate and up, one for down
