"""The golden Switch Transformers: their configs and weights, for the script that makes the files and the tests.

numpy and safetensors alone, so that both environments can import it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.golden import weights

HERE = Path(__file__).parent / "switch"
INPUTS, TARGETS = (24, 17, 9, 1), (20, 3, 14, 8)  # tokens of each row; the rows are padded on the right
NEW = 32

COMMON = dict(vocab_size=64, d_model=32, num_heads=4, num_experts=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=1)
MODELS = {  # name -> (seed, sizes); seeds whose greedy texts do not soon repeat one token
    "roomy": (7, dict(d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_sparse_encoder_layers=1,
                      num_sparse_decoder_layers=2, expert_capacity=64, tie_word_embeddings=True)),
    "untied": (1, dict(d_kv=12, d_ff=40, num_layers=2, num_decoder_layers=3, num_sparse_encoder_layers=2,
                       num_sparse_decoder_layers=1, expert_capacity=3, tie_word_embeddings=False,
                       relative_attention_num_buckets=8, relative_attention_max_distance=12,
                       decoder_start_token_id=0)),
    "crowded": (7, dict(d_kv=6, d_ff=24, num_layers=3, num_decoder_layers=2, num_sparse_encoder_layers=1,
                        num_sparse_decoder_layers=2, expert_capacity=2, tie_word_embeddings=True,
                        decoder_start_token_id=0)),
}


def kind(name: str) -> str:
  """The kind of a tensor, for `weights.tensor`."""
  kinds = {"decoder.final_layer_norm": "gain", "layer_norm": "norm", "classifier": "router", ".q.": "query"}
  return next((kinds[part] for part in kinds if part in name), "weight")


def tensors(name: str) -> dict[str, np.ndarray]:
  """The weights of a golden model by their Hugging Face names, float32."""
  shapes, (seed, _) = json.loads((HERE / name / "shapes.json").read_text()), MODELS[name]
  return {tensor: weights.tensor(tensor, shape, seed, kind(tensor)) for tensor, shape in shapes.items()}


def checkpoint(name: str, directory: Path) -> Path:
  """Writes a golden model to `directory` as transformers saves it, float32."""
  shutil.copy(HERE / name / "config.json", directory / "config.json")
  safetensors.numpy.save_file(tensors(name), directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def expected(name: str) -> dict[str, np.ndarray]:
  """What transformers computed; see `make_switch.py`."""
  return safetensors.numpy.load_file(HERE / name / "expected.safetensors")
