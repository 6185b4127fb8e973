"""The experiment on down against up: it changes the projection that it says, and measures kurtosis as scipy does."""

import types

import numpy as np
import pytest
import scipy.stats

from experiments import down_vs_up
from moeq_jax import artifacts, codecs
from moeq_jax.encode import candidates
from tests import tiny


@pytest.fixture(scope="module")
def subject() -> types.SimpleNamespace:
  functions, blocks = tiny.functions(), list(tiny.model().blocks)
  return types.SimpleNamespace(functions=functions, blocks=blocks,
                               sparse_blocks=lambda: [block for block in blocks if functions.sparse(block)])


@pytest.fixture(scope="module")
def layers(subject) -> list[artifacts.LayerCodes]:
  stats = candidates.shrink_unrouted(tiny.stats())
  return [candidates.encode_layer(subject.functions.experts(block), stats, layer, codec=codecs.get("rtn(group=32)"),
                                  widths=down_vs_up.WIDTHS) for layer, block in enumerate(subject.sparse_blocks())]


@pytest.mark.parametrize(("arm", "bits"), [
    ("only up at 2 bits", {"gate": 16, "up": 2, "down": 16}),
    ("down at 3 bits, others at 2", {"gate": 2, "up": 2, "down": 3})])
def test_an_arm_changes_what_it_says(subject, layers, arm: str, bits: dict[str, int]):
  assert down_vs_up.ARMS[arm] == bits
  found = down_vs_up._blocks(subject, layers, codecs.get("rtn(group=32)"), bits)
  sparse = [block for block in found if subject.functions.sparse(block)]
  assert len(found) == len(subject.blocks) and sparse
  for layer, (before, after) in enumerate(zip(subject.sparse_blocks(), sparse, strict=True)):
    for name, w in subject.functions.experts(after).items():
      plain = np.asarray(subject.functions.experts(before)[name])
      if bits[name] == 16:
        np.testing.assert_array_equal(w, plain)
      else:
        place = down_vs_up.PROJECTIONS.index(name), down_vs_up.WIDTHS.index(bits[name])
        squared = ((np.asarray(w) - plain) ** 2).sum((1, 2))
        np.testing.assert_allclose(squared, layers[layer].errors["weight"][:, *place], rtol=1e-4)


def test_kurtosis_is_that_of_scipy(subject):
  found = down_vs_up.kurtosis(subject)
  for layer, block in enumerate(subject.sparse_blocks()):
    for name, w in subject.functions.experts(block).items():
      np.testing.assert_allclose(found[name][layer], scipy.stats.kurtosis(w, axis=1, fisher=False), rtol=1e-5)
