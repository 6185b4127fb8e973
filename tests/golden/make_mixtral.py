"""Makes the golden files of Mixtral: tiny random models as transformers saves them, and the logits it computes.

Run in an environment of its own with torch and transformers (the versions used are in `mixtral.json`); tests only read
the files. `python make_mixtral.py` writes them beside itself; `python make_mixtral.py check DIRECTORY` loads a
checkpoint with transformers, runs it on `DIRECTORY/tokens.npy` and writes `DIRECTORY/logits.npy`, float32.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers

COMMON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
MODELS = {
    "mixtral_tied": dict(intermediate_size=48, head_dim=16, tie_word_embeddings=True, rope_theta=10_000.0),
    "mixtral_untied": dict(intermediate_size=20, tie_word_embeddings=False, rope_theta=1_000_000.0),
}
STD = 0.3  # large, so that routing, attention and positions all move the logits
BATCH, LENGTH = 2, 20


def _random_model(seed: int, rope_theta: float, **sizes) -> transformers.MixtralForCausalLM:
  config = transformers.MixtralConfig(**COMMON, **sizes, rope_parameters={"rope_type": "default",
                                                                         "rope_theta": rope_theta})
  model = transformers.MixtralForCausalLM(config).eval()
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    centre = 1.0 if "norm" in name else 0.0
    parameter.data = centre + STD * torch.randn(parameter.shape, generator=generator)
  return model


def make(directory: Path, seed: int, **sizes) -> None:
  """Writes config.json, model.safetensors (bfloat16), and expected.safetensors: tokens, logits, routing per layer."""
  model = _random_model(seed, **sizes).to(torch.bfloat16)
  model.save_pretrained(directory)
  (directory / "generation_config.json").unlink()
  model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
  tokens = torch.randint(COMMON["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
  seen = []
  for layer in model.model.layers:
    layer.mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
  with torch.no_grad():
    logits = model(tokens).logits
  expected = {"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}
  for index, (_, weights, experts) in enumerate(seen):
    expected |= {f"experts.{index}": experts.to(torch.int32), f"weights.{index}": weights.contiguous()}
  safetensors.torch.save_file(expected, directory / "expected.safetensors")
  for file in directory.iterdir():
    file.chmod(0o644)


def check(directory: Path) -> None:
  """Writes what transformers computes from a checkpoint that another program wrote."""
  model, info = transformers.MixtralForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
  print({k: sorted(v) for k, v in info.items()})
  with torch.no_grad():
    logits = model(torch.from_numpy(np.load(directory / "tokens.npy")).long()).logits
  np.save(directory / "logits.npy", logits.numpy())


def main() -> None:
  """Writes the golden files, or checks a checkpoint."""
  if sys.argv[1:2] == ["check"]:
    return check(Path(sys.argv[2]))
  here = Path(__file__).parent
  for seed, (name, sizes) in enumerate(MODELS.items()):
    make(here / name, seed, **sizes)
  versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "safetensors": safetensors.__version__, "numpy": np.__version__}
  (here / "mixtral.json").write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
  main()
