"""Hugging Face checkpoints in and out, whole or in parts.

Weights are `[out, in]` in the files and `[in, out]` here. Every tensor of a checkpoint must be used, and every
parameter of the model filled (`layout.py`, by the table in `names.py`): anything else is an error that names the file
and the tensor. Opening reads headers only; weights are read when a part of the model is asked for.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from moeq_jax import artifacts, tensor_files
from moeq_jax.models import families, hf_config, layout, names
from moeq_jax.models.hf_config import Config
from moeq_jax.models.layout import CheckpointError, InMemory, Parameters
from moeq_jax.models.switch import SwitchConfig

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"  # of the l-th MoE layer, in files of routers
_MOST_CONFIG = 10_000_000  # bytes
_BLOCK = 1 << 23


def _path_name(path: tuple[Any, ...]) -> str:
  keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
  return "/".join(k for k in keys if k != "value")


def named_leaves(model: Any) -> dict[str, Any]:
  """A model's parameters by path, for example `blocks/0/moe/gate`."""
  return {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


_abstract = functools.lru_cache(maxsize=8)(families.abstract)


def _fill(tree: Any, prefix: str, leaf: Callable[[str], Any]) -> Any:
  """A pytree like `tree`, each leaf from the name of its parameter, which begins with `prefix`."""
  leaves = [leaf(f"{prefix}/{name}") for name in named_leaves(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def read_config(directory: Path) -> tuple[Config, dict[str, Any]]:
  """Reads `config.json`: the sizes and the raw values.

  Raises:
    CheckpointError: the directory or the file is missing, is not JSON, or describes a model that is not supported.
  """
  path = Path(directory) / "config.json"
  if not path.is_file():
    raise CheckpointError(f"{path}: not found; {_instead(Path(directory))}")
  try:
    values = tensor_files.read_json(path, _MOST_CONFIG)
  except tensor_files.TensorFilesError as error:
    raise CheckpointError(str(error)) from None
  try:
    return hf_config.read(values), values
  except ValueError as error:
    inside = Path(directory) / "quantized"
    hint = f"; this is a run's work directory, its model is {inside}" if (inside / "moeq.json").is_file() else ""
    raise CheckpointError(f"{directory}: {error}{hint}") from None


def _instead(directory: Path) -> str:
  """What stands where a checkpoint directory was expected."""
  if directory.is_file():
    return "this is a file, a directory in Hugging Face format was expected"
  if not directory.is_dir():
    return "there is no such directory; one in Hugging Face format was expected"
  return "expected a directory in Hugging Face format"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Checkpoint:
  """An opened checkpoint: what it holds is known and verified, weights are read when asked for.

  A weight that is NaN or infinite is an error (`CheckpointError`) where it is read; a file that has changed since is
  `tensor_files.TensorFilesError`.

  Attributes:
    directory: where it is.
    config: sizes.
    values: what `config.json` holds.
    files: the tensors.
    layers: number of blocks.
    sparse_layers: the blocks with experts.
    projections: of an expert, in the order of `artifacts.PROJECTIONS`.
    experts: E; 0 in a dense model.
  """

  def __init__(self, directory: Path, config: Config, values: dict[str, Any], files: tensor_files.TensorFiles):
    self.directory, self.config, self.values, self.files = directory, config, values, files
    self.layers, self.experts = names.block_count(config), names.expert_count(config)
    self.projections = names.projections(config)
    self.sparse_layers = tuple(l for l in range(self.layers) if config.sparse(l))
    sources, self._ignored = layout.arrange(directory, config, files, _parts(config))
    self._parameters = Parameters(config, files, sources)

  def top(self, dtype: Any = None) -> Any:
    """Embedding, final norm and what else stands in no block, in `dtype` (None: as stored)."""
    self._check_copies()
    return _fill(_abstract(self.config).top, "top", self._leaf(dtype))

  def block(self, l: int, dtype: Any = None, experts: bool = True) -> Any:
    """Block `l` in `dtype` (None: as stored); without `experts` their leaves are `jax.ShapeDtypeStruct`."""
    shapes, read = names.block_shapes(self.config, l), self._leaf(dtype)

    def leaf(parameter: str) -> Any:
      if experts or not names.is_expert(parameter):
        return read(parameter)
      return jax.ShapeDtypeStruct(shapes[parameter], _computable(dtype or self._parameters.dtype(parameter)))

    return _fill(_abstract(self.config).blocks[l], f"blocks/{l}", leaf)

  def _leaf(self, dtype: Any) -> Callable[[str], jax.Array]:
    return lambda parameter: _as_jax(self._parameters.whole(parameter, dtype))

  def expert(self, l: int, e: int) -> dict[str, np.ndarray]:
    """The projections of one expert, `[in, out]`, in the type they are stored in; no other bytes are read."""
    return {name: self.projection(l, e, name) for name in self.projections}

  def projection(self, l: int, e: int, name: str) -> np.ndarray:
    """One projection of one expert, as `expert` gives it."""
    return self._parameters.expert(f"blocks/{l}/moe/{name}", e)

  def router(self, l: int) -> np.ndarray:
    """The router of block `l`, `[E, D]` float32."""
    return self._parameters.whole(f"blocks/{l}/moe/router", np.float32)

  def others(self, l: int | None) -> dict[str, np.ndarray]:
    """What is no expert in block `l` (None: in no block): tensors as stored, by their names in the files."""
    if l is None:
      self._check_copies()
    return {name: layout.finite(self.files, name) for name in self._names(l, experts=False)}

  def expert_names(self, l: int) -> list[str]:
    """The tensors that hold the experts of block `l`; none if it is dense."""
    return self._names(l, experts=True)

  def nbytes(self, l: int | None, experts: bool) -> int:
    """Bytes as stored of the experts of block `l`, or of all else in it (None: in no block)."""
    return sum(self.files[name].nbytes for name in self._names(l, experts))

  def _names(self, l: int | None, experts: bool) -> list[str]:
    shapes = names.top_shapes(self.config) if l is None else names.block_shapes(self.config, l)
    chosen = (self._parameters.sources[p].names for p in shapes if names.is_expert(p) == experts)
    return sorted({name for group in chosen for name in group})

  def _check_copies(self) -> None:
    layout.check_copies(self.files, self._parameters.sources, self._ignored)

  def digest(self, advance: Callable[[int], None] = lambda bytes_read: None) -> str:
    """SHA-256 over config.json, the index and all tensor files, whatever the directory is called.

    Args:
      advance: called with the number of bytes read since it was last called.
    """
    files = [self.directory / "config.json", *self.files.files]
    return artifacts.digest({file.name: _file_digest(file, advance) for file in files})


def _parts(config: Config) -> Iterator[names.Shapes]:
  """The parameters of every part of a model: what stands in no block, then block by block."""
  yield names.top_shapes(config)
  for l in range(names.block_count(config)):
    yield names.block_shapes(config, l)


def _file_digest(file: Path, advance: Callable[[int], None]) -> str:
  sha = hashlib.sha256()
  with file.open("rb") as stream:
    while block := stream.read(_BLOCK):
      sha.update(block)
      advance(len(block))
  return sha.hexdigest()


def _computable(dtype: Any) -> np.dtype:
  """The type that arrays of a stored type have in jax: float64 becomes float32."""
  return np.dtype(np.float32) if np.dtype(dtype) == np.float64 else np.dtype(dtype)


def _as_jax(array: np.ndarray) -> jax.Array:
  return jnp.asarray(array.astype(_computable(array.dtype), copy=False))


def open_checkpoint(directory: str | Path) -> Checkpoint:
  """Opens a checkpoint directory: reads its config and the headers of its files, no weights.

  Raises:
    CheckpointError: a file is missing or damaged; a tensor is missing, unused, or of a wrong shape or type.
  """
  directory = Path(directory)
  config, values = read_config(directory)
  if (directory / "moeq.json").is_file():
    raise CheckpointError(f"{directory}: holds a quantized model (moeq.json), from which no checkpoint can be read; "
                          "take the original one")
  try:
    files = tensor_files.TensorFiles.open(directory)
  except tensor_files.TensorFilesError as error:
    raise CheckpointError(str(error)) from None
  return Checkpoint(directory, names.fitted(config, files), values, files)


def load(directory: Path, dtype: Any = jnp.float32) -> tuple[Any, Config]:
  """Reads a checkpoint directory into a model with parameters in `dtype`.

  Raises:
    CheckpointError: a file is missing or damaged; a tensor is missing, unused, of a wrong shape or type, or not finite.
  """
  checkpoint = open_checkpoint(directory)
  abstract = _abstract(checkpoint.config)
  parts = [checkpoint.top(dtype), *(checkpoint.block(l, dtype) for l in range(checkpoint.layers))]
  leaves = {f"{prefix}/{name}": leaf for prefix, part in zip(_prefixes(len(parts) - 1), parts, strict=True)
            for name, leaf in named_leaves(part).items()}
  model = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)])
  return model, checkpoint.config


