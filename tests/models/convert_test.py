"""Checkpoints in and out: exact round trips, and errors that name the file, the tensor and the remedy."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax.models import convert, decoder

GOLDEN = Path(__file__).parents[1] / "golden" / "mixtral_untied"
CONFIG = decoder.DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, num_local_experts=3, num_experts_per_tok=2, rope_theta=3e4, rms_norm_eps=1e-4)
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
  shutil.copytree(GOLDEN, tmp_path / "checkpoint")
  return tmp_path / "checkpoint"


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes) -> None:
  values = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(values | changes))


def bfloat16_model(config: decoder.DecoderConfig = CONFIG) -> decoder.Decoder:
  """A model whose float32 parameters are bfloat16 values."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: decoder.init(config, 0))
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape).astype(ml_dtypes.bfloat16), jnp.float32), shapes)


# ---------------------------------------------------------------------------------------------------------------------
# What goes in comes out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_local_experts": 1,
                                                                          "num_experts_per_tok": 1}])
def test_a_saved_model_is_loaded_exactly(tmp_path: Path, changes: dict):
  config = dataclasses.replace(CONFIG, **changes)
  model = bfloat16_model(config)
  convert.save(tmp_path, model, config)
  loaded, config_again = convert.load(tmp_path)
  assert config_again == config
  assert jax.tree.structure(loaded) == jax.tree.structure(model)
  for name, leaf in convert.named_leaves(loaded).items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, convert.named_leaves(model)[name], err_msg=name)


def test_equal_models_give_equal_bytes_and_the_dtype_may_be_chosen(tmp_path: Path):
  for name in "ab":
    convert.save(tmp_path / name, bfloat16_model(), CONFIG)
  for file in ("config.json", "model.safetensors"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
  loaded, _ = convert.load(tmp_path / "a", jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_names_and_orientation_are_those_of_hugging_face():
  model = bfloat16_model()
  tensors = convert.tensors(model, CONFIG.num_local_experts)
  block = model.blocks[1]
  for theirs, ours in (("w1", block.moe.gate), ("w3", block.moe.up), ("w2", block.moe.down)):
    np.testing.assert_array_equal(tensors[EXPERT.replace("w1", theirs)].astype(np.float32), ours[...][2].T)
  np.testing.assert_array_equal(tensors[GATE.format(1)].astype(np.float32), block.moe.router[...])
  query = tensors["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
  np.testing.assert_array_equal(query, block.attention.q[...].T)
  assert "lm_head.weight" not in tensors
  assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_shards_are_read_together(directory: Path):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  whole, _ = convert.load(directory)
  (directory / "model.safetensors").unlink()
  for part in range(2):
    shard = {name: tensors[name] for name in sorted(tensors)[part::2]}
    safetensors.numpy.save_file(shard, directory / f"model-0000{part + 1}-of-00002.safetensors")
  parts, _ = convert.load(directory)
  assert all(map(np.array_equal, jax.tree.leaves(whole), jax.tree.leaves(parts)))
  (directory / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(convert.CheckpointError, match="is missing .*copy all files of the checkpoint again"):
    convert.load(directory)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_other_float_types_are_read(directory: Path, dtype: type):
  whole, _ = convert.load(directory)
  edit(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
  loaded, _ = convert.load(directory)
  for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------------------------------


def fails(directory: Path, *said: str) -> None:
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load(directory)
  for part in said:
    assert part in str(caught.value), str(caught.value)


def test_a_missing_directory_config_or_weights_file(directory: Path):
  fails(directory / "nowhere", str(directory / "nowhere" / "config.json"), "not found", "Hugging Face")
  (directory / "model.safetensors").unlink()
  fails(directory, str(directory), "no model*.safetensors", "Hugging Face")
  (directory / "config.json").unlink()
  fails(directory, str(directory / "config.json"), "not found")


@pytest.mark.parametrize("length", [0, 5, 100, 20_000, -1])
def test_a_truncated_weights_file(directory: Path, length: int):
  file = directory / "model.safetensors"
  file.write_bytes(file.read_bytes()[:length])
  fails(directory, str(file), "truncated or damaged", "copy it again")


@pytest.mark.parametrize("text", ['{"model_type": "mixtral",', "", "[1]", b"\xff\xfe{}"])
def test_a_broken_config(directory: Path, text: str | bytes):
  (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
  fails(directory, str(directory / "config.json"), "JSON", "copy the file again")


def test_a_config_of_another_architecture(directory: Path):
  edit_config(directory, model_type="qwen3_moe")
  fails(directory, str(directory), "config.json: model_type is 'qwen3_moe'", "supported: 'mixtral'")


def test_a_missing_tensor(directory: Path):
  edit(directory, lambda tensors: tensors.pop(EXPERT))
  fails(directory, str(directory), f"tensor {EXPERT} is missing", "copy all files")


def test_an_unexpected_tensor(directory: Path):
  extra = "model.layers.0.self_attn.q_proj.bias"
  edit(directory, lambda tensors: tensors.update({extra: np.zeros(3, np.float32)}))
  fails(directory, str(directory / "model.safetensors"), f"tensor {extra} has no place", "another checkpoint")


def test_an_output_matrix_where_the_config_ties_it(directory: Path):
  edit_config(directory, tie_word_embeddings=True)
  fails(directory, "tensor lm_head.weight has no place", "config.json")


def test_a_tensor_of_wrong_shape(directory: Path):
  edit(directory, lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)}))
  fails(directory, str(directory / "model.safetensors"), EXPERT, "[32, 20]", "[20, 32]", "another checkpoint")


def test_a_config_of_another_size(directory: Path):
  edit_config(directory, vocab_size=65)
  fails(directory, "model.embed_tokens.weight", "[64, 32]", "[65, 32]")
  edit_config(directory, vocab_size=64, num_hidden_layers=3)
  fails(directory, "tensor model.layers.2.", "is missing")
  edit_config(directory, num_hidden_layers=1)
  fails(directory, "tensor model.layers.1.", "has no place")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(directory: Path, value: float):
  def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors[EXPERT] = tensors[EXPERT].copy()
    tensors[EXPERT][3, 4] = value

  edit(directory, spoil)
  fails(directory, str(directory / "model.safetensors"), EXPERT, "NaN or infinite", "damaged")


def test_integers_are_not_taken_for_weights(directory: Path):
  edit(directory, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.int8)}))
  fails(directory, str(directory / "model.safetensors"), EXPERT, "int8", "quantized", "original")


