"""GGUF files: tiny ones written by the library's own writer, read back by formulas of their types."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import language_model
from moeq_jax.models import convert, gguf_file
from tests import tiny_gguf

HF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
      "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
      "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def decoded(name: str, array: np.ndarray) -> np.ndarray:
  """What is left of a tensor in the file, by the formulas of its type, blocks of 32."""
  if tiny_gguf.kind(name) in ("F32", "F16"):
    return array.astype(np.float16 if tiny_gguf.kind(name) == "F16" else np.float32).astype(np.float32)
  blocks = array.reshape(-1, 32)
  if tiny_gguf.kind(name) == "Q8_0":
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    codes = np.round(blocks / scale)
    return (codes * scale.astype(np.float16).astype(np.float32)).reshape(array.shape)
  low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
  scale = (high - low) / np.float32(15)
  codes = np.clip(np.floor((blocks - low) / scale + np.float32(0.5)), 0, 15)
  half = lambda x: x.astype(np.float16).astype(np.float32)
  return (codes * half(scale) + half(low)).reshape(array.shape)


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
  """Row 2i of each head goes to i, row 2i + 1 to i + half."""
  size = len(rows) // heads
  order = [head * size + i for head in range(heads) for i in [*range(0, size, 2), *range(1, size, 2)]]
  return rows[order]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, gguf_file.GgufFile]:
  folder = tmp_path_factory.mktemp("gguf")
  return {tied: gguf_file.open_gguf(tiny_gguf.write(folder / f"{tied}.gguf", tied=tied)) for tied in (True, False)}


def expected(tied: bool) -> dict[str, np.ndarray]:
  """The tensors that a reader must find, under Hugging Face's names."""
  found = {}
  for name, array in tiny_gguf.tensors(tied).items():
    value, part = decoded(name, array), name.split(".")[-2]
    if part in ("attn_q", "attn_k"):
      value = unpaired(value, tiny_gguf.HEADS if part == "attn_q" else tiny_gguf.KV)
    inside = name.startswith("blk")
    found[f"model.layers.{name.split('.')[1]}.{HF[part]}.weight" if inside else gguf_file.TOP[name]] = value
  return found


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_the_file_under_hugging_face_names(files: dict, tied: bool):
  file = files[tied]
  assert file.tensors.keys() == expected(tied).keys()
  for name, value in expected(tied).items():
    np.testing.assert_allclose(file.tensor(name), value, rtol=2e-6, atol=1e-7, err_msg=name)
  config = file.config
  assert (config.family, config.tie_word_embeddings, config.rope_theta) == ("llama", tied, 5e4)
  sizes = config.head_dim, config.num_key_value_heads, config.vocab_size
  assert sizes == (tiny_gguf.HEAD_DIM, tiny_gguf.KV, tiny_gguf.V)


def test_pairs_side_by_side_are_the_rotation_of_halves():
  """Turning neighbours (i, i + 1) in the file's order is turning halves (i, i + n / 2) in ours."""
  rng = np.random.default_rng(0)
  weight, x, angle = rng.normal(size=(2 * 8, 5)), rng.normal(size=5), rng.normal(size=4)

  def turn(pairs: np.ndarray) -> np.ndarray:  # [heads, 4, 2]
    a, b = pairs[..., 0], pairs[..., 1]
    return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

  side_by_side = turn((weight @ x).reshape(2, 4, 2))
  ours = (gguf_file.halves(weight, 2) @ x).reshape(2, 2, 4)
  np.testing.assert_allclose(turn(np.moveaxis(ours, 1, -1)), side_by_side)


def test_it_computes_what_the_same_tensors_do_as_a_checkpoint(files: dict, tmp_path: Path):
  tokens = np.random.default_rng(1).integers(0, tiny_gguf.V, (2, 9)).astype(np.int32)
  (tmp_path / "config.json").write_text(json.dumps(files[True].values))
  safetensors.numpy.save_file(expected(True), tmp_path / "model.safetensors")
  found, checkpoint = (language_model.load(place) for place in (files[True].path, tmp_path))
  np.testing.assert_allclose(found.logits(tokens), checkpoint.logits(tokens), atol=1e-5)
  assert found.ends == (5,) and found.prefix == 0
  assert found.encode("the token") == tiny_gguf.trained().encode("the token").ids


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = ["the router sends every token .", " two  words\n\n and\ttabs", "naïve 12 x345", "", "a  7", "<|endoftext|>the"]


