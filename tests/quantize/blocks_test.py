"""The task `quantize` with blocks of neurons, from end to end on a tiny checkpoint, against the same in memory."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import channels, codecs, inspection, language_model, qtensor, results, runs
from moeq_jax.allocate import blocks as allocate_blocks
from moeq_jax.assemble import apply
from moeq_jax.calibrate import channels as channel_statistics
from moeq_jax.encode import channels as encode_channels
from moeq_jax.encode import neurons, stream
from moeq_jax.evaluate import perplexity
from moeq_jax.export import native
from moeq_jax.models import convert
from moeq_jax.quantize import blocks, needs
from moeq_jax.scores import channels as scores
from tests import tiny

CODEC, BUDGET = "rtn(group=32)", 2.5
BASE = ("budget=2.5", "block=32", "method=knapsack(fisher_error)")
KILLED = "layer-00001.moeq.safetensors"
WORKER = """
import os, signal, sys
from pathlib import Path
from moeq_jax import runs
replace = os.replace
def killed(source, target):
  if Path(target).name == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
  replace(source, target)
os.replace = killed
runs.execute(runs.load_config("configs/quantize.py:smoke", sys.argv[3:]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("blocks") / "checkpoint")


@pytest.fixture(scope="module")
def overrides(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
  root = tmp_path_factory.mktemp("tokens")
  for name, batches in (("calibration", tiny.tokens(3)), ("evaluation", tiny.samples(2))):
    np.save(root / f"{name}.npy", np.concatenate(batches))

  def overrides(*settings: str) -> list[str]:
    fields = (f"checkpoint={checkpoint}", f"length={tiny.LENGTH}", f"calibration.tokens={root / 'calibration.npy'}",
              "calibration.sequences=12", f"evaluation.tokens={root / 'evaluation.npy'}", f"codec={CODEC}", *settings)
    return [f"--config.{field}" for field in fields]

  return overrides


@pytest.fixture(scope="module")
def run(overrides: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
  """Runs the task with some fields set; returns the work directory."""
  root = tmp_path_factory.mktemp("runs")

  def run(name: str, *settings: str) -> Path:
    runs.execute(runs.load_config("configs/quantize.py:smoke", overrides(*settings)), root / name)
    return root / name

  return run


@pytest.fixture(scope="module")
def workdir(run: Callable[..., Path]) -> Path:
  """A run with every sweep."""
  return run("all", *BASE, "export=('hf',)")


@pytest.fixture(scope="module")
def plan(workdir: Path) -> channels.BlockPlan:
  return channels.BlockPlan.load(workdir / "plan.npz")


def packed_in_memory(plan: channels.BlockPlan) -> list[dict[str, qtensor.QTensor]]:
  """The model's experts in the plan's order, encoded and packed at its widths, a layer at a time."""
  codec, layers = codecs.get(CODEC), []
  for layer, block in enumerate(tiny.model().blocks):
    experts = neurons.sort_experts(tiny.functions().experts(block), plan.order[layer])
    bits = {name: own[layer] for name, own in plan.by_projection().items()}
    layers.append(neurons.pack_layer(neurons.encode_layer(experts, bits, {}, codec=codec), codec.group))
  return layers


def test_the_costs_are_those_of_channels_measured_in_memory(workdir: Path):
  model, functions = tiny.model(), tiny.functions()
  stats = channel_statistics.collect(functions, model.top, list(model.blocks), tiny.tokens(3))
  experts = [functions.experts(block) for block in model.blocks]
  codec = codecs.get(CODEC)
  layers = [encode_channels.encode_layer(own, stats, layer, codec=codec, widths=tiny.WIDTHS)
            for layer, own in enumerate(experts)]
  shapes = {name: w.shape[1:] for name, w in experts[0].items()}
  errors = encode_channels.error_table(layers, shapes, widths=tiny.WIDTHS, codec=codec)
  rows = scores.as_cost("fisher_error", scores.Evidence(errors, experts, stats))
  found = channels.BlockCosts.load(workdir / "costs-fisher_error-block-32.npz")
  expected = allocate_blocks.merged(allocate_blocks.ordered(rows, found.order), 32)
  assert (found.block, found.down_block, found.units) == (32, 32, "arbitrary")
  np.testing.assert_allclose(found.cost, expected.cost, rtol=2e-2, atol=1e-6 * expected.cost.max())
  least = sum(rows.cost[..., rows.part(name), 0] for name in rows.projections)  # dearest first, up to sums' noise
  placed = np.take_along_axis(least, found.order.astype(int), axis=2)
  assert (np.diff(placed, axis=2) <= 1e-3 * placed.max(axis=2, keepdims=True)).all()


def test_the_quantized_model_holds_the_plans_codes_and_all_else_unchanged(workdir: Path, plan: channels.BlockPlan,
                                                                         checkpoint: Path):
  model, source = native.open(workdir / "quantized"), convert.open_checkpoint(checkpoint)
  assert plan.bits.shape == (2, 6, 9) and len(np.unique(plan.bits)) > 2
  assert all((own != own[..., :1]).any() for own in plan.by_projection().values())  # widths change inside a matrix
  for layer, expected in enumerate(packed_in_memory(plan)):
    packed, others = model.layer(layer)
    assert list(packed) == list(expected)
    for name, q in packed.items():
      assert q.bits.shape == ((6, 3, 1) if name == "down" else (6, 1, 3))
      assert all(np.array_equal(getattr(q, f), getattr(expected[name], f))
                 for f in ("buffer", "bits", "offset", "scale", "zero")), name
    kept = source.others(layer)
    assert set(others) == set(kept) and all(others[n].tobytes() == kept[n].tobytes() for n in kept)


def test_bits_are_counted_three_ways(workdir: Path, plan: channels.BlockPlan):
  model, packed = native.open(workdir / "quantized"), packed_in_memory(plan)
  sizes, row = model.manifest["sizes"], results.read(workdir / "rows.jsonl")[1]
  tensors = [q for layer in packed for q in layer.values()]
  assert plan.permutation_bits() == 16 * 96 / (3 * 96 * 64)
  assert sizes["nominal_bits"] == pytest.approx(plan.average_bits()) and 2.4 < plan.average_bits() <= BUDGET
  assert sizes["effective_bits"] == pytest.approx(qtensor.effective_bits(*tensors) + plan.permutation_bits())
  assert sizes["stored_bits"] * plan.sizes.sum() * 12 / 8 == pytest.approx(qtensor.stored_bytes(*tensors))
  assert {name: row[name] for name in sizes} == sizes
  assert (row["block"], row["permutation_bits"]) == (32, plan.permutation_bits())
  said = model.manifest["plan"]
  assert (said["block"], said["down_block"], said["constraint"], said["method"]) == (
      32, 32, "none", "knapsack(fisher_error, block=32)")
  assert said["bits"] == plan.bits.tolist()
  weights = {name: np.mean(own) for name, own in plan.by_projection().items()}
  assert said["average_bits"] == pytest.approx(weights)


def test_the_losses_are_those_of_both_models_in_memory(workdir: Path, plan: channels.BlockPlan):
  functions, model, batches = tiny.functions(), tiny.model(), tiny.samples(2)
  full = perplexity.reference(functions, model.top, list(model.blocks), batches)
  placed = apply.quantized_blocks(functions, list(model.blocks), packed_in_memory(plan))
  loss = perplexity.measure(functions, model.top, placed, batches, full).loss
  first, second = results.read(workdir / "rows.jsonl")
  assert (first["loss"], second["loss"]) == pytest.approx((full.loss.mean(), loss.mean()), rel=1e-5)
  assert second["loss_delta"] > second["loss_delta_ci95"] > 0


def test_the_exported_copy_computes_what_the_packed_model_does(workdir: Path, plan: channels.BlockPlan):
  copy, _ = convert.load(workdir / "hf", jnp.float32)
  for block, packed in zip(copy.blocks, packed_in_memory(plan), strict=True):
    for name, weights in tiny.functions().experts(block).items():
      expected = np.asarray(qtensor.dequantize(packed[name], jnp.bfloat16), np.float32)
      assert np.array_equal(np.asarray(weights), expected), name
  opened = language_model.load(workdir / "quantized")
  layers = [{name: qtensor.dequantize(q) for name, q in layer.items()} for layer in packed_in_memory(plan)]
  expected = tiny.logits(layers)
  np.testing.assert_allclose(opened.logits(tiny.tokens(1)[0]), expected, rtol=2e-3, atol=2e-3)


def test_finer_units_have_bounds_below_coarser_values(workdir: Path, plan: channels.BlockPlan):
  """Block x projection, projection, expert, layer at equal nominal bits, as the task plans them; truly nested."""
  report = json.loads((workdir / "report.json").read_text())
  value = {row["constraint"]: row["predicted"] for row in report["constraints"]}
  assert plan.lower_bound <= plan.predicted == value["none"]
  for loose, tight in (("none", "gate_equals_up"), ("none", "projection"), ("projection", "expert"),
                       ("gate_equals_up", "expert"), ("expert", "per_layer")):
    assert value[loose] <= value[tight] * (1 + 1e-12)
  assert plan.lower_bound < value["expert"]
  assert all(row["bits"] <= BUDGET for row in report["constraints"])


def test_reports_say_the_averages_and_what_opens_it(workdir: Path, plan: channels.BlockPlan):
  averages = ", ".join(f"{name} {bits:.3f}" for name, bits in plan.averages().items())
  for file in ("report.html", "report.md"):
    text = (workdir / file).read_text()
    assert "block of 32 neurons" in text and averages in text.replace("\\_", "_"), file
  facts = dict(inspection.facts(inspection.describe(workdir / "quantized")))
  assert facts["plan"] == "knapsack(fisher_error, block=32) at 2.5 bits" and averages in facts["widths"]
  counts = {int(n): int(c) for c, n in re.findall(r"(\d+) at (\d)", facts["widths"])}
  assert counts == {b: int((plan.bits == b).sum()) for b in np.unique(plan.bits)}


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(workdir: Path, run: Callable[..., Path],
                                                              overrides: Callable[..., list[str]],
                                                              monkeypatch: pytest.MonkeyPatch):
  place = workdir.parent / "killed"
  command = [sys.executable, "-c", WORKER, KILLED, str(place), *overrides(*BASE, "export=('hf',)")]
  done = subprocess.run(command, cwd=runs.ROOT, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  assert (place / "quantized" / "layer-00000.moeq.safetensors").is_file() and (place / "plan.npz").is_file()
  assert not (place / "quantized" / "moeq.json").exists()
  monkeypatch.setattr(stream, "channel_errors", None)  # nothing is measured again
  run("killed", *BASE, "export=('hf',)")
  for path in (workdir / "quantized").iterdir():
    assert (place / "quantized" / path.name).read_bytes() == path.read_bytes(), path.name
  assert (place / "rows.jsonl").read_bytes() == (workdir / "rows.jsonl").read_bytes()


def test_gptq_sees_the_inputs_in_the_order_of_the_neurons(run: Callable[..., Path]):
  """Codes from streamed rows against those from the same run's plan and moments of all rows in memory."""
  text, codec = "gptq(group=32)", codecs.get("gptq(group=32)")
  made = run("gptq", "budget=2.5", "block=32", f"codec={text}", "evaluation.sequences=0",
             "method=knapsack(router_grad_error, constraint=gate_equals_up, widths=(2, 4))")
  plan, model = channels.BlockPlan.load(made / "plan.npz"), native.open(made / "quantized")
  own = plan.by_projection()
  assert np.array_equal(own["gate"], own["up"]) and set(np.unique(plan.bits)) == {2, 4}
  ready = neurons.sort_stats(tiny.stats(), plan.order)
  for layer, block in enumerate(tiny.model().blocks):
    experts = neurons.sort_experts(tiny.functions().experts(block), plan.order[layer])
    moments = {name: (ready.moment_mid if name == "down" else ready.moment_in)[layer] for name in experts}
    encoded = neurons.encode_layer(experts, {name: bits[layer] for name, bits in own.items()}, moments, codec=codec)
    packed, _ = model.layer(layer)
    for name, q in packed.items():
      wrong = np.mean(qtensor.unpack(q) != encoded[name][0].codes, axis=(1, 2))
      assert np.median(wrong) < 0.01, (layer, name)  # sums in another order, fed back


@pytest.mark.parametrize("block", [16, 32])
def test_the_files_fit_into_the_memory_that_was_asked_for(run: Callable[..., Path], block: int):
  made = run(f"memory-{block}", "memory=330000B", f"block={block}", "method=knapsack(weight_mse)",
             "evaluation.sequences=0", "calibration.sequences=0")
  taken = sum(path.stat().st_size for path in (made / "quantized").iterdir())
  plan = channels.BlockPlan.load(made / "plan.npz")
  assert 200_000 < taken <= 330_000 and 1 < plan.average_bits() < 4 and (plan.block, plan.down_block) == (block, 32)


# ---------------------------------------------------------------------------------------------------------------------
# What is needed, and mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "codec", "text", "expected"), [
    ("weight_error", "rtn", True, "e"), ("weight_mse", "gptq", True, "fer"), ("router_grad_error", "rtn", True, "fbe"),
    ("fisher_error", "rtn", True, "fbef"), ("fisher_error", "gptq", True, "fbefr"),
    ("statistical_error", "hqq", True, "fbe"), ("statistical_error", "hqq", False, "e"),
])
def test_only_what_a_score_of_neurons_reads_is_measured(method: str, codec: str, text: bool, expected: str):
  found = needs.of(f"knapsack({method}, block=64)", 2.5, (1, 2, 3, 4), codecs.get(codec), ("gate", "up", "down"), False,
                   text=text)
  made = [name[0] for name in ("forward", "backward", "errors", "fisher", "rows") if getattr(found, name)]
  assert "".join(made) == expected


@pytest.mark.parametrize(("settings", "said"), [
    (("block=48",), "block=48 is not one of .16, 32, 64, 128. neurons"),
    (("block=-32",), "block=-32 is not one of"),
    (("block=64",), "blocks of 64 rows of down .* do not divide the 96 neurons of an expert; take block=16 or 32"),
    (("block=32", "codec=rtn(group=0)"), "group=0: one scale over all rows of down"),
    (("block=32", "codec=rtn(group=128)"), "not divide the 96 neurons of an expert; take a codec with a smaller"),
    (("block=32", "method=uniform"), "config.block=32: uniform gives one width to an expert"),
    (("block=32", "method=knapsack(fisher_error, block=16)"), "name one block"),
    (("block=32", "method=knapsack(output_error)"), "unknown score of channels 'output_error'"),
    (("block=32", "method=knapsack(weight_mse, constraint=block)"), "unknown constraint 'block'"),
    (("block=32", "codec=rtn(group=32,grid=ct)", "widths=(2, 3, 4)", "export=('compressed-tensors',)"),
     "compressed-tensors has one width for a projection .* export hf"),
    (("block=32", "calibration.sequences=0"), "no calibration, so there are no gradients"),
])
def test_mistakes_are_found_before_any_work(run: Callable[..., Path], tmp_path: Path, settings: tuple[str, ...],
                                            said: str):
  with pytest.raises(ValueError, match=said):
    run(str(tmp_path / "run"), "budget=2.5", "method=knapsack(fisher_error)", *settings)
  assert not [path for path in (tmp_path / "run").iterdir() if path.name not in runs.NOTES]


def test_the_block_becomes_an_option_of_the_method_once(caplog: pytest.LogCaptureFixture):
  config = runs.load_config("configs/quantize.py", ["--config.checkpoint=x", "--config.block=64"])
  once = blocks.resolved(config)
  assert once.method == "knapsack(router_grad_error, block=64)" and config.method == "knapsack(router_grad_error)"
  assert "quantize.py:blocks" in caplog.text
  caplog.clear()
  assert blocks.resolved(once).method == once.method
  for_blocks = runs.load_config("configs/quantize.py:blocks", ["--config.checkpoint=x", "--config.block=32"])
  assert blocks.resolved(for_blocks).method == "knapsack(fisher_error, block=32)" and not caplog.text


def test_a_dry_run_knows_blocks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
  settings = [f"--config.{s}" for s in (f"checkpoint={checkpoint}", "dry_run=True", "budget=2.5", "block=32",
                                        f"codec={CODEC}", f"length={tiny.LENGTH}")]
  runs.execute(runs.load_config("configs/quantize.py", settings), tmp_path)
  found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["method"] == "knapsack(router_grad_error, block=32)"
  assert [stage["stage"] for stage in found["stages"]][1] == "forward sweep and errors"
