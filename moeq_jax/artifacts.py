"""The values that pass between stages, and how they are kept on disk.

Every stage of the pipeline reads and writes only what is defined here and in `qtensor.py`. All of them are frozen
dataclasses that can be saved, opened alone, and reused by a later run only when their key matches.

Letters used in shapes all over the project:

  B batch, S sequence, T tokens, D hidden size, F expert ffn size, E experts, K inputs of a matmul (rows of a weight),
  N outputs of a matmul (columns), G scale groups along K, L MoE layers (dense blocks are not counted), W candidate
  widths (bits), U units, P projections of an expert (those of gate, up, down that the model has, in this order),
  V vocabulary.

Weights are stored as `[K, N]`, so that `y = x @ w`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

PROJECTIONS = ("gate", "up", "down")


# ---------------------------------------------------------------------------------------------------------------------
# Files: atomic writes, digests, keys
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary path beside `path`; on a clean exit the file is synced and renamed to `path`.

  A process killed at any moment leaves either the old file or the new one, never a part of it.

  Raises:
    OSError: the file cannot be written; names it.
  """
  path, temporary = Path(path), None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    yield temporary
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    temporary.chmod(0o644)
    os.replace(temporary, path)
  except OSError as error:
    reason = error.strerror or error
    raise OSError(f"{path}: cannot be written ({reason}); make room, or choose another directory") from error
  finally:
    if temporary:
      temporary.unlink(missing_ok=True)


