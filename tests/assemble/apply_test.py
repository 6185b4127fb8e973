"""A model that runs from packed buffers is the model of the dequantized weights."""

import dataclasses

import jax
import numpy as np
import pytest

from moeq_jax import artifacts, qtensor
from moeq_jax.assemble import apply
from tests import tiny


@pytest.mark.parametrize("spec", ["rtn(group=32)", "gptq(group=32)"])
def test_packed_buffers_give_the_logits_of_dense_weights(spec: str):
  dense = [{name: w.astype(np.float32) for name, w in tiny.decoded(codes, bits).items()}
           for codes, bits in zip(tiny.encoded(spec)[0], tiny.PLAN, strict=True)]
  expected, ours = tiny.logits(dense), tiny.logits(tiny.packed(spec=spec))
  assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)
  full = tiny.logits([tiny.functions().experts(block) for block in tiny.model().blocks])
  assert np.linalg.norm(ours - full) > 0.05 * np.linalg.norm(full)


def test_the_bits_and_weights_are_those_of_the_plan():
  for layer, codes, bits in zip(tiny.packed(), tiny.encoded()[0], tiny.PLAN, strict=True):
    restored = tiny.decoded(codes, bits)
    assert list(layer) == list(artifacts.PROJECTIONS)
    for name, q in layer.items():
      np.testing.assert_array_equal(q.bits[:, 0, 0], bits)
      np.testing.assert_allclose(qtensor.dequantize(q), restored[name], rtol=1e-6, atol=1e-7)
    assert qtensor.nominal_bits(*layer.values()) == pytest.approx(bits.mean())


def test_sized_buffers_change_shapes_and_nothing_else():
  exact, sized = tiny.packed(), tiny.packed(sized=True)
  np.testing.assert_array_equal(tiny.logits(sized), tiny.logits(exact))
  other = tiny.packed(np.full_like(tiny.PLAN, 2), sized=True)
  shapes = lambda layers: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), layers)
  assert shapes(sized) == shapes(other) and jax.tree.structure(sized) == jax.tree.structure(other)
  assert shapes(exact) != shapes(tiny.packed(np.full_like(tiny.PLAN, 2)))
  for a, b in zip(exact, sized, strict=True):
    assert qtensor.stored_bytes(*a.values()) == qtensor.stored_bytes(*b.values())
    assert qtensor.effective_bits(*a.values()) == qtensor.effective_bits(*b.values())


def test_a_width_that_was_not_encoded_is_named():
  with pytest.raises(ValueError, match=r"expert 2.*wants 8 bits.*\(1, 2, 3, 4\)"):
    apply.pack_layer(tiny.encoded()[0][0], np.array([1, 2, 8, 4, 1, 2]), widths=tiny.WIDTHS, group=32)


def test_widths_in_any_order():
  codes = tiny.encoded()[0][0]
  turned = dataclasses.replace(codes, codes={name: artifacts.Codes(*(field[::-1] for field in bank))
                                             for name, bank in codes.codes.items()})
  layer = apply.pack_layer(turned, tiny.PLAN[0], widths=tiny.WIDTHS[::-1], group=32)
  for name, q in tiny.packed()[0].items():
    np.testing.assert_array_equal(layer[name].buffer, q.buffer)


def test_the_original_blocks_stay_as_they_are():
  before = np.array(tiny.functions().experts(tiny.model().blocks[0])["gate"])
  apply.quantized_blocks(tiny.functions(), tiny.model().blocks, tiny.packed())
  np.testing.assert_array_equal(tiny.functions().experts(tiny.model().blocks[0])["gate"], before)


def test_every_layer_needs_its_codes():
  with pytest.raises(ValueError, match="shorter|longer"):
    apply.quantized_blocks(tiny.functions(), tiny.model().blocks, tiny.packed()[:1])
