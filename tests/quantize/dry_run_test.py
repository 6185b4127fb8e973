"""A dry run checks shapes, counts what a run would take, reads no weight and leaves nothing behind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moeq_jax import codecs, main, runs, workspace
from moeq_jax.models import convert, hf_config, layout
from moeq_jax.quantize import dry_run, estimates, needs, sizes
from tests import tiny, tiny_switch

CONFIGS = ("configs/paper/mixtral_8x7b.py", "configs/paper/mixtral_8x22b.py", "configs/paper/switch_base_64.py")
AMOUNTS = estimates.Amounts(
    projections={"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}, experts=8, layers=32,
    active=10**10, checkpoint=10**11, block=10**8, state=10**9, halfway=2 * 10**9, logits=10**8, rows=90_112,
    tokens=2**18, per_token=2, evaluation=2**16, bits=2.25)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("dry") / "checkpoint")


def outlook(tmp_path: Path, config: str, *overrides: str) -> dry_run.Outlook:
  loaded = runs.load_config(config, [f"--config.{o}" for o in ("dry_run=True", *overrides)])
  return dry_run.outlook(loaded, workspace.Workdir(tmp_path))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_paper_s_configs_need_no_checkpoint(config: str, tmp_path: Path, capsys: pytest.CaptureFixture):
  assert main.main(["main", "run", f"--config={config}", "--config.dry_run=True", f"--workdir={tmp_path}"]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  expected = {"mixtral_8x7b": (45_097_156_608, 16.11, 68.38), "mixtral_8x22b": (135_291_469_824, 43.34, 59.17),
              "switch_base_64": (12 * 64 * 2 * 768 * 3072, None, None)}[Path(config).stem]
  assert (found["expert_parameters"], found["paper_gib"]) == expected[:2]
  assert found["published"].get("mean_accuracy_of_8_tasks") == expected[2]
  assert found["hours"] == pytest.approx(sum(stage["hours"] for stage in found["stages"]), abs=0.01)
  assert {path.name for path in tmp_path.iterdir()} <= runs.NOTES


def test_rows_of_the_tables_become_methods():
  load = lambda arg: runs.load_config(f"configs/paper/mixtral_8x7b.py:{arg}")
  assert load("bits=2.0").method == "tiers(router_norm, levels=3, variant=code)"
  assert load("bits=2.125,variant=paper").method == "tiers(router_norm)"
  assert load("method=uniform,bits=3").method == "uniform" and load("official=True").codec.startswith("gptq_official")
  assert load("bits=2.25").published.to_dict() == {"memory_gb": 14.5, "mean_accuracy_of_8_tasks": 65.79}
  final = runs.load_config("configs/paper/switch_base_64.py:method=norm_change,bits=2.25,final=True")
  assert final.method == "tiers(router_norm, zeta=0)" and final.published.rouge_2 == 18.01
  for arg, said in (("bits=2.3", "ours at 2.75, 2.5"), ("method=pmq,bits=2.5", "67.53 points at 2.5 bits are a number"),
                    ("method=owrs", "the table has fp16, uniform, ours")):
    with pytest.raises(ValueError, match=said):
      load(arg)


def test_a_checkpoint_is_described_by_its_headers_and_no_weight_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(layout, "finite", None)  # what reads weights
  found = outlook(tmp_path, "configs/quantize.py", f"checkpoint={checkpoint}", "budget=2.5", f"length={tiny.LENGTH}",
                  "codec=rtn(group=32)", "method=tiers(router_norm_change)")
  c = tiny.CONFIG
  experts = c.num_hidden_layers * c.num_local_experts * 3 * c.hidden_size * c.intermediate_size
  assert found.parameters[1] == experts and found.counts == {3: 3, 2: 3}
  assert "headers of 52 tensors verified" in found.checked[0]
  assert [stage.name for stage in found.stages] == ["open and hash", "encode", "evaluate, before and after"]


def test_the_estimated_file_is_about_as_large_as_the_written_one(checkpoint: Path, tmp_path: Path):
  options = (f"checkpoint={checkpoint}", "budget=2.5", "codec=rtn(group=32)", "method=tiers(router_norm)",
             "evaluation.sequences=0")
  found = outlook(tmp_path, "configs/quantize.py", *options)
  runs.execute(runs.load_config("configs/quantize.py", [f"--config.{o}" for o in options]), tmp_path / "run")
  written = sum(path.stat().st_size for path in (tmp_path / "run" / "quantized").iterdir())
  assert written <= found.file_bytes <= 1.6 * written  # the margin for headers is large beside a tiny model


def test_sizes_by_config_alone_are_those_of_the_checkpoint(checkpoint: Path):
  source = convert.open_checkpoint(checkpoint)
  known = sizes.read(source.values)
  for layer in (None, 0, 1):
    for experts in (True, False):
      assert known.nbytes(layer, experts) == source.nbytes(layer, experts)
  assert (known.layers, known.sparse_layers, known.experts) == (source.layers, source.sparse_layers, source.experts)
  assert sizes.check(tiny_switch.CONFIG) == len(convert.named_leaves(tiny_switch.model()))
  assert sizes.differences(source.config, source.config) == []


def test_a_checkpoint_of_another_model_than_the_table_s_is_refused(checkpoint: Path, tmp_path: Path):
  with pytest.raises(ValueError, match="is not the model of config.model .*parameters differ"):
    outlook(tmp_path, "configs/paper/mixtral_8x7b.py", f"checkpoint={checkpoint}")


def test_without_sizes_nothing_can_be_said(tmp_path: Path):
  with pytest.raises(ValueError, match="config.model holds no config.json values"):
    outlook(tmp_path, "configs/quantize.py", "budget=2.5")


def test_a_shape_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch):
  shapes = sizes.names.block_shapes
  monkeypatch.setattr(sizes.names, "block_shapes", lambda c, l: shapes(c, l) | {f"blocks/{l}/moe/up": (6, 64, 95)})
  with pytest.raises(ValueError, match=r"blocks/0/moe/up: the model has \(6, 64, 96\), files hold \(6, 64, 95\)"):
    sizes.check(tiny.CONFIG)


def test_mistakes_are_found_in_a_dry_run_too(tmp_path: Path):
  for option, said in (("codec=gtpq", "did you mean 'gptq'"),
                       ("budget=3.5", "3.5 bits per weight is out of the possible range"),
                       ("calibration.sequences=0", "needs text"), ("missing_routers=no", "it is 'error'"),
                       ("calibration.sequences=6", "fill whole batches")):
    with pytest.raises(ValueError, match=said):
      outlook(tmp_path, "configs/paper/mixtral_8x7b.py", option)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------------------------------


def test_the_rates_give_back_what_they_were_measured_from():
  once = {name: estimates.encode_hours(AMOUNTS, codecs.get(name)) * 3600 / 32 for name in ("rtn", "hqq")}
  assert once["rtn"] == pytest.approx(56, rel=0.01) and once["hqq"] == pytest.approx(115, rel=0.01)
  few = AMOUNTS.__class__(**{**AMOUNTS.__dict__, "layers": 1, "experts": 1, "tokens": 2048, "per_token": 1})
  assert estimates.encode_hours(few, codecs.get("gptq")) * 3600 == pytest.approx(92, rel=0.25)
  square = AMOUNTS.__class__(**{**few.__dict__, "projections": {"w": (4096, 4096)}, "tokens": 0})
  assert estimates.encode_hours(square, codecs.get("gptq")) * 3600 == pytest.approx(4096**2 / 9.1e6, rel=0.01)


def test_memory_of_gptq_on_one_expert_is_what_was_measured():
  one = AMOUNTS.__class__(**{**AMOUNTS.__dict__, "experts": 1, "layers": 1, "tokens": 2048, "per_token": 1, "block": 0,
                             "halfway": 0, "bits": 0.0})
  found = estimates.stages(one, needs.Needs(False, False, False, False, True), codecs.get("gptq"), 3)
  encode = next(stage for stage in found if stage.name == "encode")
  assert encode.memory / 2**30 == pytest.approx(4.7, rel=0.08)
  layers = AMOUNTS.__class__(**{**AMOUNTS.__dict__, "bits": 2.5})  # 2 bits and the scales of groups of 64
  for name in ("rtn", "hqq"):
    found = estimates.stages(layers, needs.Needs(False, False, False, False, False), codecs.get(name), 1)
    assert next(s for s in found if s.name == "encode").memory / 2**30 == pytest.approx(1.68, rel=0.1)


def test_more_sweeps_and_tokens_take_longer_and_more_memory():
  def total(amounts: estimates.Amounts, which: needs.Needs, codec: str = "rtn") -> tuple[float, float]:
    found = estimates.stages(amounts, which, codecs.get(codec), 4)
    return sum(s.hours for s in found), max(s.memory for s in found)

  none, forward = needs.Needs(False, False, False, False, False), needs.Needs(True, False, False, False, False)
  both, errors = needs.Needs(True, True, False, False, False), needs.Needs(True, True, True, False, False)
  hours = [total(AMOUNTS, which)[0] for which in (none, forward, both, errors)]
  assert hours == sorted(hours) and len(set(hours)) == 4
  more = AMOUNTS.__class__(**{**AMOUNTS.__dict__, "tokens": 2 * AMOUNTS.tokens})
  assert total(more, forward)[0] > total(AMOUNTS, forward)[0] and total(more, forward)[1] > total(AMOUNTS, forward)[1]
  assert total(AMOUNTS, none)[0] > 0 and math.isfinite(total(AMOUNTS, errors, "gptq")[0])


def test_every_block_is_traced_with_the_run_s_shapes():
  config = hf_config.read(hf_config.write(tiny.CONFIG))
  state, halfway, logits = sizes.states(config, tiny.functions(), "float32", np.zeros((2, 8), np.int32))
  assert state.shape == (2, 8, 64) and logits.shape == (2, 8, 320)
  assert sizes.nbytes(state) == 2 * 8 * 64 * 4 and sizes.nbytes(halfway) >= 2 * sizes.nbytes(state)