def remove_partial(directory: Path) -> None:
  """Removes the temporary files that killed processes left in `directory` and below; nobody else may write there."""
  for path in directory.rglob(".*.????????.partial"):
    path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` to `path` atomically."""
  with atomic_path(path) as temporary:
    temporary.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON with sorted keys, atomically; equal values give equal bytes.

  Raises:
    ValueError: a number that is not finite; names the file, which keeps its old content.
  """
  try:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
  except ValueError as error:
    raise ValueError(f"{path}: not written, JSON holds finite numbers only ({error})") from None
  write_bytes(path, (text + "\n").encode())


def digest(data: Any) -> str:
  """SHA-256 (hex) of bytes, of an array (with its dtype and shape), of a file (`Path`), or of a JSON-able value."""
  sha = hashlib.sha256()
  if isinstance(data, bytes):
    sha.update(data)
  elif isinstance(data, Path):
    with data.open("rb") as file:
      while block := file.read(1 << 20):
        sha.update(block)
  elif hasattr(data, "dtype"):
    array = np.asarray(data)
    sha.update(f"{array.dtype}{array.shape}".encode())
    sha.update(array.tobytes())
  else:
    sha.update(json.dumps(data, sort_keys=True, allow_nan=False).encode())
  return sha.hexdigest()


def digest_of(value: Any) -> str:
  """SHA-256 of a dataclass: of all its fields, by name."""
  return digest({field.name: digest(getattr(value, field.name)) for field in dataclasses.fields(value)})


def key(stage: str, version: int, spec: Any, inputs: Mapping[str, str]) -> str:
  """The identity of a stage's product: its name and version, its spec, and the digests of what it read."""
  return digest({"stage": stage, "version": version, "spec": spec, "inputs": dict(inputs)})


class StaleProductError(Exception):
  """A product on disk was made from other inputs, another spec or another version of its stage."""


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
  """Writes arrays and JSON-able metadata to one `.npz`, atomically and with the same bytes for the same values.

  Raises:
    TypeError: an array of a type that the format does not keep (bfloat16: hand over a `uint16` view).
  """
  packed = {name: np.asarray(value) for name, value in sorted(arrays.items())}
  for name, value in packed.items():
    if value.dtype.kind in "OV":
      raise TypeError(f"{path}: array {name} is {value.dtype}, which .npz does not keep; save a view as integers")
  packed["__meta__"] = np.frombuffer(json.dumps(dict(meta), sort_keys=True).encode(), np.uint8)
  with atomic_path(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **packed)


def load_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads what `save_arrays` wrote: `(arrays, metadata)`."""
  # Given a path, np.load leaves a damaged file open.
  with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
    arrays = {name: archive[name] for name in archive.files}
  return arrays, json.loads(arrays.pop("__meta__").tobytes())


@dataclasses.dataclass(frozen=True)
class Saved:
  """A frozen dataclass of arrays and plain values that can be kept in an `.npz` under a key."""

  def save(self, path: str | os.PathLike, product_key: str = "") -> None:
    """Writes this value to `path` (atomically), stamped with `product_key`."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in fields.items() if name not in arrays}
    save_arrays(path, arrays, {"type": type(self).__name__, "key": product_key, "plain": plain})

  @classmethod
  def load(cls, path: str | os.PathLike, product_key: str | None = None) -> Self:
    """Reads a value back. With `product_key`, raises `StaleProductError` if the file was stamped with another."""
    arrays, meta = load_arrays(path)
    if meta.get("type") != cls.__name__:
      raise StaleProductError(f"{path}: holds {meta.get('type', 'something else')}, not {cls.__name__}; delete it")
    if product_key is not None and meta["key"] != product_key:
      raise StaleProductError(f"{path}: was made from other inputs, another spec or another version; delete it")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["plain"].items()}
    return cls(**arrays, **plain)


# ---------------------------------------------------------------------------------------------------------------------
# The values
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stats(Saved):
  """What one pass of forward and backward over calibration batches saw.

  Attributes:
    tokens: `[L, E]` int64, tokens routed to each expert.
    gate_weight: `[L, E]` float64, sum over its tokens of the renormalised top-k routing weight.
    router_norm: `[L, E]` float64, L2 norm of each router row.
    router_grad: `[L, E]` float64, root mean square over batches of the norm of d loss / d router row (nats per token).
    moment_in: `[L, E, D, D]` float32, sum over the expert's tokens of `x x^T`, input of gate and up.
    moment_mid: `[L, E, F, F]` float32, sum over the expert's tokens of `h h^T`, input of down.
    grad_sq_gate, grad_sq_up: `[L, E, F]` float32, sum over the expert's tokens of the squared derivative of the summed
      token loss with respect to the projection's output; `None` for a projection that the experts do not have.
    grad_sq_down: `[L, E, D]` float32, the same for down (routing weight included).
    total_tokens: tokens seen by each layer.
    batches: calibration batches.

  What streaming does not keep for all layers at once (moments, squared gradients) is `None` there.
  """

  tokens: np.ndarray
  gate_weight: np.ndarray
  router_norm: np.ndarray
  router_grad: np.ndarray
  moment_in: np.ndarray | None
  moment_mid: np.ndarray | None
  grad_sq_gate: np.ndarray | None
  grad_sq_up: np.ndarray | None
  grad_sq_down: np.ndarray | None
  total_tokens: int
  batches: int

  def unrouted(self) -> list[tuple[int, int]]:
    """The `(layer, expert)` pairs that saw no calibration token."""
    return [(int(l), int(e)) for l, e in np.argwhere(self.tokens == 0)]


class Codes(NamedTuple):
  """One projection of a layer's experts at every candidate width.

  Attributes:
    codes: `[W, E, K, N]` uint8.
    scale, zero: `[W, E, G, N]` bfloat16; a weight is `(code - zero) * scale`.
  """

  codes: np.ndarray
  scale: np.ndarray
  zero: np.ndarray

  def choose(self, index: np.ndarray) -> "Codes":
    """The codes of one plan: width `index[e]` for expert e; fields without the `W` axis."""
    experts = np.arange(len(index))
    return Codes(*(field[index, experts] for field in self))


@dataclasses.dataclass(frozen=True)
class LayerCodes:
  """The experts of one layer at every candidate width, and their errors; kept in one file.

  Attributes:
    codes: `{projection: Codes}`, in the order of `PROJECTIONS`.
    errors: `{"weight", "output", "fisher"}` `[E, P, W]` and `"norm"` `[E, P]`, see `ErrorTable`.
  """

  codes: dict[str, Codes]
  errors: dict[str, np.ndarray]

  def save(self, path: str | os.PathLike, product_key: str) -> None:
    """Writes the layer to `path` (atomically), stamped with `product_key`."""
    arrays = {f"error.{name}": value for name, value in self.errors.items()}
    for name, codes in self.codes.items():
      arrays |= {f"{name}.{k}": v if v.dtype == np.uint8 else v.view(np.uint16) for k, v in codes._asdict().items()}
    save_arrays(path, arrays, {"key": product_key})

  @classmethod
  def load(cls, path: str | os.PathLike, product_key: str) -> Self:
    """Reads the layer; raises `StaleProductError` if it was made from something else."""
    arrays, meta = load_arrays(path)
    if meta["key"] != product_key:
      raise StaleProductError(f"{path}: was made from other inputs, another spec or another version; delete it")
    errors = {k.removeprefix("error."): v for k, v in arrays.items() if k.startswith("error.")}
    real = {k: v if v.dtype == np.uint8 else v.view(ml_dtypes.bfloat16) for k, v in arrays.items() if k[:6] != "error."}
    names = [name for name in PROJECTIONS if f"{name}.codes" in real]
    return cls({name: Codes(*(real[f"{name}.{field}"] for field in Codes._fields)) for name in names}, errors)


@dataclasses.dataclass(frozen=True)
class ErrorTable(Saved):
  """Errors of every expert at every candidate width, per projection.

  Attributes:
    weight: `[L, E, P, W]` float64, squared Frobenius norm of `w_hat - w`.
    output: `[L, E, P, W]` float64, squared output error `tr(dW^T M dW)` with M the second moment of the inputs, summed
      over the expert's calibration tokens.
    fisher: `[L, E, P, W]` float64, `1/2 sum_kn A_kk G_nn dW_kn^2`, the diagonal K-FAC estimate of the loss increase in
      nats per calibration token; `None` where no backward pass was made.
    norm: `[L, E, P]` float64, squared Frobenius norm of `w`.
    widths: candidate bits, ascending.
    codec: spec string of the codec.
    group: rows of K that share a scale (0 = all of K).
    projections: `[P]` names, in the order of `PROJECTIONS`.
    sizes: `[P]` weights of one expert's projection, K times N.
  """

  weight: np.ndarray
  output: np.ndarray
  fisher: np.ndarray | None
  norm: np.ndarray
  widths: tuple[int, ...]
  codec: str
  group: int
  projections: tuple[str, ...]
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CostTable(Saved):
  """`cost[l, e, p, w]`: the price of storing one projection of one expert with `widths[w]` bits.

  Cells that share a width cost the sum of what each costs (`allocate/constraints.py`).

  Attributes:
    cost: `[L, E, P, W]` float64; non-negative.
    widths: candidate bits, ascending.
    score: the score's spec string.
    units: `"nats"` (predicted loss increase per token) or `"arbitrary"`.
    projections: `[P]` names, in the order of `PROJECTIONS`.
    sizes: `[P]` weights of one expert's projection.
  """

  cost: np.ndarray
  widths: tuple[int, ...]
  score: str
  units: str
  projections: tuple[str, ...]
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan(Saved):
  """The bits of every expert, or of every projection of every expert, with what was asked and what is promised.

  Attributes:
    bits: `[L, E]` or `[L, E, P]` int64.
    method: the method's spec string, for example `knapsack(router_grad_error)`.
    budget: average nominal bits per expert weight asked for.
    predicted: cost of the plan under the method's own cost table (`None` where a method has none).
    lower_bound: certified lower bound on the least cost at this budget (`None` without a certificate).
    constraint: which cells share one width, see `allocate/constraints.py`.
  """

  bits: np.ndarray
  method: str
  budget: float
  predicted: float | None = None
  lower_bound: float | None = None
  constraint: str = "expert"

  def by_projection(self, projections: int) -> np.ndarray:
    """The bits of every projection, `[L, E, P]`.

    Raises:
      ValueError: the plan has another number of projections.
    """
    bits = self.bits if self.bits.ndim == 3 else np.repeat(self.bits[..., None], projections, axis=2)
    if bits.shape[2] != projections:
      raise ValueError(f"plan {self.method}: has bits for {bits.shape[2]} projections, the experts have {projections};"
                       " it was made for another model")
    return bits

  def as_json(self) -> dict[str, Any]:
    """The plan as JSON-able values."""
    return dataclasses.asdict(self) | {"bits": self.bits.tolist()}
