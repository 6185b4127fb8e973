"""What the sweeps share: the opened checkpoint, the work directory, and the products of one layer."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeq_jax import artifacts, progress, user_text, workspace
from moeq_jax.models import convert, decoder, families

MEGABYTE = 10**6
# Raised when a sweep computes something else from the same inputs; older products are then made again.
VERSIONS = {"states": 1, "forward": 1, "backward": 1, "errors": 1, "costs": 1, "encoded": 1, "losses": 1}


@dataclasses.dataclass(frozen=True)
class Subject:
  """A checkpoint that is read layer by layer, and the directory that it is quantized in.

  Attributes:
    run: the work directory.
    source: the checkpoint.
    functions: how its blocks compute.
    dtype: that blocks compute in.
  """

  run: workspace.Workdir
  source: convert.Checkpoint
  functions: decoder.Functions
  dtype: str

  @functools.cached_property
  def digest(self) -> str:
    """Of the checkpoint's files; they are hashed when it is first asked for."""
    return _digest(self.run, self.source)

  @property
  def layers(self) -> range:
    """All blocks."""
    return range(self.source.layers)

  @property
  def sparse(self) -> tuple[int, ...]:
    """The blocks with experts."""
    return tuple(self.source.sparse_layers)

  def block(self, layer: int) -> Any:
    """A block without its experts' weights."""
    return self.source.block(layer, self.dtype, experts=False)

  def experts(self, layer: int) -> Any:
    """What loads one expert of a block: `expert -> {projection: [K, N]}`."""
    return functools.partial(self.source.expert, layer)

  def key(self, stage: str, spec: Any, **inputs: str) -> str:
    """The key of a stage's product of this checkpoint."""
    return artifacts.key(stage, VERSIONS[stage], spec, {"model": self.digest} | inputs)

  def text_key(self, stage: str, spec: dict[str, Any], text: user_text.Text) -> str:
    """The key of a product that depends on text, and so on the dtype of the computation."""
    return self.key(stage, spec | {"dtype": self.dtype}, text=text.digest)


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Named arrays of one layer, kept in one file."""

  values: dict[str, np.ndarray]

  def save(self, path: Path, key: str) -> None:
    """Writes the arrays to `path` (atomically), stamped with `key`."""
    artifacts.save_arrays(path, self.values, {"key": key})

  @classmethod
  def load(cls, path: Path, key: str) -> Self:
    """Reads the arrays; raises `StaleProductError` if they were made from something else."""
    arrays, meta = artifacts.load_arrays(path)
    if meta.get("key") != key:
      raise artifacts.StaleProductError(f"{path}: was made from other inputs, another spec or another version")
    return cls(arrays)


def open_source(run: workspace.Workdir, name: str, dtype: str) -> Subject:
  """Opens a checkpoint: headers and config now, weights when they are needed.

  Args:
    run: the work directory; it remembers the digest of files that have not changed.
    name: the directory; a relative one is looked for here and then from the project's root.
    dtype: that blocks compute in.

  Raises:
    convert.CheckpointError: a file is missing, damaged, or belongs to another checkpoint; names file and tensor.
    ValueError: the model has no experts.
  """
  directory = next((p for p in (Path(name), workspace.ROOT / name) if p.is_dir()), Path(name))
  source = convert.open_checkpoint(directory)
  if not source.sparse_layers:
    raise ValueError(f"{directory}: the model has no experts, and only experts are quantized; upcycle makes a"
                     " Mixture-of-Experts model of a dense one")
  return Subject(run, source, families.functions(source.config, dtype), dtype)


def _digest(run: workspace.Workdir, source: convert.Checkpoint) -> str:
  """The digest of the checkpoint's files; hashed again only if one of them has another size or time than last time."""
  files = sorted({*source.files.files, source.directory / "config.json"})
  stamp = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
  key = hashlib.sha256(repr(stamp).encode()).hexdigest()

  def make() -> Arrays:
    read, total = 0, sum(size for _, size, _ in stamp)
    with progress.bar("read checkpoint, MB", total // MEGABYTE) as advance:

      def count(more: int) -> None:
        nonlocal read
        if steps := (read + more) // MEGABYTE - read // MEGABYTE:
          advance(steps=steps)
        read += more

      found = source.digest(count)
    return Arrays({"digest": np.frombuffer(bytes.fromhex(found), np.uint8)})

  return run.product("digest.npz", key, Arrays.load, make).values["digest"].tobytes().hex()
