"""Checkpoints of Mixtral-8x7B's shape for `bench stream`: random ones, and ones whose experts are holes in files."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from moeq_jax import artifacts
from moeq_jax.models import hf_config, names
from moeq_jax.models.decoder import DecoderConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
TILE = 1 << 22  # random values that are drawn; larger tensors repeat them


def config(layers: int, shrink: int = 1) -> DecoderConfig:
  """Mixtral-8x7B with `layers` layers and a small vocabulary; `shrink` divides all widths (for tests)."""
  return DecoderConfig(
      vocab_size=512, hidden_size=4096 // shrink, intermediate_size=14336 // shrink, num_hidden_layers=layers,
      num_attention_heads=32 // shrink, num_key_value_heads=8 // min(shrink, 8), head_dim=128, num_local_experts=8,
      num_experts_per_tok=2, rope_theta=1e6, tie_word_embeddings=False, max_position_embeddings=4096)


def shapes(c: DecoderConfig) -> Iterator[dict[str, tuple[int, ...]]]:
  """The tensors of every file, as they stand in checkpoints (`[out, in]`): the top's, then those of each layer."""
  for part in [names.top_shapes(c), *(names.block_shapes(c, layer) for layer in range(c.num_hidden_layers))]:
    found = {}
    for parameter, shape in part.items():
      for name in names.tensor_names(c, parameter):
        inner = shape[1:] if names.is_expert(parameter) else shape
        found[name] = inner[::-1] if names.turned(parameter) else inner
    yield found


def write(directory: Path, c: DecoderConfig, *, holes: bool) -> int:
  """Writes a checkpoint of random bfloat16 weights, a shard a layer; returns its bytes.

  The numbers are drawn once, `TILE` of them, and repeated: each tensor begins at another place of the tile and has a
  scale of its own. With `holes` only what is no expert is written, and the rest of the files takes no room on disk.

  Args:
    directory: made if it is not there.
    c: sizes.
    holes: whether experts are left out.
  """
  directory.mkdir(parents=True, exist_ok=True)
  artifacts.write_json(directory / "config.json", hf_config.write(c))
  rng, places, total, parts = np.random.default_rng(0), {}, 0, list(shapes(c))
  tile = rng.normal(0, 0.02, TILE).astype(np.float32)
  for number, tensors in enumerate(parts):
    file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
    total += _write_shard(directory / file, tensors, tile, rng, holes)
    places |= dict.fromkeys(tensors, file)
  artifacts.write_json(directory / "model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": places})
  return total


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], tile: np.ndarray, rng: np.random.Generator,
                 holes: bool) -> int:
  header, end = {}, 0
  for name, shape in tensors.items():
    begin, end = end, end + 2 * math.prod(shape)
    header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header).encode()
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    first = file.tell()
    for name, shape in tensors.items():
      if ".experts." in name and holes:
        continue
      file.seek(first + header[name]["data_offsets"][0])
      scaled = (np.roll(tile, -int(rng.integers(TILE))) * rng.uniform(0.5, 1.5)).astype(BF16)
      left = math.prod(shape)
      while left:
        left -= file.write(scaled[:left].view(np.uint8)) // 2
    file.truncate(first + end)
  return end
