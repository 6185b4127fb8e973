"""The Switch track: orders and counts as the paper's, row-wise HQQ, what a plan costs, and what bad input is called."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import switch_track as experiment
from moeq_jax import artifacts, codecs, data, pairs, scores, switch_training
from moeq_jax.models import convert, switch
from moeq_jax.scores import damage as damage_lib
from moeq_jax.switch_track import correlations, measure, task
from moeq_jax.switch_track import subject as subjects

SIZES = switch.SwitchConfig(
    vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
    expert_capacity=64, encoder_sparse=(1,), decoder_sparse=(1,), eos_token_id=291)
WORDS = "red green blue small large old new cat dog bird house tree".split()


def made(kind: str, count: int) -> list[pairs.Pair]:
  rng = np.random.default_rng(len(kind))
  return [pairs.Pair(domain, f"{kind} {domain} {i}", " ".join(rng.choice(WORDS, 9)), " ".join(rng.choice(WORDS, 3)))
          for domain in pairs.DOMAINS for i in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
  """A random model of four experts, whose routers have changed, and pairs of random words."""
  place = tmp_path_factory.mktemp("finetuned") / "model"
  model = switch.init(SIZES, 0)
  convert.save(place, model, SIZES, np.float32)
  before = convert.routers(model) + 0.1 * np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
  convert.save_routers(place / "router_init.safetensors", before)
  tokenizer = switch_training.make_tokenizer([data.Document("wiki", "a", " ".join(WORDS))], 300, 8)
  artifacts.write_bytes(place / "tokenizer.json", tokenizer.to_str().encode())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pairs, "training", lambda few=False: made("trained", 6))
    patch.setattr(pairs, "held_out", lambda: made("held out", 8))
    yield place


def config(checkpoint: Path) -> ml_collections.ConfigDict:
  made = experiment.get_config("smoke")
  made.update(checkpoint=str(checkpoint), compute_dtype="float32", budgets=(2.0, 2.5), draws=3, draws_written=1,
              batch=4, methods=("uniform", "tiers(router_norm_change, zeta=0)", "knapsack(output_error)", "random"))
  return made


@pytest.fixture(scope="module")
def workdir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run that nothing befell."""
  place = tmp_path_factory.mktemp("run")
  task.run(config(checkpoint), place)
  return place


def rows(workdir: Path) -> dict[str, dict]:
  return {row["id"]: row for row in map(json.loads, (workdir / "rows.jsonl").read_text().splitlines())}


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_decoder_that_does_not_read_its_encoder_loses_nothing_with_other_texts(checkpoint: Path):
  subject = subjects.open_checkpoint(config(checkpoint))
  text = subjects.read_pairs(config(checkpoint), subject)
  assert measure.other_texts(subject, text)["loss_delta"] != 0
  for block in subject.blocks:
    if block.stack == "decoder":
      block.cross.o.set_value(jnp.zeros_like(block.cross.o.get_value()))
  assert measure.other_texts(subject, text) == {"loss_delta": 0, "loss_delta_ci95": 0}


def test_every_method_has_its_rows(workdir: Path):
  found = rows(workdir)
  kinds = sorted(((row["family"], row["budget"], row["draw"]) for row in found.values()), key=str)
  assert kinds == sorted([("full", None, None), ("uniform", 2.0, None), ("knapsack", 2.0, None),
                          ("knapsack", 2.5, None), ("tiers", 2.5, None),
                          *(("random", 2.5, draw) for draw in range(3))], key=str)
  assert all(len(row["config_hash"]) == 64 for row in found.values())


def test_rows_of_written_plans_have_rouge_and_the_others_have_not(workdir: Path):
  for row in rows(workdir).values():
    assert ("rouge2" in row) == (row["draw"] is None or row["draw"] < 1)
    assert row["nominal_bits"] <= (32 if row["id"] == "full" else row["budget"])
  full = rows(workdir)["full"]
  assert full["loss_delta"] == 0 and full["rouge2_delta"] == 0 and full["router_agreement"] == 1


