"""The format `pack-quantized` of compressed-tensors 0.20: packed symmetric integers among Hugging Face's other tensors.

An expert's weight `NAME.weight` `[N, K]` becomes three tensors:

  NAME.weight_packed  int32 [N, ceil(K bits / 32)]: the codes of a row densely, lowest bits first; a code may lie across
                      two words (3 bits); the last word is filled up with zeros
  NAME.weight_scale   [N, G] in the dtype of the source; G = K / group, or 1
  NAME.weight_shape   int64 [2]: N, K

and stands for `(code - 2^(bits - 1)) * scale`. There are no zeros in the format, so the codes must be on the grid `ct`
(`codecs/grid.py`). config.json gets the key `quantization_config`: one entry of `config_groups` per scheme (bits and
group size), with the modules it holds for as names or regular expressions. Wider schemes come first: a reader that
takes the first scheme for all experts then finds too few codes and fails, instead of reading wrong weights.
"""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeq_jax import artifacts, codecs, progress
from moeq_jax.export import native, shard_writer

WIDTHS = (2, 3, 4, 8)
_SUFFIX = ".weight"


class Scheme(NamedTuple):
  """How a module's weight is packed: bits, and rows of K that share a scale (None: all, the format's `channel`)."""

  bits: int
  group: int | None


# Of every block with experts: expert -> projection -> (the module's name, its scheme).
Modules = dict[int, dict[int, dict[str, tuple[str, Scheme]]]]