def _prefixes(blocks: int) -> list[str]:
  return ["top", *(f"blocks/{l}" for l in range(blocks))]


# ---------------------------------------------------------------------------------------------------------------------
# From tensors in memory
# ---------------------------------------------------------------------------------------------------------------------


def build_top(config: Config, tensors: Mapping[str, np.ndarray], dtype: Any = None) -> Any:
  """What stands in no block, from tensors by their names in the files; `dtype` None: as they are.

  Raises:
    CheckpointError: a tensor is missing, unused, of a wrong shape or type, or not finite.
  """
  config = names.fitted(config, tensors)
  return _build(config, _abstract(config).top, "top", names.top_shapes(config), tensors, dtype)


def build_block(config: Config, l: int, tensors: Mapping[str, np.ndarray], dtype: Any = None,
                experts: Mapping[str, Any] | None = None) -> Any:
  """Block `l` from tensors by their names in the files.

  Args:
    config: of the model.
    l: which block.
    tensors: all that is no expert; with the experts, if `experts` is not given.
    dtype: of the parameters; None: as they are.
    experts: arrays or QTensors `[E, in, out]` by projection.

  Raises:
    CheckpointError: a tensor is missing, unused, of a wrong shape or type, or not finite; or experts of a wrong shape.
  """
  shapes, tree = names.block_shapes(config, l), _abstract(config).blocks[l]
  if not experts:
    return _build(config, tree, f"blocks/{l}", shapes, tensors, dtype)
  inside = {p.rsplit("/", 1)[1]: shape for p, shape in shapes.items() if names.is_expert(p)}
  if {name: tuple(value.shape) for name, value in experts.items()} != inside:
    raise CheckpointError(f"block {l}: experts of shapes {({n: tuple(v.shape) for n, v in experts.items()})} where "
                          f"config.json implies {inside}; they belong to another model")
  rest = {p: shape for p, shape in shapes.items() if not names.is_expert(p)}
  block = _build(config, tree, f"blocks/{l}", rest, tensors, dtype)
  return families.functions(config, jnp.float32).with_experts(block, jax.tree.map(jnp.asarray, dict(experts)))


