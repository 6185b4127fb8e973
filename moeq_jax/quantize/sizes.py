"""A checkpoint that is known by its config.json alone: what stands for `convert.Checkpoint` where only sizes matter."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from moeq_jax.models import convert, families, hf_config, names

STORED = 2  # bytes of a weight: bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a model.

  Attributes:
    config: of the model.
    directory: there is none.
  """

  config: hf_config.Config
  directory: None = None

  @property
  def layers(self) -> int:
    """Number of blocks."""
    return names.block_count(self.config)

  @property
  def sparse_layers(self) -> tuple[int, ...]:
    """The blocks with experts."""
    return tuple(l for l in range(self.layers) if self.config.sparse(l))

  @property
  def experts(self) -> int:
    """E."""
    return names.expert_count(self.config)

  @property
  def projections(self) -> tuple[str, ...]:
    """Of an expert."""
    return names.projections(self.config)

  def nbytes(self, l: int | None, experts: bool) -> int:
    """Bytes in bfloat16 of the experts of block `l`, or of all else in it (None: in no block)."""
    shapes = names.top_shapes(self.config) if l is None else names.block_shapes(self.config, l)
    return STORED * sum(math.prod(shape) for name, shape in shapes.items() if names.is_expert(name) == experts)


def read(values: Mapping[str, Any]) -> Sizes:
  """The sizes that a config.json describes.

  Raises:
    ValueError: a field is missing or wrong (names it), or the model has no experts.
  """
  sizes = Sizes(hf_config.read(values))
  if not sizes.sparse_layers:
    raise ValueError("config.model: the model has no experts, and only experts are quantized")
  return sizes


def check(config: hf_config.Config) -> int:
  """Compares the shapes of the table of names, by which files are read, with those of the model that computes.

  Returns:
    How many parameters were compared.

  Raises:
    ValueError: they differ; names the first parameter.
  """
  found = {name: tuple(leaf.shape) for name, leaf in convert.named_leaves(families.abstract(config)).items()}
  expected = dict(names.top_shapes(config))
  for layer in range(names.block_count(config)):
    expected |= names.block_shapes(config, layer)
  for name in sorted(found.keys() | expected.keys()):
    if found.get(name) != expected.get(name):
      raise ValueError(f"{name}: the model has {found.get(name)}, files hold {expected.get(name)}")
  return len(found)


def differences(wanted: hf_config.Config, found: hf_config.Config) -> list[str]:
  """The parameters whose shapes differ between two models, in words."""

  def shapes(config: hf_config.Config) -> dict[str, tuple[int, ...]]:
    parts = [names.top_shapes(config), *(names.block_shapes(config, l) for l in range(names.block_count(config)))]
    return {name: shape for part in parts for name, shape in part.items()}

  one, two = shapes(wanted), shapes(found)
  return [f"{name}: {two.get(name, 'missing')} there, {one.get(name, 'nothing')} wanted"
          for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]


def states(config: hf_config.Config, functions: Any, dtype: str, batch: Any) -> tuple[Any, Any, Any]:
  """What flows through the model for one batch, as shapes: a state, what a sparse block keeps of it between its two
  halves, and the logits. Traces every kind of block once, so that a shape that does not fit is an error here."""
  model = families.abstract(config, dtype)
  state = jax.eval_shape(functions.embed, model.top, batch)
  halfway, seen = None, set()
  for block in model.blocks:
    kind = str(jax.tree.structure(block)), str([leaf.shape for leaf in jax.tree.leaves(block)])
    if kind not in seen:
      seen.add(kind)
      if functions.sparse(block):
        halfway = jax.eval_shape(functions.before, block, state)
      state = jax.eval_shape(functions.block, block, state)[0]
  return state, halfway, jax.eval_shape(functions.head, model.top, state)


def nbytes(tree: Any) -> int:
  """Bytes of a tree of shapes."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
