"""Codecs turn a weight matrix into codes of 1 to 8 bits: RTN, HQQ and GPTQ, as pure functions of arrays.

  codec = codecs.get("gptq(group=64)")
  encode = jax.jit(jax.vmap(codec.encode, in_axes=(0, None, 0)))      # over experts; bits are data
  encoded = encode(w, 2, moment)                                      # codes uint8, scale and zero bf16
  w_hat = codecs.decode(encoded, codec.group, rows=w.shape[-2])

The format that all of them share is described in `grid.py`. `gptq(grid=ct)` encodes to the symmetric integers that the
compressed-tensors format keeps; the choice of the grid is made before encoding, not at export. `gptq_official` is the
weaker variant of GPTQ that the router-norm paper's official code runs, there to be compared with.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from moeq_jax import registry
from moeq_jax.codecs import gptq, gptq_official, grid, hqq, rtn

TABLE = {"rtn": rtn, "hqq": hqq, "gptq": gptq, "gptq_official": gptq_official}

WIDTHS = grid.WIDTHS
GROUPS = grid.GROUPS
Encoded = grid.Encoded
decode = grid.decode
errors = grid.errors

_REGISTRY = registry.Registry("codec", {name: module.Spec for name, module in TABLE.items()})


@dataclasses.dataclass(frozen=True)
class Codec:
  """A codec with its options; hashable, so that it can be a static argument.

  Attributes:
    name: its name in `TABLE`.
    spec: its options, the `Spec` of its module.
  """

  name: str
  spec: Any

  @property
  def group(self) -> int:
    """Rows of K that share a scale; 0 = all."""
    return self.spec.group

  def check_widths(self, widths: Iterable[int]) -> None:
    """Raises `ValueError` where this codec cannot encode one of `widths` to some use; names it and the remedy.

    A traced width cannot be looked at, so whoever takes widths from a user asks here first.
    """
    if unknown := sorted(set(widths) - set(WIDTHS)):
      raise ValueError(f"{self}: no codec encodes {unknown} bits; the widths are {WIDTHS}")
    if self.spec.grid == "ct" and 1 in widths:
      raise ValueError(f"{self}: one bit on the grid 'ct' is {{-1, 0}} times a scale, without a positive weight; leave"
                       " 1 out of the widths, or take the grid 'affine'")

  @property
  def needs_moment(self) -> bool:
    """Whether `encode` looks at the inputs of what it encodes."""
    return hasattr(TABLE[self.name], "factorise")

  def factorise(self, moment: jax.Array) -> jax.Array:
    """What `encode` makes of a moment `[K, K]` before it looks at weights: the same for all widths, all columns and all
    matrices with these inputs. Only where `needs_moment`; pure."""
    return TABLE[self.name].factorise(moment, self.spec)

  def encode(self, w: jax.Array, bits: jax.Array | int, moment: jax.Array | None = None,
             factor: jax.Array | None = None) -> Encoded:
    """Encodes one matrix; pure, to be jitted and vmapped by the caller.

    Columns do not depend on each other: a slab of them is encoded to the same bits as within the whole matrix.

    Args:
      w: `[K, N]` float32, finite (see `check_finite`).
      bits: int32 scalar in `WIDTHS`, or one of them for every group of every column, `[G, N]`, `[G, 1]` or `[1, N]`
        (then a GPTQ code of a group depends on the widths of the groups before it); may be traced.
      moment: `[K, K]` float32, sum over tokens of `x x^T`; GPTQ needs it, the others ignore it.
      factor: what `factorise` made of the moment, in its place.

    Raises:
      ValueError: see `check_widths`, where `bits` is a plain number; or GPTQ without a moment.
    """
    if isinstance(bits, int):
      self.check_widths((bits,))
    given = {} if factor is None else {"factor": factor}
    return TABLE[self.name].encode(w, bits, moment, self.spec, **given)

  def __str__(self) -> str:
    """The spec string: the group, and what differs from the defaults."""
    options = ((field, getattr(self.spec, field.name)) for field in dataclasses.fields(self.spec))
    changed = {field.name: value for field, value in options if field.name == "group" or value != field.default}
    return str(registry.Spec(self.name, (), changed))


def get(spec: str) -> Codec:
  """The codec that a spec string names, for example `gptq(group=64)`.

  Raises:
    registry.SpecError: not a spec, an unknown codec or an unknown option; the message names the nearest one.
    ValueError: a value that the option does not allow.
  """
  return Codec(registry.parse(spec).name, _REGISTRY.get(spec)())


def check_finite(w: np.ndarray | jax.Array, name: str) -> None:
  """Raises `ValueError` if the tensor `name` holds NaN or infinite values. Runs on the host."""
  wrong = ~np.isfinite(np.asarray(w, np.float32))
  if wrong.any():
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise ValueError(
        f"tensor {name!r}: {int(wrong.sum())} of {wrong.size} values are NaN or infinite, the first at {first}; "
        "the checkpoint is damaged or was saved from a run that diverged: take another one")
