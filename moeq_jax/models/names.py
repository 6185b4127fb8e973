"""Where every parameter stands in a checkpoint: one table of templates per family, compiled to regular expressions.

A template is the name of a tensor with `{l}` for the block (of its stack) and `{e}` for the expert. Where a parameter
has several, any of them is read and the first is written. Experts stand in files in one of two layouts: a tensor per
expert, `[out, in]`; or fused, as modules of transformers 5.23 hold them: `gate_up_proj [E, 2F, D]`, gate first, and
`down_proj [E, D, F]`.
"""

import dataclasses
import functools
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from moeq_jax.models.hf_config import Config
from moeq_jax.models.switch import SwitchConfig

Shapes = dict[str, tuple[int, ...]]
EXPERTS = ("moe/gate", "moe/up", "moe/down")
GATE_UP = "moe/gate+up"  # the fused tensor of both
_NUMBER = "(0|[1-9][0-9]{0,5})"
_TURNED = frozenset("q k v o gate up down".split())


def _decoder(moe: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
  """The table of a decoder: what all share, and `moe`, whose templates begin after `model.layers.{l}.`."""
  block = {
      "attention_norm": ("input_layernorm.weight",),
      "ffn_norm": ("post_attention_layernorm.weight",),
      **{f"attention/{name}": (f"self_attn.{name}_proj.weight",) for name in "qkvo"},
      **{f"attention/{name}_bias": (f"self_attn.{name}_proj.bias",) for name in "qkvo"},
      **{f"attention/{name}_norm": (f"self_attn.{name}_norm.weight",) for name in "qk"},
      **{f"mlp/{name}": (f"mlp.{name}_proj.weight",) for name in ("gate", "up", "down")},
  }
  inside = {f"blocks/{name}": tuple(f"model.layers.{{l}}.{t}" for t in templates)
            for name, templates in (dict(moe) | block).items()}
  return inside | {"top/embedding": ("model.embed_tokens.weight",), "top/norm": ("model.norm.weight",),
                   "top/output": ("lm_head.weight",)}


def _moe(*prefixes: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Any]:
  """Router and experts below any of `prefixes`, with `names` for gate, up and down in the layout by expert."""
  every = lambda *tails: tuple(f"{prefix}.{tail}" for tail in tails for prefix in prefixes)
  return {
      **{name: every(f"experts.{{e}}.{tail}.weight") for name, tail in zip(EXPERTS[:2], names[:2], strict=True)},
      "moe/down": every(f"experts.{{e}}.{names[2]}.weight", "experts.down_proj"),
      GATE_UP: every("experts.gate_up_proj"),
      "moe/router": every("gate.weight"),
  }


def _switch(stack: str, feed: int) -> dict[str, tuple[str, ...]]:
  """One stack of a Switch Transformer; `feed` is the sublayer with the feed-forward network."""
  block, mlp = f"{stack}.block.{{l}}.layer", f"{stack}.block.{{l}}.layer.{feed}.mlp"
  table = {
      "moe/up": f"{mlp}.experts.expert_{{e}}.wi.weight", "moe/down": f"{mlp}.experts.expert_{{e}}.wo.weight",
      "moe/router": f"{mlp}.router.classifier.weight", "mlp/up": f"{mlp}.wi.weight", "mlp/down": f"{mlp}.wo.weight",
      "attention_norm": f"{block}.0.layer_norm.weight", "ffn_norm": f"{block}.{feed}.layer_norm.weight",
      **{f"attention/{name}": f"{block}.0.SelfAttention.{name}.weight" for name in "qkvo"},
  }
  if stack == "decoder":
    table |= {"cross_norm": f"{block}.1.layer_norm.weight"}
    table |= {f"cross/{name}": f"{block}.1.EncDecAttention.{name}.weight" for name in "qkvo"}
  return {f"{stack}/{name}": (template,) for name, template in table.items()}


_QWEN = _moe("mlp")
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": _decoder(_moe("block_sparse_moe", "mlp", names=("w1", "w3", "w2"))),
    "qwen2_moe": _decoder(_QWEN | {"moe/shared_gate": ("mlp.shared_expert_gate.weight",)} | {
        f"moe/shared/{name}": (f"mlp.shared_expert.{name}_proj.weight",) for name in ("gate", "up", "down")}),
    "qwen3_moe": _decoder(_QWEN),
    "olmoe": _decoder(_QWEN),
    "llama": _decoder({}),
    "switch_transformers": _switch("encoder", 1) | _switch("decoder", 2) | {
        "top/embedding": ("shared.weight",), "top/output": ("lm_head.weight",),
        **{f"top/{stack}_embedding": (f"{stack}.embed_tokens.weight",) for stack in ("encoder", "decoder")},
        "top/encoder_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
        "top/decoder_bias": ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
        "encoder/final_norm": ("encoder.final_layer_norm.weight",), "top/norm": ("decoder.final_layer_norm.weight",)},
}

