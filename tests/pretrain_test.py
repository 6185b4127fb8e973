"""Pre-training end to end on a sample of the text: what it leaves behind, and that a stopped run ends the same."""

import json
import shutil
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import tokenizers

from configs import pretrain_small, train_split
from moeq_jax import data, pretrain
from moeq_jax.models import convert

STEPS = 6
FILES = ["config.json", "held_out.json", "model.safetensors", "router_init.safetensors", "tokenizer.json",
         "training_log.jsonl"]


def config() -> ml_collections.ConfigDict:
  """The smoke config, smaller still."""
  made = pretrain_small.get_config("smoke")
  made.model.update(vocab_size=300, num_hidden_layers=1)
  made.update(batch=2, length=32, steps=STEPS, warmup=2, log_every=1, save_every=2, held_out_sequences=2)
  return made


@pytest.fixture(scope="module")
def sample():
  """One article in a hundred, and no code, in place of all the text."""
  with pytest.MonkeyPatch.context() as patch:
    few = [d for i, d in enumerate(data.articles()) if i % 100 == 0 or (data.is_held_out(d.name) and i % 10 == 0)]
    patch.setattr(data, "articles", lambda: iter(few))
    patch.setattr(data, "TRAIN_PACKAGES", {})
    patch.setattr(data, "CALIBRATION_PACKAGES", ())
    patch.setattr(data, "HELD_OUT_PACKAGES", {})
    yield few


