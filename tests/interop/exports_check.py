"""What we export, opened by other tools: dequantized checkpoints and compressed-tensors files of every family.

transformers takes one scheme for all experts of a compressed-tensors file; with several it must fail, never run with
wrong weights. Files with several are checked tensor by tensor with the library's own dequantizer.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

TOLERANCE = 2e-4
EXPERTS, GROUP = 4, 32
STD = 0.2
COMMON = dict(vocab_size=80, max_position_embeddings=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
              num_hidden_layers=2, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2)
DECODERS: dict[str, dict[str, Any]] = {
    "mixtral": dict(COMMON, intermediate_size=96, num_local_experts=EXPERTS),
    "qwen2_moe": dict(COMMON, intermediate_size=96, moe_intermediate_size=96, shared_expert_intermediate_size=80,
                      num_experts=EXPERTS),
    "qwen3_moe": dict(COMMON, intermediate_size=48, moe_intermediate_size=96, num_experts=EXPERTS, head_dim=16,
                      num_hidden_layers=3, mlp_only_layers=[1]),
    "olmoe": dict(COMMON, intermediate_size=96, num_experts=EXPERTS),
}
SWITCH = dict(vocab_size=80, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4,
              num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=EXPERTS, expert_capacity=64,
              decoder_start_token_id=0, pad_token_id=0)
LAYERS = np.stack([np.full((EXPERTS, 3), bits) for bits in (2, 4)])
MIXED = np.random.default_rng(0).choice([2, 3, 4, 8], (2, EXPERTS, 3))
PLANS = {"8": np.full((2, EXPERTS, 3), 8), "4": np.full((2, EXPERTS, 3), 4), "3": np.full((2, EXPERTS, 3), 3),
         "2": np.full((2, EXPERTS, 3), 2), "layers": LAYERS, "experts": MIXED[:, :, :1].repeat(3, 2), "mixed": MIXED}
ONE = ("8", "4", "3", "2")


@dataclasses.dataclass
class Made:
  """What our side made of one checkpoint and plan.

  Attributes:
    directory: holds native, hf, ct-None (every expert in its own width) and ct-8 (all in 8 bits).
    weights: of experts by name, float32, as our model runs with them.
    logits: of our model, from its packed buffers; None where they were not asked for.
  """

  directory: Path
  weights: dict[str, np.ndarray]
  logits: np.ndarray | None


def checkpoint(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
  """Saves a random model."""
  config = transformers.AutoConfig.for_model(family, **(DECODERS | {"switch_transformers": SWITCH})[family])
  kind = transformers.AutoModelForSeq2SeqLM if family == "switch_transformers" else transformers.AutoModelForCausalLM
  model, generator = kind.from_config(config), torch.Generator().manual_seed(1)
  for name, parameter in model.named_parameters():
    parameter.data = STD * torch.randn(parameter.shape, generator=generator) + ("norm" in name)
  model.to(dtype).save_pretrained(directory)
  return directory


def jobs(source: Path, plan: str, to: Path, projections: int = 3, codec: str = "rtn") -> list[dict[str, Any]]:
  """Quantizes, exports, and asks for the logits."""
  batch = {"tokens": "tokens"} if projections == 3 else {"inputs": "inputs", "targets": "targets"}
  return [{"do": "export", "checkpoint": source, "to": to, "codec": f"{codec}(group={GROUP}, grid=ct)", "as": to.name,
           "bits": PLANS[plan][:, :, :projections].tolist(), "widths": [None, 8], "shard_bytes": 90_000},
          {"do": "logits", "checkpoint": to / "native", "as": f"logits {to.name}"} | batch]


def tokens(seed: int = 0, length: int = 24) -> np.ndarray:
  return np.random.default_rng(seed).integers(3, 80, (2, length)).astype(np.int32)


def collect(to: Path, left: Mapping[str, np.ndarray]) -> Made:
  weights = {name.partition("/")[2]: array for name, array in left.items() if name.startswith(f"{to.name}/")}
  return Made(to, weights, left.get(f"logits {to.name}"))


@pytest.fixture(scope="module", params=list(DECODERS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ours: Any) -> dict[str, Made]:
  """A decoder of every family under every plan."""
  folder = tmp_path_factory.mktemp(request.param)
  source, wanted = checkpoint(request.param, folder / "source"), []
  for plan in PLANS:
    wanted += jobs(source, plan, folder / plan)[: 1 + (plan in ("4", "mixed"))]
  _, left = ours(wanted, tokens=tokens())
  return {plan: collect(folder / plan, left) for plan in PLANS}


def opened(directory: Path, kind: Any = transformers.AutoModelForCausalLM, **options: Any) -> torch.nn.Module:
  """A model as transformers opens it, no tensor missing, left over or of another shape."""
  model, said = kind.from_pretrained(directory, output_loading_info=True, attn_implementation="eager", **options)
  assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
  return model.eval()


@torch.no_grad()
def logits(directory: Path, **options: Any) -> np.ndarray:
  return opened(directory, **options)(torch.from_numpy(tokens()).long()).logits.float().numpy()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
  return {name: tensor for path in sorted(directory.glob("*.safetensors"))
          for name, tensor in safetensors.torch.load_file(path).items()}


def dequantized(directory: Path) -> dict[str, torch.Tensor]:
  """All tensors of a compressed-tensors directory, by the library; it complains of what no scheme claims."""
  return CompressedTensorsDequantizer(str(directory), dtype=torch.float32).validate(tensors(directory))


def assert_weights(found: dict[str, torch.Tensor], made: Made, dtype: torch.dtype = torch.float32) -> None:
  """Experts have the weights that our model runs with, rounded to `dtype`; all else is as in the dequantized export."""
  plain = tensors(made.directory / "hf")
  assert set(found) == set(plain) and set(made.weights) < set(plain)
  for name, tensor in plain.items():
    if name in made.weights:
      assert torch.equal(found[name].float(), torch.from_numpy(made.weights[name].copy()).to(dtype).float()), name
    else:
      assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---------------------------------------------------------------------------------------------------------------------
# Decoders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["4", "mixed"])
def test_the_dequantized_checkpoint_has_our_logits(made: dict[str, Made], plan: str):
  case = made[plan]
  assert_weights(tensors(case.directory / "hf"), case)
  theirs = logits(case.directory / "hf")
  print(f"{case.directory}: {np.abs(theirs - case.logits).max():.1e} of {theirs.std():.2f}")
  assert np.abs(theirs - case.logits).max() <= TOLERANCE and theirs.std() > 0.3


@pytest.mark.parametrize("plan", ONE)
def test_one_scheme_opens_with_our_logits(made: dict[str, Made], plan: str):
  case = made[plan]
  theirs, plain = logits(case.directory / "ct-None"), logits(case.directory / "hf")
  np.testing.assert_array_equal(theirs, plain)
  if case.logits is not None:
    assert np.abs(theirs - case.logits).max() <= TOLERANCE


@pytest.mark.parametrize("plan", ["layers", "experts", "mixed"])
def test_a_mixed_plan_in_one_width_opens_with_our_logits(made: dict[str, Made], plan: str):
  case = made[plan]
  theirs = logits(case.directory / "ct-8")
  np.testing.assert_array_equal(theirs, logits(case.directory / "hf"))
  if case.logits is not None:
    assert np.abs(theirs - case.logits).max() <= TOLERANCE


@pytest.mark.parametrize("plan", list(PLANS))
def test_the_library_reads_our_weights(made: dict[str, Made], plan: str):
  assert_weights(dequantized(made[plan].directory / "ct-None"), made[plan])
  assert_weights(dequantized(made[plan].directory / "ct-8"), made[plan])


@pytest.mark.parametrize("plan", ["layers", "experts", "mixed"])
def test_several_schemes_fail_in_transformers(made: dict[str, Made], plan: str):
  with pytest.raises(RuntimeError, match="conversion of the weights"):
    opened(made[plan].directory / "ct-None")


def test_bfloat16_stays_bfloat16(tmp_path: Path, ours: Any):
  source = checkpoint("mixtral", tmp_path / "source", torch.bfloat16)
  _, left = ours(jobs(source, "4", tmp_path / "4")[:1])
  case = collect(tmp_path / "4", left)
  assert_weights(tensors(case.directory / "hf"), case, torch.bfloat16)
  assert_weights(dequantized(case.directory / "ct-None"), case, torch.bfloat16)
  model = opened(case.directory / "ct-None")
  assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
  np.testing.assert_array_equal(logits(case.directory / "ct-None"), logits(case.directory / "hf"))


# ---------------------------------------------------------------------------------------------------------------------
# Switch Transformer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory, ours: Any) -> dict[str, Made]:
  folder = tmp_path_factory.mktemp("switch")
  source = checkpoint("switch_transformers", folder / "source")
  wanted = [job for plan in ("4", "mixed") for job in jobs(source, plan, folder / plan, projections=2)]
  _, left = ours(wanted, inputs=tokens(1, 20), targets=tokens(2, 12))
  return {plan: collect(folder / plan, left) for plan in ("4", "mixed")}


@torch.no_grad()
def switch_logits(directory: Path, **options: Any) -> np.ndarray:
  model = opened(directory, transformers.SwitchTransformersForConditionalGeneration, **options)
  inputs, targets = (torch.from_numpy(t).long() for t in (tokens(1, 20), tokens(2, 12)))
  return model(input_ids=inputs, labels=targets).logits.numpy()


@pytest.mark.parametrize("plan", ["4", "mixed"])
def test_switch_dequantized_has_our_logits(switch: dict[str, Made], plan: str):
  case = switch[plan]
  assert_weights(tensors(case.directory / "hf"), case)
  assert np.abs(switch_logits(case.directory / "hf") - case.logits).max() <= TOLERANCE


@pytest.mark.parametrize("plan", ["4", "mixed"])
def test_switch_compressed_is_read_by_the_library(switch: dict[str, Made], plan: str):
  assert_weights(dequantized(switch[plan].directory / "ct-None"), switch[plan])


def test_switch_compressed_opens_dequantized_alone(switch: dict[str, Made]):
  directory = switch["4"].directory
  asked = transformers.CompressedTensorsConfig(dequantize=True)
  np.testing.assert_array_equal(switch_logits(directory / "ct-None", quantization_config=asked),
                                switch_logits(directory / "hf"))
  with pytest.raises(AttributeError, match="no attribute 'weight'"):  # transformers 5.23 initialises what it will load
    switch_logits(directory / "ct-None")
