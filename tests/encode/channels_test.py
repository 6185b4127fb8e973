"""Errors per channel add up to those per projection, and those of columns are what a column of its own loses."""

import functools

import numpy as np
import pytest

from moeq_jax import channels, codecs
from moeq_jax.encode import candidates
from moeq_jax.encode import channels as encoding
from tests import tiny
from tests.calibrate import channels_test

SHAPES = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}


@functools.cache
def errors(spec: str = "rtn(group=32)", axis: str = "neurons") -> channels.ChannelErrors:
  codec, moments = codecs.get(spec), candidates.shrink_unrouted(tiny.stats())
  layers = [encoding.encode_layer(tiny.functions().experts(block), channels_test.stats(), layer, codec=codec,
                                  widths=tiny.WIDTHS, axis=axis, moments=moments)
            for layer, block in enumerate(tiny.model().blocks)]
  return encoding.error_table(layers, SHAPES, widths=tiny.WIDTHS, codec=codec, axis=axis)


@pytest.mark.parametrize("axis", channels.AXES)
@pytest.mark.parametrize("spec", ["rtn(group=32)", "gptq(group=32)"])
def test_channels_add_up_to_projections(spec: str, axis: str):
  found, whole = errors(spec, axis), tiny.encoded(spec)[1]
  counts = [96, 96, 96 if axis == "neurons" else 64]
  np.testing.assert_array_equal(np.bincount(found.projection), counts)
  np.testing.assert_array_equal(np.bincount(found.projection, weights=found.sizes), whole.sizes)
  starts = np.cumsum([0, *counts[:-1]])
  for kind in ("weight", "fisher"):
    summed = np.add.reduceat(getattr(found, kind).astype(np.float64), starts, axis=2)
    expected = getattr(whole, kind)
    np.testing.assert_allclose(summed, expected, rtol=2e-4, atol=1e-6 * expected.max(), err_msg=kind)


def test_each_channel_is_the_formula():
  found, stats = errors(), channels_test.stats()
  layer, expert, bits = 0, 2, 2
  experts, codec = tiny.functions().experts(tiny.model().blocks[layer]), codecs.get("rtn(group=32)")
  tokens = stats.tokens[layer, expert] * stats.total_tokens
  start = 0
  for name in found.projections:
    w = np.asarray(experts[name][expert], np.float32)
    squared = (np.asarray(codecs.decode(codec.encode(w, bits), 32, len(w)), np.float64) - w) ** 2
    fisher = 0.5 * stats.inputs(name)[layer, expert][:, None] * squared * stats.gradients(name)[layer, expert] / tokens
    axis = 1 if name == "down" else 0
    here = slice(start, start + w.shape[1 - axis])
    np.testing.assert_allclose(found.weight[layer, expert, here, 1], squared.sum(axis), rtol=1e-4)
    np.testing.assert_allclose(found.fisher[layer, expert, here, 1], fisher.sum(axis), rtol=1e-3)
    start = here.stop
  assert start == found.weight.shape[2]


def test_a_column_loses_alone_what_it_loses_in_its_matrix():
  """So that rows of gate and up, and outputs of down, may have widths of their own under every codec."""
  moment = tiny.stats().moment_in[0, 0]
  w = np.asarray(tiny.functions().experts(tiny.model().blocks[0])["up"][0], np.float32)
  for spec in ("rtn(group=32)", "hqq(group=32)", "gptq(group=32)"):
    codec = codecs.get(spec)
    whole = np.asarray(codecs.decode(codec.encode(w, 3, moment), 32, 64))
    alone = np.asarray(codecs.decode(codec.encode(w[:, 5:6], 3, moment), 32, 64))
    np.testing.assert_allclose(alone, whole[:, 5:6], rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_lose_nothing_and_what_is_wrong_is_named():
  experts = {name: np.array(w) for name, w in tiny.functions().experts(tiny.model().blocks[0]).items()}
  encode = functools.partial(encoding.encode_layer, stats=channels_test.stats(), layer=0, widths=(2, 3))
  experts["up"][1, :, 7] = 0
  found = encode(experts, codec=codecs.get("rtn(group=32)"))
  np.testing.assert_array_equal(found["weight"][1, 96 + 7], 0)
  np.testing.assert_array_equal(found["fisher"][1, 96 + 7], 0)
  assert (found["weight"][1, 96 + 8] > 0).all()
  with pytest.raises(ValueError, match="looks at second moments"):
    encode(experts, codec=codecs.get("gptq(group=32)"))
  experts["down"][0, 3, 3] = np.nan
  with pytest.raises(ValueError, match="layer 0, down"):
    encode(experts, codec=codecs.get("rtn(group=32)"))
  with pytest.raises(ValueError, match="unknown axis 'rows'"):
    encode(experts, codec=codecs.get("rtn(group=32)"), axis="rows")
