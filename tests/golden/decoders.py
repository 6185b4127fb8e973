"""The golden decoders: their configs and weights, for the script that makes the files and the test that reads them.

numpy and safetensors alone, so that both environments can import it.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.golden import weights

HERE = Path(__file__).parent / "decoders"
LENGTHS = (20, 13, 6)  # tokens of each row; the rows are padded on the right
NEW = 32

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=24)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
DEFAULT = dict(rope_type="default", rope_theta=1e6)
MIXTRAL = dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
QWEN = dict(intermediate_size=40, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
QWEN2 = dict(QWEN, shared_expert_intermediate_size=28)
OLMOE = dict(intermediate_size=24, num_experts=4, num_experts_per_tok=2)
LLAMA = dict(intermediate_size=40)

# name -> (family, what differs from SIZES); eager attention everywhere.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral_tied": ("mixtral", dict(MIXTRAL, head_dim=16, tie_word_embeddings=True)),
    "mixtral_window": ("mixtral", dict(MIXTRAL, sliding_window=6, num_key_value_heads=1, rope_parameters=DEFAULT)),
    "mixtral_linear": ("mixtral", dict(MIXTRAL, num_local_experts=7, num_experts_per_tok=3, num_key_value_heads=4,
                                       rope_parameters=LINEAR)),
    "qwen2_moe": ("qwen2_moe", dict(QWEN2)),
    "qwen2_moe_window": ("qwen2_moe", dict(QWEN2, norm_topk_prob=True, decoder_sparse_step=2, use_sliding_window=True,
                                           sliding_window=5, max_window_layers=1, num_key_value_heads=4)),
    "qwen2_moe_yarn": ("qwen2_moe", dict(QWEN2, qkv_bias=False, num_experts=6, num_key_value_heads=1,
                                         tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3_moe": ("qwen3_moe", dict(QWEN, head_dim=16, mlp_only_layers=[0])),
    "qwen3_moe_window": ("qwen3_moe", dict(QWEN, head_dim=8, norm_topk_prob=True, num_hidden_layers=3,
                                           decoder_sparse_step=2, attention_bias=True, use_sliding_window=True,
                                           sliding_window=7)),
    "qwen3_moe_llama3": ("qwen3_moe", dict(QWEN, head_dim=12, norm_topk_prob=True, num_experts=8, num_experts_per_tok=4,
                                           num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "olmoe": ("olmoe", dict(OLMOE, num_key_value_heads=4)),
    "olmoe_clip": ("olmoe", dict(OLMOE, clip_qkv=0.5, attention_bias=True)),
    "olmoe_normalized": ("olmoe", dict(OLMOE, clip_qkv=1.0, norm_topk_prob=True, num_experts=8, num_experts_per_tok=3,
                                       num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_tied": ("llama", dict(LLAMA, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama_bias": ("llama", dict(LLAMA, attention_bias=True, head_dim=16,
                                 rope_parameters=dict(YARN, original_max_position_embeddings=64, beta_fast=8.0,
                                                      beta_slow=0.5, truncate=False))),
}


def kind(name: str) -> str:
  """The kind of a tensor (see `weights.py`) by its Hugging Face name."""
  if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
    return "router"
  return "norm" if "norm" in name else "weight"


def tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
  """Random tensors of these names and shapes."""
  return {name: weights.tensor(name, shape, seed, kind(name)) for name, shape in shapes.items()}


def folded(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
  """The shapes with those of expert 0 alone, `{e}` in place of its number and the number of experts before them."""
  count = 1 + max((int(found[1]) for name in shapes if (found := re.search(r"\.experts\.(\d+)\.", name))), default=-1)
  return {name.replace(".experts.0.", ".experts.{e}."): [count, *shape] if ".experts.0." in name else shape
          for name, shape in shapes.items() if not re.search(r"\.experts\.[1-9]", name)}


def _unfolded(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
  plain = {name: shape for name, shape in shapes.items() if "{e}" not in name}
  return plain | {name.replace("{e}", str(e)): shape[1:] for name, shape in shapes.items() if "{e}" in name
                  for e in range(shape[0])}


def checkpoint(name: str, directory: Path) -> Path:
  """Writes a golden model to `directory` as transformers saves it, float32."""
  facts = json.loads((HERE / "models.json").read_text())["models"][name]
  directory.mkdir(parents=True, exist_ok=True)
  shutil.copy(HERE / name / "config.json", directory / "config.json")
  made = tensors(_unfolded(facts["shapes"]), facts["seed"])
  safetensors.numpy.save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def expected(name: str) -> dict[str, np.ndarray]:
  """What transformers computed; see `make_decoders.py`."""
  return safetensors.numpy.load_file(HERE / name / "expected.safetensors")


def tokens(seed: int) -> np.ndarray:
  """The prompts `[B, S]` of a model, random to the last column."""
  return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS))).astype(np.int32)
