"""The task `quantize` from end to end on a tiny checkpoint, against the same quantization in memory."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import artifacts, codecs, qtensor, results, runs, scores
from moeq_jax.allocate import methods
from moeq_jax.assemble import apply
from moeq_jax.encode import stream
from moeq_jax.evaluate import perplexity
from moeq_jax.export import native
from moeq_jax.models import convert
from tests import tiny

METHOD, CODEC = "knapsack(router_grad_error)", "rtn(group=32)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("quantize") / "checkpoint")


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
  """Runs the task on token ids with some fields set; returns the work directory."""
  root = tmp_path_factory.mktemp("runs")
  for name, batches in (("calibration", tiny.tokens(2)), ("evaluation", tiny.samples(2))):
    np.save(root / f"{name}.npy", np.concatenate(batches))

  def run(name: str, *settings: str) -> Path:
    overrides = (f"checkpoint={checkpoint}", f"length={tiny.LENGTH}", f"calibration.tokens={root / 'calibration.npy'}",
                 f"evaluation.tokens={root / 'evaluation.npy'}", f"codec={CODEC}", *settings)
    config = runs.load_config("configs/quantize.py:smoke", [f"--config.{override}" for override in overrides])
    runs.execute(config, root / name)
    return root / name

  return run


@pytest.fixture(scope="module")
def workdir(run: Callable[..., Path]) -> Path:
  """A run with every sweep."""
  return run("all", "budget=2.5", f"method={METHOD}", "export=('hf',)")


def packed_in_memory(workdir: Path) -> list[dict[str, qtensor.QTensor]]:
  """The experts at the widths of the run's plan, packed from the codes of `tiny.encoded`."""
  bits = np.array(json.loads((workdir / "plan.json").read_text())["bits"])
  return [apply.pack_layer(codes, own, widths=tiny.WIDTHS, group=32)
          for codes, own in zip(tiny.encoded(CODEC)[0], bits, strict=True)]


def test_the_plan_is_that_of_the_same_evidence_in_memory(workdir: Path):
  table = artifacts.CostTable.load(workdir / "costs-router_grad_error.npz")
  found = tiny.evidence()
  ask = methods.Inputs(tiny.WIDTHS, found.routers.shape[:2], cost=lambda spec: table, sensitivity=lambda spec: None,
                       draws=1, seed=0)
  plan = json.loads((workdir / "plan.json").read_text())
  assert plan == methods.candidates(METHOD, 2.5, ask)[0].plan.as_json()
  gradient = np.load(workdir / "backward" / "layer-00000.npz")["router_grad_sq"]
  costs = table.cost[0] / np.sqrt(gradient / 2)[:, None, None]
  np.testing.assert_allclose(costs, scores.evaluate("weight_mse", found)[0], rtol=1e-4)


def test_the_quantized_model_holds_the_plans_codes_and_all_else_unchanged(workdir: Path, checkpoint: Path):
  model, source = native.open(workdir / "quantized"), convert.open_checkpoint(checkpoint)
  for layer, expected in enumerate(packed_in_memory(workdir)):
    packed, others = model.layer(layer)
    assert list(packed) == list(expected)
    for name, q in packed.items():
      assert all(np.array_equal(getattr(q, f), getattr(expected[name], f)) for f in ("buffer", "bits", "scale", "zero"))
    kept = source.others(layer)
    assert set(others) == set(kept) and all(others[n].tobytes() == kept[n].tobytes() for n in kept)
  top = source.others(None)
  assert {n: a.tobytes() for n, a in model.top().items()} == {n: a.tobytes() for n, a in top.items()}
  for name in ("config.json", "tokenizer.json"):
    assert (model.directory / name).read_bytes() == (checkpoint / name).read_bytes()
  assert model.manifest["codec"] == CODEC and model.manifest["plan"]["method"] == METHOD
  assert model.manifest["sizes"]["nominal_bits"] <= 2.5