def test_the_loss_is_that_of_the_model_per_target(workdir: Path, checkpoint: Path):
  subject = subjects.open_checkpoint(config(checkpoint))
  text = subjects.read_pairs(config(checkpoint), subject)
  model, sizes = convert.load(checkpoint)
  total, count = switch_training.held_out_losses(model, sizes, text.evaluation, "sequence").sum(axis=0)
  assert count == sum(np.sum(batch["targets"] >= 0) for batch in text.evaluation)
  np.testing.assert_allclose(rows(workdir)["full"]["loss"], total / count, rtol=1e-5)


def test_a_second_run_measures_nothing_again_and_changes_no_byte(workdir: Path, checkpoint: Path,
                                                                 monkeypatch: pytest.MonkeyPatch):
  files = [path for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != "timings.jsonl"]
  before = {path: path.read_bytes() for path in files}
  real, calls = measure.examples, []
  monkeypatch.setattr(measure, "examples", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
  task.run(config(checkpoint), workdir)
  assert len(calls) == 1  # full precision, which is the reference of all
  assert before == {path: path.read_bytes() for path in before}


def test_pairs_of_different_purposes_do_not_meet(checkpoint: Path):
  subject = subjects.open_checkpoint(config(checkpoint))
  text = subjects.read_pairs(config(checkpoint), subject)
  assert len(text.found) == 8 and sorted({p.domain for p in text.found}) == ["code", "wiki"]
  keys = lambda batches: {row.tobytes() for batch in batches for row in batch["inputs"]}
  assert not keys(text.evaluation) & keys(text.damage) and not keys(text.evaluation) & keys(text.calibration)
  assert len(keys(text.damage)) == 8
  assert [p.domain for p in text.found_written] == ["code", "code", "wiki", "wiki"]
  assert set(text.found_written) < set(text.found) and keys(text.written) < keys(text.evaluation)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's rule
# ---------------------------------------------------------------------------------------------------------------------


def test_orders_and_counts_of_thirty_two_experts():
  """Golden: shares of three bits at the paper's budgets; the experts whose norm changed least have them."""
  change = np.random.default_rng(1).permutation(32).astype(np.float64)
  routers = np.ones((1, 32, 2), np.float32) / np.sqrt(2)
  table = np.ones((1, 32, 2, 4))
  errors = artifacts.ErrorTable(weight=table, output=table, fisher=table, norm=table[..., 0], widths=(1, 2, 3, 4),
                                codec="hqq(group=0)", group=0, projections=("up", "down"), sizes=(16, 16))
  evidence = scores.Evidence(None, errors, routers * (1 + change)[None, :, None].astype(np.float32), routers,
                             [{"up": np.ones((32, 4, 4), np.float32)}])
  inputs = task.methods.Inputs((1, 2, 3, 4), (1, 32), None, lambda spec: scores.sensitivity(spec, evidence), 1, 0)
  for budget, high in ((2.125, 4), (2.25, 8), (2.5, 16), (2.75, 24), (2.875, 28)):
    for reverse in (False, True):
      spec = f"tiers(router_norm_change, zeta=0{', reverse=True' if reverse else ''})"
      bits = task.methods.candidates(spec, budget, inputs)[0].plan.bits[0]
      kept = np.argsort(-change if reverse else change)[:high]
      assert sorted(np.flatnonzero(bits == 3)) == sorted(kept) and np.mean(bits) == budget
  one_bit = task.methods.candidates("tiers(router_norm_change, zeta=0)", 1.5, inputs)[0].plan.bits
  assert sorted(np.unique(one_bit)) == [1, 2]


def test_row_wise_hqq_has_one_scale_for_each_output_row():
  """methods 1.4: min-max range of a row in 2^b - 1 steps, the zero point moved; never worse than min-max in l_0.7."""
  w = jnp.asarray(np.random.default_rng(0).standard_t(4, (48, 5)), jnp.float32)
  codec = codecs.get("hqq(group=0)")
  for bits in (1, 2, 3):
    encoded = codec.encode(w, bits)
    assert encoded.scale.shape == encoded.zero.shape == (1, 5) and int(np.max(encoded.codes)) <= 2**bits - 1
    low, high = np.asarray(w).min(axis=0), np.asarray(w).max(axis=0)
    np.testing.assert_allclose(np.asarray(encoded.scale, np.float32)[0], (high - low) / (2**bits - 1), rtol=2**-7)
    step, zero = np.asarray(encoded.scale, np.float32), np.asarray(encoded.zero, np.float32)
    nearest = np.clip(np.round(np.asarray(w) / step + zero), 0, 2**bits - 1)
    np.testing.assert_array_equal(np.asarray(encoded.codes), nearest)
    plain = np.clip(np.round(np.asarray(w) / step - low / step), 0, 2**bits - 1) * step + low
    norm = lambda error: np.sum(np.abs(error) ** 0.7)
    assert norm(np.asarray(codecs.decode(encoded, 0, 48)) - w) <= norm(plain - np.asarray(w)) * 1.01


def test_a_bank_gives_every_expert_the_width_of_the_plan(checkpoint: Path):
  subject, codec = subjects.open_checkpoint(config(checkpoint)), codecs.get("rtn(group=0)")
  encode = jax.jit(jax.vmap(codec.encode, in_axes=(0, None)))
  experts = [subject.functions.experts(block) for block in subject.sparse_blocks()]
  layers = []
  for layer in experts:
    banks = {}
    for name, weights in layer.items():
      banks[name] = artifacts.Codes(*(np.stack(parts) for parts in
                                      zip(*(encode(weights, bits) for bits in (2, 3)), strict=True)))
    layers.append(artifacts.LayerCodes(banks, {}))
  bits = np.array([[2, 3, 3, 2], [3, 2, 2, 2]])
  blocks = measure.Bank(layers, (2, 3), 0).blocks(subject, bits)
  placed = [subject.functions.experts(block) for block in blocks if subject.functions.sparse(block)]
  for layer in range(2):
    for e in range(4):
      codes, scale, zero = (part[e] for part in encode(experts[layer]["up"], int(bits[layer, e])))
      expected = (np.asarray(codes, np.float32) - np.asarray(zero, np.float32)) * np.asarray(scale, np.float32)
      np.testing.assert_allclose(placed[layer]["up"][e], expected, rtol=1e-6)
  assert measure.effective_bits(layers, bits) == np.mean(bits) + 1.0  # 32 bits of scale and zero for 32 weights


def test_padding_is_counted_neither_as_tokens_nor_as_gate_weight(workdir: Path, checkpoint: Path):
  subject = subjects.open_checkpoint(config(checkpoint))
  text = subjects.read_pairs(config(checkpoint), subject)
  stats = task.calibrate(task.workspace.Workdir(workdir), subject, text)
  real = [sum(int(np.sum(b["inputs"] != 0)) for b in text.calibration),
          sum(int(np.sum(b["targets"] >= 0)) for b in text.calibration)]
  assert stats.tokens.sum(axis=1).tolist() == real
  assert np.all(stats.gate_weight <= stats.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Correlations
# ---------------------------------------------------------------------------------------------------------------------


def test_rank_correlations_are_inside_layers():
  first = np.array([[1.0, 2, 3, 4], [10, 20, 30, 40], [1, 1, 1, 1]])
  assert correlations.inside(first, first[:, ::-1]) == [-1.0, -1.0, None]
  assert correlations.inside(first, np.exp(first)) == [1.0, 1.0, None]
  assert correlations.mean([1.0, None, 0.0]) == 0.5 and correlations.mean([None]) is None


def test_the_summary_has_damage_and_frequency(workdir: Path):
  summary = json.loads((workdir / "summary.json").read_text())
  assert np.shape(summary["scores"]["measured damage"]) == np.shape(summary["scores"]["frequency"]) == (2, 4)
  assert "router_norm_change ~ measured damage" in summary["correlations"]
  damage = damage_lib.Damage.load(workdir / "damage.npz")
  np.testing.assert_array_equal(summary["scores"]["measured damage"], damage.mean)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pretrained_model_with_other_experts_is_named(checkpoint: Path, tmp_path: Path):
  other = dataclasses.replace(SIZES, num_experts=8)
  convert.save(tmp_path / "eight", switch.init(other, 0), other)
  changed = config(checkpoint)
  changed.pretrained = str(tmp_path / "eight")
  with pytest.raises(convert.CheckpointError, match=r"2 MoE layers of 8 experts .* has 2 MoE layers of 4 experts"):
    subjects.open_checkpoint(changed)


def test_the_pretrained_model_may_be_named_in_place_of_the_file(checkpoint: Path, tmp_path: Path):
  before = switch.init(SIZES, 5)
  convert.save(tmp_path, before, SIZES, np.float32)
  changed = config(checkpoint)
  changed.pretrained = str(tmp_path)
  np.testing.assert_array_equal(subjects.open_checkpoint(changed).routers_init, convert.routers(before))


def test_without_initial_routers_the_norm_is_taken_only_if_the_config_says_so(checkpoint: Path):
  subject = dataclasses.replace(subjects.open_checkpoint(config(checkpoint)), routers_init=None)
  with pytest.raises(ValueError, match="config.fall_back_to_norm=True"):
    subjects.methods_for(config(checkpoint), subject)
  changed = config(checkpoint)
  changed.fall_back_to_norm = True
  assert "tiers(router_norm, zeta=0)" in subjects.methods_for(changed, subject)
  assert not any("norm_change" in spec for spec in subjects.methods_for(changed, subject))
  changed.methods = ("uniform", "random")
  changed.fall_back_to_norm = False
  assert subjects.methods_for(changed, subject) == ["uniform", "random"]  # nobody asks for them


def test_initial_routers_of_another_model_are_refused(checkpoint: Path, tmp_path: Path):
  convert.save_routers(tmp_path / "router_init.safetensors", np.ones((2, 8, 32)))
  with pytest.raises(convert.CheckpointError, match="router_init.safetensors"):
    subjects.routers_before(tmp_path, "", np.ones((2, 4, 32)))


def test_an_expert_that_is_never_routed_is_reported_and_quantized(checkpoint: Path, tmp_path: Path):
  model, _ = convert.load(checkpoint)
  block = next(b for b in model.blocks if hasattr(b, "moe"))
  router = np.asarray(block.moe.router.get_value()).copy()
  router[1:] = router[0] + np.eye(32)[:3] * 1e-6
  router[3] = 0 * router[3]
  router[:3] *= 0
  router[0] += 0  # ties go to expert 0: the others of this layer see nothing
  block.moe.router.set_value(jnp.asarray(router, jnp.float32))
  convert.save(tmp_path / "model", model, SIZES, np.float32)
  for name in ("tokenizer.json", "router_init.safetensors"):
    artifacts.write_bytes(tmp_path / "model" / name, (checkpoint / name).read_bytes())
  changed = config(tmp_path / "model")
  changed.update(budgets=(2.5,), methods=("tiers(frequency, zeta=0)",), damage=0)
  task.run(changed, tmp_path / "run")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["unrouted"] == [[0, 1], [0, 2], [0, 3]]
  assert "measured damage" not in summary["scores"] and rows(tmp_path / "run")["full"]["loss"] > 0


@pytest.mark.parametrize(("field", "value", "message"), [
    ("damage_bits", 8, "damage_bits=8"),
    ("draws_written", 9, "draws_written=9"),
    ("evaluation", 10, "evaluation=10"),
    ("written", 12, "written=12"),
    ("codec", "hqq(groups=0)", "did you mean 'group'"),
    ("methods", ("tiers(router_norms)",), "did you mean 'router_norm'"),
])
def test_mistakes_in_the_config_are_named(checkpoint: Path, tmp_path: Path, field: str, value, message: str):
  changed = config(checkpoint)
  with changed.ignore_type():
    changed[field] = value
  with pytest.raises(ValueError, match=message):
    task.run(changed, tmp_path)


def test_calibration_does_not_hang_on_what_is_evaluated(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(pairs, "xsum", lambda: [pairs.Pair("xsum", str(i), f"red {i}", "green") for i in range(40)])
  changed = config(checkpoint)
  both = subjects.read_pairs(changed, subjects.open_checkpoint(changed)).calibration
  changed.domains = ("xsum",)
  news = subjects.read_pairs(changed, subjects.open_checkpoint(changed))
  assert sum(len(rows["inputs"]) for rows in news.calibration) == changed.calibration
  jax.tree.map(np.testing.assert_array_equal, news.calibration, both)
  assert {pair.domain for pair in news.found} == {"xsum"} and len(news.found) == changed.evaluation


def test_too_few_pairs_are_named(checkpoint: Path):
  changed = config(checkpoint)
  changed.evaluation = 80
  with pytest.raises(ValueError, match="domain 'code' has 8 pairs, 44 are asked for"):
    subjects.read_pairs(changed, subjects.open_checkpoint(changed))
