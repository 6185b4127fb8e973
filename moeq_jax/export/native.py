"""The project's own container of a quantized model: packed experts and all other tensors in one safetensors file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import artifacts, container, qtensor

FILE = "model.moeq.safetensors"


def named(packed: Sequence[Mapping[str, qtensor.QTensor]]) -> dict[str, qtensor.QTensor]:
  """The packed experts of all layers under the names that the file uses."""
  return {f"layers.{l}.experts.{name}": q for l, layer in enumerate(packed) for name, q in layer.items()}


def save(directory: Path, packed: Sequence[Mapping[str, qtensor.QTensor]], others: Mapping[str, np.ndarray],
         files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Path:
  """Writes a quantized model to `directory`; equal input gives equal bytes.

  Args:
    directory: made if it is not there.
    packed: per layer `{"gate", "up", "down"}`.
    others: everything that is not quantized, bfloat16, under its name in the original checkpoint.
    files: what goes beside it (config.json, tokenizer.json), unchanged.
    meta: JSON-able: the plan, the codec, the source.

  Returns:
    The path of the container.
  """
  for name, content in files.items():
    artifacts.write_bytes(directory / name, content)
  container.save(directory / FILE, named(packed) | dict(others), meta)
  return directory / FILE


def sizes(packed: Sequence[Mapping[str, qtensor.QTensor]], others: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Bits per expert weight, counted three ways, and the megabytes (1e6) of all tensors in the file, header excluded."""
  tensors = list(named(packed).values())
  stored = qtensor.stored_bytes(*tensors)
  weights = sum(int(np.prod(q.shape)) for q in tensors)
  return {
      "nominal_bits": qtensor.nominal_bits(*tensors),
      "effective_bits": qtensor.effective_bits(*tensors),
      "stored_bits": 8 * stored / weights,
      "file_mb": (stored + sum(a.nbytes for a in others.values())) / 1e6,
  }