def test_the_losses_are_those_of_both_models_in_memory(workdir: Path):
  functions, model, batches = tiny.functions(), tiny.model(), tiny.samples(2)
  full = perplexity.reference(functions, model.top, list(model.blocks), batches)
  blocks = apply.quantized_blocks(functions, list(model.blocks), packed_in_memory(workdir))
  loss = perplexity.measure(functions, model.top, blocks, batches, full).loss
  first, second = results.read(workdir / "rows.jsonl")
  assert first["loss"] == pytest.approx(full.loss.mean(), rel=1e-5)
  assert second["loss"] == pytest.approx(loss.mean(), rel=1e-5)
  delta, stderr = perplexity.paired(loss, full.loss)
  assert second["loss_delta"] == pytest.approx(delta, rel=1e-3)
  assert second["loss_delta_ci95"] == pytest.approx(1.96 * stderr, rel=1e-3)
  assert second["loss_delta"] > second["loss_delta_ci95"] > 0
  assert (first["family"], second["family"], second["budget"]) == ("full", "knapsack", 2.5)


def test_the_exported_copy_is_the_dequantized_model(workdir: Path):
  model, _ = convert.load(workdir / "hf", jnp.float32)
  for block, packed in zip(model.blocks, packed_in_memory(workdir), strict=True):
    for name, weights in tiny.functions().experts(block).items():
      expected = np.asarray(qtensor.dequantize(packed[name], jnp.bfloat16), np.float32)
      assert np.array_equal(np.asarray(weights), expected), name


def test_the_report_and_the_end_say_what_was_done(workdir: Path):
  report = json.loads((workdir / "report.json").read_text())
  assert report["unrouted"] == [list(tiny.UNROUTED)]
  sizes = native.open(workdir / "quantized").manifest["sizes"]
  assert report["bits"] == {"asked": 2.5, **{n: sizes[f"{n}_bits"] for n in ("nominal", "effective", "stored")}}
  files = sum(path.stat().st_size for path in (workdir / "quantized").iterdir())
  assert report["bytes"]["after"] == files > report["bytes"]["experts_after"]
  ratios = {row["constraint"]: row["ratio"] for row in report["constraints"]}
  assert ratios["none"] <= ratios["gate_equals_up"] <= ratios["expert"] == 1 <= ratios["per_layer"]
  page = (workdir / "report.html").read_text()
  assert f"block {tiny.UNROUTED[0]}, expert {tiny.UNROUTED[1]}" in page and f"{sizes['stored_bits']:.3f}" in page
  assert not (workdir / "states").exists()


def test_the_same_command_again_does_nothing_again(workdir: Path, run: Callable[..., Path],
                                                   monkeypatch: pytest.MonkeyPatch):
  kept = [path for path in workdir.rglob("*") if path.suffix in (".npz", ".safetensors") or path.name == "moeq.json"]
  before = {path: path.stat().st_mtime_ns for path in kept}
  monkeypatch.setattr(stream, "encode_expert", None)
  monkeypatch.setattr(stream, "expert_errors", None)
  assert run("all", "budget=2.5", f"method={METHOD}", "export=('hf',)") == workdir
  assert {path: path.stat().st_mtime_ns for path in kept} == before


