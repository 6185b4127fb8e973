"""Switch Transformers: random small models saved by transformers, run by both, in both modes of capacity.

A full forward of transformers counts the tokens of an expert over a sequence (`sequence`), generation with a cache over
every call (`call`). Experts overflow in two of the configs, where the modes differ.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.switch_transformers import modeling_switch_transformers as source

TOLERANCE, MARGIN, NEW = 2e-4, 5e-4, 32
INPUTS, TARGETS = (22, 15, 7, 2), (12, 20, 3, 1)  # lengths of the rows
STD = 0.25
SIZES = dict(vocab_size=96, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
CONFIGS: list[dict[str, Any]] = [
    dict(d_model=48, d_kv=8, d_ff=40, num_heads=6, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
         num_sparse_decoder_layers=2, num_experts=5, expert_capacity=64),
    dict(d_model=32, d_kv=12, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2, num_sparse_encoder_layers=1,
         num_sparse_decoder_layers=1, num_experts=3, expert_capacity=3, tie_word_embeddings=False,
         relative_attention_num_buckets=16, relative_attention_max_distance=20),
    dict(d_model=24, d_kv=6, d_ff=56, num_heads=4, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=2,
         num_sparse_decoder_layers=2, num_experts=4, expert_capacity=2),
    dict(d_model=40, d_kv=10, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
         num_sparse_decoder_layers=1, num_experts=8, expert_capacity=64, tie_word_embeddings=False),
]
STORED, SHARDED = (torch.float32, torch.float32, torch.bfloat16, torch.float32), (False, True, False, True)
Model = transformers.SwitchTransformersForConditionalGeneration


@dataclasses.dataclass
class Case:
  """A checkpoint and what transformers computes from it."""

  directory: Path
  inputs: np.ndarray
  targets: np.ndarray
  logits: np.ndarray
  greedy: list[list[int]]


def rows(lengths: tuple[int, ...], fill: int, seed: int) -> np.ndarray:
  drawn = np.random.default_rng(seed).integers(2, SIZES["vocab_size"], (len(lengths), max(lengths)))
  return np.where(np.arange(max(lengths))[None] < np.array(lengths)[:, None], drawn, fill).astype(np.int32)


def forward(model: Model, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """Logits of the targets that are no padding."""
  inputs, wanted = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()
  read = torch.cat([torch.zeros_like(wanted[:, :1]), wanted.clamp(min=0)[:, :-1]], dim=1)
  logits = model(inputs, attention_mask=(inputs != 0).long(), decoder_input_ids=read).logits
  return logits[wanted >= 0].numpy()


def decided(model: Model, inputs: np.ndarray, targets: np.ndarray) -> bool:
  """Whether every router prefers its expert by more than `MARGIN`, at all places."""
  margins = []

  def hook(module: Any, given: Any, output: Any) -> None:
    best = output[2].topk(2, dim=-1).values
    margins.append((best[..., 0] - best[..., 1]).min())

  hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, source.SwitchTransformersTop1Router)]
  forward(model, inputs, targets)
  for handle in hooks:
    handle.remove()
  assert margins
  return min(margins) > MARGIN


def greedy(model: Model, inputs: np.ndarray) -> list[list[int]] | None:
  """`NEW` tokens for each input alone, with a cache; None if one wins by less than `MARGIN`."""
  found = []
  model.generation_config.eos_token_id = None
  for row, length in zip(torch.from_numpy(inputs).long(), INPUTS, strict=True):
    out = model.generate(row[None, :length], do_sample=False, max_new_tokens=NEW, use_cache=True, output_logits=True,
                         return_dict_in_generate=True, decoder_start_token_id=0)
    best = torch.cat(out.logits).topk(2).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN:
      return None
    found.append(out.sequences[0, 1:].tolist())
  return found


def load(directory: Path) -> Model:
  model, said = Model.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
  assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
  return model.eval()


def scale(name: str, config: transformers.SwitchTransformersConfig) -> float:
  """The standard deviation of a random tensor; queries are smaller, since T5 does not divide by their size."""
  if "classifier" in name:
    return 4 * STD
  return STD * config.d_kv**-0.5 if name.endswith("ttention.q.weight") else STD


def make(index: int, directory: Path) -> Case:
  """Saves a model of the first seed that is decided everywhere, and runs it as transformers reads it back."""
  config = transformers.SwitchTransformersConfig(**SIZES, **CONFIGS[index])
  for seed in range(200):
    model, generator = Model(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
      noise = scale(name, config) * torch.randn(parameter.shape, generator=generator)
      wide = name == "decoder.final_layer_norm.weight" and config.tie_word_embeddings  # such logits are divided
      parameter.data = ((3.0 if wide else 1.0 if "norm" in name else 0.0) + noise).to(torch.bfloat16).float()
    model.to(STORED[index]).save_pretrained(directory, **({"max_shard_size": "20KB"} if SHARDED[index] else {}))
    assert (len(list(directory.glob("*.safetensors"))) > 2) == SHARDED[index]
    model, inputs, targets = load(directory), rows(INPUTS, 0, seed), rows(TARGETS, -100, seed + 1000)
    if decided(model, inputs, targets) and (found := greedy(model, inputs)):
      return Case(directory, inputs, targets, forward(model, inputs, targets), found)
  raise AssertionError(f"{index}: every seed has near ties")


@pytest.fixture(scope="module")
@torch.no_grad()
def cases(tmp_path_factory: pytest.TempPathFactory, ours: Any) -> list[tuple]:
  """The cases, with our logits, our greedy tokens and the directory of the checkpoint we saved."""
  torch.set_num_threads(1)  # the models are tiny
  made = [make(index, tmp_path_factory.mktemp(f"switch_{index}")) for index in range(len(CONFIGS))]
  jobs, arrays = [], {}
  for i, case in enumerate(made):
    prompts = [row[:n].tolist() for row, n in zip(case.inputs, INPUTS, strict=True)]
    arrays |= {f"inputs_{i}": case.inputs, f"targets_{i}": case.targets}
    jobs += [
        {"do": "logits", "checkpoint": case.directory, "inputs": f"inputs_{i}", "targets": f"targets_{i}",
         "as": f"logits_{i}"},
        {"do": "generate", "checkpoint": case.directory, "capacity": "call", "prompts": prompts, "new": NEW},
        {"do": "save", "checkpoint": case.directory, "to": case.directory / "ours"},
    ]
  answers, left = ours(jobs, **arrays)
  return [(case, left[f"logits_{i}"], answers[3 * i + 1], case.directory / "ours") for i, case in enumerate(made)]


def test_logits(cases: list[tuple]):
  for case, logits, _, _ in cases:
    difference = np.abs(logits[case.targets >= 0] - case.logits).max()
    print(f"{case.directory.name}: {difference:.1e} of {case.logits.std():.1f}")
    assert difference <= TOLERANCE, case.directory
    assert case.logits.std() > 0.3


def test_greedy_tokens(cases: list[tuple]):
  for case, _, new, _ in cases:
    assert new == case.greedy, case.directory
    assert all(len(row) == NEW for row in new) and len({token for row in new for token in row}) > 4


@torch.no_grad()
def test_what_we_save_opens_in_transformers(cases: list[tuple]):
  for case, _, _, directory in cases:
    theirs = forward(load(directory), case.inputs, case.targets)
    assert np.abs(theirs - case.logits).max() <= 1e-5, directory
    assert json.loads((directory / "config.json").read_text())["architectures"]
