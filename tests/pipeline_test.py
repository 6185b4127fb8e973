"""When the pipeline works and when it reuses: every key, the rows that a killed run left, and mistakes in a config."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest

from configs import quickstart
from moeq_jax import artifacts, codecs, pipeline, registry, results, runs, workspace
from moeq_jax.allocate import constraints, methods
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
    functions=types.SimpleNamespace(experts=lambda block: block, sparse=lambda block: True),
    sparse_blocks=lambda: [0, 1], files=dict, expert_weights=lambda: 12 * 3 * 64 * 96)
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
    return artifacts.LayerCodes(dict.fromkeys(artifacts.PROJECTIONS, bank), errors)

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
  return methods.Candidate(artifacts.Plan(np.full(SHAPE, bits), method, budget), method.partition("(")[0])


FOUND = [plan("uniform"), plan("random"), plan("knapsack(fisher_error)"), plan("knapsack(damage)")]


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  return quickstart.get_config("smoke")


@pytest.fixture
def measured(monkeypatch) -> list[str]:
  """The plans that were evaluated; a row tells the bits of its plan."""
  names: list[str] = []

  def evaluate(subject, text, layers, codec, candidate, against, widths) -> tuple[dict[str, Any], np.ndarray]:
    names.append(candidate.plan.method)
    bits = float(candidate.plan.bits.mean())
    return candidate.as_row() | {"loss": bits, "codec": str(codec)}, LOSSES[candidate.plan.method] + bits

  monkeypatch.setattr(perplexity, "reference", lambda *_: perplexity.Reference([], [], np.array([1.0, 2, 3, 4])))
  monkeypatch.setattr(pipeline, "evaluate", evaluate)
  return names


LOSSES = {"uniform": np.array([1.0, 2.0, 3.0, 4.0]), "random": np.array([1.1, 2.0, 3.5, 4.0]),
          "knapsack(fisher_error)": np.array([0.9, 1.9, 3.0, 3.7]), "knapsack(damage)": np.array([0.5, 1.5, 2.5, 3.5])}


def measure(run: workspace.Workdir, config: ml_collections.ConfigDict, found: list = FOUND, **changes: Any) -> bytes:
  values = {"text": TEXT, "subject": SUBJECT, "codes_key": "codes"} | changes
  rows = pipeline.measure(run, values["subject"], values["text"], [], CODEC, found, config, values["codes_key"])
  assert [row["id"] for row in rows] == ["full", *(c.file_name() for c in found)]
  return (run.path / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "other"), [("rows", "losses"), ("losses", "rows")])
@pytest.mark.parametrize("kept", range(6))
def test_a_run_that_was_killed_measures_only_what_is_missing(run, config, measured, kept: int, name: str, other: str):
  measure(run, config)
  path, beside = run.path / f"{name}.jsonl", run.path / f"{other}.jsonl"
  whole = path.read_bytes(), beside.read_bytes()
  lines = whole[0].splitlines(keepends=True)
  assert len(lines) == 5 and len(measured) == 4
  path.write_bytes(b"".join(lines[:kept]))
  measured.clear()
  measure(run, config)
  assert (path.read_bytes(), beside.read_bytes()) == whole
  assert measured == [c.plan.method for c in FOUND][max(kept - 1, 0):]


def draws(budget: float) -> list[methods.Candidate]:
  """Two draws of uniform plans and a knapsack."""
  uniform = [artifacts.Plan(np.full(SHAPE, bits), "uniform", budget) for bits in (2, 4)]
  best = artifacts.Plan(np.full(SHAPE, 3), "knapsack(damage)", budget)
  return [*(methods.Candidate(p, "uniform", i) for i, p in enumerate(uniform)), methods.Candidate(best, "knapsack")]


def test_rows_carry_the_paired_difference_from_uniform_widths(run, config, measured):
  measure(run, config, [*FOUND[:1], *draws(3.0), *FOUND[1:]])
  rows = {row["id"]: row for row in results.read(run.path / "rows.jsonl")}
  for c in FOUND[1:]:  # all at 2 bits
    difference = LOSSES[c.plan.method] - LOSSES["uniform"]
    expected = difference.mean(), 1.96 * difference.std(ddof=1) / 2
    assert (rows[c.file_name()]["vs_uniform"], rows[c.file_name()]["vs_uniform_ci95"]) == pytest.approx(expected)
  assert rows["knapsack-damage-3"]["vs_uniform"] == pytest.approx(-0.5)  # 3 bits against the mean of draws of 2 and 4
  assert rows["knapsack-damage-3"]["vs_uniform_ci95"] == pytest.approx(0, abs=1e-12)
  assert all(rows[name]["vs_uniform"] is None for name in ("full", "uniform-2", "uniform-3-draw0"))
  kept = {row["id"]: results.numbered(row, "sequence_").tolist() for row in results.read(run.path / "losses.jsonl")}
  assert list(kept) == list(rows) and kept["full"] == [1, 2, 3, 4] and kept["uniform-3-draw1"] == [5, 6, 7, 8]


def test_without_uniform_plans_there_is_no_difference_from_them(run, config, measured):
  measure(run, config, [*FOUND[1:], FOUND[0]])
  assert {row["vs_uniform"] for row in results.read(run.path / "rows.jsonl")} == {None}


@pytest.mark.parametrize("change", [
    {"codes_key": "another"}, {"text": changed(TEXT, digest="another")},
    {"subject": changed(SUBJECT, dtype="bfloat16")},
    {"found": [plan("uniform", 3), *FOUND[1:]]}, {"found": [*FOUND[:3], plan("knapsack(damage)", 1)]},
    {"found": FOUND[::-1]}, {"found": FOUND[1:]}])
def test_rows_of_another_input_plan_or_order_are_measured_again(run, tmp_path, config, measured, caplog, change: dict):
  before = measure(run, config)
  measured.clear()
  after = measure(run, config, **change)
  assert len(measured) == len(change.get("found", FOUND))
  assert all(f"{name}.jsonl was made from something else" in caplog.text for name in ("rows", "losses"))
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


def test_export_sorts_tensors_by_block_and_knows_dense_blocks():
  others = {"model.norm.weight": 1, "model.layers.1.self_attn.q_proj.weight": 2,
            "model.layers.0.input_layernorm.weight": 3}
  subject = changed(SUBJECT, others=others, functions=types.SimpleNamespace(sparse=lambda block: block == 1))
  experts, blocks, top = pipeline._by_block(subject, ["packed"])
  assert experts == [{}, "packed"] and top == {"model.norm.weight": 1}
  assert blocks == [{"model.layers.0.input_layernorm.weight": 3}, {"model.layers.1.self_attn.q_proj.weight": 2}]


@pytest.mark.parametrize(("field", "value", "said"), [
    ("codec", "gtpq(group=64)", "did you mean 'gptq'"), ("codec", "rtn(group=48)", "group=48"),
    ("codec", "rtn(grid=ct)", "one bit on the grid 'ct'"),
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


def test_the_experiment_on_constraints_has_every_constraint():
  config = runs.load_config("experiments/constraints.py")
  pipeline.check(config)
  module = runs.load_module(runs.find_config("experiments/constraints.py"))
  assert set(module.CONSTRAINTS) == set(constraints.CONSTRAINTS)
  assert len(config.methods) == 1 + 3 * len(constraints.CONSTRAINTS)


@pytest.mark.parametrize("arg", [None, "smoke"])
def test_the_quickstart_has_no_mistake(arg: str | None):
  config = quickstart.get_config(arg)
  pipeline.check(config)
  names = [registry.canonical(method) for method in config.methods]
  assert all(registry.canonical(method) in names and budget in config.budgets for method, budget in config.export)
