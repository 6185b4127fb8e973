"""What a run opens and keeps: checkpoints that are whole, windows that do not overlap, products that are not stale."""

import json
import logging
import shutil
from pathlib import Path

import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import artifacts, data, workspace
from moeq_jax.models import convert
from tests import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
  """A copy that a test may damage."""
  return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def opened(directory: Path) -> workspace.Subject:
  return workspace.open_checkpoint(str(directory), "float32")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_opened_whole(pristine: Path):
  subject = opened(pristine)
  assert subject.shape == (2, 6) and subject.expert_weights() == 12 * 3 * 64 * 96 and subject.dtype == "float32"
  for name, leaf in convert.named_leaves(tiny.model()).items():
    if name.startswith("blocks/0/moe/"):
      field = name.rsplit("/", 1)[1]
      np.testing.assert_array_equal(getattr(subject.blocks[0].moe, field).get_value(), leaf)
  np.testing.assert_array_equal(subject.routers, convert.routers(tiny.model()))
  assert subject.routers_init.shape == subject.routers.shape and subject.routers_init.std() > 0
  assert all(a.dtype == ml_dtypes.bfloat16 for a in subject.others.values())
  names = set(safetensors.numpy.load_file(pristine / WEIGHTS))
  assert set(subject.others) == {name for name in names if ".experts." not in name}
  assert subject.files() == {name: (pristine / name).read_bytes() for name in ("config.json", "tokenizer.json")}


def test_a_relative_name_is_looked_for_here_and_from_the_project(pristine: Path, monkeypatch):
  monkeypatch.chdir(pristine.parent)
  assert workspace.open_checkpoint(pristine.name, "float32").digest == opened(pristine).digest
  monkeypatch.chdir(pristine.parent.parent)
  monkeypatch.setattr(workspace, "ROOT", pristine.parent)
  assert workspace.open_checkpoint(pristine.name, "float32").digest == opened(pristine).digest


def test_the_initial_routers_may_be_missing(checkpoint: Path):
  (checkpoint / "router_init.safetensors").unlink()
  assert opened(checkpoint).routers_init is None


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "router_init.safetensors"])
def test_the_digest_sees_a_change_in_every_file(checkpoint: Path, pristine: Path, name: str):
  content = bytearray((checkpoint / name).read_bytes())
  if name.endswith("json"):
    content += b"\n"
  else:
    content[-3] ^= 1  # a low bit of a weight
  (checkpoint / name).write_bytes(content)
  assert opened(checkpoint).digest != opened(pristine).digest


def test_the_digest_sees_every_shard_and_nothing_else(checkpoint: Path, pristine: Path):
  tensors = safetensors.numpy.load_file(checkpoint / WEIGHTS)
  (checkpoint / WEIGHTS).unlink()
  half = len(tensors) // 2
  for number, part in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
    shard = checkpoint / f"model-0000{number}-of-00002.safetensors"
    safetensors.numpy.save_file({name: tensors[name] for name in part}, shard)
  before = opened(checkpoint)
  np.testing.assert_array_equal(before.routers, convert.routers(tiny.model()))
  (checkpoint / "training_log.jsonl").write_text("{}")
  assert opened(checkpoint).digest == before.digest
  last = list(tensors)[-1]
  tensors[last] = tensors[last] * 2
  safetensors.numpy.save_file({name: tensors[name] for name in list(tensors)[half:]},
                              checkpoint / "model-00002-of-00002.safetensors")
  assert opened(checkpoint).digest != before.digest


def _edit(checkpoint: Path, change) -> None:
  tensors = safetensors.numpy.load_file(checkpoint / WEIGHTS)
  change(tensors)
  safetensors.numpy.save_file(tensors, checkpoint / WEIGHTS)


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def _poison(tensors: dict[str, np.ndarray]) -> None:
  tensors[EXPERT] = tensors[EXPERT].copy()
  tensors[EXPERT][1, 2] = np.nan


