"""The file that keeps QTensors and plain arrays: safetensors, with equal bytes for equal values.

Any safetensors reader opens it. A QTensor `name` is the tensors `name.buffer`, `name.bits`, `name.offset`, `name.scale`
and `name.zero`; only the rows of the buffer that hold blocks are written. Everything else is JSON under one metadata
key, `moeq` (the library orders several keys at random): the static sizes of each QTensor, a SHA-256 checksum per tensor
over its type, shape and bytes, the caller's metadata, and a checksum over all of that.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from moeq_jax import artifacts, qtensor
from moeq_jax.qtensor import QTensor

_KEY = "moeq"
_VERSION = 1  # of the format; a file of another one is refused
_ARRAYS = ("buffer", "bits", "offset", "scale", "zero")
_STATIC = ("K", "N", "group", "k_tile", "k_block", "axis")


class ContainerError(ValueError):
  """A container is missing, truncated, damaged, or of another version of the format."""


def save(path: str | os.PathLike, tensors: Mapping[str, QTensor | np.ndarray], meta: Mapping[str, Any]) -> None:
  """Writes tensors and JSON-able metadata to `path`, atomically.

  Raises:
    ValueError: a QTensor breaks an invariant, or two tensors would have the same name in the file.
    OSError: the file cannot be written; names it.
  """
  arrays: dict[str, np.ndarray] = {}
  static = {}
  for name, value in sorted(tensors.items()):
    parts = {name: value}
    if isinstance(value, QTensor):
      value.validate(name)
      static[name] = {field: getattr(value, field) for field in _STATIC}
      parts = {f"{name}.{field}": getattr(value, field) for field in _ARRAYS}
      parts[f"{name}.buffer"] = value.buffer[:, : qtensor.used_rows(value)]
    for key, array in parts.items():
      qtensor.check(key not in arrays, f"{path}: two tensors are called {key}")
      arrays[key] = np.asarray(array, order="C")
  checksums = {key: artifacts.digest(array) for key, array in arrays.items()}
  content = {"checksums": checksums, "meta": dict(meta), "qtensors": static, "version": _VERSION}
  content = json.loads(json.dumps(content, allow_nan=False))
  stamped = json.dumps({"content": content, "sha256": artifacts.digest(content)}, sort_keys=True)
  with artifacts.atomic_path(path) as temporary:
    try:
      safetensors.numpy.save_file(arrays, temporary, metadata={_KEY: stamped})
    except safetensors.SafetensorError as error:  # the library's name for a full disk
      raise OSError(str(error)) from error


def load(path: str | os.PathLike) -> tuple[dict[str, QTensor | np.ndarray], dict[str, Any]]:
  """Reads what `save` wrote: `(tensors, metadata)`, with numpy arrays, every checksum and shape verified.

  Raises:
    ContainerError: no such file, not whole, not the bytes that were written, or another version of the format; names
      the file, the first tensor at fault and what to do.
  """
  path = Path(path)
  if not path.is_file():
    raise ContainerError(f"{path}: no such file; run the stage that writes it")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      content = _content(path, file.metadata())
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise _damaged(path, _first_cut_off(path), f"is not whole ({error})") from error
  for name, checksum in content["checksums"].items():
    if name not in arrays or artifacts.digest(arrays[name]) != checksum:
      raise _damaged(path, name, "does not match its checksum" if name in arrays else "is missing")
  if extra := sorted(set(arrays) - set(content["checksums"])):
    raise _damaged(path, extra[0], "has no checksum")
  tensors: dict[str, Any] = {}
  for name, static in content["qtensors"].items():
    tensors[name] = QTensor(**{field: arrays.pop(f"{name}.{field}") for field in _ARRAYS}, **static)
    try:
      tensors[name].validate(name)
    except ValueError as error:
      raise _damaged(path, name, f"is not a QTensor ({error})") from error
  return dict(sorted((tensors | arrays).items())), content["meta"]


def load_meta(path: str | os.PathLike) -> dict[str, Any]:
  """The caller's metadata of a container, without its tensors: verified itself, but not what it describes.

  Raises:
    ContainerError: no such file, or its header is damaged; names the file and what to do.
  """
  path = Path(path)
  if not path.is_file():
    raise ContainerError(f"{path}: no such file; run the stage that writes it")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return _content(path, file.metadata())["meta"]
  except safetensors.SafetensorError as error:
    raise _damaged(path, _first_cut_off(path), f"is not whole ({error})") from error


def _damaged(path: Path, tensor: str, what: str) -> ContainerError:
  return ContainerError(f"{path}: {tensor} {what}; the file is damaged: delete it and write it again")


def _content(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
  """The verified content of the metadata key."""
  try:
    stamped = json.loads((metadata or {})[_KEY])
    content, checksum = stamped["content"], stamped["sha256"]
  except (KeyError, TypeError, ValueError) as error:
    raise _damaged(path, f"metadata key {_KEY!r}", "cannot be read") from error
  if artifacts.digest(content) != checksum:
    raise _damaged(path, f"metadata key {_KEY!r}", "does not match its checksum")
  if content["version"] != _VERSION:
    raise ContainerError(f"{path}: is a container of version {content['version']!r}, and this program reads version"
                         f" {_VERSION}: read it with the program that wrote it, or write it again")
  return content


def _first_cut_off(path: Path) -> str:
  """The first tensor, in the order of the file, whose bytes lie past the end of the file."""
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, path.stat().st_size))
  try:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    ends = sorted((entry["data_offsets"][1], name) for name, entry in entries.items())
  except (ValueError, AttributeError, LookupError, TypeError):
    return "the header"
  return next((name for end, name in ends if 8 + length + end > path.stat().st_size), "the header")
