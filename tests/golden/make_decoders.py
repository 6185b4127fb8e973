"""Makes the golden files of the decoder families: what transformers computes with the weights of `weights.py`.

Run in an environment of its own with torch and transformers (the versions used are in `decoders/models.json`); tests
only read the files. `python -m tests.golden.make_decoders` writes `decoders/models.json` and per model `config.json`
and `expected.safetensors`, float32, eager attention:

  tokens [B, S]              prompts of `decoders.LENGTHS`, the rest is padding
  logits [sum(LENGTHS), V]   of the padded batch with its attention mask, at the places that are not padding
  experts.l, weights.l       [sum(LENGTHS), k] of block l, likewise
  generated [B, NEW]         greedy continuation of each prompt alone
"""

import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import transformers

from tests.golden import decoders

MARGIN = 2e-3  # between the two largest logits of a greedy step, and between the last expert chosen and the next


def _config(family: str, sizes: dict[str, Any]) -> transformers.PreTrainedConfig:
  return transformers.AutoConfig.for_model(family, **(decoders.SIZES | sizes))


def _shapes(directory: Path, config: transformers.PreTrainedConfig) -> dict[str, list[int]]:
  """Writes a model of this config to `directory`, to see which tensors transformers gives it."""
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
  with safetensors.safe_open(directory / "model.safetensors", "np") as file:
    return {name: file.get_slice(name).get_shape() for name in file.keys()}


def _load(directory: Path, shapes: dict[str, list[int]], seed: int) -> transformers.PreTrainedModel:
  """The model with the weights of `seed`, loaded from a checkpoint in `directory`."""
  tensors = decoders.tensors(shapes, seed)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  return model.eval()


def _forward(model: transformers.PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray] | None:
  """Logits and routing of the padded batch; None if an expert is chosen by too small a margin."""
  mask = np.arange(tokens.shape[1])[None] < np.array(decoders.LENGTHS)[:, None]
  padded, seen = np.where(mask, tokens, 0), {}
  for index, layer in enumerate(model.model.layers):
    if gate := getattr(layer.mlp, "gate", None):
      gate.register_forward_hook(lambda module, inputs, output, index=index: seen.update({index: output}))
  logits = model(torch.from_numpy(padded).long(), attention_mask=torch.from_numpy(mask).long()).logits.numpy()
  found = {"tokens": padded, "logits": logits[mask]}
  for index, (scores, kept, chosen) in seen.items():
    scores, chosen = scores.numpy()[mask.ravel()], chosen.numpy()[mask.ravel()]
    ordered = -np.sort(-scores, axis=-1)[:, : chosen.shape[1] + 1]
    if np.diff(-ordered, axis=-1).min() < MARGIN:
      return None
    found |= {f"experts.{index}": chosen.astype(np.int32), f"weights.{index}": kept.numpy()[mask.ravel()]}
  return found


def _greedy(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray | None:
  """`[B, NEW]`, each prompt alone with transformers' cache; None if a token wins by too small a margin."""
  rows = []
  for row, length in zip(tokens, decoders.LENGTHS, strict=True):
    prompt = torch.from_numpy(row[None, :length]).long()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=decoders.NEW, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    best = torch.cat(out.logits).topk(2).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN:
      return None
    rows.append(out.sequences[0, length:].numpy())
  return np.stack(rows).astype(np.int32)


def make(name: str) -> dict[str, Any]:
  """Writes the files of a model, of the first seed without near ties; returns its seed and shapes."""
  family, sizes = decoders.MODELS[name]
  config = _config(family, sizes)
  with tempfile.TemporaryDirectory() as folder:
    shapes = _shapes(Path(folder), config)
    for seed in range(1000):
      model, tokens = _load(Path(folder), shapes, seed), decoders.tokens(seed)
      expected = _forward(model, tokens)
      if expected and (generated := _greedy(model, tokens)) is not None:
        break
    else:
      raise ValueError(f"{name}: all seeds have near ties")
    target = decoders.HERE / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(folder) / "config.json", target / "config.json")
  safetensors.numpy.save_file(expected | {"generated": generated}, target / "expected.safetensors")
  print(name, seed, expected["logits"].std(), np.unique(generated).size, flush=True)
  return {"seed": seed, "shapes": decoders.folded(shapes)}


@torch.no_grad()
def main() -> None:
  """Writes the golden files."""
  versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "safetensors": safetensors.__version__, "numpy": np.__version__}
  models = {name: make(name) for name in decoders.MODELS}
  text = json.dumps({"versions": versions, "models": models}, indent=1, sort_keys=True)
  (decoders.HERE / "models.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