@pytest.mark.parametrize(("damage", "said"), [
    (lambda c: shutil.rmtree(c), r"config\.json: not found"),
    (lambda c: (c / WEIGHTS).unlink(), r"no model\*\.safetensors"),
    (lambda c: (c / WEIGHTS).write_bytes((c / WEIGHTS).read_bytes()[:-1000]), r"model\.safetensors.*truncated"),
    (lambda c: (c / WEIGHTS).write_bytes(b""), r"model\.safetensors.*truncated"),
    (lambda c: _edit(c, lambda t: t.pop(EXPERT)), f"{EXPERT} is missing"),
    (lambda c: _edit(c, lambda t: t.update({EXPERT: t[EXPERT].T.copy()})), rf"{EXPERT} has shape \[96, 64\]"),
    (lambda c: _edit(c, _poison), f"{EXPERT} holds NaN"),
    (lambda c: (c / "config.json").write_text("{"), r"config\.json: cannot be read .not valid JSON"),
    (lambda c: (c / "tokenizer.json").unlink(), r"tokenizer\.json: not found"),
    (lambda c: (c / "tokenizer.json").write_text("{"), r"tokenizer\.json: cannot be read"),
    (lambda c: (c / "router_init.safetensors").write_bytes(b"x"), r"router_init\.safetensors: cannot be read"),
])
def test_a_damaged_checkpoint_is_refused_with_file_and_tensor(checkpoint: Path, damage, said: str):
  damage(checkpoint)
  with pytest.raises(convert.CheckpointError, match=said):
    opened(checkpoint)


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoint: Path):
  large = data.train_tokenizer(tiny.documents(2, 0), tiny.CONFIG.vocab_size + 10)
  (checkpoint / "tokenizer.json").write_text(large.to_str())
  with pytest.raises(convert.CheckpointError, match="330 tokens, config.json says 320"):
    opened(checkpoint)
  values = json.loads(data.train_tokenizer(tiny.documents(2, 0), 300).to_str())
  text = json.dumps(values).replace(data.END_OF_TEXT, "</s>")
  (checkpoint / "tokenizer.json").write_text(text)
  with pytest.raises(convert.CheckpointError, match=r"no token <\|endoftext\|>"):
    opened(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def config(**changes) -> ml_collections.ConfigDict:
  made = ml_collections.ConfigDict(dict(domains=("wiki", "code"), length=16, batch=4, calibration=6, evaluation=4,
                                        damage=dict(sequences=2, bits=2)))
  made.update(calibration_set=0)
  made.update_from_flattened_dict(changes)
  if "calibration_set" not in changes:  # as in configs that know nothing of it
    del made.calibration_set
  return made


@pytest.fixture
def streams(monkeypatch) -> dict[str, dict[str, data.TokenStream]]:
  """Streams in which every token occurs once: `{"calibration", "held out"}`, by domain."""
  monkeypatch.setattr(data, "calibration", lambda: [data.Document(d, "calibration", "x") for d in data.DOMAINS])
  monkeypatch.setattr(data, "held_out", lambda: [data.Document(d, "held out", "x") for d in data.DOMAINS])
  stream = lambda start, size: data.TokenStream(np.arange(start, start + size, dtype=np.int32), 4 * size)
  made = {"calibration": {d: stream(10_000 * i, 1000) for i, d in enumerate(data.DOMAINS)},
          "held out": {d: stream(100_000 + 10_000 * i, 500) for i, d in enumerate(data.DOMAINS)}}
  monkeypatch.setattr(data, "encode", lambda documents, _: {d.domain: made[d.name][d.domain] for d in documents})
  return made


def test_windows_of_different_purposes_share_no_token(streams):
  text = workspace.read_text(config(), None)
  parts = {name: np.concatenate(getattr(text, name)) for name in ("calibration", "damage", "evaluation")}
  assert {name: rows.shape for name, rows in parts.items()} == {
      "calibration": (12, 16), "damage": (4, 16), "evaluation": (8, 16)}
  everything = np.concatenate([rows.ravel() for rows in parts.values()])
  assert len(set(everything.tolist())) == everything.size
  assert (parts["calibration"] < 100_000).all() and (parts["damage"] >= 100_000).all()
  assert all(batch.shape == (4, 16) and batch.dtype == np.int32
             for batches in (text.calibration, text.damage, text.evaluation) for batch in batches)
  assert all((np.diff(rows, axis=1) == 1).all() for rows in parts.values())


def test_another_set_changes_the_calibration_windows_alone(streams):
  usual, same, other = (workspace.read_text(config(**c), None) for c in ({}, {"calibration_set": 0},
                                                                         {"calibration_set": 1}))
  assert usual.digest == same.digest != other.digest
  assert not set(np.ravel(usual.calibration)) & set(np.ravel(other.calibration))
  for purpose in ("damage", "evaluation"):
    np.testing.assert_array_equal(getattr(usual, purpose), getattr(other, purpose))


def test_every_domain_has_its_share_and_its_name(streams):
  text = workspace.read_text(config(), None)
  rows = np.concatenate(text.evaluation)
  assert text.domains.tolist() == ["code"] * 4 + ["wiki"] * 4
  for domain in ("code", "wiki"):
    known = set(streams["held out"][domain].tokens.tolist())
    assert all(set(row.tolist()) <= known for row in rows[text.domains == domain])
  assert text.tokens_per_byte == {"code": 0.25, "wiki": 0.25}
  assert np.ptp(rows[:4, 0]) > 250  # spread over the 500 tokens of the domain


def test_the_digest_sees_tokens_and_purposes(streams):
  digest = lambda **changes: workspace.read_text(config(**changes), None).digest
  assert digest() == digest()
  assert len({digest(), digest(length=15), digest(evaluation=6), digest(domains=("wiki", "passages")),
              digest(**{"damage.sequences": 4})}) == 5
  assert workspace.read_text(config(**{"damage.sequences": 0}), None).damage == []


@pytest.mark.parametrize(("changes", "said"), [
    ({"length": 100}, "domain 'code' has 500 tokens of held-out text, 6 sequences of 100.*lower config.length"),
    ({"calibration": 80}, "domain 'code' has 1000 tokens of calibration text, 80 sequences of 16"),
    ({"domains": ("wiki", "cod")}, "unknown domain 'cod'; did you mean 'code'"),
    ({"domains": ("wiki", "wiki")}, "each once"), ({"domains": ()}, "at least one domain"),
    ({"calibration": 0}, "config.calibration=0.*at least one sequence"),
    ({"evaluation": 0}, "config.evaluation=0.*at least one sequence"),
    ({"damage.sequences": -2}, "config.damage.sequences=-2"),
    ({"evaluation": 3}, "config.evaluation=3.*do not fill batches of 4"),
    ({"damage.sequences": 3}, "config.damage.sequences=3.*do not fill batches of 4"),
    ({"domains": ("wiki",), "batch": 1, "evaluation": 1}, "evaluation=1.*at least two sequences"),
    ({"calibration_set": 12}, "1000 tokens of calibration text, 6 sequences of 16 in each of 13 sets"),
    ({"calibration_set": -1}, "config.calibration_set=-1"), ({"batch": 0}, "config.batch=0"),
    ({"length": 1}, "config.length=1"),
])
def test_mistakes_about_text_are_named(streams, changes: dict, said: str):
  with pytest.raises(ValueError, match=said):
    workspace.read_text(config(**changes), None)


def test_synthetic_text_goes_through_the_tokenizer(pristine: Path, monkeypatch):
  monkeypatch.setattr(data, "calibration", lambda: tiny.documents(3, 1) + tiny.documents(3, 2, "code"))
  monkeypatch.setattr(data, "held_out", lambda: tiny.documents(3, 3) + tiny.documents(3, 4, "code"))
  subject = opened(pristine)
  text = workspace.read_text(config(), subject.tokenizer)
  assert 0 < text.tokens_per_byte["wiki"] < 0.5
  words = " ".join(subject.tokenizer.decode(row.tolist()) for row in np.concatenate(text.evaluation)).split()
  assert np.mean([word in tiny.TEXT for word in words]) > 0.7


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


def test_a_product_is_made_once_and_again_only_where_it_must_be(tmp_path: Path, caplog):
  run, made = workspace.Workdir(tmp_path / "run"), []

  def product(key: str, cls: type = artifacts.Plan) -> artifacts.Plan:
    value = artifacts.Plan(np.array([[len(made)]]), "uniform", 2.0)
    return run.product("sub/plan.npz", key, cls.load, lambda: made.append(key) or value)

  assert product("one").bits == 0 and product("one").bits == 0
  assert made == ["one"] and not caplog.records
  with caplog.at_level(logging.WARNING):
    assert product("two").bits == 1 and made == ["one", "two"]
  assert "sub/plan.npz was made from something else" in caplog.text
  assert product("two").bits == 1 and len(made) == 2


@pytest.mark.parametrize("damage", [
    lambda c: c[:-20], lambda c: b"", lambda c: b"not a product", lambda c: c[:300] + bytes([c[300] ^ 255]) + c[301:]])
def test_a_damaged_product_is_made_again_with_a_warning(tmp_path: Path, caplog, damage):
  run, made = workspace.Workdir(tmp_path), []
  value = artifacts.Plan(np.arange(100).reshape(10, 10), "uniform", 2.0)
  product = lambda: run.product("plan.npz", "key", artifacts.Plan.load, lambda: made.append(1) or value)
  product()
  whole = (tmp_path / "plan.npz").read_bytes()
  (tmp_path / "plan.npz").write_bytes(damage(whole))
  np.testing.assert_array_equal(product().bits, value.bits)
  assert len(made) == 2 and "plan.npz cannot be read" in caplog.text
  assert (tmp_path / "plan.npz").read_bytes() == whole


def test_timings_stand_beside_the_results(tmp_path: Path):
  run = workspace.Workdir(tmp_path / "new")
  for stage in ("open", "calibrate"):
    with run.timed(stage):
      pass
  lines = [json.loads(line) for line in (tmp_path / "new" / "timings.jsonl").read_text().splitlines()]
  assert [line["stage"] for line in lines] == ["open", "calibrate"] and all(line["seconds"] >= 0 for line in lines)
