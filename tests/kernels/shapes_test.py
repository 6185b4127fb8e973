"""Named shapes and routings."""

import numpy as np
import pytest

from moeq_jax.kernels import shapes


def test_matmuls_of_a_layer():
  assert shapes.LAYERS["mixtral-8x7b"].matmuls() == {
    "gate": (8, 4096, 14336), "up": (8, 4096, 14336), "down": (8, 14336, 4096)}
  assert shapes.LAYERS["switch-base-64"].matmuls() == {"up": (64, 768, 3072), "down": (64, 3072, 768)}


@pytest.mark.parametrize("name", shapes.LAYERS)
def test_scaling_keeps_the_aspect_ratio(name: str):
  layer = shapes.LAYERS[name]
  small = layer.scaled(1 / 16)
  assert small.hidden * layer.ffn == small.ffn * layer.hidden
  assert small.hidden * 16 == layer.hidden
  assert (small.experts, small.top_k) == (layer.experts, layer.top_k)


def test_scaling_to_a_fraction_of_a_row_is_refused():
  with pytest.raises(ValueError, match="not whole"):
    shapes.LAYERS["smollm2-upcycled"].scaled(1 / 128)


@pytest.mark.parametrize("routing", shapes.ROUTINGS)
def test_every_row_is_routed(routing: str):
  sizes = shapes.group_sizes(routing, 1000, 16)
  assert sizes.sum() == 1000
  assert sizes.dtype == np.int32
  np.testing.assert_array_equal(sizes, shapes.group_sizes(routing, 1000, 16))


def test_routings_differ_in_balance():
  spread = {name: shapes.group_sizes(name, 16000, 16).std() / 1000 for name in shapes.ROUTINGS}
  assert spread["uniform"] < 0.1 < 0.5 < spread["zipf"] < spread["all_to_one"]
  assert (shapes.group_sizes("all_to_one", 10, 16) > 0).sum() == 1
