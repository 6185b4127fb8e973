"""Quantized models on disk: bytes that agree with the bits reported, and files that give the same model back."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moeq_jax import artifacts, container, qtensor
from moeq_jax.assemble import apply
from moeq_jax.export import native
from tests import tiny
from tests.export import small


def moeq_small() -> list[dict[str, qtensor.QTensor]]:
  """Random experts of moeq-small's shape (5 layers of 16, 256 x 256, group 64), half of them at 2 bits, half at 3."""
  rng = np.random.default_rng(0)
  draw = lambda: artifacts.Codes(
      rng.integers(0, 4, (2, 16, 256, 256)).astype(np.uint8), np.ones((2, 16, 4, 256), ml_dtypes.bfloat16),
      np.ones((2, 16, 4, 256), ml_dtypes.bfloat16))
  codes = artifacts.LayerCodes({name: draw() for name in artifacts.PROJECTIONS}, {})
  return [apply.pack_layer(codes, rng.permutation([2, 3] * 8), widths=(2, 3), group=64) for _ in range(5)]


def contents(directory: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def payload(path: Path) -> int:
  """Bytes of the tensors in a safetensors file."""
  return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_stored_bytes_are_within_two_percent_of_the_effective_bits(tmp_path: Path):
  packed = moeq_small()
  found = native.sizes(packed, {})
  assert found["nominal_bits"] == 2.5
  assert found["effective_bits"] == 2.5 + 32 / 64
  assert found["effective_bits"] <= found["stored_bits"] <= 1.02 * found["effective_bits"]
  manifest = native.save(tmp_path, packed, [{}] * 5, {}, {}, {"codec": "rtn"})
  assert manifest["sizes"] == found
  written, weights = sum(path.stat().st_size for path in tmp_path.glob("layer-*")), 5 * 16 * 3 * 256 * 256
  assert found["effective_bits"] <= 8 * written / weights <= 1.02 * found["effective_bits"]
  assert written == pytest.approx(found["file_mb"] * 1e6, rel=0.005)


def test_all_other_tensors_count(tmp_path: Path):
  model = small.save(tmp_path, small.MIXED)
  experts, (blocks, top) = [model.layer(l)[0] for l in range(model.layers)], small.others()
  rest = top | {name: a for block in blocks for name, a in block.items()}
  bare, found = native.sizes(experts, {}), native.sizes(experts, rest)
  assert model.manifest["sizes"] == found
  assert found["file_mb"] - bare["file_mb"] == pytest.approx(2e-6 * sum(a.size for a in rest.values()))
  assert found["stored_bits"] == bare["stored_bits"]
  written = sum(payload(path) for path in tmp_path.glob("*.safetensors"))
  assert written == pytest.approx(found["file_mb"] * 1e6, rel=1e-3)


def test_widths_of_projections_count_by_their_weights():
  found = native.sizes([small.packed({"gate": (2, 2, 4), "up": (2, 2, 2), "down": (8, 2, 2)})], {})
  assert found["nominal_bits"] == pytest.approx((2 + 2 + 4 + 2 + 2 + 2 + 8 + 2 + 2) / 9)
  assert found["effective_bits"] == found["nominal_bits"] + 32 / small.GROUP


def test_sized_buffers_are_no_larger_on_disk(tmp_path: Path):
  native.save_layer(tmp_path / "exact", 0, tiny.packed()[0], {}, {})
  native.save_layer(tmp_path / "sized", 0, tiny.packed(sized=True)[0], {}, {})
  assert contents(tmp_path / "exact") == contents(tmp_path / "sized")
  assert native.sizes(tiny.packed(sized=True), {}) == native.sizes(tiny.packed(), {})


def test_a_model_without_quantized_experts_has_no_size():
  with pytest.raises(ValueError, match="no quantized expert"):
    native.sizes([{}], {})


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_comes_back_with_the_same_logits(tmp_path: Path):
  packed = tiny.packed()
  native.save(tmp_path, packed, [{}] * len(packed), {}, small.FILES, {"codec": "rtn(group=32)"})
  model = native.open(tmp_path)
  np.testing.assert_array_equal(tiny.logits([model.layer(l)[0] for l in range(model.layers)]), tiny.logits(packed))


@pytest.mark.parametrize("codec", [small.CT, small.AFFINE])
def test_everything_comes_back(tmp_path: Path, codec: str):
  model, (blocks, top) = small.save(tmp_path, small.MIXED, codec), small.others()
  assert sorted(contents(tmp_path)) == sorted(["config.json", "tokenizer.json", native.TOP, native.MANIFEST,
                                               *map(native.layer_file, range(3))])
  assert model.files() == small.FILES and model.config == json.loads(small.FILES["config.json"])
  assert [list(model.layer(l)[0]) for l in range(3)] == [[], list(artifacts.PROJECTIONS), list(artifacts.PROJECTIONS)]
  for l, expected in enumerate([*blocks, top]):
    found = model.layer(l)[1] if l < 3 else model.top()
    assert set(found) == set(expected)
    for name, value in expected.items():
      assert found[name].dtype == ml_dtypes.bfloat16
      np.testing.assert_array_equal(found[name], value)
  for name, q in small.packed(small.MIXED[2], codec, seed=2).items():
    np.testing.assert_array_equal(qtensor.unpack(model.layer(2)[0][name]), qtensor.unpack(q))


def test_the_manifest_tells_what_is_there(tmp_path: Path):
  manifest = json.loads((small.save(tmp_path).directory / native.MANIFEST).read_text())
  assert manifest["format"] == "moeq" and manifest["version"] == 1 and manifest["layers"] == 3
  assert manifest["codec"] == small.CT and manifest["source"] == "random" and manifest["sizes"]["nominal_bits"] == 4
  assert manifest["files"] == {name: artifacts.digest(data) for name, data in contents(tmp_path).items()
                               if name != native.MANIFEST}


def test_equal_input_gives_equal_bytes(tmp_path: Path):
  for name in "ab":
    small.save(tmp_path / name, small.MIXED)
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_layer_by_layer_it_is_the_same_model_in_any_order(tmp_path: Path):
  small.save(tmp_path / "whole")
  blocks, top = small.others()
  native.save_top(tmp_path / "parts", top, {})
  for l in (2, 0, 1):
    native.save_layer(tmp_path / "parts", l, small.packed(small.UNIFORM[l], seed=l) if l else {}, blocks[l], {})
  native.finish(tmp_path / "parts", small.FILES, {"codec": small.CT, "plan": None, "source": "random", "layers": 3})
  assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


# ---------------------------------------------------------------------------------------------------------------------
# What is not whole
# ---------------------------------------------------------------------------------------------------------------------


def test_a_layers_metadata_tells_a_resumed_run_what_is_done(tmp_path: Path):
  native.save_layer(tmp_path, 1, small.packed(small.UNIFORM[1]), {}, {"key": "k", "tokens": [1, 2]})
  assert native.read_meta(tmp_path, 1) == {"key": "k", "tokens": [1, 2]}
  assert native.read_meta(tmp_path, 0) is None and native.read_meta(tmp_path, None) is None
  path = tmp_path / native.layer_file(1)
  path.write_bytes(path.read_bytes()[:-1])
  assert native.read_meta(tmp_path, 1) is None


def test_a_model_is_not_finished_before_its_last_layer(tmp_path: Path):
  small.save(tmp_path)
  (tmp_path / native.layer_file(1)).unlink()
  with pytest.raises(native.QuantizedError, match=r"layer-00001.*not finished"):
    native.finish(tmp_path, {}, {"codec": small.CT, "layers": 3})
  assert native.is_quantized(tmp_path)
  with pytest.raises(native.QuantizedError, match=r"is not finished.*give the command"):
    native.open(tmp_path)


def test_writing_a_layer_again_takes_the_manifest_away(tmp_path: Path):
  model = small.save(tmp_path)
  native.save_layer(tmp_path, 0, {}, model.layer(0)[1], {})
  assert not (tmp_path / native.MANIFEST).exists()


def test_layers_of_a_deeper_model_do_not_stay(tmp_path: Path):
  small.save(tmp_path)
  native.save(tmp_path, [small.packed(small.UNIFORM[1])], [{}], {}, small.FILES, {"codec": small.CT})
  assert sorted(path.name for path in tmp_path.glob("layer-*")) == [native.layer_file(0)]
  assert native.open(tmp_path).layers == 1


def test_every_flipped_byte_is_found(tmp_path: Path):
  model, rng = small.save(tmp_path), np.random.default_rng(0)
  reads = {native.layer_file(1): lambda: model.layer(1), native.TOP: model.top, "config.json": lambda: model.config,
           "tokenizer.json": model.files}
  for name, read in reads.items():
    path = tmp_path / name
    kept = path.read_bytes()
    for place in rng.integers(0, len(kept), 8):
      path.write_bytes(kept[:place] + bytes([kept[place] ^ 1 << int(rng.integers(8))]) + kept[place + 1:])
      with pytest.raises(native.QuantizedError, match=re.escape(f"{path}: is not the file")):
        read()
    path.write_bytes(kept[:-1])
    with pytest.raises(native.QuantizedError, match="SHA-256 differs"):
      read()
    path.write_bytes(kept)
    read()


def test_a_layer_of_another_model_is_found(tmp_path: Path):
  model = small.save(tmp_path / "a")
  small.save(tmp_path / "b", small.LAYERS)
  (tmp_path / "b" / native.layer_file(1)).rename(tmp_path / "a" / native.layer_file(1))
  with pytest.raises(native.QuantizedError, match="of another model"):
    model.layer(1)
  container.load(tmp_path / "a" / native.layer_file(1))  # though it is whole


@pytest.mark.parametrize("name", ["config.json", native.layer_file(2), native.TOP])
def test_a_missing_file_is_found_on_opening(tmp_path: Path, name: str):
  small.save(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(native.QuantizedError, match=f"{name}: is missing.*3 layers"):
    native.open(tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    ({"format": "other"}, "is not a manifest"), ({"version": 2}, "version 2, this program reads version 1"),
    ({"layers": 0}, "is not a manifest"), ({"layers": 10**9}, "layer-00003.*is missing"), ({"layers": "3"}, "is not a"),
    ({"files": {"../secret": "0"}}, "is not a manifest"), ({"files": None}, "cannot be read"),
    ({"sizes": 1}, "is not a manifest"),
])
def test_a_wrong_manifest_is_an_error_that_says_so(tmp_path: Path, change: dict, said: str):
  path = small.save(tmp_path).directory / native.MANIFEST
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(native.QuantizedError, match=said):
    native.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": "moeq"}', "\xff"])
def test_a_manifest_that_is_none_is_an_error_that_says_so(tmp_path: Path, text: str):
  small.save(tmp_path)
  (tmp_path / native.MANIFEST).write_bytes(text.encode("latin-1"))
  with pytest.raises(native.QuantizedError, match="moeq.json: cannot be read"):
    native.open(tmp_path)


def test_another_directory_is_no_quantized_model(tmp_path: Path):
  assert not native.is_quantized(tmp_path)
  with pytest.raises(native.QuantizedError, match="is no quantized model: it has no moeq.json"):
    native.open(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../b", native.TOP, native.MANIFEST, native.layer_file(0)])
def test_files_with_names_of_ours_are_refused(tmp_path: Path, name: str):
  with pytest.raises(ValueError, match="cannot go beside"):
    small.save(tmp_path, files={name: b""})
