"""Experts packed one by one are the bytes of experts packed together."""

import hypothesis
import numpy as np
from hypothesis import strategies

from moeq_jax import codecs, qtensor
from moeq_jax.quantize import packing
from tests import tiny


@hypothesis.given(strategies.lists(strategies.sampled_from(tiny.WIDTHS), min_size=6, max_size=6))
def test_joined_experts_are_the_bytes_of_all_packed_at_once(bits: list[int]):
  layers, errors = tiny.encoded()
  parts, expected = [], {}
  for name, bank in layers[0].codes.items():
    chosen = bank.choose(np.array([tiny.WIDTHS.index(width) for width in bits]))
    expected[name] = qtensor.pack(chosen.codes, np.array(bits), chosen.scale, chosen.zero, group=errors.group)
  for expert, width in enumerate(bits):
    own = {name: codecs.Encoded(*(field[tiny.WIDTHS.index(width), expert] for field in bank))
           for name, bank in layers[0].codes.items()}
    parts.append(packing.pack_expert(own, dict.fromkeys(own, width), errors.group))
  joined = packing.join_layer(parts)
  assert list(joined) == list(expected)
  for name, q in joined.items():
    q.validate(name)
    for field in ("buffer", "bits", "offset", "scale", "zero"):
      ours, theirs = getattr(q, field), getattr(expected[name], field)
      assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), (name, field)
  wide = packing.widened(joined, {name: q.buffer.shape[1] + 8 for name, q in joined.items()})
  assert all(np.array_equal(qtensor.unpack(wide[name]), qtensor.unpack(q)) for name, q in joined.items())
  assert qtensor.stored_bytes(*wide.values()) == qtensor.stored_bytes(*joined.values())