@pytest.mark.parametrize("file", ["layer-00001.moeq.safetensors", "top.moeq.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_made_again_by_the_same_command(workdir: Path, run: Callable[..., Path], file: str):
  copy = shutil.copytree(workdir, workdir.parent / f"damaged-{file}")
  content = bytearray((copy / "quantized" / file).read_bytes())
  content[-1] ^= 1
  (copy / "quantized" / file).write_bytes(content)
  run(copy.name, "budget=2.5", f"method={METHOD}", "export=('hf',)")
  for path in (workdir / "quantized").iterdir():
    assert (copy / "quantized" / path.name).read_bytes() == path.read_bytes(), path.name


# ---------------------------------------------------------------------------------------------------------------------
# Other settings
# ---------------------------------------------------------------------------------------------------------------------


def test_uniform_widths_without_data_read_no_text_and_sweep_once(run: Callable[..., Path]):
  workdir = run("uniform", "budget=3", "method=uniform", "evaluation.sequences=0", "calibration.tokens=",
                "evaluation.tokens=")
  model = native.open(workdir / "quantized")
  expected = [apply.pack_layer(codes, np.full(6, 3), widths=tiny.WIDTHS, group=32) for codes in tiny.encoded(CODEC)[0]]
  for layer, packed in enumerate(expected):
    assert all(np.array_equal(model.layer(layer)[0][name].buffer, q.buffer) for name, q in packed.items())
  folders = {path.name for path in workdir.iterdir() if path.is_dir()}
  assert folders == {"quantized", "figures"}
  row = results.read(workdir / "rows.jsonl")[1]
  assert (row["nominal_bits"], row["loss"], row["loss_delta"], row["sequential"]) == (3.0, None, None, None)
  assert "not measured" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("constraint", ["none", "per_layer_projection"])
def test_projections_may_have_widths_of_their_own(run: Callable[..., Path], constraint: str):
  workdir = run(f"projections-{constraint}", "budget=2.2", "evaluation.sequences=0", "widths=(1, 2, 3, 4)",
                f"method=knapsack(weight_mse, constraint={constraint}, widths=(1, 2, 4))")
  bits = np.array(json.loads((workdir / "plan.json").read_text())["bits"])
  assert bits.shape == (2, 6, 3) and set(bits.ravel()) <= {1, 2, 4} and 2.0 < bits.mean() <= 2.2
  model = native.open(workdir / "quantized")
  for layer in range(2):
    packed = model.layer(layer)[0]
    assert np.array_equal(np.stack([q.bits.ravel() for q in packed.values()], 1), bits[layer])
  page = (workdir / "report.html").read_text()
  assert re.search(rf'<tr class="best"><th scope="row">{constraint}</th>', page)


@pytest.mark.parametrize("size", [280_000, 310_000])
def test_the_files_fit_into_the_memory_that_was_asked_for(run: Callable[..., Path], size: int):
  workdir = run(f"memory-{size}", f"memory={size}B", "method=knapsack(weight_mse)", "evaluation.sequences=0")
  taken = sum(path.stat().st_size for path in (workdir / "quantized").iterdir())
  asked = json.loads((workdir / "report.json").read_text())["bits"]["asked"]
  assert size - 120_000 < taken <= size and 1 <= asked <= 4


def test_sequential_rows_come_from_the_quantized_layers_before(run: Callable[..., Path],
                                                              monkeypatch: pytest.MonkeyPatch):
  seen: list[tuple[np.ndarray, np.ndarray]] = []
  encode = stream.encode_expert

  def watched(weights: Any, rows: np.ndarray, mids: np.ndarray, bits: Any, *, codec: codecs.Codec):
    seen.append((rows, mids))
    return encode(weights, rows, mids, bits, codec=codecs.get(CODEC))  # compiles less

  monkeypatch.setattr(stream, "encode_expert", watched)
  workdir = run("sequential", "budget=2", "method=uniform", "codec=gptq(group=32)", "sequential=True",
                "evaluation.sequences=0")
  assert [row["sequential"] for row in results.read(workdir / "rows.jsonl")] == [None, True]
  page = (workdir / "report.html").read_text()
  assert "gptq(group=32), on the inputs that the quantized layers before it give" in page
  first = {name: tiny.decoded(tiny.encoded(CODEC)[0][0], 2)[name] for name in artifacts.PROJECTIONS}
  experts = [first, tiny.functions().experts(tiny.model().blocks[1])]
  layers = [tiny.forward(batch, experts)[1] for batch in tiny.tokens(2)]
  for layer in range(2):
    for expert in range(6):
      rows, mids = seen[6 * layer + expert]
      chosen = [(own[layer].chosen == expert).any(axis=1) for own in layers]
      expected = np.concatenate([own[layer].rows[c] for own, c in zip(layers, chosen)])
      np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-3)
      assert mids.shape == (len(expected), tiny.CONFIG.intermediate_size)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ((), "one of --config.budget=BITS"),
    (("budget=2", "memory=20GiB"), "not both"),
    (("memory=lots",), "a size is a number with a unit"),
    (("memory=100kB",), "config.memory=100kB: .*the model takes"),
    (("budget=9",), "possible range"),
    (("budget=2", "checkpoint="), "--config.checkpoint=DIR"),
    (("budget=2", "checkpoint=nowhere"), "nowhere.config.json: not found"),
    (("budget=2", "codec=gtpq"), "did you mean 'gptq'"),
    (("budget=2", "codec=hqq(grid=ct)"), "HQQ moves the zeros"),
    (("budget=2", "method=knapsak(x)"), "did you mean 'knapsack'"),
    (("budget=2", "method=knapsack(weight)"), "unknown score 'weight'"),
    (("budget=2", "widths=(1, 5)"), "no codec encodes .5. bits"),
    (("budget=2", "sequential=True"), "rtn does not look at inputs"),
    (("budget=2", "compute_dtype=float16"), "it is 'float32' or 'bfloat16'"),
    (("budget=2", "export=('gguf',)"), "unknown format 'gguf'"),
    (("budget=2", "export=('compressed-tensors',)"), "--config.codec='rtn.group=128, grid=ct.'"),
    (("budget=2", "export=('hf(width=4)',)"), "hf has no option 'width'"),
    (("budget=2", "codec=rtn(group=32,grid=ct)", "widths=(2, 3, 4)", "export=('compressed-tensors(width=5)',)"),
     "width is one of"),
    (("budget=2", "codec=rtn(group=64,grid=ct)", "widths=(2, 3, 4)", "export=('compressed-tensors',)", "method=uniform",
      "evaluation.sequences=0"), "groups of 64 do not divide the 96 inputs of down"),
    (("budget=2", "export=('hf(dtype=float64)',)", "method=uniform"), "'float64' .*none of .*hf.dtype=bfloat16"),
    (("budget=2", "calibration.sequences=0"), "needs text; .*:data_free"),
    (("budget=2", "calibration.sequences=800"), "holds 8 sequences of 24 tokens, 800 of 24"),
])
def test_mistakes_are_found_before_any_work(run: Callable[..., Path], tmp_path: Path, settings: tuple[str, ...],
                                            said: str):
  name = str(tmp_path / "run")
  with pytest.raises(ValueError, match=said):
    run(name, *settings)
  assert not [path for path in (tmp_path / "run").iterdir() if path.name not in runs.NOTES]


