"""`config.json` in and out: what transformers 5.23 takes it for, and errors that name the field."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moeq_jax.models import hf_config
from moeq_jax.models.decoder import DecoderConfig
from tests.golden import decoders, switches

GOLDEN = {**{name: decoders.HERE / name for name in decoders.MODELS},
          **{f"switch_{name}": switches.HERE / name for name in switches.MODELS}}
SWITCH = dict(  # as transformers 5.23 writes it
    add_cross_attention=False, add_router_probs=False, architectures=["SwitchTransformersForConditionalGeneration"],
    bos_token_id=None, d_ff=48, d_kv=8, d_model=32, decoder_sparse_step=1, dense_act_fn="relu", dropout_rate=0.1,
    encoder_sparse_step=2, eos_token_id=1, expert_capacity=7, initializer_factor=1.0, is_decoder=False,
    is_encoder_decoder=True, layer_norm_epsilon=1e-6, model_type="switch_transformers", num_decoder_layers=2,
    num_experts=4, num_heads=4, num_layers=4, num_sparse_decoder_layers=2, num_sparse_encoder_layers=2, pad_token_id=0,
    relative_attention_max_distance=128, relative_attention_num_buckets=32, router_aux_loss_coef=0.001,
    router_bias=False, router_dtype="float32", router_ignore_padding_tokens=False, router_jitter_noise=0.01,
    router_z_loss_coef=0.001, tie_word_embeddings=True, transformers_version="5.23.0", use_cache=True, vocab_size=64)
# What is set in the golden models, and what transformers takes where nothing is: as `transformers.*Config()` has it.
EXPECTED: dict[str, dict[str, Any]] = {
    "mixtral_tied": dict(family="mixtral", head_dim=16, num_local_experts=4, norm_topk_prob=True, rope_theta=1e6,
                         rms_norm_eps=1e-5, tie_word_embeddings=True, sliding_windows=(), qkv_bias=False),
    "mixtral_window": dict(sliding_windows=(6, 6), head_dim=8, num_key_value_heads=1, tie_word_embeddings=False),
    "mixtral_linear": dict(rope_scaling=(("factor", 2.0), ("rope_type", "linear")), rope_theta=1e4,
                           num_experts_per_tok=3),
    "qwen2_moe": dict(intermediate_size=24, shared_size=28, qkv_bias=True, o_bias=False, norm_topk_prob=False,
                      dense_layers=(), dense_size=0, qk_norm="", rms_norm_eps=1e-6, rope_theta=1e4, sliding_windows=()),
    "qwen2_moe_window": dict(dense_layers=(0,), dense_size=40, sliding_windows=(5, None), norm_topk_prob=True),
    "qwen2_moe_yarn": dict(qkv_bias=False, rope_scaling=(
        ("factor", 4.0), ("original_max_position_embeddings", 16), ("rope_type", "yarn"))),
    "qwen3_moe": dict(qk_norm="head", dense_layers=(0,), dense_size=40, qkv_bias=False, head_dim=16, shared_size=0),
    "qwen3_moe_window": dict(qkv_bias=True, o_bias=True, dense_layers=(0, 2), sliding_windows=(7, 7, 7)),
    "qwen3_moe_llama3": dict(num_local_experts=8, rope_scaling=(
        ("factor", 4.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0), ("original_max_position_embeddings", 24),
        ("rope_type", "llama3"))),
    "olmoe": dict(qk_norm="whole", clip_qkv=None, norm_topk_prob=False, rms_norm_eps=1e-5, num_key_value_heads=4),
    "olmoe_clip": dict(clip_qkv=0.5, qkv_bias=True, o_bias=True),
    "olmoe_normalized": dict(norm_topk_prob=True, num_experts_per_tok=3),
    "llama_tied": dict(family="llama", num_local_experts=0, intermediate_size=40, rms_norm_eps=1e-6),
    "llama_bias": dict(qkv_bias=True, o_bias=True, head_dim=16),
    "switch": dict(encoder_sparse=(1, 3), decoder_sparse=(0, 1), expert_capacity=7, d_ff=48, tie_word_embeddings=True,
                   decoder_start_token_id=0, eos_token_id=1, relative_attention_num_buckets=32,
                   separate_embeddings=False),
}


def values(name: str, **changes: Any) -> dict[str, Any]:
  """A golden config; a change to `...` takes the field away."""
  changed = (SWITCH if name == "switch" else json.loads((GOLDEN[name] / "config.json").read_text())) | changes
  return {key: value for key, value in changed.items() if value is not ...}


def read(name: str, **changes: Any) -> hf_config.Config:
  return hf_config.read(values(name, **changes))


@pytest.fixture(autouse=True)
def no_warning(caplog: pytest.LogCaptureFixture):
  """Nothing is warned of that a test does not ask about."""
  yield
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", EXPECTED)
def test_configs_are_read_as_transformers_takes_them(name: str):
  config = read(name)
  assert {field: getattr(config, field) for field in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_written_is_read_back(name: str):
  config = read(name)
  written = hf_config.write(config, "float32")
  assert hf_config.read(written) == config
  theirs = values(name)
  same = {"architectures", "model_type", "rope_parameters", "num_hidden_layers", "d_model", "hidden_size"}
  assert {k: written[k] for k in same & written.keys()} == {k: theirs[k] for k in same & theirs.keys()}
  assert not {field for field in written.keys() - theirs.keys()} - {
      "num_experts", "num_local_experts", "decoder_start_token_id", "head_dim", "dtype"}


@pytest.mark.parametrize("name", ["mixtral_tied", "qwen2_moe", "switch"])
def test_a_model_that_a_family_cannot_be_is_not_written(name: str):
  change = {"qk_norm": "head"} if name != "switch" else {"encoder_sparse": (0,)}
  with pytest.raises(ValueError, match=f"cannot have {next(iter(change))}"):
    hf_config.write(dataclasses.replace(read(name), **change))


# ---------------------------------------------------------------------------------------------------------------------
# Spellings and defaults
# ---------------------------------------------------------------------------------------------------------------------


def test_older_spellings_of_rotation_and_dtype():
  for name in ("mixtral_linear", "qwen3_moe_llama3", "qwen2_moe_yarn"):
    items = dict(values(name)["rope_parameters"])
    theta, kind = items.pop("rope_theta"), items.pop("rope_type")
    for spelled in ("type", "rope_type"):
      old = read(name, rope_parameters=..., rope_theta=theta, rope_scaling=items | {spelled: kind}, dtype=...,
                 torch_dtype="float32")
      assert old == read(name)
    assert read(name, rope_theta=theta, rope_scaling=items | {"type": kind, "rope_type": kind}) == read(name)


def test_rotations_that_are_not_given():
  assert read("mixtral_tied", rope_parameters=...).rope_theta == 1e6
  assert read("qwen3_moe", rope_parameters=None, rope_scaling=None).rope_theta == 1e4
  assert read("llama_tied", rope_parameters=..., rope_theta=5).rope_theta == 5.0
  filled = dict(read("qwen2_moe_yarn", rope_parameters={"rope_type": "yarn", "factor": 2.0}).rope_scaling)
  assert filled["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(("name", "field", "value"), [
    ("mixtral_tied", "rms_norm_eps", 1e-5), ("qwen2_moe", "rms_norm_eps", 1e-6), ("olmoe", "rms_norm_eps", 1e-5),
    ("mixtral_tied", "tie_word_embeddings", False), ("switch", "tie_word_embeddings", True),
    ("qwen2_moe_window", "norm_topk_prob", False), ("olmoe_normalized", "norm_topk_prob", False),
    ("qwen3_moe_window", "norm_topk_prob", False), ("qwen2_moe_yarn", "qkv_bias", True),
    ("olmoe_clip", "clip_qkv", None),
    ("mixtral_tied", "max_position_embeddings", 131072), ("llama_tied", "max_position_embeddings", 2048),
    ("llama_tied", "num_key_value_heads", 4), ("switch", "expert_capacity", 64),
    ("switch", "relative_attention_num_buckets", 32), ("switch", "layer_norm_epsilon", 1e-6),
])
def test_a_missing_field_has_the_value_that_transformers_takes(name: str, field: str, value: Any):
  assert getattr(read(name, **{field: ...}), field) == value
  assert getattr(read(name, **{field: None}), field) == value


@pytest.mark.parametrize("head_dim", [..., None, 8])
def test_heads_of_no_given_size_share_the_hidden_size(head_dim: Any):
  assert read("mixtral_window", head_dim=head_dim).head_dim == 8
  assert read("qwen3_moe", head_dim=head_dim).head_dim == 8


def test_experts_under_either_name():
  for name in ("mixtral_tied", "qwen2_moe", "qwen3_moe", "olmoe"):
    for field in ("num_experts", "num_local_experts"):
      assert read(name, **{"num_experts": ..., "num_local_experts": ...} | {field: 4}).num_local_experts == 4


def test_the_sparse_blocks_of_a_switch_transformer():
  """The rule of transformers 5.23, with its edges: where none should be sparse, one is."""
  def blocks(layers: int, **given: Any) -> tuple[int, ...]:
    given = {"encoder_sparse_step": ..., "num_sparse_encoder_layers": ...} | given
    return read("switch", num_layers=layers, **given).encoder_sparse

  assert blocks(12, num_sparse_encoder_layers=6) == (1, 3, 5, 7, 9, 11)
  assert blocks(12) == (1, 5, 9) and blocks(4, num_sparse_encoder_layers=4) == (0, 1, 2, 3)
  assert blocks(4, num_sparse_encoder_layers=0) == (1,) and blocks(1, num_sparse_encoder_layers=0) == (0,)
  assert blocks(4, num_sparse_encoder_layers=8) == () and blocks(5, encoder_sparse_step=3) == (1, 4)
  assert blocks(12, num_sparse_encoder_layers=5, encoder_sparse_step=2) == (1, 3, 5, 7, 9, 11)


def test_windows_by_layer_types():
  assert read("qwen2_moe_window", layer_types=["sliding_attention"] * 2).sliding_windows == (5, 5)
  assert read("qwen2_moe_window", layer_types=...).sliding_windows == (5, None)
  assert read("qwen2_moe_window", layer_types=..., max_window_layers=0).sliding_windows == ()
  assert read("qwen3_moe_window", layer_types=["sliding_attention"] * 3).sliding_windows == (7, 7, 7)
  assert read("mixtral_tied", layer_types=["full_attention"] * 2).sliding_windows == ()
  assert read("qwen3_moe", sliding_window=4096).sliding_windows == ()  # not in use


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes", "said"), [
    ("mixtral_tied", {"model_type": "mixtrall"}, "model_type is 'mixtrall'; supported: .*did you mean 'mixtral'"),
    ("mixtral_tied", {"model_type": ...}, "model_type is None"),
    ("mixtral_tied", {"model_type": ["mixtral"]}, "model_type is"),
    ("mixtral_tied", {"num_local_experts": 0}, "num_local_experts is 0; a whole number is needed, from 1"),
    ("olmoe", {"num_experts": 0}, "num_local_experts is 0"),
    ("switch", {"num_experts": 0}, "num_experts is 0"),
    ("mixtral_tied", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it is more than num_local_experts 4"),
    ("mixtral_tied", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ("mixtral_tied", {"num_experts": 5}, "num_local_experts and num_experts is .*must agree"),
    ("mixtral_tied", {"num_attention_heads": 3}, "num_attention_heads is 3; it is not a multiple of num_key"),
    ("mixtral_window", {"num_attention_heads": 5}, "hidden_size is 32; it is not a multiple of num_attention_heads 5"),
    ("mixtral_tied", {"head_dim": 5}, "head_dim is 5; it is odd"),
    ("olmoe", {"head_dim": 16}, "head_dim is 16; it does not divide hidden_size 32"),
    ("mixtral_tied", {"hidden_size": "32"}, "hidden_size is '32'; a whole number"),
    ("mixtral_tied", {"hidden_size": 32.0}, "hidden_size is 32.0; a whole number"),
    ("mixtral_tied", {"hidden_size": True}, "hidden_size is True"),
    ("mixtral_tied", {"hidden_size": -32}, "hidden_size is -32"),
    ("mixtral_tied", {"vocab_size": 2**40}, "vocab_size is"),
    ("mixtral_tied", {"vocab_size": ...}, "vocab_size is None; a whole number is needed"),
    ("mixtral_tied", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("mixtral_tied", {"num_hidden_layers": 10**4000}, "num_hidden_layers is 1000"),
    ("switch", {"num_decoder_layers": 10**9}, "num_decoder_layers"),
    ("mixtral_tied", {"num_local_experts": 10**9}, "num_local_experts"),
    ("mixtral_tied", {"head_dim": 10**9}, "head_dim"),
    ("mixtral_tied", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn is 'gated-gelu'"),
    ("switch", {"router_dtype": "bfloat16"}, "router_dtype is 'bfloat16'"),
    ("mixtral_tied", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false"),
    ("mixtral_tied", {"rms_norm_eps": 0}, "rms_norm_eps is 0; a finite number above 0"),
    ("mixtral_tied", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ("mixtral_tied", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ("mixtral_tied", {"sliding_window": 0}, "sliding_window is 0"),
    ("mixtral_tied", {"layer_types": ["sliding_attention"] * 2}, "layer_types .*contradicts"),
    ("qwen3_moe_window", {"layer_types": ["full_attention"] * 3}, "layer_types .*contradicts"),
    ("qwen2_moe_window", {"layer_types": ["full_attention"]}, "layer_types is .*2 times"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "layer_types .*contradicts"),
    ("qwen2_moe", {"layer_types": ["mamba"] * 2}, "layer_types is"),
    ("qwen2_moe_window", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen3_moe", {"mlp_only_layers": [5]}, "mlp_only_layers is .*from 0 to 1"),
    ("qwen3_moe", {"mlp_only_layers": 0}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen3_moe", {"intermediate_size": ...}, "intermediate_size"),
    ("olmoe", {"clip_qkv": -1}, "clip_qkv is -1"),
    ("switch", {"encoder_sparse_step": 4}, "encoder_sparse_step is 4; num_sparse_encoder_layers 2 of 4 layers"),
    ("switch", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ("switch", {"decoder_start_token_id": 64}, "decoder_start_token_id is 64; a whole number is needed, from 0 to 63"),
    ("switch", {"pad_token_id": 64}, "pad_token_id is 64; a whole number is needed, from 0 to 63"),
    ("switch", {"relative_attention_max_distance": 16}, "relative_attention_max_distance is 16"),
])
def test_fields_that_contradict_or_cannot_be(name: str, changes: dict[str, Any], said: str):
  with pytest.raises(ValueError, match=f"config.json: .*{said}"):
    read(name, **changes)


@pytest.mark.parametrize(("changes", "said"), [
    ({"rope_theta": 2.0}, "rope_theta is .*both spellings, with different values"),
    ({"rope_scaling": {"type": "linear", "factor": 3.0}}, "factor of rope_parameters and rope_scaling .*both"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type of rope_scaling is 'dynamic'; supported"),
    ({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type of rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor does not belong there"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "high_freq_factor is miss"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of parameters for all layers"),
    ({"rope_parameters": 3}, "one set of parameters"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2'; a finite number"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta is 0.5; a finite number above 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this is not supported for mixtral"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
     "high_freq_factor is 1.0; low_freq_factor 1.0 is not below"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 1e-320}}, "rotations that are not finite"),
])
def test_rotations_that_contradict_or_cannot_be(changes: dict[str, Any], said: str):
  with pytest.raises(ValueError, match=said):
    read("mixtral_linear", **changes)


@pytest.mark.parametrize(("name", "field", "value"), [
    ("switch", "is_gated_act", True), ("switch", "router_bias", True),
    ("mixtral_tied", "expert_bias", True), ("mixtral_tied", "attention_bias", True), ("llama_tied", "mlp_bias", True),
    ("olmoe", "sliding_window", 4),
    ("mixtral_tied", "quantization_config", {"quant_method": "gptq"}), ("mixtral_tied", "norm_topk_prob", False),
    ("llama_tied", "pretraining_tp", 2), ("qwen3_moe", "shared_expert_intermediate_size", 8),
    ("llama_tied", "final_logit_softcapping", 30.0), ("mixtral_tied", "clip_qkv", 1.0), ("olmoe", "qkv_bias", True),
    ("switch", "num_selected_experts", 2), ("mixtral_tied", "per_layer_config", {"0": {"head_dim": 4}}),
])
def test_fields_that_change_the_computation_are_refused_by_name(name: str, field: str, value: Any):
  with pytest.raises(ValueError, match=f"config.json: {field} is .*not supported for {values(name)['model_type']}"):
    read(name, **{field: value})


def test_the_same_fields_without_effect_are_fine():
  plain = read("llama_tied")
  assert read("llama_tied", mlp_bias=False, pretraining_tp=1, is_gated_act=False, sliding_window=None, use_cache=False,
              quantization_config=None, norm_topk_prob=True, attention_dropout=0.5) == plain


def test_unknown_fields_are_named_in_a_warning(caplog: pytest.LogCaptureFixture):
  assert read("mixtral_tied", frobnicate=3, colour={"a": 1}) == read("mixtral_tied")
  assert [r.getMessage() for r in caplog.records] == [
      "config.json: fields of mixtral that are not known here are ignored: colour, frobnicate"]
  caplog.clear()


def test_the_shipped_config_is_read_without_a_warning():
  shipped = Path(__file__).parents[2] / "experiments" / "models" / "moeq-small" / "config.json"
  config = hf_config.read(json.loads(shipped.read_text()))
  assert isinstance(config, DecoderConfig) and config.num_local_experts == 16
  assert hf_config.write(config) == json.loads(shipped.read_text())