def save(model: native.Quantized, directory: str | Path, names: shard_writer.Names, *, width: int | None = None,
         dtype: str | None = None, shard_bytes: int = shard_writer.SHARD_BYTES,
         advance: progress.Advance = lambda: None) -> Path:
  """Writes a quantized model in compressed-tensors' format, in the memory of one packed block and one shard.

  Args:
    model: the quantized model, encoded on the grid `ct`.
    directory: must not be there, or be empty; appears when all of it is written.
    names: how experts are called in the source.
    width: packs every expert in this many bits, with the same weights: a larger file with one scheme for all experts,
      which is all that some readers take. None: each in its own width.
    dtype: of the experts in the source, and so of scales, one of `shard_writer.DTYPES`; None: as config.json says.
    shard_bytes: most bytes of a file, unless a single tensor has more.
    advance: called after each of `model.layers + 1` parts.

  Returns:
    `directory`.

  Raises:
    shard_writer.ExportError: the model is on another grid, a width or a group size that the format does not have, a
      width below that of an expert, the directory is not empty; says what to do.
    native.QuantizedError: a file of the model is missing or damaged.
  """
  directory, config = Path(directory), model.config
  group, kind = _checked_group(model), shard_writer.dtype_of(config, dtype)
  modules: Modules = {}
  unquantized: list[str] = []
  with shard_writer.new_directory(directory) as place:
    writer = shard_writer.ShardWriter(place, shard_bytes)
    for layer in range(model.layers):
      packed, others = model.layer(layer)
      unquantized += _add_others(writer, others)
      for index, projection in itertools.product(range(_experts(packed)), packed):
        module = names(layer, index, projection).removesuffix(_SUFFIX)
        tensors, scheme = compress(shard_writer.Expert.of(packed[projection], index), group, kind, module, width)
        modules.setdefault(layer, {}).setdefault(index, {})[projection] = module, scheme
        for name, tensor in tensors.items():
          writer.add(f"{module}.{name}", tensor)
      advance()
    unquantized += _add_others(writer, model.top())
    writer.close()
    config["quantization_config"] = quantization_config(modules, unquantized)
    for name, content in model.files().items():
      artifacts.write_bytes(place / name, content)
    artifacts.write_bytes(place / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    advance()
  return directory


def _experts(packed: native.Packed) -> int:
  return next((q.shape[0] for q in packed.values()), 0)


def _add_others(writer: shard_writer.ShardWriter, tensors: native.Tensors) -> list[str]:
  """Writes tensors that are not quantized; returns the modules among them that have a matrix."""
  for name, tensor in tensors.items():
    writer.add(name, tensor)
  return [n.removesuffix(_SUFFIX) for n, tensor in tensors.items() if tensor.ndim == 2 and n.endswith(_SUFFIX)]


def _checked_group(model: native.Quantized) -> int:
  """The group size of the model's codec (0: all of K); raises `ExportError` unless its grid is `ct`."""
  spec = model.manifest["codec"]
  codec = codecs.get(spec)
  if codec.spec.grid != "ct":
    other = "gptq" if codec.name == "gptq" else "rtn"
    raise shard_writer.ExportError(
        f"{model.directory}: its codec {spec} has free zeros, the format has symmetric integers only; quantize with"
        f" {other}(group={codec.group}, grid=ct), or export to a dequantized checkpoint")
  return codec.group


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def compress(expert: shard_writer.Expert, group: int, dtype: np.dtype, module: str,
             width: int | None = None) -> tuple[dict[str, np.ndarray], Scheme]:
  """The three tensors of one module and its scheme; arguments and errors as in `save`."""
  rows, columns = expert.codes.shape
  bits = expert.bits if width is None else width
  if bits not in WIDTHS or expert.bits not in WIDTHS:
    raise shard_writer.ExportError(f"{module}: has {expert.bits or 'several'} bits, to be packed in {bits}; the"
                                   f" format is written with {WIDTHS} bits: plan with these widths")
  if bits < expert.bits:
    raise shard_writer.ExportError(f"{module}: has {expert.bits} bits, which do not fit width={width}; raise it")
  if (expert.zero != 2 ** (expert.bits - 1)).any():
    raise shard_writer.ExportError(f"{module}: its zeros are not {2 ** (expert.bits - 1)}; quantize with grid=ct")
  if group and rows > group and rows % group:
    raise shard_writer.ExportError(f"{module}: groups of {group} do not divide its {rows} inputs, as the format wants;"
                                   " quantize with another group, or with group=0 (one scale per output)")
  scale = expert.scale.T.astype(dtype)
  if not ((scale == expert.scale.T) & (scale > 0)).all():
    raise shard_writer.ExportError(f"{module}: a scale does not fit {dtype}; pass dtype='bfloat16' or 'float32'")
  codes = expert.codes.T + np.uint8(2 ** (bits - 1) - 2 ** (expert.bits - 1))
  tensors = {"weight_packed": pack(codes, bits), "weight_scale": scale,
             "weight_shape": np.array([columns, rows], np.int64)}
  return tensors, Scheme(bits, group if group and group <= rows else None)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Codes `[N, K]` uint8 below `2^bits` -> int32 `[N, ceil(K bits / 32)]`, dense, lowest bits first."""
  rows, columns = codes.shape
  eights = np.pad(codes, ((0, 0), (0, -columns % 8))).reshape(rows, -1, 8)
  words = np.zeros(eights.shape[:2], "<u8")  # eight codes fill `bits` bytes
  for place in range(8):
    words |= eights[:, :, place].astype("<u8") << np.uint64(bits * place)
  filled = words.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
  needed = 4 * -(-columns * bits // 32)
  filled = np.pad(filled, ((0, 0), (0, max(0, needed - filled.shape[1]))))[:, :needed]
  return np.ascontiguousarray(filled).view("<i4")


# ---------------------------------------------------------------------------------------------------------------------
# The entry in config.json
# ---------------------------------------------------------------------------------------------------------------------


def quantization_config(modules: Modules, unquantized: list[str]) -> dict[str, Any]:
  """The value of `quantization_config`: a group per scheme, widest first, and the modules that are not quantized."""
  schemes = {scheme for experts in modules.values() for parts in experts.values() for _, scheme in parts.values()}
  ordered = sorted(schemes, key=lambda s: (-s.bits, s.group or 0))
  return {
      "config_groups": {f"group_{i}": _config_group(targets(modules, s), s) for i, s in enumerate(ordered)},
      "format": "pack-quantized",
      "global_compression_ratio": None,
      "ignore": sorted(unquantized),
      "kv_cache_scheme": None,
      "quant_method": "compressed-tensors",
      "quantization_status": "compressed",
      "version": "0.20.0",
  }


def _config_group(modules: list[str], scheme: Scheme) -> dict[str, Any]:
  weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False,
             "strategy": "group" if scheme.group else "channel", "group_size": scheme.group}
  return {"targets": modules, "weights": weights, "input_activations": None, "output_activations": None,
          "format": "pack-quantized"}


def targets(modules: Modules, scheme: Scheme) -> list[str]:
  """What a group holds for: whole blocks and whole experts as regular expressions, else modules by name.

  Regular expressions are matched from the beginning of a module's name, and nothing else in a model begins so.
  """
  found = []
  for experts in modules.values():
    block = _shared([name for parts in experts.values() for name, _ in parts.values()])
    whole = {e: parts for e, parts in experts.items() if all(s == scheme for _, s in parts.values())}
    if len(whole) == len(experts):
      found.append(f"re:{re.escape(block)}")
    elif whole:
      tails = [_shared([name for name, _ in parts.values()])[len(block) : -1] for parts in whole.values()]
      found.append(f"re:{re.escape(block)}({'|'.join(map(re.escape, tails))})\\.")
    found += [name for e, parts in experts.items() if e not in whole for name, s in parts.values() if s == scheme]
  return found


def _shared(names: list[str]) -> str:
  """The longest beginning of all names that ends in a dot."""
  beginning = os.path.commonprefix(names)
  return beginning[: beginning.rfind(".") + 1]
