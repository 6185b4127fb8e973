"""`bench blocks`: both sides have equal bytes, ratios are those of pairs, and what it is not made for is refused."""

import ast
import json

import numpy as np
import pytest

from moeq_jax import qtensor
from moeq_jax.bench import blocks
from moeq_jax.kernels import shapes
from tests import conformance

SMALL = shapes.Layer(experts=4, top_k=2, hidden=64, ffn=256)


def test_a_small_table(monkeypatch, capsys):
  monkeypatch.setattr(blocks, "LAYERS", {"small": SMALL, "other": SMALL})
  monkeypatch.setattr(blocks, "ROWS", (40,))
  monkeypatch.setattr(blocks, "LEAST_SECONDS", 0.0)
  found = blocks.run(rounds=3, shape="small", blocks=64, order="sorted")
  assert [row["part"] for row in found["results"]] == ["up", "down", "ffn"]
  for row in found["results"]:
    assert row["bytes"][0] == row["bytes"][1] == 4 * 64 * 256 * 2.5 / 8 * (3 if row["part"] == "ffn" else 1)
    assert row["pairs"] == 3
    assert row["ratio"] > 0
  assert json.loads(json.dumps(found))["benchmark"] == "blocks"
  assert "small" in capsys.readouterr().out


@pytest.mark.parametrize("order", blocks.ORDERS)
def test_every_expert_has_blocks_of_every_width(order: str):
  of_blocks, of_experts = (blocks._weights(SMALL, 64, of) for of in (order, "experts"))
  for name, blocked in of_blocks.items():
    assert blocked.blocks == (4, 4, 1) if name == "down" else (4, 1, 4)
    bits = np.asarray(blocked.bits).reshape(4, 4)
    assert (np.sort(bits, axis=1) == [1, 2, 3, 4]).all()
    assert (order == "sorted") == (np.diff(bits, axis=1) < 0).all()
    assert of_experts[name].blocks == (4, 1, 1)
    assert qtensor.nominal_bits(blocked) == qtensor.nominal_bits(of_experts[name]) == 2.5


def test_block_sizes_are_those_of_the_command_line(monkeypatch):
  monkeypatch.setattr(blocks, "LAYERS", {"small": SMALL})
  monkeypatch.setattr(blocks, "ROWS", (40,))
  monkeypatch.setattr(blocks, "LEAST_SECONDS", 0.0)
  found = blocks.run(rounds=1, blocks=ast.literal_eval("64,32"))  # as options are read
  assert [row["block"] for row in found["results"]] == [64] * 3 + [32] * 3


def test_rows_in_8_bits_are_for_few():
  assert [case[1:] for case in blocks._cases(SMALL)][:4] == [(2, "exact"), (2, "int8"), (16, "exact"), (16, "int8")]
  assert [case[1:] for case in blocks._cases(SMALL)][4:6] == [(128, "exact"), (512, "exact")]


def test_a_call_is_the_product_of_its_part():
  weights = blocks._weights(SMALL, 64, "shuffled")
  call = blocks._call(SMALL, weights, "down", 6, "exact")
  wanted = conformance.expected(np.asarray(call.args[0]), np.asarray(qtensor.dequantize(weights["down"])),
                                shapes.group_sizes("uniform", 6, 4))
  assert conformance.difference(call(), wanted) < 1e-2


def test_the_ratio_is_that_of_pairs():
  found = blocks._times([lambda: sum(range(20_000)), lambda: sum(range(100_000))], 5)
  assert 2.5 < found["ratio"] < 10
  assert found["milliseconds"]["blocks"] > found["milliseconds"]["experts"]


@pytest.mark.parametrize("options", [{"shape": "mixtral"}, {"blocks": "24"}, {"blocks": "64,24"}, {"order": "best"}])
def test_unknown_names_are_refused(options: dict[str, str]):
  with pytest.raises(ValueError, match=next(iter(options.values()))):
    blocks.run(**options)
