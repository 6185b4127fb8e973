"""Makes the golden files of Switch Transformer: what transformers computes with tiny random models.

Run in an environment of its own with torch and transformers (the versions used are in `switch/versions.json`); tests
only read the files. `python -m tests.golden.make_switch` writes them below `switch/`: for each model `config.json` as
transformers saves it, the names and shapes of its tensors, and `expected.safetensors`, float32, eager attention:

  inputs [B, S], targets [B, T]            of `switches.INPUTS` and `TARGETS`; padding is 0 and -100
  logits_sequence, logits_call [B, T, V]   of one pass over the targets, and of a call for each of them, with a cache
  logits_left [B, T, V]                    of one pass, with the inputs padded on the left
  greedy_sequence, greedy_call [B, NEW]    generated without and with a cache
  experts.i, kept.i [B, S or T]            of the i-th router in the pass: whom each token chose, whether it was taken
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers
from transformers.models.switch_transformers import modeling_switch_transformers as source

from tests.golden import switches, weights

ROUNDING = 5e-5  # the most that logits in float32 may differ from those in float64
MARGIN = 4e-4  # between the two largest logits of a greedy step, and of a router: twice the tolerance of the tests

Model = transformers.SwitchTransformersForConditionalGeneration


def _model(seed: int, **sizes) -> Model:
  model = Model(transformers.SwitchTransformersConfig(**switches.COMMON, **sizes)).eval()
  for name, parameter in model.named_parameters():  # tied tensors come once, under their first name
    parameter.data = torch.from_numpy(weights.tensor(name, parameter.shape, seed, switches.kind(name)))
  model.generation_config.eos_token_id = None  # nothing ends before its time
  return model


def _rows(lengths: tuple[int, ...], fill: int, seed: int) -> torch.Tensor:
  """Random tokens, no padding among them, filled up on the right."""
  rows = torch.full((len(lengths), max(lengths)), fill)
  generator = torch.Generator().manual_seed(seed)
  for row, length in zip(rows, lengths, strict=True):
    row[:length] = torch.randint(2, switches.COMMON["vocab_size"], (length,), generator=generator)
  return rows


def _cache() -> transformers.EncoderDecoderCache:
  """An empty cache. The one that `generate` makes has as many layers as the encoder, too few for a longer decoder."""
  return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())


def _step_by_step(model: Model, encoded, mask: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
  """Logits of given tokens, one call a token with a cache."""
  cache = _cache()
  logits = [model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=read[:, i : i + 1], use_cache=True,
                  past_key_values=cache).logits for i in range(read.shape[1])]
  return torch.cat(logits, dim=1)


def _routing(model: Model, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
  """What `run` returns, and of every router, encoder first, whom each token chose and whether it was taken."""
  seen = {}
  hooks = [module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
           for name, module in model.named_modules() if isinstance(module, source.SwitchTransformersTop1Router)]
  logits = run()
  for hook in hooks:
    hook.remove()
  found = {}
  for index, name in enumerate(sorted(seen, key=lambda name: (name.startswith("decoder"), name))):
    taken, _, router_logits = seen[name]
    _check_margin(router_logits)
    found |= {f"experts.{index}": router_logits.argmax(-1).to(torch.int32), f"kept.{index}": taken.sum(-1).bool()}
  return logits, found


def _check_margin(logits: torch.Tensor) -> None:
  """Fails if rounding may decide which logit `[..., n]` is the largest."""
  first, second = logits.topk(2).values.unbind(-1)
  margin = float((first - second).min())
  assert margin > MARGIN, f"the two largest logits are {margin:.1e} apart; take another seed"


def _greedy(model: Model, inputs: torch.Tensor, **options) -> torch.Tensor:
  """`[B, NEW]`, without the token that the decoder starts with."""
  out = model.generate(inputs, attention_mask=(inputs != 0).long(), decoder_start_token_id=0, do_sample=False,
                       max_new_tokens=switches.NEW, return_dict_in_generate=True, output_logits=True, **options)
  _check_margin(torch.stack(out.logits))
  return out.sequences[:, 1:].int()


def _check_rounding(model: Model, logits: torch.Tensor, real: torch.Tensor, **batch: torch.Tensor) -> None:
  """Fails if rounding alone moves the logits: then two right programs would differ. The model is float64 afterwards."""
  for module in model.double().modules():
    if isinstance(module, source.SwitchTransformersTop1Router):
      module.dtype = torch.float64
  error = float((model(**batch).logits - logits)[real].abs().max())
  assert error < ROUNDING, f"rounding moves the logits by {error:.1e}"


@torch.no_grad()
def make(directory: Path, seed: int, **sizes) -> None:
  """Writes the config, the batch, logits in both modes of capacity, with padding on the left, and greedy texts."""
  model = _model(seed, **sizes)
  inputs, targets = _rows(switches.INPUTS, 0, seed), _rows(switches.TARGETS, -100, seed + 100)
  read = torch.cat([torch.zeros_like(targets[:, :1]), targets.clamp(min=0)[:, :-1]], dim=1)
  mask = (inputs != 0).long()
  left = torch.stack([row.roll(len(row) - n) for row, n in zip(inputs, switches.INPUTS, strict=True)])
  whole, routing = _routing(model, lambda: model(inputs, attention_mask=mask, decoder_input_ids=read).logits)
  encoded = model.encoder(inputs, attention_mask=mask)
  expected = {
      "inputs": inputs.int(), "targets": targets.int(), "logits_sequence": whole,
      "logits_call": _step_by_step(model, encoded, mask, read),
      "logits_left": model(left, attention_mask=(left != 0).long(), decoder_input_ids=read).logits,
      "greedy_sequence": _greedy(model, inputs, use_cache=False),
      "greedy_call": _greedy(model, inputs, use_cache=True, past_key_values=_cache()),
  } | routing
  directory.mkdir(parents=True, exist_ok=True)
  model.config.architectures = [type(model).__name__]
  model.config.save_pretrained(directory)
  shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
  (directory / "shapes.json").write_text(json.dumps(shapes, sort_keys=True) + "\n")
  safetensors.torch.save_file({k: v.contiguous() for k, v in expected.items()}, directory / "expected.safetensors")
  _check_rounding(model, whole, targets >= 0, input_ids=inputs, attention_mask=mask, decoder_input_ids=read)


def buckets() -> dict[str, torch.Tensor]:
  """The buckets of distances from -600 to 600, for several counts and furthest distances."""
  relative = torch.arange(-600, 601)
  bucket = source.SwitchTransformersAttention._relative_position_bucket
  return {f"{count}.{furthest}.{int(both)}": bucket(relative, both, count, furthest).to(torch.int8)
          for count, furthest in ((32, 128), (8, 12), (12, 50), (64, 1000)) for both in (False, True)}


def main() -> None:
  """Writes the golden files."""
  here = switches.HERE
  for name, (seed, sizes) in switches.MODELS.items():
    make(here / name, seed, **sizes)
  safetensors.torch.save_file(buckets(), here / "buckets.safetensors")
  versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "safetensors": safetensors.__version__, "numpy": np.__version__}
  (here / "versions.json").write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")
  for file in here.rglob("*.*"):
    file.chmod(0o644)


if __name__ == "__main__":
  main()
