"""The compressed-tensors format: bytes of its own library, schemes that hold for what they should, and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moeq_jax import qtensor
from moeq_jax.export import compressed_tensors, huggingface, native, shard_writer
from tests.export import huggingface_test, small

GOLDEN = Path(__file__).parents[1] / "golden" / "compressed.safetensors"  # see make_compressed.py
GROUPS = {"whole": 0, "odd": 0, "one": 0, "grouped": 32}


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
  """Codes of packed rows, read bit by bit."""
  flags = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
  return (flags.reshape(len(words), columns, bits) << np.arange(bits)).sum(-1)


def values(directory: Path) -> dict[str, np.ndarray]:
  """Every tensor as the format defines it, by one scheme for each module, found as its readers find it."""
  stored = huggingface_test.tensors(directory)
  groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
  found = {name: array for name, array in stored.items() if not re.search(r"\.weight_(packed|scale|shape)$", name)}
  for name in stored:
    if not name.endswith(".weight_packed"):
      continue
    module = name.removesuffix(".weight_packed")
    schemes = [group["weights"] for group in groups.values() if any(matches(t, module) for t in group["targets"])]
    assert len(schemes) == 1, module
    rows, columns = stored[f"{module}.weight_shape"]
    bits, scale = schemes[0]["num_bits"], stored[f"{module}.weight_scale"].astype(np.float32)
    assert scale.shape == (rows, columns // schemes[0]["group_size"] if schemes[0]["strategy"] == "group" else 1)
    codes = unpacked(stored[name], bits, columns) - 2 ** (bits - 1)
    found[f"{module}.weight"] = codes.astype(np.float32) * scale.repeat(columns // scale.shape[1], axis=1)
  return found


def matches(target: str, module: str) -> bool:
  return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", compressed_tensors.WIDTHS)
@pytest.mark.parametrize("case", list(GROUPS))
def test_the_tensors_are_those_of_the_library(case: str, bits: int):
  golden = load_file(GOLDEN)
  expected = {name.partition(".")[2]: array for name, array in golden.items() if name.startswith(f"{case}_{bits}.")}
  codes, scale = expected.pop("codes"), expected["weight_scale"].astype(ml_dtypes.bfloat16)
  unsigned = (codes.T.astype(int) + 2 ** (bits - 1)).astype(np.uint8)[None]
  zero = np.full((1, *scale.T.shape), 2 ** (bits - 1), ml_dtypes.bfloat16)
  q = qtensor.pack(unsigned, np.array([bits]), scale.T[None], zero, group=GROUPS[case])
  found, scheme = compressed_tensors.compress(
      shard_writer.Expert.of(q, 0), GROUPS[case], expected["weight_scale"].dtype, "module")
  assert scheme == (bits, GROUPS[case] or None) and set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    assert found[name].shape == array.shape


@hypothesis.given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 80), st.integers(0, 99))
def test_packing_is_dense_and_can_be_undone(bits: int, rows: int, columns: int, seed: int):
  codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
  words = compressed_tensors.pack(codes, bits)
  assert words.dtype == np.int32 and words.shape == (rows, -(-columns * bits // 32))
  np.testing.assert_array_equal(unpacked(words, bits, columns), codes)
  spare = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, columns * bits :]
  assert not spare.any()


# ---------------------------------------------------------------------------------------------------------------------
# Directories
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("plan", ["UNIFORM", "LAYERS", "MIXED"])
@pytest.mark.parametrize("width", [None, 8])
def test_it_stands_for_the_same_weights(tmp_path: Path, plan: str, width: int | None, dtype: str):
  model = small.save(tmp_path / "q", getattr(small, plan))
  found = values(compressed_tensors.save(model, tmp_path / "ct", small.names, width=width, dtype=dtype,
                                         shard_bytes=20_000))
  expected = huggingface_test.tensors(huggingface.save(model, tmp_path / "hf", small.names, dtype="float32"))
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, name)


def config_of(directory: Path, plan: Any, **options: Any) -> dict[str, Any]:
  model = small.save(directory / "q", plan)
  made = compressed_tensors.save(model, directory / "ct", small.names, **options)
  return json.loads((made / "config.json").read_text())


def test_one_scheme_for_all_experts_is_one_group(tmp_path: Path):
  config = config_of(tmp_path, small.UNIFORM)
  entry = config.pop("quantization_config")
  assert config == json.loads(small.FILES["config.json"])
  assert entry["quant_method"] == "compressed-tensors" and entry["quantization_status"] == "compressed"
  assert entry["config_groups"] == {"group_0": {
      "targets": [rf"re:model\.layers\.{l}\.block_sparse_moe\.experts\." for l in (1, 2)], "input_activations": None,
      "output_activations": None, "format": "pack-quantized",
      "weights": {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group",
                  "group_size": 32}}}


def test_schemes_by_layer(tmp_path: Path):
  groups = config_of(tmp_path, small.LAYERS)["quantization_config"]["config_groups"]
  assert [(group["weights"]["num_bits"], group["targets"]) for group in groups.values()] == [
      (3, [r"re:model\.layers\.2\.block_sparse_moe\.experts\."]),
      (2, [r"re:model\.layers\.1\.block_sparse_moe\.experts\."])]


def test_schemes_by_expert_and_projection_the_widest_first(tmp_path: Path):
  groups = config_of(tmp_path, small.MIXED)["quantization_config"]["config_groups"]
  block = r"re:model\.layers\.{}\.block_sparse_moe\.experts\.({})\."
  assert [(g["weights"]["num_bits"], g["targets"]) for g in groups.values()] == [
      (8, [block.format(1, "1"), small.names(2, 2, "down").removesuffix(".weight")]),
      (4, [block.format(2, "1")]),
      (3, [block.format(2, "0")]),
      (2, [block.format(1, "0|2"), *(small.names(2, 2, p).removesuffix(".weight") for p in ("gate", "up"))]),
  ]


def test_a_width_for_all_makes_one_scheme_of_a_mixed_plan(tmp_path: Path):
  groups = config_of(tmp_path, small.MIXED, width=8)["quantization_config"]["config_groups"]
  assert [group["weights"]["num_bits"] for group in groups.values()] == [8]


def test_an_expert_number_that_begins_another_is_not_taken_for_it():
  plan = {e: {p: (f"m.experts.{e}.{p}", compressed_tensors.Scheme(2 if e == 1 else 4, 32)) for p in ("up", "down")}
          for e in range(13)}
  for bits, expected in ((2, {1}), (4, set(range(13)) - {1})):
    found = compressed_tensors.targets({0: plan}, compressed_tensors.Scheme(bits, 32))
    assert {e for e in plan if any(matches(t, f"m.experts.{e}.up") for t in found)} == expected
    assert {e for e in plan if any(matches(t, f"m.experts.{e}.down") for t in found)} == expected


def test_everything_else_with_a_matrix_is_ignored(tmp_path: Path):
  ignore = config_of(tmp_path, small.UNIFORM)["quantization_config"]["ignore"]
  assert ignore == sorted(["lm_head", "model.layers.0.mlp.gate_proj",
                           *(f"model.layers.{l}.block_sparse_moe.gate" for l in (1, 2)),
                           *(f"model.layers.{l}.self_attn.q_proj" for l in range(3))])


def test_a_projection_smaller_than_a_group_has_a_scale_per_row(tmp_path: Path):
  shapes = {"up": (64, 16), "down": (16, 64)}
  experts = small.packed({"up": (4, 4), "down": (4, 4)}, shapes=shapes)
  native.save(tmp_path / "q", [experts], [{}], {}, small.FILES, {"codec": small.CT})
  directory = compressed_tensors.save(native.open(tmp_path / "q"), tmp_path / "ct", small.names)
  groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
  assert {(g["weights"]["strategy"], g["weights"]["group_size"]) for g in groups.values()} == {
      ("channel", None), ("group", 32)}
  assert values(directory)[small.names(0, 1, "down")].shape == (64, 16)


def test_equal_input_gives_equal_bytes(tmp_path: Path):
  model = small.save(tmp_path / "q", small.MIXED)
  paths = [compressed_tensors.save(model, tmp_path / name, small.names, shard_bytes=9_000) for name in "ab"]
  contents = [{path.name: path.read_bytes() for path in directory.iterdir()} for directory in paths]
  assert contents[0] == contents[1]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------------------------------


def test_the_affine_grid_is_refused_before_anything_is_written(tmp_path: Path):
  model = small.save(tmp_path / "q", small.UNIFORM, small.AFFINE)
  with pytest.raises(shard_writer.ExportError, match=r"has free zeros.*quantize with gptq\(group=32, grid=ct\)"):
    compressed_tensors.save(model, tmp_path / "ct", small.names)
  assert not (tmp_path / "ct").exists()


def one(**changes: Any) -> shard_writer.Expert:
  """An expert `[64, 8]` of 4 bits in two groups; `changes` replace what is packed."""
  half, zero = (np.full((1, 2, 8), value, ml_dtypes.bfloat16) for value in (0.5, 8))
  packed = {"codes": np.zeros((1, 64, 8), np.uint8), "bits": np.array([4]), "scale": half, "zero": zero} | changes
  return shard_writer.Expert.of(qtensor.pack(**packed, group=32), 0)


@pytest.mark.parametrize(("changes", "options", "said"), [
    ({"bits": np.array([1])}, {}, r"m: has 1 bits.*\(2, 3, 4, 8\) bits"),
    ({"bits": np.array([[[4, 2]]])}, {}, "m: has several bits"),
    ({}, {"width": 5}, "to be packed in 5"),
    ({}, {"width": 2}, "has 4 bits, which do not fit width=2"),
    ({"zero": np.full((1, 2, 8), 7, ml_dtypes.bfloat16)}, {}, "its zeros are not 8.*grid=ct"),
    ({"scale": np.full((1, 2, 8), 2.0**-30, ml_dtypes.bfloat16)}, {"dtype": np.dtype(np.float16)}, "not fit float16"),
])
def test_what_the_format_does_not_hold_is_refused_by_name(changes: dict, options: dict, said: str):
  with pytest.raises(shard_writer.ExportError, match=said):
    compressed_tensors.compress(one(**changes), 32, **{"dtype": np.dtype(np.float32), "module": "m"} | options)


def test_a_short_last_group_is_refused(tmp_path: Path):
  shapes = {"up": (80, 8), "down": (64, 8)}
  native.save(tmp_path / "q", [small.packed({"up": (4,), "down": (4,)}, shapes=shapes)], [{}], {}, small.FILES,
              {"codec": small.CT})
  with pytest.raises(shard_writer.ExportError, match="groups of 32 do not divide its 80 inputs.*group=0"):
    compressed_tensors.save(native.open(tmp_path / "q"), tmp_path / "ct", small.names)
