"""Tensors in safetensors files: headers are read and verified at once, tensors later, and only the bytes asked for.

The format: eight bytes with the length of the header (little-endian); the header, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`; then the bytes of the tensors, end to end. A sharded
checkpoint has an index beside its shards, `{"weight_map": {tensor: file}}`. Nothing that a file says is believed before
it is checked: types against sizes, offsets against the file, the index against the shards. Pickle is never opened.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}.items()}
MOST_HEADER = 100_000_000  # bytes; the limit of the format
MOST_VALUES = 2_000_000  # in a header or index, so that reading it takes at most a few hundred megabytes
MOST_AXES, LONGEST_AXIS = 16, 2**40
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


class TensorFilesError(ValueError):
  """Files of tensors are missing, damaged or lie: the message names the file, the tensor and the remedy."""


class Entry(NamedTuple):
  """Where a tensor stands.

  Attributes:
    file: path.
    dtype: numpy type; bfloat16 and 8-bit floats are those of ml_dtypes.
    shape: as the header says.
    begin, end: bytes from the beginning of the file.
  """

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor."""
    return self.end - self.begin


class TensorFiles(Mapping[str, Entry]):
  """The tensors of one file or of a checkpoint's shards, by name.

  Attributes:
    files: everything that was opened, the index included, sorted.
  """

  def __init__(self, entries: Mapping[str, Entry], files: tuple[Path, ...]):
    self._entries, self.files = dict(entries), files

  @classmethod
  def open(cls, directory: str | os.PathLike) -> Self:
    """Reads the headers of a checkpoint: `model.safetensors`, or the shards of its index, or `model*.safetensors`.

    The index may name files beside it only. Those may be links to anywhere, as in the caches of download tools: the
    names come from the checkpoint, where links lead is the user's own doing.

    Raises:
      TensorFilesError: a file is missing, damaged or contradicts another; names file, tensor and remedy.
    """
    directory = Path(directory)
    if not directory.is_dir():
      raise TensorFilesError(f"{directory}: no such directory")
    index, single = directory / INDEX, directory / SINGLE
    if not os.path.isfile(index):
      return cls._of_files([single] if os.path.isfile(single) else _listed(directory))
    places = _places(index)
    if os.path.isfile(single) and SINGLE not in places:
      raise TensorFilesError(f"{directory}: has both {SINGLE} and an index of other files; remove the one that is not "
                             "meant")
    entries: dict[str, Entry] = {}
    for file, names in sorted(places.items()):
      entries |= _shard(index, directory / file, names)
    return cls(entries, tuple(sorted([index, *(directory / file for file in places)])))

  @classmethod
  def open_file(cls, path: str | os.PathLike) -> Self:
    """Reads the header of one safetensors file; raises `TensorFilesError` like `open`."""
    return cls._of_files([Path(path)])

  @classmethod
  def _of_files(cls, files: list[Path]) -> Self:
    entries: dict[str, Entry] = {}
    for file in files:
      found = _header(file)
      if twice := sorted(found.keys() & entries.keys()):
        raise TensorFilesError(f"{file}: tensor {shown(twice[0])} stands in {entries[twice[0]].file.name}, too; remove "
                               "the file that is not of this checkpoint")
      entries |= found
    return cls(entries, tuple(files))

  def __getitem__(self, name: str) -> Entry:
    return self._entries[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  @property
  def nbytes(self) -> int:
    """Bytes of all tensors."""
    return sum(entry.nbytes for entry in self._entries.values())

  def read(self, name: str, index: int | slice | tuple[int, slice] | None = None) -> np.ndarray:
    """Reads a tensor, or a part of it that lies in one piece, into memory of its own.

    Args:
      name: of the tensor.
      index: a row or consecutive rows of the first axis, or consecutive rows of one row; None for everything.

    Raises:
      KeyError: no such tensor.
      IndexError: no such row.
      TensorFilesError: the file can no longer be read, or is shorter than it was.
    """
    entry = self[name]
    first, shape = _part(entry, index)
    data = np.empty(math.prod(shape) * entry.dtype.itemsize, np.uint8)
    try:
      with entry.file.open("rb", buffering=0) as file:
        file.seek(first)
        done = 0
        while done < len(data) and (count := file.readinto(memoryview(data)[done:])):
          done += count
    except OSError as error:
      raise damaged(entry.file, error.strerror or str(error)) from None
    if done < len(data):
      raise damaged(entry.file, f"it ends in the middle of tensor {shown(name)}")
    return data.view(entry.dtype).reshape(shape)


def _part(entry: Entry, index: int | slice | tuple[int, slice] | None) -> tuple[int, tuple[int, ...]]:
  """First byte and shape of a part of a tensor."""
  first, shape = entry.begin, entry.shape
  for axis in index if isinstance(index, tuple) else () if index is None else (index,):
    row = math.prod(shape[1:]) * entry.dtype.itemsize
    rows = range(shape[0])[axis]
    if isinstance(rows, int):
      first, shape = first + rows * row, shape[1:]
    elif rows.step == 1:
      first, shape = first + rows.start * row, (len(rows), *shape[1:])
    else:
      raise IndexError(f"rows of a tensor are read one after the other, not {axis}")
  return first, shape


def shown(name: str) -> str:
  """A name from a file as messages show it: short, and without control characters."""
  text = name if name.isprintable() else ascii(name)
  return text if len(text) <= 120 else f"{text[:117]}..."


def damaged(file: Path, reason: str) -> TensorFilesError:
  """The error of a file whose content cannot be right."""
  return TensorFilesError(f"{file}: cannot be read ({reason}); it is truncated or damaged: copy it again")


# ---------------------------------------------------------------------------------------------------------------------
# JSON, strictly
# ---------------------------------------------------------------------------------------------------------------------


def parse_json(file: Path, data: bytes) -> dict[str, Any]:
  """The JSON object in `data`, which was read from `file`.

  Raises:
    TensorFilesError: not UTF-8, not JSON, no object, a key given twice, a constant that JSON lacks, nested too deeply,
      or too many values; names the file.
  """
  if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
    raise damaged(file, f"not valid JSON of a checkpoint: more than {MOST_VALUES} values")
  try:
    value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    if b"\\u" in data:
      json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
  except RecursionError:
    raise damaged(file, "not valid JSON of a checkpoint: nested too deeply") from None
  except ValueError as error:
    raise damaged(file, f"not valid JSON: {shown(str(error))}") from None
  if not isinstance(value, dict):
    raise damaged(file, "holds no JSON object")
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"{shown(twice)} is there twice")
  return value


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is no number")


