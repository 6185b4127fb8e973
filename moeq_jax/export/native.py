"""The project's own format of a quantized model: a directory with one container per block, and a manifest.

  config.json, tokenizer files    as they are in the source
  layer-00000.moeq.safetensors    block 0: its packed experts, `blocks.0.experts.gate` and so on, and its other tensors
                                  as stored in the source, under their names there
  top.moeq.safetensors            the tensors of no block
  moeq.json                       the manifest, written last: where it is, all else is there

Layers are written one at a time, atomically, so that a model larger than memory can be written and a killed run goes
on behind its last layer. Every file is a safetensors file with checksums inside (`container.py`), and the manifest
holds the SHA-256 of every file, which is compared when the file is opened. Equal input gives equal bytes.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import artifacts, container, qtensor

FORMAT, VERSION = "moeq", 1
MANIFEST, TOP = "moeq.json", "top.moeq.safetensors"
_COUNTS = ("weights", "code_bits", "scale_bits", "stored_bytes", "other_bytes")

Packed = Mapping[str, qtensor.QTensor]
Tensors = Mapping[str, np.ndarray]


class QuantizedError(ValueError):
  """A directory does not hold a whole quantized model; the message names the file and the remedy."""


def layer_file(layer: int) -> str:
  """The name of a block's file."""
  return f"layer-{layer:05d}.moeq.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def save_layer(directory: Path, layer: int, packed: Packed, others: Tensors, meta: Mapping[str, Any], *,
               order_bits: int = 0) -> Path:
  """Writes one block, atomically; a manifest that is there no longer holds and is deleted.

  Args:
    directory: made if it is not there.
    layer: index of the block.
    packed: the block's experts by projection; empty for a dense block.
    others: the block's other tensors, by their names in the source.
    meta: JSON-able; `read_meta` gives it back.
    order_bits: what the order of the experts' neurons would take; it is counted in `effective_bits`, not stored.

  Returns:
    The path of the file.
  """
  named = {f"blocks.{layer}.experts.{name}": q for name, q in packed.items()}
  return _save(directory / layer_file(layer), named | dict(others),
               dict(meta) | {"counts": counts(packed, others, order_bits)})


def save_top(directory: Path, others: Tensors, meta: Mapping[str, Any]) -> Path:
  """Writes the tensors of no block, atomically; arguments as in `save_layer`."""
  return _save(directory / TOP, others, dict(meta) | {"counts": counts({}, others)})