def test_the_tokenizer_gives_the_tokens_of_the_one_that_was_written(files: dict):
  ours = files[True].tokenizer()
  for text in TEXTS:
    assert ours.encode(text).ids == tiny_gguf.trained().encode(text).ids, text
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
  assert ours.encode("<|endoftext|>").ids == [0]


def test_digits_stand_alone_where_the_file_says_so(tmp_path: Path):
  ours = gguf_file.open_gguf(tiny_gguf.write(tmp_path / "a.gguf", pre="smollm")).tokenizer()
  assert [len(part) for part, _ in ours.pre_tokenizer.pre_tokenize_str("ab 123  4")] == [2, 1, 1, 1, 1, 2, 1]
  assert ours.decode(ours.encode("ab 123  4").ids) == "ab 123  4"


def test_a_text_begins_with_the_token_that_the_file_asks_for(tmp_path: Path):
  ours = gguf_file.open_gguf(tiny_gguf.write(tmp_path / "a.gguf", bos=True)).tokenizer()
  assert ours.encode("the").ids == [0, *tiny_gguf.trained().encode("the").ids]
  assert ours.encode("the", add_special_tokens=False).ids == tiny_gguf.trained().encode("the").ids


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "said"), [
    ({"architecture": "qwen2"}, "general.architecture is 'qwen2'"),
    ({"meta": {"expert_count": 4}}, "llama.expert_count"),
    ({"meta": {"rope.scaling.type": "yarn"}}, "scaled"),
    ({"meta": {"rope.dimension_count": 8}}, "llama.rope.dimension_count is 8"),
    ({"meta": {"attention.head_count": [4, 4]}}, "llama.attention.head_count"),
    ({"meta": {"attention.head_count": 0}}, "heads have 64"),
    ({"meta": {"block_count": 3}}, "is missing"),
    ({"meta": {"block_count": 1}}, "blk.1.*has no place"),
    ({"meta": {"feed_forward_length": 128}}, "shape"),
    ({"drop": "blk.1.ffn_norm.weight"}, "post_attention_layernorm.weight is missing"),
    ({"drop": "token_embd.weight"}, "vocab_size"),
    ({"tensor": ("blk.0.attn_q.bias", np.zeros(tiny_gguf.D, np.float32))}, "attn_q.bias has no place"),
    ({"tokenizer": "llama"}, "tokenizer.ggml.model is 'llama'"),
    ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; .*take the model's safetensors checkpoint"),
    ({"tokens": ["a", "b", "a"]}, "a token twice"),
])
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], said: str):
  path = tiny_gguf.write(tmp_path / "a.gguf", **changes)
  with pytest.raises(convert.CheckpointError, match=said) as error:
    language_model.load(path)
  assert "a.gguf" in str(error.value) or "shape" in said


def test_a_truncated_or_lying_file_is_an_error_that_names_it(tmp_path: Path):
  whole = tiny_gguf.write(tmp_path / "whole.gguf").read_bytes()
  path, rng = tmp_path / "part.gguf", np.random.default_rng(0)
  for length in [0, 3, 4, 8, 23, *rng.integers(24, len(whole), 25)]:
    path.write_bytes(whole[:length])
    with pytest.raises(convert.CheckpointError, match="part.gguf"):
      gguf_file.open_gguf(path)
  place = whole.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 8
  path.write_bytes(whole[:place] + (2**60).to_bytes(8, "little") + whole[place + 8 :])
  with pytest.raises(convert.CheckpointError, match="part.gguf"):
    gguf_file.open_gguf(path)


def test_a_missing_file_is_named(tmp_path: Path):
  with pytest.raises(convert.CheckpointError, match="a.gguf: not found"):
    gguf_file.open_gguf(tmp_path / "a.gguf")
