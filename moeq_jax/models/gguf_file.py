"""Dense language models from GGUF files (llama architecture), with the tokenizer that the file carries.

The `gguf` library reads the file and turns its quantized blocks into float32. Two things differ from Hugging Face's
format, into which everything is brought here: tensor names, and the order of the rows of q and k. The file keeps the
two numbers that a rotary position turns together next to each other, Hugging Face half a head apart.

Only the byte-level BPE tokenizer (`gpt2`) is read. Its metadata names the rule that cuts text before the merges; a rule
that is not in `CUTS` is an error, since a wrong one gives other tokens in silence.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from moeq_jax.models import convert, decoder, hf_config

ARCHITECTURE = "llama"
# The file's name -> Hugging Face's.
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
CUTS = {"gpt-2": False, "smollm": True}  # tokenizer.ggml.pre -> whether every digit stands alone
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are cut out of the text before anything else


class _Reader(gguf.GGUFReader):
  """The library's reader, which at the end of a truncated file would return less than asked for and go on."""

  def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
    if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
      raise ValueError(f"bytes {offset} and on are past its end: it is truncated")
    return super()._get(offset, dtype, count, override_order)


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An opened file; tensors are read when asked for.

  Attributes:
    path: of the file.
    values: what `config.json` would say.
    config: sizes.
    fields: metadata by key.
    tensors: the library's entries under Hugging Face's names.
  """

  path: Path
  values: dict[str, Any]
  config: decoder.DecoderConfig
  fields: Mapping[str, Any]
  tensors: Mapping[str, gguf.ReaderTensor]

  def tensor(self, name: str) -> np.ndarray:
    """A tensor by Hugging Face's name, as Hugging Face orders it, float32.

    Raises:
      convert.CheckpointError: its type cannot be read.
    """
    entry = self.tensors[name]
    try:
      array = gguf.dequantize(entry.data, entry.tensor_type)
    except NotImplementedError:
      raise convert.CheckpointError(f"{self.path}: tensor {entry.name} is of type {entry.tensor_type.name}, which the"
                                    " gguf library cannot turn into numbers; take a file of another type") from None
    heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
    for part, count in heads.items():
      if part in name:
        array = halves(array, count)
    return np.asarray(array, np.float32)

  def tensors_of(self, l: int | None) -> dict[str, np.ndarray]:
    """The tensors of block `l` (None: of no block) by Hugging Face's names."""
    prefix = f"model.layers.{l}."
    chosen = (name for name in self.tensors if (name.startswith(prefix) if l is not None else ".layers." not in name))
    return {name: self.tensor(name) for name in chosen}

  def top(self, dtype: Any = None) -> Any:
    """Embedding, final norm and output projection."""
    return convert.build_top(self.config, self.tensors_of(None), dtype)

  def block(self, l: int, dtype: Any = None) -> Any:
    """Block `l`."""
    return convert.build_block(self.config, l, self.tensors_of(l), dtype)

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The file's tokenizer.

    Raises:
      convert.CheckpointError: it is of another kind, cuts text by an unknown rule, or contradicts itself.
    """
    try:
      return _tokenizer(self.fields)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
      raise convert.CheckpointError(f"{self.path}: its tokenizer cannot be read ({error}); take the model's"
                                    " safetensors checkpoint, which has a tokenizer.json") from None


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k `[heads * size, D]`, from pairs side by side to pairs half a head apart."""
  size = len(rows) // heads
  return rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: Path) -> GgufFile:
  """Opens a GGUF file: metadata and the places of the tensors.

  Raises:
    convert.CheckpointError: the file is missing, damaged, of another architecture, or describes a model that is not
      supported; names the field or the tensor.
  """
  if not path.is_file():
    raise convert.CheckpointError(f"{path}: not found; expected a GGUF file")
  try:
    reader = _Reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except Exception as error:  # the library raises whatever a wrong byte leads to
    raise convert.CheckpointError(f"{path}: cannot be read as GGUF ({error}); copy it again") from None
  try:
    values = _config_values(fields, {tensor.name: tensor.shape.tolist() for tensor in reader.tensors})
    config = hf_config.read(values)
    tensors = _named(reader.tensors, config)
  except ValueError as error:
    raise convert.CheckpointError(f"{path}: {error}") from None
  return GgufFile(path, values, config, fields, tensors)


