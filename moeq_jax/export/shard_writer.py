"""Checkpoint directories in Hugging Face's format, written shard by shard; and one expert taken out of packed ones."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import safetensors.numpy

from moeq_jax import artifacts, qtensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}

# (block, expert, projection) -> the name of that weight [N, K] in the source, ending in ".weight".
Names = Callable[[int, int, str], str]


class ExportError(ValueError):
  """A quantized model cannot be written in another format; the message says why and what to do."""


class ShardWriter:
  """Writes tensors to `model-00001-of-00003.safetensors` and so on; holds at most one shard of them in memory."""

  def __init__(self, directory: Path, shard_bytes: int):
    """Args: directory: the place of the shards. shard_bytes: a shard is written before it would grow beyond this."""
    self._directory, self._limit = directory, shard_bytes
    self._tensors: dict[str, np.ndarray] = {}
    self._bytes = 0  # of these tensors
    self._shards: list[dict[str, int]] = []  # of each shard written: name -> bytes

  def add(self, name: str, tensor: np.ndarray) -> None:
    """Takes one tensor; raises `ExportError` if there already is one of this name."""
    if name in self._tensors or any(name in shard for shard in self._shards):
      raise ExportError(f"two tensors are called {name!r}: the names of experts do not tell them apart")
    if self._tensors and self._bytes + tensor.nbytes > self._limit:
      self._flush()
    self._tensors[name] = np.ascontiguousarray(tensor)
    self._bytes += tensor.nbytes

  def close(self) -> None:
    """Writes the last shard, gives the shards their names, and writes the index unless there is one shard."""
    self._flush()
    count = len(self._shards)
    numbers = [f"-{i + 1:05d}-of-{count:05d}" for i in range(count)] if count > 1 else [""]
    names = [f"model{number}.safetensors" for number in numbers]
    for index, name in enumerate(names):
      os.replace(self._path(index), self._directory / name)
    if count > 1:
      places = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
      total = sum(sum(shard.values()) for shard in self._shards)
      artifacts.write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})

  def _flush(self) -> None:
    with artifacts.atomic_path(self._path(len(self._shards))) as temporary:
      try:
        safetensors.numpy.save_file(self._tensors, temporary, metadata={"format": "pt"})
      except safetensors.SafetensorError as error:  # the library's name for a full disk
        raise OSError(str(error)) from error
    self._shards.append({name: tensor.nbytes for name, tensor in self._tensors.items()})
    self._tensors, self._bytes = {}, 0

  def _path(self, index: int) -> Path:
    return self._directory / f"shard-{index:05d}.safetensors"


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
  """Yields a directory beside `directory` that takes its name on a clean exit and is deleted otherwise.

  Raises:
    ExportError: `directory` is there and not empty.
  """
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ExportError(f"{directory}: is there and not empty; choose another directory, or delete it")
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.parent / f".{directory.name}.partial"
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    os.replace(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def dtype_of(config: Mapping[str, Any], dtype: str | None) -> np.dtype:
  """The dtype of the experts in the source: as told, or as config.json says.

  Raises:
    ExportError: it is none of `DTYPES`.
  """
  name = dtype or config.get("dtype") or config.get("torch_dtype")
  if name not in DTYPES:
    raise ExportError(f"dtype {name!r} (from config.json unless told) is none of {', '.join(DTYPES)}; pass dtype=")
  return DTYPES[name]


@dataclasses.dataclass(frozen=True)
class Expert:
  """One projection of one expert, unpacked.

  Attributes:
    codes: `[K, N]` uint8; zeros where `bits` is 16.
    bits: of all its codes; None if its blocks differ.
    scale, zero: `[G, N]` float32, bf16 values.
    packed: the same as a QTensor of one expert.
  """

  codes: np.ndarray
  bits: int | None
  scale: np.ndarray
  zero: np.ndarray
  packed: qtensor.QTensor

  @classmethod
  def of(cls, q: qtensor.QTensor, index: int) -> Self:
    """Expert `index` of packed experts that are not sharded."""
    part = {field: np.asarray(getattr(q, field))[index : index + 1] for field in ("bits", "offset", "scale", "zero")}
    one = dataclasses.replace(q, **part)
    widths = np.unique(one.bits)
    scale, zero = (np.asarray(a[0], np.float32) for a in (one.scale, one.zero))
    return cls(qtensor.unpack(one)[0], int(widths[0]) if len(widths) == 1 else None, scale, zero, one)

  def weights(self, dtype: Any = np.float32) -> np.ndarray:
    """`[K, N]`: `(code - zero) * scale` with the roundings of `qtensor.dequantize`, rounded to `dtype`."""
    if (self.packed.bits == 16).any():
      return np.asarray(qtensor.dequantize(self.packed)[0]).astype(dtype)
    found, group = np.empty(self.codes.shape, dtype), self.packed.group
    with np.errstate(over="ignore"):  # of float16; the caller looks for infinite weights
      for start, scale, zero in zip(range(0, len(found), group), self.scale, self.zero, strict=True):
        rows = slice(start, start + group)
        found[rows] = (self.codes[rows] - zero) * scale
    return found