# What checkpoints in use hold beside their parameters, and what it must be to be passed over: a copy of the embedding,
# the frequencies of the rotation, or a bias that is never added.
IGNORED: dict[str, dict[str, str]] = {
    family: {"lm_head.weight": "copy", "model.rotary_emb.inv_freq": "rotation",
             "model.layers.{l}.self_attn.rotary_emb.inv_freq": "rotation"} for family in TABLE} | {
    "switch_transformers": {
        "lm_head.weight": "copy", "encoder.embed_tokens.weight": "copy", "decoder.embed_tokens.weight": "copy",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "bias"}}


class Place(NamedTuple):
  """Where a tensor belongs.

  Attributes:
    parameter: `top/...` or `blocks/{l}/...`; `blocks/{l}/moe/gate+up` for both in one tensor.
    expert: which one; None for no expert, or for all in one tensor.
  """

  parameter: str
  expert: int | None


def _pattern(template: str) -> str:
  """The regular expression that matches the names of a template."""
  return re.escape(template).replace(r"\{l\}", _NUMBER).replace(r"\{e\}", _NUMBER)


@functools.cache
def _rules(family: str) -> tuple[re.Pattern, list[tuple[str, bool, bool]]]:
  """All templates of a family in one expression, and, by number of their outer group, what they stand for."""
  pairs = [(name, template) for name, templates in TABLE[family].items() for template in templates]
  pairs.sort(key=lambda pair: "{e}" not in pair[1])  # most tensors are experts
  meaning: list[tuple[str, bool, bool]] = [("", False, False)]
  for name, template in pairs:
    has = "{l}" in template, "{e}" in template
    meaning += [(name, *has)] + [("", False, False)] * sum(has)
  return re.compile("|".join(f"({_pattern(template)})" for _, template in pairs)), meaning


def place(config: Config, name: str) -> Place | None:
  """Where the tensor `name` belongs in a model of this config; None if it names no such block, expert or parameter."""
  pattern, meaning = _rules(config.family)
  if not (match := pattern.fullmatch(name)):
    return None
  group = next(i for i in range(1, len(meaning)) if meaning[i][0] and match[i] is not None)
  parameter, in_block, of_expert = meaning[group]
  stack, _, rest = parameter.partition("/")
  expert = int(match[group + 1 + in_block]) if of_expert else None
  if stack == "top":
    return Place(parameter, None) if parameter in top_shapes(config) else None
  if (expert or 0) >= max(expert_count(config), 1):
    return None
  first, count = _stack(config, stack)
  layer = int(match[group + 1]) if in_block else count - 1
  return Place(f"blocks/{first + layer}/{rest}", expert) if layer < count else None


def _stack(config: Config, stack: str) -> tuple[int, int]:
  """The first block of a stack, and how many it has."""
  if stack == "blocks":
    return 0, config.num_hidden_layers
  return (0, config.num_layers) if stack == "encoder" else (config.num_layers, config.num_decoder_layers)


def fitted(config: Config, tensors: Container[str]) -> Config:
  """The config of a model with these tensors: whether the stacks of an untied Switch Transformer have embeddings of
  their own is for no config to say."""
  if not isinstance(config, SwitchConfig) or config.tie_word_embeddings:
    return config
  return dataclasses.replace(config, separate_embeddings="encoder.embed_tokens.weight" in tensors)


@functools.cache
def _ignored_rules(family: str) -> list[tuple[re.Pattern, str]]:
  return [(re.compile(_pattern(template)), kind) for template, kind in IGNORED[family].items()]


def ignored(config: Config, name: str) -> str | None:
  """What the tensor `name` must be to be passed over: `copy`, `rotation` or `bias`; None if it must not be there."""
  for pattern, kind in _ignored_rules(config.family):
    if pattern.fullmatch(name):
      return kind if name != "lm_head.weight" or config.tie_word_embeddings else None
  return None


def tensor_names(config: Config, parameter: str) -> list[str]:
  """The tensors that make up a parameter where we write it: one, or one per expert.

  Args:
    config: of the model.
    parameter: `top/...` or `blocks/{l}/...`.
  """
  stack, layer, rest = "top", 0, parameter.removeprefix("top/")
  if parameter.startswith("blocks/"):
    _, number, rest = parameter.split("/", 2)
    stack, layer = "blocks", int(number)
    if isinstance(config, SwitchConfig):
      stack = "encoder" if layer < config.num_layers else "decoder"
      layer -= _stack(config, stack)[0]
  template = TABLE[config.family][f"{stack}/{rest}"][0]
  return [template.format(l=layer, e=e) for e in range(expert_count(config) if "{e}" in template else 1)]