def _build(config: Config, tree: Any, prefix: str, shapes: names.Shapes, tensors: Mapping[str, np.ndarray],
           dtype: Any) -> Any:
  """Fills the leaves of `tree` that are in `shapes`; the others stay abstract."""
  held = InMemory(tensors)
  sources, ignored = layout.arrange(prefix, config, held, [shapes])
  layout.check_copies(held, sources, ignored)
  parameters = Parameters(config, held, sources)
  abstract = {f"{prefix}/{name}": leaf for name, leaf in named_leaves(tree).items()}
  return _fill(tree, prefix, lambda p: _as_jax(parameters.whole(p, dtype)) if p in shapes else abstract[p])


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def tensors(model: Any, config: Config, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
  """The model's parameters in `dtype` under Hugging Face's names, a tensor per expert.

  transformers 5 reads an untied Switch Transformer with an embedding for each stack, so where it has one for both, that
  is there three times.
  """
  out = {}
  for parameter, leaf in named_leaves(model).items():
    array = np.asarray(leaf).astype(dtype)
    parts = array if names.is_expert(parameter) else [array]
    turned = names.turned(parameter)
    out |= {name: np.ascontiguousarray(part.T if turned else part)
            for name, part in zip(names.tensor_names(config, parameter), parts, strict=True)}
  if isinstance(config, SwitchConfig) and not (config.tie_word_embeddings or config.separate_embeddings):
    out |= {f"{stack}.embed_tokens.weight": out["shared.weight"] for stack in ("encoder", "decoder")}
  return out


def save(directory: Path, model: Any, config: Config, dtype: Any = ml_dtypes.bfloat16) -> None:
  """Writes `config.json` and `model.safetensors` in Hugging Face's format of the model's family.

  Raises:
    ValueError: models of this family cannot be what `config` says.
  """
  artifacts.write_json(directory / "config.json", hf_config.write(config, np.dtype(dtype).name))
  data = safetensors.numpy.save(tensors(model, config, dtype), metadata={"format": "pt"})
  artifacts.write_bytes(directory / "model.safetensors", data)


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def routers(model: Any) -> np.ndarray:
  """The router weights of all MoE layers, `[L, E, D]` float32."""
  return np.stack([np.asarray(block.moe.router[...], np.float32) for block in model.blocks if hasattr(block, "moe")])


def save_routers(path: Path, routers_LxExD: Sequence[np.ndarray] | np.ndarray) -> None:
  """Writes router weights `[L, E, D]` as one float32 tensor per MoE layer, under the names of Mixtral."""
  named = {ROUTER.format(l): np.asarray(router, np.float32) for l, router in enumerate(routers_LxExD)}
  artifacts.write_bytes(path, safetensors.numpy.save(named, metadata={"format": "pt"}))


def load_routers(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads what `save_routers` wrote: `[L, E, D]` float32.

  Raises:
    CheckpointError: the file is missing or damaged, or its routers are not of `shape` or not finite.
  """
  if not path.is_file():
    raise CheckpointError(f"{path}: not found; router_norm_change needs the routers from before training")
  try:
    files = tensor_files.TensorFiles.open_file(path)
  except tensor_files.TensorFilesError as error:
    raise CheckpointError(str(error)) from None
  wanted = [ROUTER.format(l) for l in range(shape[0])]
  if wrong := sorted(files.keys() ^ set(wanted)):
    state = "has no place" if wrong[0] in files else "is missing"
    raise CheckpointError(f"{path}: tensor {wrong[0]} {state}; the file holds the initial routers of another model, not"
                          f" of this one with {shape[0]} layers")
  for name in wanted:
    layout.check(files, name, tuple(shape[1:]))
  return np.stack([layout.finite(files, name) for name in wanted]).astype(np.float32)
