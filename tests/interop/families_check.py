"""Random small models of every family, saved by transformers, run by both; and the way back.

Each family gets four configs. Their checkpoints differ in layout: one file or shards, a tensor per expert or the fused
stacks of transformers' modules, float32, bfloat16 or float16. Seeds are passed over whose routers or greedy tokens are
decided by less than `MARGIN`: rounding would decide there.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

TOLERANCE, MARGIN, NEW = 2e-4, 5e-4, 32
LENGTHS = (21, 14, 5, 1)  # of the rows, padded on the right
STD = 0.25  # large, so that routing, attention and positions all move the logits
STORED = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
FUSED = (False, False, True, False)
SHARDED = (False, True, False, True)

SIZES = dict(vocab_size=96, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
QWEN = dict(intermediate_size=44, moe_intermediate_size=20)
THETA = dict(rope_type="default", rope_theta=5e5)
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "mixtral": [
        dict(hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             num_local_experts=5, num_experts_per_tok=2),
        dict(hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
             num_local_experts=3, num_experts_per_tok=1, head_dim=12, tie_word_embeddings=True),
        dict(hidden_size=24, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
             num_local_experts=8, num_experts_per_tok=3, sliding_window=5, rope_parameters=THETA),
        dict(hidden_size=40, intermediate_size=8, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
             num_local_experts=2, num_experts_per_tok=2, rms_norm_eps=1e-3),
    ],
    "qwen2_moe": [
        dict(QWEN, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, num_experts=5,
             num_experts_per_tok=2, shared_expert_intermediate_size=36),
        dict(QWEN, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, num_experts=4,
             num_experts_per_tok=3, shared_expert_intermediate_size=8, norm_topk_prob=True, mlp_only_layers=[1],
             tie_word_embeddings=True),
        dict(QWEN, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, num_experts=6,
             num_experts_per_tok=1, shared_expert_intermediate_size=20, decoder_sparse_step=2, qkv_bias=False),
        dict(QWEN, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1, num_experts=3,
             num_experts_per_tok=2, shared_expert_intermediate_size=44, use_sliding_window=True, sliding_window=4,
             max_window_layers=2, rope_parameters=THETA),
    ],
    "qwen3_moe": [
        dict(QWEN, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, num_experts=5,
             num_experts_per_tok=2, head_dim=16),
        dict(QWEN, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, num_experts=4,
             num_experts_per_tok=4, head_dim=10, norm_topk_prob=True, mlp_only_layers=[0, 2]),
        dict(QWEN, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=7,
             num_experts_per_tok=3, head_dim=6, attention_bias=True, tie_word_embeddings=True),
        dict(QWEN, hidden_size=40, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, num_experts=3,
             num_experts_per_tok=1, head_dim=32, decoder_sparse_step=2, norm_topk_prob=True, rope_parameters=THETA),
    ],
    "olmoe": [
        dict(hidden_size=48, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             num_experts=5, num_experts_per_tok=2),
        dict(hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
             num_experts=4, num_experts_per_tok=3, clip_qkv=0.7, norm_topk_prob=True),
        dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
             num_experts=8, num_experts_per_tok=4, attention_bias=True, tie_word_embeddings=True),
        dict(hidden_size=40, intermediate_size=12, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
             num_experts=3, num_experts_per_tok=1, rope_parameters=THETA, rms_norm_eps=1e-4),
    ],
}


@dataclasses.dataclass
class Case:
  """A checkpoint and what transformers computes from it."""

  directory: Path
  tokens: np.ndarray
  logits: np.ndarray
  greedy: list[list[int]]


def mask() -> torch.Tensor:
  return torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


def randomize(model: torch.nn.Module, seed: int) -> None:
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    scale = 4 * STD if name.endswith(("gate.weight", "router.classifier.weight")) and parameter.ndim == 2 else STD
    noise = scale * torch.randn(parameter.shape, generator=generator)
    parameter.data = (noise + (1.0 if "norm" in name else 0.0)).to(torch.bfloat16).float()


def store(model: transformers.PreTrainedModel, directory: Path, index: int) -> None:
  """Saves a model in the layout and type of its place in the list."""
  kept = model.to(STORED[index])
  if FUSED[index]:
    kept.config.save_pretrained(directory)
    tied = {"lm_head.weight"} if kept.config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in kept.state_dict().items() if name not in tied}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  else:
    kept.save_pretrained(directory, **({"max_shard_size": "20KB"} if SHARDED[index] else {}))
    assert (len(list(directory.glob("*.safetensors"))) > 2) == SHARDED[index]


def load(directory: Path, kind: Any = transformers.AutoModelForCausalLM) -> transformers.PreTrainedModel:
  model, said = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                     output_loading_info=True)
  assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
  return model.eval()


def forward(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
  """Logits of the places that are no padding, `[sum(LENGTHS), V]`."""
  return model(tokens, attention_mask=mask().long()).logits[mask()].numpy()


def decided(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> bool:
  """Whether every router chooses its experts by more than `MARGIN`."""
  margins, hooks = [], []

  def hook(module: Any, inputs: Any, output: Any) -> None:
    scores, _, chosen = output
    scores = scores[mask().ravel()]
    ordered, k = scores.sort(-1, descending=True).values, chosen.shape[-1]
    if k < scores.shape[-1]:
      margins.append((ordered[:, k - 1] - ordered[:, k]).min())

  for layer in model.model.layers:
    if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
      hooks.append(layer.mlp.gate.register_forward_hook(hook))
  forward(model, tokens)
  for handle in hooks:
    handle.remove()
  return not margins or min(margins) > MARGIN


def greedy(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> list[list[int]] | None:
  """`NEW` tokens after each prompt alone, by the cache of transformers; None if one wins by less than `MARGIN`."""
  rows = []
  model.generation_config.eos_token_id = None
  for row, length in zip(tokens, LENGTHS, strict=True):
    out = model.generate(row[None, :length], attention_mask=torch.ones(1, length, dtype=torch.long), do_sample=False,
                         max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    best = torch.cat(out.logits).topk(2).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN:
      return None
    rows.append(out.sequences[0, length:].tolist())
  return rows


def make(family: str, index: int, directory: Path) -> Case:
  """Saves a model of the first seed that is decided everywhere, and runs it as transformers reads it back."""
  config = transformers.AutoConfig.for_model(family, **(SIZES | CONFIGS[family][index]))
  for seed in range(200):
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    store(model, directory, index)
    model = load(directory)
    drawn = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], mask().shape)
    tokens = torch.from_numpy(np.where(mask().numpy(), drawn, 0))
    if decided(model, tokens) and (found := greedy(model, tokens)):
      return Case(directory, tokens.numpy().astype(np.int32), forward(model, tokens), found)
  raise AssertionError(f"{family} {index}: every seed has near ties")


@pytest.fixture(scope="module", params=list(CONFIGS))
@torch.no_grad()
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ours: Any) -> list[tuple]:
  """The cases of a family, with our logits, our greedy tokens and the directory of the checkpoint we saved."""
  torch.set_num_threads(1)  # the models are tiny
  cases, jobs, arrays = [], [], {}
  for index in range(len(CONFIGS[request.param])):
    case = make(request.param, index, tmp_path_factory.mktemp(f"{request.param}_{index}"))
    prompts = [row[:n].tolist() for row, n in zip(case.tokens, LENGTHS, strict=True)]
    arrays[f"tokens_{index}"] = case.tokens
    cases.append(case)
    jobs += [
        {"do": "logits", "checkpoint": case.directory, "tokens": f"tokens_{index}", "as": f"logits_{index}"},
        {"do": "generate", "checkpoint": case.directory, "prompts": prompts, "new": NEW},
        {"do": "save", "checkpoint": case.directory, "to": case.directory / "ours"},
    ]
  answers, left = ours(jobs, **arrays)
  return [(case, left[f"logits_{i}"], answers[3 * i + 1], case.directory / "ours") for i, case in enumerate(cases)]


def test_logits(family: list[tuple]):
  for index, (case, logits, _, _) in enumerate(family):
    difference = np.abs(logits[mask().numpy()] - case.logits).max()
    print(f"{case.directory.name}: {difference:.1e} of {case.logits.std():.1f}")
    assert difference <= TOLERANCE, index
    assert case.logits.std() > 0.3


def test_greedy_tokens(family: list[tuple]):
  for case, _, new, _ in family:
    assert new == case.greedy, case.directory
    assert all(len(row) == NEW for row in new) and len({token for row in new for token in row}) > 4


@torch.no_grad()
def test_what_we_save_opens_in_transformers(family: list[tuple]):
  for case, _, _, directory in family:
    theirs = forward(load(directory), torch.from_numpy(case.tokens).long())
    assert np.abs(theirs - case.logits).max() <= 1e-5, directory
    assert json.loads((directory / "config.json").read_text())["architectures"]
