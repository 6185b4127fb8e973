"""What `inspect` says of checkpoints: counts and sizes that are those of the model and of its packed experts."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich import console as rich_console

from moeq_jax import inspection, qtensor, runs, tensor_files
from moeq_jax.allocate import budget as budget_lib
from moeq_jax.export import native
from moeq_jax.models import convert, hf_config, names
from moeq_jax.models.decoder import DecoderConfig
from tests import tiny
from tests.golden import checkpoints

MIXTRAL_8X7B = DecoderConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
    tie_word_embeddings=False, max_position_embeddings=32768)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


def shown(found: inspection.Description) -> str:
  out = io.StringIO()
  inspection.show(found, rich_console.Console(file=out, width=120))
  return out.getvalue()


def hollow(directory: Path, config: hf_config.Config) -> Path:
  """A checkpoint of this config whose files have headers and holes: a file per block, bfloat16."""
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(hf_config.write(config)))
  parts = [names.top_shapes(config), *(names.block_shapes(config, l) for l in range(names.block_count(config)))]
  places = {}
  for number, part in enumerate(parts):
    header, end = {}, 0
    for parameter, shape in part.items():
      inside = shape[1:] if names.is_expert(parameter) else shape
      inside = inside[::-1] if names.turned(parameter) else inside
      for name in names.tensor_names(config, parameter):
        begin, end = end, end + 2 * int(np.prod(inside))
        header[name] = {"dtype": "BF16", "shape": list(inside), "data_offsets": [begin, end]}
    file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
    places |= dict.fromkeys(header, file)
    text = json.dumps(header).encode()
    with (directory / file).open("wb") as stream:
      stream.write(len(text).to_bytes(8, "little") + text)
      stream.truncate(8 + len(text) + end)
  (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": places}))
  return directory


def test_mixtral_8x7b_is_described_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(tensor_files.TensorFiles, "read", lambda *_: pytest.fail("weights were read"))
  found = inspection.describe(hollow(tmp_path / "big", MIXTRAL_8X7B), budget=2.5, memory=20 << 30)
  assert found.parameters == 46_702_792_704  # what its authors' checkpoint holds
  assert found.expert_parameters == 32 * 8 * 3 * 4096 * 14336
  assert found.active_parameters == 46_702_792_704 - found.expert_parameters * 6 // 8
  assert found.types == {"bfloat16": 2 * found.parameters} and found.expert_bytes == 2 * found.expert_parameters
  layer = 2 * (found.expert_parameters // 32 + 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 4096)
  assert found.streaming_bytes == int(1.6 * layer) + (2 << 30)
  halves = (found.uniform[2] + found.uniform[3]) / 2
  assert found.budget is not None and found.budget[1] == pytest.approx(halves)
  assert found.uniform[4] - found.uniform[2] == found.expert_parameters * 2 // 8
  text = shown(found)
  for part in ("mixtral", "32: 32 with experts", "8 in each, 2 for a token", "46.7 billion, 12.9 billion for a token",
               "86.99 GiB", "2.5 bits", "18.74 GiB", "20.00 GiB", "bits per expert weight", "hidden 4096, expert"):
    assert part in text


@pytest.mark.parametrize("group", [0, 32, 64])
def test_sizes_at_uniform_widths_are_those_of_packed_experts(checkpoint: Path, group: int):
  found, model = inspection.describe(checkpoint, group=group), tiny.model()
  carried = sum((checkpoint / name).stat().st_size for name in ("config.json", "tokenizer.json"))
  leaves = convert.named_leaves(model)
  others = sum(2 * leaf.size for name, leaf in leaves.items() if not names.is_expert(name)) + carried
  assert found.other_bytes == others
  for bits in inspection.WIDTHS:
    packed = []
    for e, k, n in inspection.expert_shapes(tiny.CONFIG):
      scale = np.ones((e, -(-k // (group or k)), n), np.float32)
      packed.append(qtensor.pack(np.zeros((e, k, n), np.uint8), bits, scale, scale, group=group))
    assert found.uniform[bits] == qtensor.stored_bytes(*packed) + others


@pytest.mark.parametrize("name", ["qwen2_moe_window", "switch_untied", "llama_tied"])
def test_counts_are_those_of_the_model(tmp_path: Path, name: str):
  directory = checkpoints.write(name, tmp_path)
  found, (model, config) = inspection.describe(directory), convert.load(directory)
  leaves = convert.named_leaves(model)
  experts = {path: leaf for path, leaf in leaves.items() if names.is_expert(path)}
  total, routed = (sum(leaf.size for leaf in group.values()) for group in (leaves, experts))
  assert (found.parameters, found.expert_parameters) == (total, routed)
  used = sum(leaf[0].size for leaf in experts.values()) * getattr(config, "num_experts_per_tok", 1)
  assert found.active_parameters == total - routed + used
  assert found.total_bytes == 4 * total and found.expert_bytes == 4 * routed
  blocks = [sum(leaf.size for path, leaf in leaves.items() if path.startswith(f"blocks/{l}/"))
            for l in range(names.block_count(config))]
  assert found.streaming_bytes == int(1.6 * 4 * max(blocks)) + (2 << 30)  # layers as stored, here float32
  assert bool(found.uniform) == bool(routed)


def test_what_fits_into_memory_fits_and_no_more_would(tmp_path: Path, checkpoint: Path):
  config = dataclasses.replace(tiny.CONFIG, hidden_size=128, intermediate_size=256, head_dim=32)  # whole tiles
  directory, shapes = hollow(tmp_path / "big", config), inspection.expert_shapes(config)
  plain = inspection.describe(directory)
  memory = (plain.uniform[2] + plain.uniform[3]) // 2 + budget_lib.margin(shapes)
  found = inspection.describe(directory, memory=memory)
  assert found.memory == (memory, pytest.approx(2.5, abs=2e-4))
  again = inspection.describe(directory, budget=found.memory[1]).budget
  assert again is not None and memory - 100 < again[1] + budget_lib.margin(shapes) <= memory
  generous = inspection.describe(checkpoint, memory=1 << 40)
  assert generous.memory == (1 << 40, 4.0) and "4.00 bits per expert weight (the largest width)" in shown(generous)


def packed(plan: np.ndarray, group: int = 32) -> list[dict[str, qtensor.QTensor]]:
  """Packed zeros in place of the experts of `tiny.model()`."""
  layers = []
  for bits in plan:
    layer = {}
    for name, (k, n) in (("gate", (64, 96)), ("up", (64, 96)), ("down", (96, 64))):
      scale = np.ones((6, k // group, n), np.float32)
      layer[name] = qtensor.pack(np.zeros((6, k, n), np.uint8), bits, scale, scale, group=group)
    layers.append(layer)
  return layers


def test_a_quantized_model_tells_of_its_plan(checkpoint: Path, tmp_path: Path):
  source, layers = convert.open_checkpoint(checkpoint), packed(tiny.PLAN)
  plan = {"method": "knapsack(weight_mse)", "budget": 2.5, "bits": tiny.PLAN.tolist()}
  files = {name: (checkpoint / name).read_bytes() for name in ("config.json", "tokenizer.json")}
  native.save(tmp_path, layers, [source.others(l) for l in range(2)], source.others(None), files,
              {"codec": "rtn(group=32)", "plan": plan, "source": "x"})
  found = inspection.describe(tmp_path)
  assert found.manifest == native.open(tmp_path).manifest
  assert found.parameters == inspection.describe(checkpoint).parameters and not found.uniform
  assert found.total_bytes == sum((tmp_path / name).stat().st_size for name in found.manifest["files"])
  tensors = [q for layer in layers for q in layer.values()]
  assert found.expert_bytes == pytest.approx(qtensor.stored_bytes(*tensors), abs=1)
  text = shown(found)
  bits = qtensor.nominal_bits(*tensors)
  for part in ("rtn(group=32)", "knapsack(weight_mse) at 2.5 bits", "3 at 1, 4 at 2, 2 at 3, 3 at 4 bits",
               f"{bits:.3f} codes", f"{bits + 1:.3f} with scales and zeros"):
    assert part in text, text
  with pytest.raises(ValueError, match="is quantized already; --budget and --memory are asked of its source"):
    inspection.describe(tmp_path, budget=2.5)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_description(checkpoint: Path, capsys: pytest.CaptureFixture):
  inspection.command([str(checkpoint), "--budget=2.5", "--memory=1MB"])
  text = capsys.readouterr().out
  assert str(checkpoint)[:20] in text and "2.5 bits" in text and "in 976.6 KiB" in text and "all experts at" in text


@pytest.mark.parametrize(("options", "error", "said"), [
    (["--budget=two"], runs.UsageError, "--budget=two: a number of bits is needed"),
    (["--budget=9"], ValueError, "--budget=9: from 1 to 8 bits"),
    (["--budget=0.5"], ValueError, "from 1 to 8 bits"),
    (["--budget=nan"], ValueError, "from 1 to 8 bits"),
    (["--memory=20"], None, None),
    (["--memory=lots"], ValueError, "memory='lots': a size is a number with a unit"),
    (["--memory=1kB"], ValueError, "hold no plan"),
    (["--group=48"], ValueError, "group 48: choose one of"),
    (["--groop=64"], runs.UsageError, "did you mean 'group'"),
    (["more"], runs.UsageError, "usage: ./launch.sh inspect CHECKPOINT"),
])
def test_mistakes_in_the_command(checkpoint: Path, options: list[str], error: type[Exception] | None, said: str | None):
  with pytest.raises(error or ValueError, match=said or "hold no plan"):
    inspection.command([str(checkpoint), *options])


def test_too_little_memory_still_shows_what_each_width_takes(checkpoint: Path, capsys: pytest.CaptureFixture):
  with pytest.raises(budget_lib.BudgetError, match="hold no plan"):
    inspection.command([str(checkpoint), "--memory=1kB"])
  assert "all experts at" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"budget": 2.5}, {"memory": 1 << 30}])
def test_a_dense_model_has_nothing_to_quantize(tmp_path: Path, given: dict[str, Any]):
  directory = checkpoints.write("llama_tied", tmp_path)
  assert "2: 0 with experts, 2 dense" in shown(inspection.describe(directory))
  with pytest.raises(ValueError, match="has no experts, and only experts are quantized"):
    inspection.describe(directory, **given)


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere", "nowhere/config.json: not found; there is no such directory"),
    ("a.gguf", "a.gguf/config.json: not found; this is a file, a directory"),
    ("", "config.json: not found; expected a directory in Hugging Face format"),
    ("unfinished", "unfinished: is not finished: it has layers and no moeq.json"),
    ("run", "run: config.json: model_type is None; .*; this is a run's work directory, its model is .*run/quantized"),
])
def test_places_that_hold_no_checkpoint(tmp_path: Path, name: str, said: str):
  (tmp_path / "a.gguf").touch()
  for file in ("unfinished/layer-00000.moeq.safetensors", "run/quantized/moeq.json"):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
  (tmp_path / "run" / "config.json").write_text('{"task": "quantize"}')
  with pytest.raises((convert.CheckpointError, native.QuantizedError), match=said):
    inspection.describe(tmp_path / name)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (20 << 30, "20.00 GiB"), (3 << 50, "3072.00 TiB")])
def test_sizes_for_people(count: int, text: str):
  assert inspection.size(count) == text