def read_json(file: Path, most: int = MOST_HEADER) -> dict[str, Any]:
  """Reads a JSON object of at most `most` bytes from `file`; raises `TensorFilesError` like `parse_json`."""
  try:
    with file.open("rb") as stream:
      if (size := os.fstat(stream.fileno()).st_size) > most:
        raise damaged(file, f"longer than {most} bytes")
      data = stream.read(size)
  except OSError as error:
    raise damaged(file, error.strerror or str(error)) from None
  return parse_json(file, data)


# ---------------------------------------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------------------------------------


def _header(file: Path) -> dict[str, Entry]:
  """The verified header of a file."""
  if not os.path.isfile(file):
    raise TensorFilesError(f"{file}: no such file; copy all files of the checkpoint again")
  try:
    with file.open("rb") as stream:
      size = os.fstat(stream.fileno()).st_size
      length = int.from_bytes(stream.read(8), "little")
      if size < 8:
        raise damaged(file, f"it has {size} bytes, and not even the length of a header")
      if length > size - 8:
        raise damaged(file, f"its header should have {length} bytes, the file has {size}")
      if length > MOST_HEADER:
        raise damaged(file, f"its header has {length} bytes, more than {MOST_HEADER}")
      data = stream.read(length)
  except OSError as error:
    raise damaged(file, error.strerror or str(error)) from None
  if not data.startswith(b"{"):
    raise damaged(file, "the header is no JSON object")
  infos = parse_json(file, data)
  notes = infos.pop("__metadata__", {})
  if not (isinstance(notes, dict) and all(isinstance(value, str) for value in notes.values())):
    raise damaged(file, "__metadata__ is not text by name")
  entries = {name: _entry(file, name, info, 8 + length) for name, info in infos.items()}
  _check_offsets(file, entries, 8 + length, size)
  return entries


def _whole(values: Any, most: int) -> bool:
  """Whether `values` is a list of integers from 0 to `most`."""
  return isinstance(values, list) and all(type(value) is int and 0 <= value <= most for value in values)


