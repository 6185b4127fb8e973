"""How the tensors of a checkpoint make up the parameters of a model: every tensor used, every parameter filled."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from moeq_jax.models import names
from moeq_jax.models.hf_config import Config
from moeq_jax.tensor_files import shown

FLOATS = ("bfloat16", "float16", "float32", "float64")
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
_CHUNK = 1 << 20


class CheckpointError(ValueError):
  """A checkpoint cannot be read: the message names the file, the tensor and the remedy."""


class Source(NamedTuple):
  """The tensors that make up a parameter.

  Attributes:
    names: one, or one per expert.
    kind: `whole`; `experts`, one tensor each; `stack`, experts in one tensor; `gate` or `up`, half of a stack of both.
  """

  names: tuple[str, ...]
  kind: str


class Sized(Protocol):
  """What is known of a tensor that is not read."""

  dtype: Any
  shape: tuple[int, ...]


class Readable(Protocol):
  """Tensors by name, of which parts are read; `tensor_files.TensorFiles`, or `InMemory`."""

  def __getitem__(self, name: str) -> Sized: ...

  def read(self, name: str, index: Any = None) -> np.ndarray:
    """A tensor, or the part of it at `index`."""


class InMemory(dict[str, np.ndarray]):
  """Tensors in memory."""

  def read(self, name: str, index: Any = None) -> np.ndarray:
    """A tensor, or the part of it at `index`."""
    return self[name] if index is None else self[name][index]


def place_of(tensors: Mapping[str, Sized], name: str) -> str:
  """The beginning of messages about a tensor: its file, where it has one, and its name."""
  file = getattr(tensors[name], "file", None)
  return (f"{file}: " if file else "") + f"tensor {shown(name)}"


# ---------------------------------------------------------------------------------------------------------------------
# Which tensors make up which parameters
# ---------------------------------------------------------------------------------------------------------------------


def arrange(directory: Path | str, config: Config, tensors: Mapping[str, Sized],
            wanted: Iterable[names.Shapes]) -> tuple[dict[str, Source], dict[str, str]]:
  """Finds the tensors of every parameter.

  Args:
    directory: for messages.
    config: of the model.
    tensors: all tensors there are.
    wanted: the parameters and shapes of each part of the model; not looked at further than the first that is missing.

  Returns:
    The sources by parameter, and the tensors that are passed over with what they must be (see `names.ignored`).

  Raises:
    CheckpointError: a tensor is missing, has no place, stands there twice, or has another shape or type than the config
      implies; names file and tensor.
  """
  found: dict[str, dict[int | None, str]] = {}
  ignored, strange = {}, []
  for name in tensors:
    if place := names.place(config, name):
      slots = found.setdefault(place.parameter, {})
      if place.expert in slots:
        raise _twice(tensors, name, slots[place.expert])
      slots[place.expert] = name
    elif kind := names.ignored(config, name):
      ignored[name] = kind
    else:
      strange.append(name)
  sources = {}
  for shapes in wanted:
    for parameter, shape in shapes.items():
      sources[parameter] = _source(directory, config, parameter, tensors, found)
      _check_shapes(config, parameter, shape, sources[parameter], tensors)
    _check_experts(shapes, sources, tensors)
  used = {name for source in sources.values() for name in source.names}
  strange += [name for slots in found.values() for name in slots.values() if name not in used]
  if strange:
    raise CheckpointError(f"{place_of(tensors, min(strange))} has no place in the model that config.json describes "
                          f"({len(strange)} such tensors); the config belongs to another checkpoint")
  for name, kind in ignored.items():
    _check_ignored(config, kind, name, tensors)
  return sources, ignored


def _twice(tensors: Mapping[str, Sized], name: str, other: str) -> CheckpointError:
  return CheckpointError(f"{place_of(tensors, name)} is the same parameter as tensor {shown(other)}; remove one of the "
                         "two")


def _source(directory: Path | str, config: Config, parameter: str, tensors: Mapping[str, Sized],
            found: Mapping[str, dict[int | None, str]]) -> Source:
  """The source of one parameter."""
  slots, expert = found.get(parameter, {}), names.is_expert(parameter)
  prefix, _, projection = parameter.rpartition("/")
  if both := found.get(f"{prefix}/gate+up") if expert and projection != "down" else None:
    if slots:
      raise _twice(tensors, min(slots.values()), both[None])
    return Source((both[None],), projection)
  if None in slots:
    if len(slots) > 1:
      raise _twice(tensors, slots[None], next(name for e, name in slots.items() if e is not None))
    return Source((slots[None],), "stack" if expert else "whole")
  wanted = names.tensor_names(config, parameter)
  if missing := [name for e, name in enumerate(wanted) if e not in slots]:
    raise CheckpointError(f"{directory}: tensor {missing[0]} is missing ({len(missing)} of this kind); a shard is not "
                          "there, or the tensors have other names: copy all files of the checkpoint again")
  return Source(tuple(slots[e] for e in range(len(wanted))), "experts")


def _stored_shape(config: Config, parameter: str, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
  """The shape of the tensors of a parameter in the file."""
  experts, *inside = shape if kind != "whole" else (0, *shape)
  inside = inside[::-1] if names.turned(parameter) else inside
  if kind in ("gate", "up"):
    return experts, 2 * inside[0], inside[1]
  return tuple(inside) if kind != "stack" else (experts, *inside)


def _check_shapes(config: Config, parameter: str, shape: tuple[int, ...], source: Source,
                  tensors: Mapping[str, Sized]) -> None:
  wanted = _stored_shape(config, parameter, shape, source.kind)
  for name in source.names:
    check(tensors, name, wanted)


def check(tensors: Mapping[str, Sized], name: str, shape: tuple[int, ...]) -> None:
  """Raises a CheckpointError unless a tensor is of `shape` and of a type that weights have."""
  dtype = np.dtype(tensors[name].dtype).name
  if dtype not in FLOATS:
    raise CheckpointError(f"{place_of(tensors, name)} is {dtype}, not one of {', '.join(FLOATS)}; the checkpoint is "
                          "quantized: take the original one")
  if tuple(tensors[name].shape) != shape:
    raise CheckpointError(f"{place_of(tensors, name)} has shape {list(tensors[name].shape)}, config.json implies "
                          f"{list(shape)}; the config belongs to another checkpoint")


def _check_experts(shapes: Iterable[str], sources: Mapping[str, Source], tensors: Mapping[str, Sized]) -> None:
  """The experts of one block are of one type."""
  parts = [name for parameter in shapes if names.is_expert(parameter) for name in sources[parameter].names]
  for name in parts[1:]:
    first, own = (np.dtype(tensors[n].dtype).name for n in (parts[0], name))
    if own != first:
      raise CheckpointError(f"{place_of(tensors, name)} is {own}, {shown(parts[0])} is {first}; the experts of a block "
                            "are of one type: convert the checkpoint to one type")


def _check_ignored(config: Config, kind: str, name: str, tensors: Mapping[str, Sized]) -> None:
  shapes = names.top_shapes(config)
  wanted = {"copy": shapes["top/embedding"], "bias": shapes.get("top/decoder_bias"),
            "rotation": (getattr(config, "head_dim", 0) // 2,)}[kind]
  check(tensors, name, wanted)


def check_copies(tensors: Readable, sources: Mapping[str, Source], ignored: Mapping[str, str]) -> None:
  """Raises a CheckpointError unless the tensors that should be copies of the embedding are; reads both, in parts."""
  for copy in (name for name, kind in ignored.items() if kind == "copy"):
    [embedding] = sources["top/embedding"].names
    rows, width = tensors[embedding].shape
    step = max(1, _CHUNK // max(1, width))
    for part in (slice(first, first + step) for first in range(0, rows, step)):
      if not np.array_equal(tensors.read(copy, part), tensors.read(embedding, part)):
        raise CheckpointError(f"{place_of(tensors, copy)} differs from {embedding}, of which it should be a copy "
                              "(tie_word_embeddings); correct config.json, or copy the checkpoint again")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def finite(tensors: Readable, name: str, index: Any = None) -> np.ndarray:
  """Reads a tensor, or a part of it.

  Raises:
    CheckpointError: it holds NaN or infinite values (or, in float64, values that float32 cannot hold).
  """
  array = tensors.read(name, index)
  if not all(map(_all_finite, _chunks(array))):
    raise CheckpointError(f"{place_of(tensors, name)} holds NaN or infinite values; the checkpoint is damaged")
  return array


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
  flat = array.reshape(-1)
  return (flat[i : i + _CHUNK] for i in range(0, len(flat), _CHUNK))


def _all_finite(values: np.ndarray) -> bool:
  if values.dtype == np.float64:
    return bool((np.abs(values) <= np.finfo(np.float32).max).all())
  kind, mask = _EXPONENT[values.dtype.name]
  return not (values.view(kind) & kind(mask) == kind(mask)).any()


class Parameters:
  """The parameters of a model, read from tensors when asked for: weights `[in, out]`, finite.

  Args:
    config: of the model.
    tensors: to read from.
    sources: see `arrange`.
  """

  def __init__(self, config: Config, tensors: Readable, sources: Mapping[str, Source]):
    self.config, self.tensors, self.sources = config, tensors, sources

  def dtype(self, parameter: str) -> np.dtype:
    """The type that a parameter is stored in."""
    return np.dtype(self.tensors[self.sources[parameter].names[0]].dtype)

  def expert(self, parameter: str, expert: int) -> np.ndarray:
    """One expert's projection `[in, out]`, as stored; a view of memory of its own, turned."""
    names_, kind = self.sources[parameter]
    if kind == "experts":
      return finite(self.tensors, names_[expert]).T
    if kind == "stack":
      return finite(self.tensors, names_[0], expert).T
    half = self.tensors[names_[0]].shape[1] // 2
    rows = slice(0, half) if kind == "gate" else slice(half, 2 * half)
    return finite(self.tensors, names_[0], (expert, rows)).T

  def whole(self, parameter: str, dtype: Any = None) -> np.ndarray:
    """A parameter in `dtype` (None: as stored), experts stacked, of which one at a time is held twice."""
    source = self.sources[parameter]
    dtype = np.dtype(self.dtype(parameter) if dtype is None else dtype)
    if source.kind == "whole":
      array = finite(self.tensors, source.names[0])
      return (array.T if names.turned(parameter) else array).astype(dtype, copy=False)
    count = names.expert_count(self.config)
    first = self.expert(parameter, 0)
    stack = np.empty((count, *first.shape), dtype)
    for e in range(count):
      stack[e] = self.expert(parameter, e) if e else first
    return stack
