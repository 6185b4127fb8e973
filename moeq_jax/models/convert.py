"""Hugging Face checkpoints in and out: one table of rules maps tensor names.

Weights are `[out, in]` in the files and `[in, out]` here. Every tensor of a checkpoint must be used, and every
parameter of the model filled: anything else is an error that names the file and the tensor.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from moeq_jax import artifacts
from moeq_jax.models import decoder

# our parameter -> (tensor in the file, transposed); {e} stands for the expert.
TOP = {
    "top/embedding": ("model.embed_tokens.weight", False),
    "top/norm": ("model.norm.weight", False),
    "top/output": ("lm_head.weight", False),
}
BLOCK = {
    "attention_norm": ("input_layernorm.weight", False),
    "moe_norm": ("post_attention_layernorm.weight", False),
    "attention/q": ("self_attn.q_proj.weight", True),
    "attention/k": ("self_attn.k_proj.weight", True),
    "attention/v": ("self_attn.v_proj.weight", True),
    "attention/o": ("self_attn.o_proj.weight", True),
    "moe/router": ("block_sparse_moe.gate.weight", False),
    "moe/gate": ("block_sparse_moe.experts.{e}.w1.weight", True),
    "moe/up": ("block_sparse_moe.experts.{e}.w3.weight", True),
    "moe/down": ("block_sparse_moe.experts.{e}.w2.weight", True),
}
FLOATS = ("bfloat16", "float16", "float32", "float64")


class CheckpointError(ValueError):
  """A checkpoint cannot be read: the message names the file, the tensor and the remedy."""


def _path_name(path: tuple[Any, ...]) -> str:
  keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
  return "/".join(k for k in keys if k != "value")


def named_leaves(model: decoder.Decoder) -> dict[str, Any]:
  """The model's parameters by path, for example `blocks/0/moe/gate`."""
  return {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def _tensor_names(parameter: str, experts: int) -> tuple[list[str], bool]:
  """The tensors that make up a parameter (one, or one per expert), and whether they are transposed."""
  if parameter in TOP:
    name, transposed = TOP[parameter]
    return [name], transposed
  _, layer, rest = parameter.split("/", 2)
  name, transposed = BLOCK[rest]
  name = f"model.layers.{layer}.{name}"
  return ([name.format(e=e) for e in range(experts)] if "{e}" in name else [name]), transposed


def read_config(directory: Path) -> tuple[decoder.DecoderConfig, dict[str, Any]]:
  """Reads `config.json`: the sizes and the raw values.

  Raises:
    CheckpointError: the directory or the file is missing, is not JSON, or describes a model that is not supported.
  """
  path = directory / "config.json"
  if not path.is_file():
    raise CheckpointError(f"{path}: not found; expected a directory in Hugging Face format")
  try:
    values = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from None
  if not isinstance(values, dict):
    raise CheckpointError(f"{path}: holds no JSON object; copy the file again")
  try:
    return decoder.from_config(values), values
  except ValueError as error:
    raise CheckpointError(f"{directory}: {error}") from None


class _Stored(NamedTuple):
  """A tensor and the file that it stands in."""

  file: Path
  array: np.ndarray


def _open_tensors(directory: Path) -> dict[str, _Stored]:
  files = sorted(directory.glob("model*.safetensors"))
  if not files:
    raise CheckpointError(f"{directory}: no model*.safetensors in it; expected a checkpoint in Hugging Face format")
  return {name: _Stored(file, array) for file in files for name, array in _read(file).items()}


def _read(file: Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(file)
  except AttributeError as error:  # what the library does with the 8-bit floats that numpy lacks
    raise CheckpointError(f"{file}: holds a type of tensor that cannot be read ({error}); the checkpoint is quantized: "
                          "take the original one") from None
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise CheckpointError(f"{file}: cannot be read ({error}); it is truncated or damaged: copy it again") from None


def _checked(file: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The tensor itself, once its type, shape and values are seen to be right."""
  if array.dtype.name not in FLOATS:
    raise CheckpointError(f"{file}: tensor {name} is {array.dtype}, not one of {', '.join(FLOATS)}; the checkpoint is "
                          "quantized: take the original one")
  if array.shape != shape:
    raise CheckpointError(f"{file}: tensor {name} has shape {list(array.shape)}, config.json implies {list(shape)};"
                          " the config belongs to another checkpoint")
  if not np.isfinite(array.astype(np.float32)).all():
    raise CheckpointError(f"{file}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
  return array


def load(directory: Path, dtype: jnp.dtype = jnp.float32) -> tuple[decoder.Decoder, decoder.DecoderConfig]:
  """Reads a checkpoint directory into a model with parameters in `dtype`.

  Raises:
    CheckpointError: a file is missing or damaged; a tensor is missing, unused, of a wrong shape or type, or not finite.
  """
  config, _ = read_config(directory)
  stored = _open_tensors(directory)
  model = jax.eval_shape(lambda: decoder.Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
  leaves = []
  for parameter, leaf in named_leaves(model).items():
    names, transposed = _tensor_names(parameter, config.num_local_experts)
    if missing := [n for n in names if n not in stored]:
      raise CheckpointError(f"{directory}: tensor {missing[0]} is missing ({len(missing)} of this kind); a shard is "
                            "not there, or the tensors have other names: copy all files of the checkpoint again")
    shape = leaf.shape[1:] if leaf.ndim == 3 else leaf.shape
    shape = shape[::-1] if transposed else shape
    parts = [_checked(file, n, array, shape) for n in names for file, array in [stored.pop(n)]]
    parts = [p.T if transposed else p for p in parts]
    leaves.append(jnp.asarray(np.stack(parts) if leaf.ndim == 3 else parts[0]).astype(dtype))
  if stored:
    name = min(stored)
    raise CheckpointError(f"{stored[name].file}: tensor {name} has no place in the model that config.json describes "
                          f"({len(stored)} such tensors); the config belongs to another checkpoint")
  return jax.tree.unflatten(jax.tree.structure(model), leaves), config


def tensors(model: decoder.Decoder, experts: int) -> dict[str, np.ndarray]:
  """The model's parameters as bfloat16 tensors under Hugging Face's names."""
  out = {}
  for parameter, leaf in named_leaves(model).items():
    names, transposed = _tensor_names(parameter, experts)
    array = np.asarray(leaf).astype(ml_dtypes.bfloat16)
    parts = array if leaf.ndim == 3 else [array]
    out |= {name: np.ascontiguousarray(part.T if transposed else part) for name, part in zip(names, parts)}
  return out


def config_values(config: decoder.DecoderConfig) -> dict[str, Any]:
  """`config.json` of a Mixtral model as transformers 5 writes it."""
  values = dataclasses.asdict(config)
  theta = values.pop("rope_theta")
  return values | {
      "architectures": ["MixtralForCausalLM"],
      "model_type": "mixtral",
      "dtype": "bfloat16",
      "hidden_act": "silu",
      "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
      "sliding_window": None,
      "attention_dropout": 0.0,
      "bos_token_id": 0,
      "eos_token_id": 0,
      "use_cache": True,
  }


def save(directory: Path, model: decoder.Decoder, config: decoder.DecoderConfig) -> None:
  """Writes `config.json` and `model.safetensors` (bfloat16) in Hugging Face's Mixtral format."""
  artifacts.write_json(directory / "config.json", config_values(config))
  data = safetensors.numpy.save(tensors(model, config.num_local_experts), metadata={"format": "pt"})
  artifacts.write_bytes(directory / "model.safetensors", data)


def routers(model: decoder.Decoder) -> np.ndarray:
  """The router weights of all layers, `[L, E, D]` float32."""
  return np.stack([np.asarray(block.moe.router[...], np.float32) for block in model.blocks])


def save_routers(path: Path, routers_LxExD: np.ndarray) -> None:
  """Writes router weights `[L, E, D]` as one float32 tensor per layer, under Hugging Face's names."""
  named = {f"model.layers.{l}.{BLOCK['moe/router'][0]}": np.asarray(r, np.float32) for l, r in enumerate(routers_LxExD)}
  artifacts.write_bytes(path, safetensors.numpy.save(named, metadata={"format": "pt"}))


def load_routers(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads what `save_routers` wrote: `[L, E, D]` float32.

  Raises:
    CheckpointError: the file is missing or damaged, or its routers are not of `shape` or not finite.
  """
  if not path.is_file():
    raise CheckpointError(f"{path}: not found; router_norm_change needs the routers from before training")
  named = _read(path)
  names = [f"model.layers.{l}.{BLOCK['moe/router'][0]}" for l in range(shape[0])]
  if wrong := sorted(named.keys() ^ set(names)):
    state = "has no place" if wrong[0] in named else "is missing"
    raise CheckpointError(f"{path}: tensor {wrong[0]} {state}; the file holds the initial routers of another model, not"
                          f" of this one with {shape[0]} layers")
  return np.stack([_checked(path, name, named[name], shape[1:]) for name in names]).astype(np.float32)