def test_eight_bit_floats_are_refused_by_name(directory: Path):
  header = json.dumps({EXPERT: {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
  file = directory / "model.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  fails(directory, str(file), "float8_e4m3", "quantized", "original")


# ---------------------------------------------------------------------------------------------------------------------
# The routers from before training
# ---------------------------------------------------------------------------------------------------------------------


def test_initial_routers_come_back_exactly(tmp_path: Path):
  routers = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  convert.save_routers(tmp_path / "router_init.safetensors", routers)
  loaded = convert.load_routers(tmp_path / "router_init.safetensors", (2, 3, 8))
  assert loaded.dtype == np.float32
  np.testing.assert_array_equal(loaded, routers)


def test_the_routers_of_a_model():
  model = bfloat16_model()
  routers = convert.routers(model)
  assert routers.shape == (2, 3, 8) and routers.dtype == np.float32
  for layer in range(2):
    np.testing.assert_array_equal(routers[layer], model.blocks[layer].moe.router[...])


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda file: file.unlink(), ["not found", "router_norm_change"]),
    (lambda file: file.write_bytes(file.read_bytes()[:-4]), ["truncated or damaged", "copy it again"]),
    (lambda file: convert.save_routers(file, np.zeros((3, 3, 8))), [GATE.format(2), "has no place", "another model"]),
    (lambda file: convert.save_routers(file, np.zeros((1, 3, 8))), [GATE.format(1), "is missing", "another model"]),
    (lambda file: convert.save_routers(file, np.zeros((2, 4, 8))), [GATE.format(0), "[4, 8]", "[3, 8]"]),
    (lambda file: convert.save_routers(file, np.full((2, 3, 8), np.nan)), [GATE.format(0), "NaN"]),
    (lambda file: safetensors.numpy.save_file({"x": np.zeros(3)}, file), ["is missing", "another model"]),
])
def test_initial_routers_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Path], None], said: list[str]):
  file = tmp_path / "router_init.safetensors"
  convert.save_routers(file, np.zeros((2, 3, 8)))
  spoil(file)
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load_routers(file, (2, 3, 8))
  for part in [str(file), *said]:
    assert part in str(caught.value), str(caught.value)
