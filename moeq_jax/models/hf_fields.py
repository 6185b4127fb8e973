"""Fields of a `config.json`: read with their types checked, and none left that could change what a model computes."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moeq_jax import registry
from moeq_jax.tensor_files import shown

LARGEST = 2**31 - 1  # of any size
REQUIRED: Any = object()

# The same quantity under two names: transformers writes either, depending on its version.
ALIASES = {"num_local_experts": "num_experts", "num_experts": "num_local_experts", "d_model": "hidden_size",
           "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}

# Fields that change what a model computes and that no model here has, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,), "attention_bias": (False,), "attention_multiplier": (), "attention_sinks": (False,),
    "attn_logit_softcapping": (), "clip_qkv": (), "dense_act_fn": ("relu",), "embedding_multiplier": (1, 1.0),
    "expert_bias": (False,), "feed_forward_proj": ("relu",), "final_logit_softcapping": (),
    "first_k_dense_replace": (0,), "hidden_act": ("silu",), "is_gated_act": (False,),
    "logit_scale": (1, 1.0), "logits_scaling": (1, 1.0), "mlp_bias": (False,), "moe_layer_freq": (1,),
    "n_group": (1,), "n_shared_experts": (0,), "norm_topk_prob": (True,), "num_nextn_predict_layers": (0,),
    "num_selected_experts": (1,), "num_shared_experts": (0,), "original_max_position_embeddings": (),
    "parallel_attn": (False,), "partial_rotary_factor": (1, 1.0), "per_layer_config": ({},), "pretraining_tp": (1,),
    "qk_layernorm": (False,), "qkv_bias": (False,), "quantization_config": (), "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0), "rotary_pct": (1, 1.0), "routed_scaling_factor": (1, 1.0),
    "router_bias": (False,), "scoring_func": ("softmax",), "shared_expert_intermediate_size": (0,),
    "sliding_window": (), "topk_group": (1,), "use_qk_norm": (False,), "use_sliding_window": (False,),
}

# Fields that describe training, files, generation or output, and what configs in use carry without any effect.
HARMLESS = frozenset("""
    _attn_implementation _commit_hash _name_or_path add_cross_attention add_router_probs architectures
    attention_dropout auto_map bad_words_ids batch_prioritized_routing begin_suppress_tokens bos_token_id
    capacity_factor chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout_rate dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length n_positions name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_router_logits output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate router_aux_loss_coef router_ignore_padding_tokens router_jitter_noise router_type
    router_z_loss_coef sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unk_token_id use_bfloat16 use_cache
""".split())

log = logging.getLogger(__name__)


def error(name: str, value: Any, needed: str) -> ValueError:
  """The error of a field whose value cannot be."""
  return ValueError(f"config.json: {name} is {shown(repr(value))}; {needed}")


class Fields:
  """The fields of a config; `check_rest` looks at those that nobody asked for. Null counts as missing.

  Args:
    values: what `config.json` holds.
  """

  def __init__(self, values: Mapping[str, Any]):
    self._values = values
    self._asked = {"model_type"}

  def get(self, name: str, default: Any = None) -> Any:
    """The value of a field as it is, or of the other name that it may have.

    Raises:
      ValueError: it is there under both names, with different values.
    """
    names = [n for n in (name, ALIASES.get(name)) if n]
    self._asked.update(names)
    found = {n: self._values[n] for n in names if self._values.get(n) is not None}
    values = list(found.values())
    if len(values) == 2 and values[0] != values[1]:
      raise error(" and ".join(found), values, "they are two names of one field and must agree")
    return values[0] if values else default

  def whole(self, name: str, default: Any = REQUIRED, least: int = 1, most: int = LARGEST) -> Any:
    """A whole number from `least` to `most`, or `default`, unchecked, where the field is missing."""
    value = self.get(name)
    if value is None and default is not REQUIRED:
      return default
    if type(value) is not int or not least <= value <= most:
      raise error(name, value, f"a whole number is needed, from {least} to {most}")
    return value

  def number(self, name: str, default: float | None, least: float = 0.0) -> float | None:
    """A finite number above `least`, or `default` where the field is missing."""
    value = self.get(name, default)
    return value if value is None else positive(name, value, least)

  def flag(self, name: str, default: bool) -> bool:
    """True or false, or `default` where the field is missing."""
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise error(name, value, "true or false is needed")
    return value

  def wholes(self, name: str, below: int) -> list[int]:
    """A list of whole numbers from 0 to `below - 1`, empty where the field is missing."""
    values = self.get(name, [])
    if not isinstance(values, list) or any(type(v) is not int or not 0 <= v < below for v in values):
      raise error(name, values, f"a list of indices from 0 to {below - 1} is needed")
    return values

  def one_of(self, name: str, values: Sequence[Any]) -> Any:
    """One of `values`, the first where the field is missing."""
    value = self.get(name, values[0])
    if not any(value == v and type(value) is type(v) for v in values):
      raise error(name, value, f"supported: {', '.join(map(repr, values))}")
    return value

  def check_rest(self, family: str) -> None:
    """Looks at the fields that were not asked for.

    Args:
      family: for messages.

    Raises:
      ValueError: a field changes what the model computes, and that is not supported; fields that are merely unknown are
        named in a warning.
    """
    unknown = []
    for name in sorted(self._values.keys() - self._asked - HARMLESS):
      value = self._values[name]
      if name not in NEUTRAL:
        unknown.append(name)
      elif value is not None and not any(value == v and type(value) is type(v) for v in NEUTRAL[name]):
        raise error(name, value, f"this is not supported for {family}" + (
            "; the checkpoint is quantized: take the original one" if name == "quantization_config" else ""))
    if unknown:
      log.warning("config.json: fields of %s that are not known here are ignored: %s", family,
                  ", ".join(map(shown, unknown[:20])))


def positive(name: str, value: Any, least: float = 0.0) -> float:
  """`value` as a float, once it is seen to be a finite number above `least`."""
  if type(value) not in (int, float) or not least < value < math.inf or value > 1e300:
    raise error(name, value, f"a finite number above {least:g} is needed")
  return float(value)


def unknown_family(value: Any, families: Collection[str]) -> ValueError:
  """The error of a `model_type` that is not supported."""
  near = registry.did_you_mean(shown(value), families) if isinstance(value, str) else ""
  return error("model_type", value, f"supported: {', '.join(map(repr, families))}{near}")