@pytest.fixture(scope="module")
def workdir(sample: list[data.Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run that nothing befell."""
  del sample
  place = tmp_path_factory.mktemp("undisturbed")
  pretrain.run(config(), place)
  return place


def test_the_result_is_a_checkpoint_with_all_its_files(workdir: Path):
  out = workdir / "model"
  assert sorted(path.name for path in out.iterdir()) == FILES
  model, sizes = convert.load(out)
  assert (sizes.vocab_size, sizes.num_hidden_layers, sizes.num_local_experts) == (300, 1, 4)
  before = convert.load_routers(out / "router_init.safetensors", (1, 4, 32))
  assert not np.array_equal(before, convert.routers(model))
  assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 300


def test_the_config_says_how_the_model_computes(workdir: Path):
  values = json.loads((workdir / "model" / "config.json").read_text())
  assert values["model_type"] == "mixtral" and values["tie_word_embeddings"] is True
  assert values["rope_parameters"] == {"rope_theta": 10_000.0, "rope_type": "default"}


def test_the_held_out_losses_are_those_of_the_shipped_model(workdir: Path):
  out = workdir / "model"
  summary = json.loads((out / "held_out.json").read_text())
  assert summary.keys() == {"held_out", "tokens_trained", "tokens_in_text"}
  assert summary["tokens_trained"] == STEPS * 2 * 32
  assert summary["held_out"].keys() == summary["tokens_in_text"].keys() == {"wiki", "passages"}
  tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
  held_out, training = data.encode(data.held_out(), tokenizer), data.encode(data.training(), tokenizer)
  for domain, losses in summary["held_out"].items():
    assert losses.keys() == {"nats_per_token", "nats_per_byte", "tokens"}
    assert losses["tokens"] == 2 * 31
    assert 3 < losses["nats_per_token"] < np.log(300) + 0.2  # little is learned in so few steps
    ratio = len(held_out[domain].tokens) / held_out[domain].bytes
    assert losses["nats_per_byte"] == pytest.approx(losses["nats_per_token"] * ratio)
    assert summary["tokens_in_text"][domain] == len(training[domain].tokens)


def test_the_training_log_has_the_router_norms(workdir: Path):
  rows = [json.loads(line) for line in (workdir / "model" / "training_log.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  model, _ = convert.load(workdir / "model")
  norms = np.linalg.norm(convert.routers(model), axis=-1)
  np.testing.assert_allclose(rows[-1]["router_norm"], norms, rtol=1e-2)  # the files are bfloat16
  assert all(np.shape(row["load"]) == (1, 4) and np.sum(row["load"]) == pytest.approx(1, abs=1e-3) for row in rows)


def test_a_run_that_was_stopped_ends_with_the_same_files(workdir: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch):
  draw, steps = data.batch, []

  def stopping(*args, **named):
    steps.append(args[2])
    if len(steps) == 4:
      raise KeyboardInterrupt
    return draw(*args, **named)

  monkeypatch.setattr(data, "batch", stopping)
  with pytest.raises(KeyboardInterrupt):
    pretrain.run(config(), tmp_path)
  assert not (tmp_path / "model" / "model.safetensors").exists()
  monkeypatch.setattr(data, "training", lambda: pytest.fail("the text was read again"))
  pretrain.run(config(), tmp_path)
  assert steps == [1, 2, 3, 4, 3, 4, 5, 6]
  for name in FILES:
    assert (tmp_path / "model" / name).read_bytes() == (workdir / "model" / name).read_bytes(), name


def test_kept_tokens_are_used_again_unless_the_mixture_or_the_tokenizer_changed(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  tokenizer = tokenizers.Tokenizer.from_file(str(workdir / "tokenizer.json"))
  other = data.train_tokenizer([data.Document("wiki", "a", "some other text")], 270)
  read, reads = data.training, []
  monkeypatch.setattr(data, "training", lambda: reads.append(1) or read())
  alone = config()
  alone.mixture = ml_collections.ConfigDict({"wiki": 1.0})
  fresh = pretrain.token_streams(config(), tmp_path, tokenizer)
  kept = pretrain.token_streams(config(), tmp_path, tokenizer)
  assert len(reads) == 1
  for domain, stream in fresh.items():
    assert kept[domain].tokens.dtype == stream.tokens.dtype == np.int32
    np.testing.assert_array_equal(kept[domain].tokens, stream.tokens)
    assert kept[domain].bytes == stream.bytes
  assert pretrain.token_streams(alone, tmp_path, tokenizer).keys() == {"wiki"}
  assert len(pretrain.token_streams(alone, tmp_path, other)["wiki"].tokens) > len(fresh["wiki"].tokens)
  assert len(reads) == 3


@pytest.fixture(scope="module")
def continued(sample: list[data.Document], workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run that goes on with the model of another one, which says how texts begin and end."""
  del sample
  source = tmp_path_factory.mktemp("source") / "model"
  shutil.copytree(workdir / "model", source)
  values = json.loads((source / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 0}
  (source / "config.json").write_text(json.dumps(values))
  place = tmp_path_factory.mktemp("continued")
  pretrain.run(going_on(source), place)
  return place


def going_on(source: Path) -> ml_collections.ConfigDict:
  """The smoke config of continued training, smaller still."""
  made = train_split.get_config("smoke")
  made.update(checkpoint=str(source), steps=2, batch=2, peak_rate=1e-6, end_rate=1e-6)
  made.mixture = ml_collections.ConfigDict({"wiki": 1.0})
  return made


def test_training_goes_on_with_a_checkpoint_its_tokenizer_and_its_special_tokens(workdir: Path, continued: Path):
  before, after = convert.load(workdir / "model")[0], convert.load(continued / "model")[0]
  start = convert.load_routers(continued / "model" / "router_init.safetensors", (1, 4, 32))
  np.testing.assert_array_equal(start, convert.routers(before))
  for (name, old), new in zip(convert.named_leaves(before).items(), convert.named_leaves(after).values(), strict=True):
    assert float(np.abs(np.asarray(old) - np.asarray(new)).max()) < 1e-2, name  # two steps of 1e-6, and bfloat16
  assert (continued / "model" / "tokenizer.json").read_bytes() == (workdir / "tokenizer.json").read_bytes()
  values = json.loads((continued / "model" / "config.json").read_text())
  assert (values["bos_token_id"], values["eos_token_id"], values["dtype"]) == (1, 0, "bfloat16")


def test_a_checkpoint_without_tokenizer_or_an_unknown_text_is_refused(workdir: Path, tmp_path: Path):
  shutil.copytree(workdir / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
  with pytest.raises(convert.CheckpointError, match="tokenizer.json: not found"):
    pretrain.run(going_on(tmp_path / "bare"), tmp_path / "run")
  wrong = going_on(workdir / "model")
  wrong.text = "calibraton"
  with pytest.raises(ValueError, match="did you mean 'calibration'"):
    pretrain.run(wrong, tmp_path / "other")
