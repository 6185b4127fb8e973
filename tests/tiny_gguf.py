"""Tiny GGUF files of a dense model, written by the library's own writer."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers

from moeq_jax import data
from tests import tiny

D, F, HEADS, KV, LAYERS, V, HEAD_DIM = 64, 96, 4, 2, 2, 288, 16
TYPES = {"token_embd": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q8_0", "ffn_down": "Q4_1", "ffn_up": "F16"}
SHAPES = {"attn_q": (D, D), "attn_k": (KV * HEAD_DIM, D), "attn_v": (KV * HEAD_DIM, D), "attn_output": (D, D),
          "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
META = {"context_length": 64, "embedding_length": D, "feed_forward_length": F, "block_count": LAYERS,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.dimension_count": HEAD_DIM}


@functools.cache
def trained() -> tokenizers.Tokenizer:
  return data.train_tokenizer(tiny.documents(4, seed=3), V)


@functools.cache
def tensors(tied: bool) -> dict[str, np.ndarray]:
  """Random tensors in the order of the file, float32."""
  rng = np.random.default_rng(0)
  found = {"token_embd.weight": rng.normal(0, 0.3, (V, D)), "output_norm.weight": rng.uniform(0.5, 1.5, D)}
  found |= {} if tied else {"output.weight": rng.normal(0, 0.3, (V, D))}
  for l in range(LAYERS):
    found |= {f"blk.{l}.{name}.weight": rng.normal(0, shape[1] ** -0.5, shape) for name, shape in SHAPES.items()}
    found |= {f"blk.{l}.{name}_norm.weight": rng.uniform(0.5, 1.5, D) for name in ("attn", "ffn")}
  return {name: array.astype(np.float32) for name, array in found.items()}


def kind(name: str) -> str:
  return next((TYPES[part] for part in TYPES if part in name), "F32")


def write(path: Path, *, tied: bool = True, pre: str = "gpt-2", bos: bool = False, drop: str = "",
          **changes: Any) -> Path:
  """Writes a file; `changes` replace or add metadata and, as `tensor=(name, array)`, a tensor."""
  writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
  extra = dict([changes.pop("tensor")]) if "tensor" in changes else {}
  for name, value in (META | changes.pop("meta", {})).items():
    add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
    add(f"llama.{name}", value)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_float32("llama.rope.freq_base", 5e4)
  vocabulary = sorted(trained().get_vocab(), key=trained().get_vocab().get)
  writer.add_string("tokenizer.ggml.model", changes.pop("tokenizer", "gpt2"))
  writer.add_string("tokenizer.ggml.pre", pre)
  writer.add_array("tokenizer.ggml.tokens", changes.pop("tokens", vocabulary))
  writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (V - 1))
  merges = [pair if isinstance(pair, str) else " ".join(pair)
            for pair in json.loads(trained().to_str())["model"]["merges"]]
  writer.add_array("tokenizer.ggml.merges", merges)
  writer.add_bool("tokenizer.ggml.add_bos_token", bos)
  writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
  writer.add_uint32("tokenizer.ggml.eos_token_id", 5)
  assert not changes
  for name, array in (tensors(tied) | extra).items():
    if name != drop:
      of = gguf.GGMLQuantizationType[kind(name)]
      writer.add_tensor(name, gguf.quants.quantize(array, of), raw_dtype=of)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