@pytest.mark.parametrize(("settings", "said"), [
    (("budget=3", "codec=rtn(group=32,grid=ct)", "export=('compressed-tensors(width=3)',)"),
     "the plan gives up to 4 bits"),
    (("memory=294000B",), "tiers.* takes 2.3333 bits per expert weight, and 2.3263 fit"),
])
def test_plans_that_cannot_be_used_are_refused_before_encoding(run: Callable[..., Path], tmp_path: Path,
                                                               settings: tuple[str, ...], said: str):
  with pytest.raises(ValueError, match=said):
    run(str(tmp_path / "run"), "method=tiers(router_norm, zeta=0)", "widths=(2, 3, 4)", "evaluation.sequences=0",
        *settings)
  assert not (tmp_path / "run" / "quantized").exists()


def test_a_dense_model_is_refused(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(convert, "open_checkpoint", lambda directory: type("dense", (), {"sparse_layers": ()}))
  with pytest.raises(ValueError, match="has no experts, and only experts are quantized; upcycle"):
    run(str(tmp_path / "run"), "budget=2")


def test_a_weight_that_is_not_finite_is_named(run: Callable[..., Path], checkpoint: Path, tmp_path: Path):
  tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
  name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
  tensors[name] = np.full_like(tensors[name], np.nan)
  (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(convert.CheckpointError, match=f"tensor {name} holds NaN"):
    run(str(tmp_path / "run"), f"checkpoint={tmp_path}", "budget=2", "method=uniform", "evaluation.sequences=0")


def test_the_config_and_its_variants_load(checkpoint: Path):
  for arg, fields in (("", {}), (":data_free", {"codec": "hqq(group=64)"}), (":deploy", {"widths": (4,)}),
                      (":deploy,data_free", {"codec": "rtn(group=128, grid=ct)"}),
                      (":blocks", {"block": 64, "method": "knapsack(fisher_error)"}),
                      (":blocks,data_free", {"block": 64, "method": "knapsack(weight_mse)"}),
                      (":smoke", {"length": 64})):
    config = runs.load_config(f"configs/quantize.py{arg}", [f"--config.checkpoint={checkpoint}"])
    assert config.task == "quantize" and {name: config[name] for name in fields} == fields
  with pytest.raises(ValueError, match="blocks,deploy: compressed-tensors has one width"):
    runs.load_config("configs/quantize.py:blocks,deploy", [f"--config.checkpoint={checkpoint}"])
