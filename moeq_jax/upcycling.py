"""The command `upcycle`: a dense checkpoint or GGUF file becomes a Mixtral-format one, block by block."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moeq_jax import artifacts, language_model, options, progress, registry, runs
from moeq_jax.export import shard_writer
from moeq_jax.models import convert, decoder, gguf_file, hf_config, names
from moeq_jax.train import upcycle

USAGE = "upcycle SOURCE DIR [--experts=8] [--top_k=2] [--method=copy]"
DENSE = {f"mlp.{name}_proj.weight": name for name in ("gate", "up", "down")}


@dataclasses.dataclass(frozen=True)
class Source:
  """A dense model on disk.

  Attributes:
    config: sizes.
    values: what config.json says.
    tensors: of block l (None: of no block), by Hugging Face's names.
    tokenizer: None if there is none.
  """

  config: decoder.DecoderConfig
  values: dict[str, Any]
  tensors: Callable[[int | None], dict[str, np.ndarray]]
  tokenizer: tokenizers.Tokenizer | None


def open_source(place: Path) -> Source:
  """Opens a dense checkpoint directory or a GGUF file.

  Raises:
    convert.CheckpointError: it cannot be read, or the model is not a dense one.
  """
  if place.is_file():
    file = gguf_file.open_gguf(place)
    return Source(file.config, file.values, file.tensors_of, file.tokenizer())
  checkpoint = convert.open_checkpoint(place)
  if checkpoint.config.family != "llama":
    raise convert.CheckpointError(f"{place}: is of family {checkpoint.config.family}; upcycle takes a dense model of"
                                  " family llama")
  tokenizer = language_model.open_tokenizer(place, checkpoint.config)
  return Source(checkpoint.config, checkpoint.values, checkpoint.others, tokenizer)


def command(arguments: Sequence[str]) -> None:
  """Writes a Mixture-of-Experts checkpoint made of a dense one.

  Raises:
    runs.UsageError: a wrong option.
    ValueError: the source cannot be read or be made into such a model, or the directory is not empty.
  """
  defaults = {"experts": 8, "top_k": 2, "method": "copy", "seed": 0, "dtype": "bfloat16"}
  chosen, (source, directory) = options.parse(arguments, USAGE, defaults, places=2)
  if chosen.method not in upcycle.METHODS:
    near = registry.did_you_mean(chosen.method, upcycle.METHODS)
    raise runs.UsageError(f"unknown method {chosen.method!r}{near} (methods: {', '.join(upcycle.METHODS)})")
  if not 1 <= chosen.top_k <= chosen.experts:
    raise runs.UsageError(f"--top_k={chosen.top_k}: between 1 and --experts={chosen.experts}")
  if chosen.seed < 0:
    raise runs.UsageError(f"--seed={chosen.seed}: at least 0")
  if chosen.dtype not in language_model.DTYPES:
    raise runs.UsageError(f"--dtype={chosen.dtype}: one of {', '.join(language_model.DTYPES)}")
  write(open_source(Path(source)), Path(directory), **vars(chosen))
  print(f"{directory}: {chosen.experts} experts in every layer, {chosen.top_k} of them for a token", file=sys.stderr)


def write(source: Source, directory: Path, *, experts: int, top_k: int, method: str, seed: int, dtype: str) -> None:
  """Writes `source` as a Mixtral-format checkpoint with experts, in the memory of one block and one shard.

  Args:
    source: the dense model.
    directory: must not be there, or be empty; appears when all of it is written.
    experts, top_k: of every layer, and of a token.
    method: a name in `upcycle.METHODS`.
    seed: of the routers, or of the clustering; another one for every layer.
    dtype: of the tensors written.
  """
  dense, kind = source.config, shard_writer.DTYPES[dtype]
  width = dense.intermediate_size
  if method == "split":
    width = upcycle.split_width(width, experts)
  config = dataclasses.replace(dense, family="mixtral", num_local_experts=experts, num_experts_per_tok=top_k,
                               intermediate_size=width)
  values = hf_config.write(config, dtype) | {n: source.values.get(n) for n in ("bos_token_id", "eos_token_id")}
  with (shard_writer.new_directory(directory) as place,
        progress.bar("upcycle", dense.num_hidden_layers) as advance):
    writer = shard_writer.ShardWriter(place, shard_writer.SHARD_BYTES)
    for name, tensor in source.tensors(None).items():
      writer.add(name, tensor.astype(kind))
    for l in range(dense.num_hidden_layers):
      for name, tensor in _block(source.tensors(l), config, l, method, seed).items():
        writer.add(name, tensor.astype(kind))
      advance()
    writer.close()
    artifacts.write_json(place / "config.json", values)
    if source.tokenizer:
      artifacts.write_bytes(place / "tokenizer.json", source.tokenizer.to_str().encode())


def _block(tensors: dict[str, np.ndarray], config: decoder.DecoderConfig, l: int, method: str,
           seed: int) -> dict[str, np.ndarray]:
  """The tensors of a block with experts, from those of the dense one."""
  prefix = f"model.layers.{l}."
  weights = {part: tensors.pop(prefix + name).T.astype(np.float32) for name, part in DENSE.items()}
  router, parts = upcycle.METHODS[method](weights, config.num_local_experts, config.num_experts_per_tok, seed + l)
  place = f"blocks/{l}/moe/"
  tensors[names.tensor_names(config, place + "router")[0]] = router
  for part, stacked in parts.items():
    tensors |= dict(zip(names.tensor_names(config, place + part), np.swapaxes(stacked, 1, 2), strict=True))
  return tensors
