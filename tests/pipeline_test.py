"""When the pipeline works and when it reuses: every key, the rows that a killed run left, and mistakes in a config."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest

from configs import quickstart
from moeq_jax import artifacts, codecs, pipeline, registry, results, workspace
from moeq_jax.allocate import methods
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.evaluate import perplexity
from moeq_jax.export import native
from moeq_jax.scores import damage
from tests import tiny

SHAPE = 2, tiny.CONFIG.num_local_experts
SUBJECT = types.SimpleNamespace(
    digest="model", dtype="float32", shape=SHAPE, top=None, blocks=[0, 1], config=tiny.CONFIG, others={},
    functions=types.SimpleNamespace(experts=lambda block: block), files=dict, expert_weights=lambda: 3 * 64 * 96)
TEXT = workspace.Text(calibration=tiny.tokens(2), damage=tiny.tokens(1), evaluation=tiny.tokens(1),
                      domains=np.array(["wiki"] * 4), tokens_per_byte={"wiki": 0.5}, digest="text")
CODEC = codecs.get("rtn(group=32)")


def changed(value: Any, **changes: Any) -> Any:
  """A copy of a dataclass or a namespace with other fields."""
  if dataclasses.is_dataclass(value):
    return dataclasses.replace(value, **changes)
  return types.SimpleNamespace(**vars(value) | changes)


@pytest.fixture
def run(tmp_path: Path) -> workspace.Workdir:
  return workspace.Workdir(tmp_path)


@pytest.fixture
def made(monkeypatch) -> list[str]:
  """What the stages were asked to compute; the values are made up, and differ every time."""
  names: list[str] = []
  count = lambda: np.full(SHAPE, len(names))

  def stats(*_, **__) -> artifacts.Stats:
    names.append("stats")
    zeros = {f.name: np.zeros((*SHAPE, 1), np.float32) for f in dataclasses.fields(artifacts.Stats)[:-2]}
    return artifacts.Stats(**zeros | {"tokens": 1 + count()}, total_tokens=8, batches=1)

  def layer(block: int, *_, **__) -> artifacts.LayerCodes:
    names.append(f"layer {block}")
    bank = artifacts.Codes(*(np.full((1, 1, 1, 1), len(names), t) for t in (np.uint8, np.uint16, np.uint16)))
    errors = {field: np.zeros((6, 3, 1)) for field in ("weight", "output", "fisher")} | {"norm": np.ones((6, 3))}
    return artifacts.LayerCodes(bank, bank, bank, errors)

  def harm(*_, **__) -> damage.Damage:
    names.append("damage")
    return damage.Damage(count().astype(float), count().astype(float), 2, 92)

  monkeypatch.setattr(statistics, "collect", stats)
  monkeypatch.setattr(candidates, "encode_layer", layer)
  monkeypatch.setattr(candidates, "shrink_unrouted", lambda stats: stats)
  monkeypatch.setattr(damage, "measure", harm)
  return names


# ---------------------------------------------------------------------------------------------------------------------
# Keys: every stage is run with its base values, then once with each change; only changes make it work again
# ---------------------------------------------------------------------------------------------------------------------

STATS = {"subject": SUBJECT, "text": TEXT}
CODES = {"subject": SUBJECT, "stats": 1, "codec": CODEC, "widths": (1, 2)}
DAMAGE = {"subject": SUBJECT, "text": TEXT, "bits": 2, "codes_key": "codes"}


def calibrate(run: workspace.Workdir, values: dict) -> None:
  pipeline.calibrate(run, values["subject"], values["text"])


def encode(run: workspace.Workdir, values: dict) -> None:
  stats = artifacts.Stats(**{f.name: np.full(SHAPE, values["stats"]) for f in dataclasses.fields(artifacts.Stats)[:-2]},
                          total_tokens=8, batches=1)
  pipeline.encode(run, values["subject"], stats, values["codec"], values["widths"])


def harm(run: workspace.Workdir, values: dict) -> None:
  errors = types.SimpleNamespace(widths=(1, 2, 3), group=32)
  pipeline.measure_damage(run, values["subject"], values["text"], [], errors, values["bits"], values["codes_key"])


@pytest.mark.parametrize(("stage", "base", "change", "again"), [
    (calibrate, STATS, {}, []),
    (calibrate, STATS, {"subject": changed(SUBJECT, digest="another")}, ["stats"]),
    (calibrate, STATS, {"subject": changed(SUBJECT, dtype="bfloat16")}, ["stats"]),
    (calibrate, STATS, {"text": changed(TEXT, digest="another")}, ["stats"]),
    (calibrate, STATS, {"version": "stats"}, ["stats"]),
    (calibrate, STATS, {"version": "codes"}, []),
    (encode, CODES, {}, []),
    (encode, CODES, {"subject": changed(SUBJECT, digest="another")}, ["layer 0", "layer 1"]),
    (encode, CODES, {"stats": 2}, ["layer 0", "layer 1"]),
    (encode, CODES, {"codec": codecs.get("rtn(group=64)")}, ["layer 0", "layer 1"]),
    (encode, CODES, {"codec": codecs.get("hqq(group=32)")}, ["layer 0", "layer 1"]),
    (encode, CODES, {"widths": (1, 2, 3)}, ["layer 0", "layer 1"]),
    (encode, CODES, {"version": "codes"}, ["layer 0", "layer 1"]),
    (harm, DAMAGE, {}, []),
    (harm, DAMAGE, {"bits": 3}, ["damage"]),
    (harm, DAMAGE, {"codes_key": "another"}, ["damage"]),
    (harm, DAMAGE, {"text": changed(TEXT, digest="another")}, ["damage"]),
    (harm, DAMAGE, {"subject": changed(SUBJECT, dtype="bfloat16")}, ["damage"]),
    (harm, DAMAGE, {"version": "damage"}, ["damage"]),
])
def test_a_stage_works_again_only_for_a_change(run, made, monkeypatch, stage, base: dict, change: dict, again: list):
  stage(run, base)
  first = list(made)
  stage(run, base)
  assert made == first and first
  if "version" in change:
    monkeypatch.setitem(pipeline.VERSIONS, change["version"], 99)
  stage(run, base | change)
  assert made[len(first):] == again
  stage(run, base | change)
  assert made[len(first):] == again


def test_a_lost_or_damaged_layer_is_made_again_alone(run, made, caplog):
  encode(run, CODES)
  kept = (run.path / "codes" / "layer-000.npz").read_bytes()
  path = run.path / "codes" / "layer-001.npz"
  path.write_bytes(path.read_bytes()[:-5])
  encode(run, CODES)
  assert made == ["layer 0", "layer 1", "layer 1"] and "layer-001.npz cannot be read" in caplog.text
  path.unlink()
  encode(run, CODES)
  assert made[3:] == ["layer 1"]
  assert (run.path / "codes" / "layer-000.npz").read_bytes() == kept


def test_no_damage_is_measured_where_none_is_asked_for(run, made):
  assert pipeline.measure_damage(run, SUBJECT, changed(TEXT, damage=[]), [], None, 2, "codes") is None
  assert not made


def test_experts_without_tokens_are_logged(run, made, caplog):
  stats = artifacts.Stats(**{f.name: np.ones(SHAPE) for f in dataclasses.fields(artifacts.Stats)[:-2]}, total_tokens=8,
                          batches=1)
  stats.tokens[1, 3] = 0
  pipeline.encode(run, SUBJECT, stats, CODEC, (1, 2))
  assert "layer 1, expert 3 saw no calibration token" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def plan(method: str, bits: int = 2, budget: float = 2.0) -> methods.Candidate:
  return methods.Candidate(artifacts.Plan(np.full(SHAPE, bits), method, budget), "uniform")


FOUND = [plan("uniform"), plan("random"), plan("knapsack(fisher_error)"), plan("knapsack(damage)")]


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  return quickstart.get_config("smoke")


@pytest.fixture
def measured(monkeypatch) -> list[str]:
  """The plans that were evaluated; a row tells the bits of its plan."""
  names: list[str] = []

  def evaluate(subject, text, layers, codec, candidate, against, widths) -> dict[str, Any]:
    names.append(candidate.plan.method)
    return candidate.as_row() | {"loss": float(candidate.plan.bits.mean()), "codec": str(codec)}

  monkeypatch.setattr(perplexity, "reference", lambda *_: perplexity.Reference([], [], np.array([1.0, 2, 3, 4])))
  monkeypatch.setattr(pipeline, "evaluate", evaluate)
  return names


def measure(run: workspace.Workdir, config: ml_collections.ConfigDict, found: list = FOUND, **changes: Any) -> bytes:
  values = {"text": TEXT, "subject": SUBJECT, "codes_key": "codes"} | changes
  rows = pipeline.measure(run, values["subject"], values["text"], [], CODEC, found, config, values["codes_key"])
  assert [row["id"] for row in rows] == ["full", *(c.file_name() for c in found)]
  return (run.path / "rows.jsonl").read_bytes()


@pytest.mark.parametrize("kept", range(6))
def test_a_run_that_was_killed_measures_only_what_is_missing(run, config, measured, kept: int):
  whole = measure(run, config)
  lines = whole.splitlines(keepends=True)
  assert len(lines) == 5 and len(measured) == 4
  (run.path / "rows.jsonl").write_bytes(b"".join(lines[:kept]))
  measured.clear()
  assert measure(run, config) == whole
  assert measured == [c.plan.method for c in FOUND][max(kept - 1, 0):]


@pytest.mark.parametrize("change", [
    {"codes_key": "another"}, {"text": changed(TEXT, digest="another")},
    {"subject": changed(SUBJECT, dtype="bfloat16")},
    {"found": [plan("uniform", 3), *FOUND[1:]]}, {"found": [*FOUND[:3], plan("knapsack(damage)", 1)]},
    {"found": FOUND[::-1]}, {"found": FOUND[1:]}])
def test_rows_of_another_input_plan_or_order_are_measured_again(run, tmp_path, config, measured, caplog, change: dict):
  before = measure(run, config)
  measured.clear()
  after = measure(run, config, **change)
  assert len(measured) == len(change.get("found", FOUND)) and "rows.jsonl was made from something else" in caplog.text
  assert after == measure(workspace.Workdir(tmp_path / "fresh"), config, **change) != before


def test_more_plans_are_added_to_rows_that_are_there(run, config, measured):
  before = measure(run, config, FOUND[:2])
  measured.clear()
  assert measure(run, config).startswith(before) and measured == ["knapsack(fisher_error)", "knapsack(damage)"]


@pytest.mark.parametrize("version", ["rows", "plans"])
def test_rows_of_another_version_or_config_are_measured_again(run, config, measured, monkeypatch, version: str):
  measure(run, config)
  config.seed = 7
  measure(run, config)
  assert len(measured) == 8 and {row["seed"] for row in results.read(run.path / "rows.jsonl")} == {7}
  monkeypatch.setitem(pipeline.VERSIONS, version, 99)
  measure(run, config)
  assert len(measured) == 12


def test_losses_by_domain():
  text = changed(TEXT, domains=np.array(["code", "code", "wiki", "wiki"]), tokens_per_byte={"code": 0.25, "wiki": 0.5})
  row = pipeline.losses(np.array([1.0, 2, 3, 6]), text)
  assert row == pytest.approx({"loss": 3.0, "perplexity": np.exp(3.0), "loss_code": 1.5, "nats_per_byte_code": 0.375,
                               "loss_wiki": 4.5, "nats_per_byte_wiki": 2.25})


# ---------------------------------------------------------------------------------------------------------------------
# Export and config
# ---------------------------------------------------------------------------------------------------------------------


def test_export_writes_what_is_named_and_warns_of_what_is_not_there(run, config, monkeypatch, caplog):
  saved = {}
  monkeypatch.setattr(apply, "pack_layer", lambda codes, bits, **_: (codes, bits.tolist()))
  monkeypatch.setattr(native, "save", lambda directory, packed, *_: saved.update({directory.name: packed}))
  config.export = (("knapsack( fisher_error )", 2), ("uniform", 2.5))
  pipeline.export(run, SUBJECT, ["codes 0", "codes 1"], CODEC, FOUND, config)
  assert saved == {"quantized-knapsack-fisher_error-2": [("codes 0", [2] * 6), ("codes 1", [2] * 6)]}
  assert "no plan uniform at 2.5 bits" in caplog.text


@pytest.mark.parametrize(("field", "value", "said"), [
    ("codec", "gtpq(group=64)", "did you mean 'gptq'"), ("codec", "rtn(group=48)", "group=48"),
    ("methods", ("uniform", "knapsack(fisher_eror)"), "did you mean 'fisher_error'"),
    ("methods", ("tiers",), "takes one score"), ("scores", ("router_nrom",), "did you mean 'router_norm'"),
    ("budgets", (2.0, 0.5), "raise the budget"), ("budgets", (5.0,), "out of the possible range"),
    ("widths", (1, 2, 5), r"no codec encodes \[5\]"), ("widths", (3, 4), "no solution|raise the budget"),
    ("domains", ("wikis",), "did you mean 'wiki'"), ("methods", ("knapsack(damage)",), "damage.sequences is 0"),
])
def test_a_mistake_in_the_config_is_found_before_anything_is_made(tmp_path, config, field: str, value: Any, said: str):
  config[field] = value
  with pytest.raises(ValueError, match=said):
    pipeline.compare(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_width_of_damage_must_be_encoded(config):
  config.damage.update(sequences=8, bits=8)
  with pytest.raises(ValueError, match="config.damage.bits=8 is not one of"):
    pipeline.check(config)


@pytest.mark.parametrize("arg", [None, "smoke"])
def test_the_quickstart_has_no_mistake(arg: str | None):
  config = quickstart.get_config(arg)
  pipeline.check(config)
  names = [registry.canonical(method) for method in config.methods]
  assert all(registry.canonical(method) in names and budget in config.budgets for method, budget in config.export)