def _config_values(fields: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Any]:
  """The model's `config.json`, from the metadata; raises a ValueError that names what is missing or unsupported."""
  if fields.get("general.architecture") != ARCHITECTURE:
    raise ValueError(f"general.architecture is {fields.get('general.architecture')!r}; supported: {ARCHITECTURE!r}")
  if fields.get("llama.expert_count"):
    raise ValueError("llama.expert_count is set; a GGUF file with experts is not supported: take the safetensors one")
  if fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in shapes:
    raise ValueError("rotary positions are scaled (llama.rope.scaling or rope_freqs.weight); that is not supported in a"
                     " GGUF file: take the safetensors one")

  def number(name: str, default: Any = None) -> Any:
    value = fields.get(f"llama.{name}", default)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise ValueError(f"llama.{name} is {value!r}; a number is needed")
    return value

  heads, hidden = number("attention.head_count"), number("embedding_length")
  head_dim = number("attention.key_length", hidden // max(heads, 1))
  for name in ("attention.value_length", "rope.dimension_count"):
    if number(name, head_dim) != head_dim:
      raise ValueError(f"llama.{name} is {number(name)}, heads have {head_dim}; that is not supported")
  return {
      "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "dtype": "float32",
      "vocab_size": shapes.get("token_embd.weight", [0, 0])[-1],
      "hidden_size": hidden, "intermediate_size": number("feed_forward_length"),
      "num_hidden_layers": number("block_count"), "num_attention_heads": heads,
      "num_key_value_heads": number("attention.head_count_kv", heads), "head_dim": head_dim,
      "max_position_embeddings": number("context_length"),
      "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
      "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base", 1e4)},
      "tie_word_embeddings": "output.weight" not in shapes, "attention_bias": False,
      "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
      "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
  }


def _named(tensors: list[gguf.ReaderTensor], config: decoder.DecoderConfig) -> dict[str, gguf.ReaderTensor]:
  """The tensors under Hugging Face's names; each must have a place, and no place may stay empty."""
  found = {}
  for tensor in tensors:
    layer, rest = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)", tensor.name).groups()
    table = TOP if layer is None else BLOCK
    if rest not in table or (layer is not None and int(layer) >= config.num_hidden_layers):
      raise ValueError(f"tensor {tensor.name} has no place in a {ARCHITECTURE} model of {config.num_hidden_layers}"
                       " blocks")
    found[table[rest] if layer is None else f"model.layers.{int(layer)}.{table[rest]}"] = tensor
  wanted = [TOP[name] for name in TOP if not (name == "output.weight" and config.tie_word_embeddings)]
  wanted += [f"model.layers.{l}.{name}" for l in range(config.num_hidden_layers) for name in BLOCK.values()]
  if missing := [name for name in wanted if name not in found]:
    raise ValueError(f"the tensor for {missing[0]} is missing ({len(missing)} of this kind)")
  return found


def _tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
  get = lambda name: fields[f"tokenizer.ggml.{name}"]
  if get("model") != "gpt2":
    raise ValueError(f"tokenizer.ggml.model is {get('model')!r}; supported: 'gpt2' (byte-level BPE)")
  if get("pre") not in CUTS:
    raise ValueError(f"tokenizer.ggml.pre is {get('pre')!r}; supported: {', '.join(CUTS)}")
  vocabulary = {token: index for index, token in enumerate(get("tokens"))}
  if len(vocabulary) != len(get("tokens")):
    raise ValueError("tokenizer.ggml.tokens holds a token twice")
  merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix")))
  digits = [pre_tokenizers.Digits(individual_digits=True)] if CUTS[get("pre")] else []
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
  tokenizer.decoder = decoders.ByteLevel()
  for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
    chosen = [token for token, of in zip(get("tokens"), fields.get("tokenizer.ggml.token_type", [])) if of == kind]
    add([tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL) for token in chosen])
  if fields.get("tokenizer.ggml.add_bos_token"):
    first = get("tokens")[get("bos_token_id")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocabulary[first])])
  return tokenizer
