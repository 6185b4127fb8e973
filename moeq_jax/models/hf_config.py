"""`config.json` of Hugging Face in and out: what one of each family says, and what transformers 5.23 takes it for.

Both spellings are read: transformers 5 writes `rope_parameters` and `dtype`, older versions `rope_theta`,
`rope_scaling` and `torch_dtype`. Sizes must be given; another field that is missing has the value that transformers
takes for its family. A field that would change what the model computes and is not supported is an error, one that is
merely unknown a warning.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeq_jax.models import rope
from moeq_jax.models.decoder import DecoderConfig
from moeq_jax.models.hf_fields import Fields, error, positive, unknown_family
from moeq_jax.models.switch import SwitchConfig

Config = DecoderConfig | SwitchConfig
MOST_LAYERS, MOST_EXPERTS, LARGEST_HEAD = 10_000, 100_000, 2**16
FULL, SLIDING = "full_attention", "sliding_attention"

# What transformers 5.23 takes for a missing field (`None`: as many as attention heads).
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6},
    "qwen2_moe": {"num_key_value_heads": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e4},
    "qwen3_moe": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e4},
    "olmoe": {"num_key_value_heads": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 1e4},
    "llama": {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 1e4},
}
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM", "llama": "LlamaForCausalLM",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}


def read(values: Mapping[str, Any]) -> Config:
  """The model that `config.json` describes.

  Args:
    values: its content.

  Raises:
    ValueError: a field is missing, has a value that is not supported, or contradicts another; names it.
  """
  family, fields = values.get("model_type"), Fields(values)
  if family == "switch_transformers":
    return _read_switch(fields)
  if not isinstance(family, str) or family not in DEFAULTS:
    raise unknown_family(family, ARCHITECTURES)
  return _read_decoder(family, fields)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders
# ---------------------------------------------------------------------------------------------------------------------


def _read_decoder(family: str, fields: Fields) -> DecoderConfig:
  default = DEFAULTS[family]
  fields.one_of("hidden_act", ("silu",))
  layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
  heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
  config = DecoderConfig(
      family=family,
      vocab_size=fields.whole("vocab_size"),
      hidden_size=hidden,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=fields.whole("num_key_value_heads", default["num_key_value_heads"]) or heads,
      head_dim=fields.whole("head_dim", None, most=LARGEST_HEAD) or _whole_part("hidden_size", hidden, heads),
      rms_norm_eps=fields.number("rms_norm_eps", default["rms_norm_eps"]),
      tie_word_embeddings=fields.flag("tie_word_embeddings", False),
      max_position_embeddings=fields.whole("max_position_embeddings", default["max_position_embeddings"]),
      rope_theta=0.0, **_FAMILIES[family](fields, layers))
  theta, scaling = _read_rope(fields, default["rope_theta"], config.max_position_embeddings)
  config = dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)
  fields.check_rest(family)
  _check_decoder(config)
  return config


def _whole_part(name: str, size: int, heads: int) -> int:
  if size % heads:
    raise error(name, size, f"it is not a multiple of num_attention_heads {heads}, and head_dim is not given")
  return size // heads


def _experts(fields: Fields) -> dict[str, int]:
  experts = fields.whole("num_local_experts", most=MOST_EXPERTS)
  top_k = fields.whole("num_experts_per_tok")
  if top_k > experts:
    raise error("num_experts_per_tok", top_k, f"it is more than num_local_experts {experts}")
  return {"num_local_experts": experts, "num_experts_per_tok": top_k}


def _windows(fields: Fields, layers: int, window: int | None = None, kinds: list[str] | None = None,
             free: bool = False) -> dict[str, Any]:
  """The sliding window of every block.

  Args:
    fields: of the config; `layer_types` is read here.
    layers: how many blocks.
    window: positions that a token sees in a sliding block; None if there are none.
    kinds: of each block where `layer_types` does not say; None for all alike.
    free: whether `layer_types` may differ from that.
  """
  kinds = kinds or [FULL if window is None else SLIDING] * layers
  given = fields.get("layer_types", kinds)
  if not isinstance(given, list) or len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
    raise error("layer_types", given, f"{layers} times {FULL!r} or {SLIDING!r} is needed")
  if (SLIDING in given and window is None) or not (free or given == kinds):
    raise error("layer_types", given, "it contradicts sliding_window or use_sliding_window")
  return {"sliding_windows": tuple(window if kind == SLIDING else None for kind in given) if SLIDING in given else ()}


def _mixtral(fields: Fields, layers: int) -> dict[str, Any]:
  size = {"intermediate_size": fields.whole("intermediate_size")}
  return size | _experts(fields) | _windows(fields, layers, fields.whole("sliding_window", None))


def _qwen(fields: Fields, layers: int) -> dict[str, Any]:
  """What both Qwen families share."""
  only, step = set(fields.wholes("mlp_only_layers", layers)), fields.whole("decoder_sparse_step", 1)
  dense = tuple(l for l in range(layers) if l in only or (l + 1) % step)
  fields.get("intermediate_size")
  return _experts(fields) | {
      "intermediate_size": fields.whole("moe_intermediate_size"),
      "dense_size": fields.whole("intermediate_size") if dense else 0,
      "dense_layers": dense,
      "norm_topk_prob": fields.flag("norm_topk_prob", False),
  }


def _qwen_window(fields: Fields) -> int | None:
  fields.get("sliding_window")
  return fields.whole("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None


def _qwen2_moe(fields: Fields, layers: int) -> dict[str, Any]:
  window, below = _qwen_window(fields), fields.whole("max_window_layers", 28, least=0)
  kinds = [SLIDING if window and l % 2 == 0 and l < below else FULL for l in range(layers)]
  own = {"shared_size": fields.whole("shared_expert_intermediate_size"), "qkv_bias": fields.flag("qkv_bias", True)}
  return own | _qwen(fields, layers) | _windows(fields, layers, window, kinds, free=True)


def _biases(fields: Fields) -> dict[str, bool]:
  both = fields.flag("attention_bias", False)
  return {"qkv_bias": both, "o_bias": both}


def _qwen3_moe(fields: Fields, layers: int) -> dict[str, Any]:
  own = {"qk_norm": "head"} | _biases(fields)
  return own | _qwen(fields, layers) | _windows(fields, layers, _qwen_window(fields))


def _olmoe(fields: Fields, layers: int) -> dict[str, Any]:
  return _experts(fields) | _biases(fields) | _windows(fields, layers) | {
      "intermediate_size": fields.whole("intermediate_size"),
      "qk_norm": "whole",
      "clip_qkv": fields.number("clip_qkv", None),
      "norm_topk_prob": fields.flag("norm_topk_prob", False),
  }


def _llama(fields: Fields, layers: int) -> dict[str, Any]:
  size = {"intermediate_size": fields.whole("intermediate_size"), "num_local_experts": 0, "num_experts_per_tok": 0}
  return size | _biases(fields) | _windows(fields, layers)


_FAMILIES = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe, "llama": _llama}


def _check_decoder(config: DecoderConfig) -> None:
  """Raises a ValueError if the sizes contradict one another."""
  c = config
  if c.num_attention_heads % c.num_key_value_heads:
    raise error("num_attention_heads", c.num_attention_heads,
                f"it is not a multiple of num_key_value_heads {c.num_key_value_heads}")
  if c.head_dim % 2:
    raise error("head_dim", c.head_dim, "it is odd; rotary positions turn pairs")
  if c.qk_norm == "whole" and c.head_dim * c.num_attention_heads != c.hidden_size:
    raise error("head_dim", c.head_dim, f"it does not divide hidden_size {c.hidden_size} among the heads")
  with np.errstate(all="ignore"):
    try:
      fine = np.isfinite(c.rope().frequencies).all() and math.isfinite(c.rope().amplitude)
    except (ArithmeticError, ValueError):
      fine = False
  if not fine:
    raise error("rope_parameters", dict(c.rope_scaling), "they give rotations that are not finite")


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------------


def _read_rope(fields: Fields, theta: float, positions: int) -> tuple[float, tuple[tuple[str, Any], ...]]:
  """`rope_theta` and `rope_scaling` of a `DecoderConfig`, from both spellings."""
  given = {name: _spelling(name, fields.get(name)) for name in ("rope_parameters", "rope_scaling")}
  if all(given.values()):
    for key in given["rope_parameters"].keys() & given["rope_scaling"].keys():
      if given["rope_parameters"][key] != given["rope_scaling"][key]:
        raise error(f"{key} of rope_parameters and rope_scaling", [both[key] for both in given.values()],
                    "it is there in both spellings, with different values")
  items = given["rope_scaling"] | given["rope_parameters"]
  kind, inner, outer = items.pop("rope_type", "default"), items.pop("rope_theta", None), fields.get("rope_theta")
  if inner is not None and outer is not None and inner != outer:
    raise error("rope_theta", [outer, inner], "it is there in both spellings, with different values")
  theta = positive("rope_theta", theta if inner is outer is None else outer if inner is None else inner, 1)
  if items.pop("partial_rotary_factor", 1) != 1:
    raise error("partial_rotary_factor", given, "only whole heads are turned: 1 is supported")
  needed, optional = rope.PARAMETERS[kind]
  if wrong := sorted(set(needed) - items.keys() or items.keys() - {*needed, *optional}):
    state = "is missing" if wrong[0] in needed else "does not belong there"
    raise error("rope_parameters", items, f"{wrong[0]} {state} (rope_type {kind!r})")
  for name, value in items.items():
    if name != "truncate" or not isinstance(value, bool):
      positive(name, value)
  if kind == "llama3" and items["high_freq_factor"] <= items["low_freq_factor"]:
    raise error("high_freq_factor", items["high_freq_factor"],
                f"low_freq_factor {items['low_freq_factor']} is not below")
  if kind in ("llama3", "yarn"):
    items.setdefault("original_max_position_embeddings", positions)
  return theta, () if kind == "default" else tuple(sorted((items | {"rope_type": kind}).items()))


def _spelling(name: str, items: Any) -> dict[str, Any]:
  """The rotary parameters of one spelling, with `rope_type`, without nulls; empty if there are none."""
  if items is None or items == {}:
    return {}
  if not isinstance(items, dict) or any(isinstance(value, (dict, list)) for value in items.values()):
    raise error(name, items, "one set of parameters for all layers is needed")
  items = {key: value for key, value in items.items() if value is not None}
  kinds = [items.pop(key) for key in ("rope_type", "type") if key in items] or ["default"]
  if len(set(map(str, kinds))) > 1 or kinds[0] not in rope.PARAMETERS:
    raise error(f"rope_type of {name}", kinds[0] if len(kinds) == 1 else kinds,
                f"supported: {', '.join(rope.PARAMETERS)}")
  return items | {"rope_type": kinds[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Switch Transformer
# ---------------------------------------------------------------------------------------------------------------------


def _read_switch(fields: Fields) -> SwitchConfig:
  fields.one_of("dense_act_fn", ("relu",))
  fields.one_of("router_dtype", ("float32",))
  layers, vocabulary = fields.whole("num_layers", most=MOST_LAYERS), fields.whole("vocab_size")
  both = layers, fields.whole("num_decoder_layers", layers, most=MOST_LAYERS)
  encoder, decoder = (_sparse_blocks(fields, stack, n) for stack, n in zip(("encoder", "decoder"), both, strict=True))
  config = SwitchConfig(
      vocab_size=vocabulary,
      **{name: fields.whole(name) for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_experts")},
      num_layers=both[0],
      num_decoder_layers=both[1],
      expert_capacity=fields.whole("expert_capacity", 64),
      encoder_sparse=encoder,
      decoder_sparse=decoder,
      relative_attention_num_buckets=fields.whole("relative_attention_num_buckets", 32, least=4),
      relative_attention_max_distance=fields.whole("relative_attention_max_distance", 128),
      layer_norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
      tie_word_embeddings=fields.flag("tie_word_embeddings", True),
      decoder_start_token_id=fields.whole("decoder_start_token_id", 0, least=0, most=vocabulary - 1),
      eos_token_id=_ends(fields.get("eos_token_id", 1)),
      pad_token_id=fields.whole("pad_token_id", 0, least=0, most=vocabulary - 1),
  )
  fields.check_rest("switch_transformers")
  if config.num_experts > MOST_EXPERTS:
    raise error("num_experts", config.num_experts, f"more than {MOST_EXPERTS}")
  if config.relative_attention_max_distance <= config.relative_attention_num_buckets // 2:
    raise error("relative_attention_max_distance", config.relative_attention_max_distance,
                "it is not beyond the distances that have a bucket each")
  return config


def _ends(value: Any) -> int | tuple[int, ...]:
  values = value if isinstance(value, list) else [value]
  if not values or any(type(v) is not int or v < 0 for v in values):
    raise error("eos_token_id", value, "a token, or a list of tokens, is needed")
  return value if isinstance(value, int) else tuple(value)


def _every(layers: int, step: int) -> tuple[int, ...]:
  """The blocks that are sparse with this step, by the rule of transformers 5.23."""
  return tuple(l for l in range(layers) if step == 1 or (step > 0 and l % step == 1))


def _sparse_blocks(fields: Fields, stack: str, layers: int) -> tuple[int, ...]:
  """The sparse blocks of a stack, from how many there are or from the distance between them."""
  count = fields.whole(f"num_sparse_{stack}_layers", None, least=0)
  step = fields.whole(f"{stack}_sparse_step", None, least=0)
  counted = layers // (3 if count is None else count) if count != 0 else layers
  if step is not None and count is not None and step != counted:
    raise error(f"{stack}_sparse_step", step, f"num_sparse_{stack}_layers {count} of {layers} layers mean {counted}")
  return _every(layers, counted if step is None else step)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write(config: Config, dtype: str = "bfloat16") -> dict[str, Any]:
  """`config.json` of a model as transformers 5 writes it; `read` gives `config` back.

  Args:
    config: of any family.
    dtype: type of the stored tensors.

  Raises:
    ValueError: models of this family cannot be what `config` says; names the fields.
  """
  values = {"architectures": [ARCHITECTURES[config.family]], "model_type": config.family, "dtype": dtype}
  values |= _decoder_values(config) if isinstance(config, DecoderConfig) else _switch_values(config)
  again, config = read(values), _without_idle(config)
  names = (field.name for field in dataclasses.fields(config))
  if wrong := [name for name in names if getattr(again, name) != getattr(config, name)]:
    raise ValueError(f"a model of family {config.family} cannot have {wrong[0]} = {getattr(config, wrong[0])!r}")
  return values | {"use_cache": True}


def _without_idle(config: Config) -> Config:
  """The config with fields that change nothing, or are not in a `config.json`, as `read` sets them."""
  if isinstance(config, SwitchConfig):
    return dataclasses.replace(config, separate_embeddings=False)
  idle: dict[str, Any] = {} if config.dense_layers else {"dense_size": 0}
  if not config.num_local_experts:
    idle |= {"num_experts_per_tok": 0, "norm_topk_prob": True}
  if not any(config.sliding_windows):
    idle["sliding_windows"] = ()
  return dataclasses.replace(config, **idle)


def _decoder_values(config: DecoderConfig) -> dict[str, Any]:
  c, windows = config, config.sliding_windows
  same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
  values = {name: getattr(c, name) for name in same} | {
      "hidden_act": "silu", "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
      "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta} | dict(c.rope_scaling),
      "intermediate_size": c.intermediate_size}
  if c.num_local_experts:
    experts = "num_local_experts" if c.family == "mixtral" else "num_experts"
    values |= {experts: c.num_local_experts, "num_experts_per_tok": c.num_experts_per_tok}
  if c.family == "mixtral":
    return values | {"sliding_window": windows[0] if windows else None}
  if c.family != "qwen2_moe":
    values["attention_bias"] = c.o_bias
  if c.family == "llama":
    return values | {"mlp_bias": False}
  values["norm_topk_prob"] = c.norm_topk_prob
  if c.family == "olmoe":
    return values | {"clip_qkv": c.clip_qkv}
  values |= {"intermediate_size": c.dense_size or c.intermediate_size, "moe_intermediate_size": c.intermediate_size,
             "mlp_only_layers": list(c.dense_layers), "decoder_sparse_step": 1, "use_sliding_window": any(windows),
             "sliding_window": next(filter(None, windows), None)}
  if c.family == "qwen3_moe":
    return values
  kinds = [SLIDING if window else FULL for window in windows] or [FULL] * c.num_hidden_layers
  return values | {"shared_expert_intermediate_size": c.shared_size, "qkv_bias": c.qkv_bias, "layer_types": kinds}


def _switch_values(config: SwitchConfig) -> dict[str, Any]:
  values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
    counts = {layers // count: count for count in range(layers + 1, 0, -1)}  # transformers derives the step from it
    step = next((s for s in counts if _every(layers, s) == values[f"{stack}_sparse"]), layers)
    values |= {f"{stack}_sparse_step": step, f"num_sparse_{stack}_layers": counts.get(step, 0)}
  ends, idle = values["eos_token_id"], ("family", "encoder_sparse", "decoder_sparse", "separate_embeddings")
  return {name: value for name, value in values.items() if name not in idle} | {
      "dense_act_fn": "relu", "is_encoder_decoder": True, "router_bias": False, "router_dtype": "float32",
      "dropout_rate": 0.1, "eos_token_id": list(ends) if isinstance(ends, tuple) else ends}