def _save(path: Path, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
  (path.parent / MANIFEST).unlink(missing_ok=True)
  container.save(path, tensors, meta)
  return path


def read_meta(directory: Path, layer: int | None) -> dict[str, Any] | None:
  """The `meta` that a block (None: the top) was saved with; None where it was not saved, or its header is damaged."""
  try:
    meta = container.load_meta(directory / (TOP if layer is None else layer_file(layer)))
  except container.ContainerError:
    return None
  return {name: value for name, value in meta.items() if name != "counts"}


def finish(directory: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Completes a model whose blocks and top are written: other files beside it, then the manifest.

  Args:
    directory: where they are.
    files: what goes beside them unchanged (config.json, tokenizer files), by plain name.
    manifest: JSON-able: `layers` (number of blocks), `codec`, `plan`, `source`, and whatever else is worth keeping.

  Returns:
    The manifest as written: with `format`, `version`, `files` (SHA-256 of each) and `sizes` (see `sizes`).

  Raises:
    QuantizedError: a block or the top has not been written; names it.
    ValueError: a name in `files` that is not plain or is one of ours.
  """
  (directory / MANIFEST).unlink(missing_ok=True)
  tensors = [*map(layer_file, range(manifest["layers"])), TOP]
  for path in directory.glob("layer-*.moeq.safetensors"):
    if path.name not in tensors:  # of a deeper model that was written here before
      path.unlink()
  for name, content in files.items():
    qtensor.check(Path(name).name == name and name not in (*tensors, MANIFEST), f"{name!r} cannot go beside the model")
    artifacts.write_bytes(directory / name, content)
  try:
    counted = [container.load_meta(directory / name)["counts"] for name in tensors]
  except container.ContainerError as error:
    raise QuantizedError(f"{error}; the model is not finished") from None
  written = dict(manifest) | {
      "format": FORMAT, "version": VERSION, "sizes": _sizes(counted),
      "files": {name: artifacts.digest(directory / name) for name in sorted([*files, *tensors])},
  }
  artifacts.write_json(directory / MANIFEST, written)
  return written


def save(directory: Path, packed: Sequence[Packed], others: Sequence[Tensors], top: Tensors, files: Mapping[str, bytes],
         manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Writes a whole model that is in memory: `packed` and `others` per block, the rest as in `finish`."""
  for layer, parts in enumerate(zip(packed, others, strict=True)):
    save_layer(directory, layer, *parts, {})
  save_top(directory, top, {})
  return finish(directory, files, dict(manifest) | {"layers": len(packed)})


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def counts(packed: Packed, others: Tensors, order_bits: int = 0) -> dict[str, int]:
  """What `sizes` adds up: expert weights, their bits in codes, and in scales and zeros (and an order of neurons), their
  bytes, all other bytes."""
  tensors = list(packed.values())
  weights = sum(int(np.prod(q.shape)) for q in tensors)
  nominal = qtensor.nominal_bits(*tensors) if tensors else 0
  effective = qtensor.effective_bits(*tensors) if tensors else 0
  found = (weights, nominal * weights, (effective - nominal) * weights + order_bits, qtensor.stored_bytes(*tensors),
           sum(a.nbytes for a in others.values()))
  return {name: round(value) for name, value in zip(_COUNTS, found, strict=True)}


def sizes(packed: Iterable[Packed], others: Tensors, order_bits: int = 0) -> dict[str, float]:
  """Bits per expert weight, counted three ways, and megabytes (1e6) of all tensors in the files, headers excluded.
  `order_bits` of an order of neurons, see `save_layer`."""
  return _sizes([*(counts(layer, {}) for layer in packed), counts({}, others, order_bits)])


def _sizes(counted: Iterable[Mapping[str, int]]) -> dict[str, float]:
  weights, codes, scales, stored, other = (sum(column) for column in zip(*([c[n] for n in _COUNTS] for c in counted)))
  qtensor.check(weights > 0, "the model has no quantized expert")
  return {
      "nominal_bits": codes / weights,
      "effective_bits": codes / weights + scales / weights,
      "stored_bits": 8 * stored / weights,
      "file_mb": (stored + other) / 1e6,
  }


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quantized:
  """A quantized model on disk, opened; its tensors are read block by block.

  Attributes:
    directory: where it is.
    manifest: what `finish` wrote: `layers`, `codec`, `plan`, `source`, `files`, `sizes`, ...
  """

  directory: Path
  manifest: dict[str, Any]

  @property
  def layers(self) -> int:
    """Number of blocks."""
    return self.manifest["layers"]

  @property
  def config(self) -> dict[str, Any]:
    """The source's config.json."""
    return json.loads(self._verified("config.json").read_bytes())

  def layer(self, layer: int) -> tuple[dict[str, qtensor.QTensor], dict[str, np.ndarray]]:
    """The packed experts by projection (none for a dense block) and all other tensors of a block; verified.

    Raises:
      QuantizedError: the file is gone or is not the one that was written; names it.
    """
    return read_layer(self._verified(layer_file(layer)), layer)

  def top(self) -> dict[str, np.ndarray]:
    """The tensors of no block; verified, errors as in `layer`."""
    return container.load(self._verified(TOP))[0]

  def files(self) -> dict[str, bytes]:
    """The files beside the tensors (config.json, tokenizer files); verified, errors as in `layer`."""
    tensors = {*map(layer_file, range(self.layers)), TOP}
    return {name: self._verified(name).read_bytes() for name in self.manifest["files"] if name not in tensors}

  def _verified(self, name: str) -> Path:
    """The path of a file, its bytes compared with the manifest."""
    path, expected = self.directory / name, self.manifest["files"].get(name)
    if expected is None:
      raise QuantizedError(f"{self.directory / MANIFEST}: lists no {name}; the model has {self.layers} layers")
    if not path.is_file():
      raise QuantizedError(f"{path}: is missing, {MANIFEST} lists it; copy the whole directory again")
    if artifacts.digest(path) != expected:
      raise QuantizedError(f"{path}: is not the file that {MANIFEST} describes (its SHA-256 differs); it is damaged or"
                           " of another model: copy it again, or quantize again")
    return path


def read_layer(path: Path, layer: int) -> tuple[dict[str, qtensor.QTensor], dict[str, np.ndarray]]:
  """A block's file, of a finished model or not: packed experts by projection (none for a dense block), other tensors.

  Raises:
    container.ContainerError: it is missing or damaged; names it.
  """
  prefix = f"blocks.{layer}.experts."
  tensors, _ = container.load(path)
  packed = {name.removeprefix(prefix): q for name, q in tensors.items() if isinstance(q, qtensor.QTensor)}
  others = {name: array for name, array in tensors.items() if not isinstance(array, qtensor.QTensor)}
  return {name: packed[name] for name in artifacts.PROJECTIONS if name in packed}, others


def is_quantized(directory: Path) -> bool:
  """Whether a directory holds a model in this format, finished or begun."""
  return any((directory / name).is_file() for name in (MANIFEST, layer_file(0), TOP))


def open(directory: str | Path) -> Quantized:
  """Opens a quantized model: reads the manifest, looks whether its files are there; they are read and verified later.

  Raises:
    QuantizedError: not a quantized model, one that is not finished, or files are missing; names file and remedy.
  """
  directory = Path(directory)
  path = directory / MANIFEST
  if not path.is_file():
    if is_quantized(directory):
      raise QuantizedError(f"{directory}: is not finished: it has layers and no {MANIFEST}; give the command that wrote"
                           " them again")
    raise QuantizedError(f"{directory}: is no quantized model: it has no {MANIFEST}")
  manifest = _manifest(path)
  model = Quantized(directory, manifest)
  for name in itertools.chain(["config.json", TOP], map(layer_file, range(model.layers))):  # up to the first missing
    if name not in manifest["files"] or not (directory / name).is_file():
      raise QuantizedError(f"{directory / name}: is missing, and {MANIFEST} tells of {model.layers} layers; copy the"
                           " whole directory again")
  return model


def _manifest(path: Path) -> dict[str, Any]:
  """The manifest, its form checked."""
  try:
    manifest = json.loads(path.read_bytes())
    known = manifest["format"] == FORMAT and type(manifest["layers"]) is int and manifest["layers"] > 0
    known = known and isinstance(manifest["sizes"], dict) and all(Path(n).name == n for n in manifest["files"].keys())
    version = manifest["version"]
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise QuantizedError(f"{path}: cannot be read ({error}); copy it again, or quantize again") from None
  if not known:
    raise QuantizedError(f"{path}: is not a manifest of format {FORMAT!r}; copy it again, or quantize again")
  if version != VERSION:
    raise QuantizedError(f"{path}: version {version!r}, this program reads version {VERSION}; quantize again")
  return manifest