def expert_names(config: Config, layer: int, expert: int) -> dict[str, str]:
  """The tensors of one expert of block `layer` in the layout by expert: `{projection: name}`, each `[out, in]`."""
  return {projection: tensor_names(config, f"blocks/{layer}/moe/{projection}")[expert]
          for projection in projections(config)}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def projections(config: Config) -> tuple[str, ...]:
  """The projections of an expert, in the order of `artifacts.PROJECTIONS`."""
  return ("up", "down") if isinstance(config, SwitchConfig) else ("gate", "up", "down")


def expert_count(config: Config) -> int:
  """E; 0 for a dense model."""
  return config.num_experts if isinstance(config, SwitchConfig) else config.num_local_experts


def block_count(config: Config) -> int:
  """Blocks, of both stacks where there are two."""
  return config.blocks if isinstance(config, SwitchConfig) else config.num_hidden_layers


def is_expert(parameter: str) -> bool:
  """Whether a parameter is a stack of experts."""
  return parameter.split("/", 2)[-1] in EXPERTS


def turned(parameter: str) -> bool:
  """Whether the files hold this parameter as `[out, in]`."""
  return parameter.rsplit("/", 1)[-1] in _TURNED


def top_shapes(config: Config) -> Shapes:
  """The parameters outside the blocks and their shapes, weights `[in, out]`."""
  c = config
  width = c.d_model if isinstance(c, SwitchConfig) else c.hidden_size
  shapes: Shapes = {"top/embedding": (c.vocab_size, width), "top/norm": (width,)}
  if isinstance(c, SwitchConfig):
    shapes |= {f"top/{stack}_bias": (c.relative_attention_num_buckets, c.num_heads) for stack in ("encoder", "decoder")}
    if c.separate_embeddings:
      shapes |= {f"top/{stack}_embedding": (c.vocab_size, width) for stack in ("encoder", "decoder")}
  return shapes if c.tie_word_embeddings else shapes | {"top/output": (c.vocab_size, width)}


def block_shapes(config: Config, layer: int) -> Shapes:
  """The parameters of block `layer` and their shapes, weights `[in, out]`, experts `[E, in, out]`."""
  inside = _switch_block(config, layer) if isinstance(config, SwitchConfig) else _decoder_block(config, layer)
  return {f"blocks/{layer}/{name}": shape for name, shape in inside.items()}


def _attention(prefix: str, width: int, q: int, kv: int) -> Shapes:
  return {f"{prefix}/q": (width, q), f"{prefix}/k": (width, kv), f"{prefix}/v": (width, kv), f"{prefix}/o": (q, width)}


def _feed(prefix: str, names: tuple[str, ...], width: int, ffn: int, *stack: int) -> Shapes:
  return {f"{prefix}/{name}": (*stack, *((ffn, width) if name == "down" else (width, ffn))) for name in names}


def _decoder_block(c: Config, layer: int) -> Shapes:
  width, head = c.hidden_size, c.head_dim
  sizes = {"q": c.num_attention_heads * head, "k": c.num_key_value_heads * head, "v": c.num_key_value_heads * head}
  shapes = {"attention_norm": (width,), "ffn_norm": (width,)} | _attention("attention", width, sizes["q"], sizes["k"])
  if c.qkv_bias:
    shapes |= {f"attention/{name}_bias": (size,) for name, size in sizes.items()}
  if c.o_bias:
    shapes["attention/o_bias"] = (width,)
  if c.qk_norm:
    shapes |= {f"attention/{name}_norm": (head if c.qk_norm == "head" else sizes[name],) for name in "qk"}
  if not c.sparse(layer):
    return shapes | _feed("mlp", projections(c), width, c.dense_size if c.num_local_experts else c.intermediate_size)
  shapes |= {"moe/router": (c.num_local_experts, width)}
  if c.shared_size:
    shapes |= {"moe/shared_gate": (1, width)} | _feed("moe/shared", projections(c), width, c.shared_size)
  return shapes | _feed("moe", projections(c), width, c.intermediate_size, c.num_local_experts)


def _switch_block(c: SwitchConfig, layer: int) -> Shapes:
  width, inner = c.d_model, c.num_heads * c.d_kv
  shapes = {"attention_norm": (width,), "ffn_norm": (width,)} | _attention("attention", width, inner, inner)
  if layer >= c.num_layers:
    shapes |= {"cross_norm": (width,)} | _attention("cross", width, inner, inner)
  if layer == c.num_layers - 1:
    shapes["final_norm"] = (width,)
  if not c.sparse(layer):
    return shapes | _feed("mlp", projections(c), width, c.d_ff)
  return shapes | {"moe/router": (c.num_experts, width)} | _feed("moe", projections(c), width, c.d_ff, c.num_experts)
