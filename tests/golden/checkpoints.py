"""All golden models as checkpoint directories, and the same in the other layouts that checkpoints have.

numpy, ml_dtypes and safetensors alone.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.golden import decoders, switches

NAMES = (*decoders.MODELS, *(f"switch_{name}" for name in switches.MODELS))
INDEX = "model.safetensors.index.json"


def write(name: str, directory: Path) -> Path:
  """Writes a golden model to `directory` as transformers saves it, float32."""
  directory.mkdir(parents=True, exist_ok=True)
  if name.startswith("switch_"):
    return switches.checkpoint(name.removeprefix("switch_"), directory)
  return decoders.checkpoint(name, directory)


def tensors(directory: Path) -> dict[str, np.ndarray]:
  """The tensors of `model.safetensors`, as the library reads them."""
  return safetensors.numpy.load_file(directory / "model.safetensors")


def save(directory: Path, named: Mapping[str, np.ndarray], shards: int = 1) -> Path:
  """Replaces the tensor files of a checkpoint, by one file or by shards with an index."""
  for path in directory.glob("model*"):
    path.unlink()
  if shards == 1:
    safetensors.numpy.save_file(dict(named), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
  files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
  places = {name: files[i % shards] for i, name in enumerate(sorted(named))}
  for file in files:
    part = {name: named[name] for name in sorted(named) if places[name] == file}
    safetensors.numpy.save_file(part, directory / file, metadata={"format": "pt"})
  (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return directory


def fused(named: Mapping[str, np.ndarray], prefix: str = "mlp") -> dict[str, np.ndarray]:
  """Decoder tensors with experts as modules of transformers 5.23 hold them: gate and up in one, all experts in one."""
  layers = sorted({m[1] for m in map(re.compile(r"(model\.layers\.\d+\.\w+)\.experts\.").match, named) if m})
  out = {name: array for name, array in named.items() if ".experts." not in name}
  for layer in layers:
    module = re.sub(r"\.\w+$", f".{prefix}", layer)
    gate, up, down = (np.stack(list(_experts(named, layer, ends))) for ends in (
        ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")))
    out[f"{module}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
    out[f"{module}.experts.down_proj"] = down
  return {name.replace(".block_sparse_moe.", f".{prefix}."): array for name, array in out.items()}


def _experts(named: Mapping[str, np.ndarray], layer: str, ends: tuple[str, str]) -> Iterator[np.ndarray]:
  for e in range(len(named)):
    for end in ends:
      if (name := f"{layer}.experts.{e}.{end}.weight") in named:
        yield named[name]