def _entry(file: Path, name: str, info: Any, start: int) -> Entry:
  """What a header says about one tensor, checked for itself."""
  tensor = f"tensor {shown(name)}"
  if not (isinstance(info, dict) and info.keys() == {"dtype", "shape", "data_offsets"}):
    raise damaged(file, f"{tensor} is not described by dtype, shape and data_offsets")
  kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise TensorFilesError(f"{file}: {tensor} has the type {shown(str(kind))}, known are {', '.join(DTYPES)}; if the "
                           "checkpoint is quantized, take the original one")
  if not _whole(shape, LONGEST_AXIS) or len(shape) > MOST_AXES:
    raise damaged(file, f"the shape of {tensor} is {shown(str(shape))}")
  if not _whole(offsets, 2**63) or len(offsets) != 2 or offsets[1] < offsets[0]:
    raise damaged(file, f"the data_offsets of {tensor} are {shown(str(offsets))}")
  size, length = math.prod(shape) * DTYPES[kind].itemsize, offsets[1] - offsets[0]
  if size != length or math.prod(filter(None, shape)) > LONGEST_AXIS:
    raise damaged(file, f"{tensor} of type {kind} and shape {shape} cannot have {length} bytes")
  return Entry(file, DTYPES[kind], tuple(shape), start + offsets[0], start + offsets[1])


def _check_offsets(file: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
  """Tensors lie end to end from the header to the end of the file."""
  before, tensors = "the header", sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
  for name, entry in tensors:
    if entry.end > size:
      raise damaged(file, f"tensor {shown(name)} ends at byte {entry.end}, the file has {size}")
  for name, entry in tensors:
    tensor = f"tensor {shown(name)}"
    if entry.begin != start:
      raise damaged(file, f"{tensor} overlaps {before}" if entry.begin < start else
                    f"bytes {start} to {entry.begin}, before {tensor}, belong to no tensor")
    start, before = entry.end, tensor
  if start != size:
    raise damaged(file, f"bytes {start} to {size}, after {before}, belong to no tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Directories
# ---------------------------------------------------------------------------------------------------------------------


def _listed(directory: Path) -> list[Path]:
  """The files `model*.safetensors` of a directory without an index, none of a numbered series missing."""
  files = sorted(path for path in directory.glob("model*.safetensors") if os.path.isfile(path))
  if not files:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    found = f"; {shown(pickles[0])} is pickle, which can run any program and is never opened" if pickles else ""
    raise TensorFilesError(f"{directory}: no model*.safetensors in it{found}: expected a checkpoint in Hugging Face "
                           "format, safetensors only")
  names = {path.name for path in files}
  for count in {int(match[2]) for name in names if (match := _SHARD.fullmatch(name))}:
    wanted = (f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1))
    if missing := next((name for name in wanted if name not in names), None):
      raise TensorFilesError(f"{directory / missing}: this shard of {count} is missing; copy it again")
  return files


def _places(index: Path) -> dict[str, set[str]]:
  """The tensors of every shard that an index names."""
  weights = read_json(index).get("weight_map")
  if not isinstance(weights, dict) or not weights:
    raise damaged(index, "it has no weight_map")
  places: dict[str, set[str]] = {}
  for name, file in weights.items():
    if not isinstance(file, str) or not _beside(file):
      raise TensorFilesError(f"{index}: places tensor {shown(name)} in {shown(str(file))}, which is no safetensors "
                             "file of this directory; do not trust this checkpoint, or correct its index")
    places.setdefault(file, set()).add(name)
  return places


def _beside(file: str) -> bool:
  """Whether an index may name this file: a plain name, no path."""
  return not set(file) & set("/\\:\0") and file.endswith(".safetensors") and not file.startswith(".")


def _shard(index: Path, file: Path, names: set[str]) -> dict[str, Entry]:
  """The header of a shard, which holds exactly the tensors `names`."""
  if not os.path.isfile(file):
    some = ", ".join(shown(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    raise TensorFilesError(f"{file}: this shard is missing; it should hold {len(names)} tensors ({some}): copy it "
                           "again")
  entries = _header(file)
  if missing := sorted(names - entries.keys()):
    raise TensorFilesError(f"{file}: tensor {shown(missing[0])} is missing, {index.name} places it there; copy the "
                           "shard and the index again")
  if extra := sorted(entries.keys() - names):
    raise TensorFilesError(f"{file}: tensor {shown(extra[0])} is there, {index.name} does not place it there; it may "
                           "stand in two shards: copy all files of the checkpoint again")
  return entries
