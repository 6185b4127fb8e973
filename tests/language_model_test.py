"""Models opened from disk, in every format: the same logits, likelihoods and texts as the model that was written."""

import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import moeq_jax
from moeq_jax import artifacts, data, language_model, main, runs
from moeq_jax.evaluate import text
from moeq_jax.export import native
from moeq_jax.kernels import api
from moeq_jax.models import convert, families, switch
from tests import tiny

SWITCH = switch.SwitchConfig(
    vocab_size=320, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=4, num_experts=3,
    expert_capacity=64, encoder_sparse=(), decoder_sparse=(0,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
  """`tiny.packed()` in the project's format."""
  directory, source = tmp_path_factory.mktemp("quantized"), convert.open_checkpoint(checkpoint)
  files = {name: (checkpoint / name).read_bytes() for name in ("config.json", "tokenizer.json")}
  others = [source.others(l) for l in range(source.layers)]
  native.save(directory, tiny.packed(), others, source.others(None), files, {"codec": "rtn", "plan": None})
  return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> language_model.LanguageModel:
  return moeq_jax.load(checkpoint)


@functools.cache
def encoder_decoder() -> language_model.LanguageModel:
  """A Switch Transformer in memory."""
  tree, rng = families.abstract(SWITCH), np.random.default_rng(0)
  tree = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.4, leaf.shape), jnp.float32), tree)
  return language_model.LanguageModel(SWITCH, {}, tree.top, list(tree.blocks),
                                      switch.functions(np.float32, "sequence"), None, (1,))


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_computes_what_its_model_does(model: language_model.LanguageModel):
  tokens = tiny.tokens(1)[0]
  np.testing.assert_allclose(model.logits(tokens), tiny.forward(tokens)[0], atol=1e-4)
  assert model.joint and model.length == tiny.CONFIG.max_position_embeddings


def test_a_quantized_model_computes_from_its_packed_experts(quantized: Path):
  model, tokens = language_model.load(quantized), tiny.tokens(1)[0]
  experts = [tiny.decoded(codes, bits) for codes, bits in zip(tiny.encoded()[0], tiny.PLAN, strict=True)]
  np.testing.assert_allclose(model.logits(tokens), tiny.forward(tokens, experts)[0], atol=1e-4)
  packed = model.functions.experts(model.blocks[0])["gate"]
  assert packed.buffer.dtype == np.uint8
  assert np.abs(model.logits(tokens) - tiny.forward(tokens)[0]).max() > 0.1


def test_packed_experts_go_to_the_backend_that_is_named(quantized: Path, monkeypatch: pytest.MonkeyPatch):
  tokens = tiny.tokens(1)[0]
  wanted = language_model.load(quantized).logits(tokens)
  calls = []
  reference = api.BACKENDS["reference"]
  views = dataclasses.replace(reference, prepare=lambda q: {"tensor": q}, forward=lambda x, w, sizes, out_dtype: (
      calls.append(type(w)), reference.forward(x, w["tensor"], sizes, out_dtype))[1])
  monkeypatch.setitem(api.BACKENDS, "viewing", views)
  model = language_model.load(quantized, backend="viewing")
  packed = [w for block in model.blocks for w in model.functions.experts(block).values()]
  assert packed and all(isinstance(w, api.Prepared) and w.backend == "viewing" for w in packed)
  np.testing.assert_allclose(model.logits(tokens), wanted, atol=1e-4)
  assert set(calls) == {dict}
  with pytest.raises(ValueError, match="unknown back-end 'gpu'"):
    language_model.load(quantized, backend="gpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_quantized_model_with_a_damaged_file_is_refused(quantized: Path, tmp_path: Path, name: str):
  shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
  artifacts.write_json(tmp_path / name, json.loads((quantized / name).read_text()) | {"rms_norm_eps": 1e-2})
  with pytest.raises(native.QuantizedError, match=f"{name}: is not the file"):
    language_model.load(tmp_path)


def test_it_computes_in_the_type_that_is_asked_for(checkpoint: Path):
  model, tokens = language_model.load(checkpoint, "bfloat16"), tiny.tokens(1)[0]
  assert model.top.embedding[...].dtype == "bfloat16"
  error = np.abs(model.logits(tokens) - tiny.forward(tokens)[0])
  assert 1e-3 < error.mean() < 0.1
  with pytest.raises(ValueError, match="float64"):
    language_model.load(checkpoint, "float64")


def test_relative_names_are_looked_for_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(tmp_path)
  assert language_model.load("experiments/models/moeq-small").config.num_local_experts == 16
  with pytest.raises(convert.CheckpointError, match="not found"):
    language_model.load("experiments/models/none")


def test_what_ends_a_text_is_said_by_either_config(checkpoint: Path, tmp_path: Path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
  values = json.loads((tmp_path / "config.json").read_text())
  for said, ends in ((None, ()), (3, (3,)), ([3, 4], (3, 4))):
    artifacts.write_json(tmp_path / "config.json", values | {"eos_token_id": said, "bos_token_id": None})
    model = language_model.load(tmp_path)
    assert model.ends == ends and model.tokenizer is None
    if ends:
      assert model.prefix == ends[0]
    else:
      with pytest.raises(language_model.ModelError, match="bos_token_id"):
        model.prefix  # noqa: B018
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
  assert language_model.load(tmp_path).ends == (9, 8)
  artifacts.write_json(tmp_path / "config.json", values | {"bos_token_id": 7})
  assert language_model.load(tmp_path).prefix == 7


def test_a_wrong_tokenizer_is_refused(checkpoint: Path, tmp_path: Path):
  larger = data.train_tokenizer(tiny.documents(9, 1), 400)
  for written, said in (("{}", "cannot be read"), (larger.to_str(), "belongs to another")):
    (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(language_model.ModelError, match=said):
      language_model.open_tokenizer(tmp_path, tiny.CONFIG)


def test_a_tokenizer_neither_cuts_nor_fills_up(checkpoint: Path, tmp_path: Path):
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
  whole = tokenizer.encode("the router sends every token").ids
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=100)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  assert language_model.open_tokenizer(tmp_path, tiny.CONFIG).encode("the router sends every token").ids == whole


# ---------------------------------------------------------------------------------------------------------------------
# Log-likelihoods
# ---------------------------------------------------------------------------------------------------------------------


def test_loglikelihoods_are_those_of_the_logits(model: language_model.LanguageModel):
  rng = np.random.default_rng(2)
  pairs = [(rng.integers(0, 320, a).tolist(), rng.integers(0, 320, b).tolist()) for a, b in [(7, 3), (1, 9), (12, 1)]]
  for (context, continuation), (nats, greedy) in zip(pairs, model.loglikelihoods(pairs), strict=True):
    log = np.log(tiny.softmax(tiny.forward(np.array([context + continuation]))[0][0]))[len(context) - 1 : -1]
    assert nats == pytest.approx(log[np.arange(len(continuation)), continuation].sum(), abs=1e-3)
    assert greedy == bool((log.argmax(-1) == continuation).all())


def test_the_first_tokens_of_a_long_context_are_left_out(checkpoint: Path, tmp_path: Path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
  values = json.loads((tmp_path / "config.json").read_text())
  artifacts.write_json(tmp_path / "config.json", values | {"max_position_embeddings": 8})
  model, tokens = language_model.load(tmp_path), list(range(10, 30))
  assert model.loglikelihoods([(tokens[:17], tokens[17:])]) == model.loglikelihoods([(tokens[11:17], tokens[17:])])
  assert model.loglikelihoods([(tokens[:17], tokens[17:])]) != model.loglikelihoods([(tokens[12:17], tokens[17:])])
  with pytest.raises(language_model.ModelError, match="at most 8"):
    model.loglikelihoods([(tokens[:1], tokens[1:10])])


@pytest.mark.parametrize(("pair", "said"), [
    (([], [1]), "context of 0"), (([1], []), "continuation of 0"), (([1], [320]), "token 320"), (([-1], [3]), "-1")])
def test_pairs_that_cannot_be_scored_are_refused(model: language_model.LanguageModel, pair: tuple, said: str):
  with pytest.raises(language_model.ModelError, match=said):
    model.loglikelihoods([pair])


def test_an_encoder_decoder_scores_its_targets():
  model = encoder_decoder()
  pairs = [([5, 6, 7, 1], [8, 9]), ([4], [3, 2, 11, 30, 1]), ([5, 6, 7, 1], [8, 10])]
  logits = model.logits(switch.batch(*map(list, zip(*pairs)), SWITCH)).astype(np.float64)
  for (_, targets), of_row, (nats, _) in zip(pairs, logits, model.loglikelihoods(pairs), strict=True):
    log = np.log(tiny.softmax(of_row))
    assert nats == pytest.approx(log[np.arange(len(targets)), targets].sum(), abs=1e-4)
  assert not model.joint and model.prefix == 1


def test_texts_are_scored_through_the_tokenizer(model: language_model.LanguageModel):
  (nats, _), = text.loglikelihoods(model.scorer(), [("the router ", "sends")])
  tokens = model.encode("the router sends")
  before = len(model.encode("the router"))
  assert nats == pytest.approx(model.loglikelihoods([(tokens[:before], tokens[before:])])[0][0], abs=1e-6)


def test_without_a_token_for_an_empty_context_others_are_scored(checkpoint: Path, tmp_path: Path,
                                                               model: language_model.LanguageModel):
  for path in checkpoint.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  values = json.loads((tmp_path / "config.json").read_text())
  artifacts.write_json(tmp_path / "config.json", values | {"eos_token_id": None, "bos_token_id": None})
  scorer, pair = language_model.load(tmp_path).scorer(), ("the router", " sends")
  assert text.loglikelihoods(scorer, [pair]) == text.loglikelihoods(model.scorer(), [pair])
  with pytest.raises(language_model.ModelError, match="bos_token_id"):
    text.loglikelihoods(scorer, [("", "sends")])


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def test_texts_and_tokens_are_continued_alike(model: language_model.LanguageModel):
  prompts = ["the router sends every", "bits", "a small model reads few words and"]
  tokens = model.generate([model.encode(prompt) for prompt in prompts], 6)
  assert model.generate(prompts, 6) == [model.decode(row) for row in tokens]
  assert [model.generate([prompt], 6)[0] for prompt in prompts] == model.generate(prompts, 6)
  assert model.generate([], 6) == []


def test_many_prompts_run_in_groups(model: language_model.LanguageModel, monkeypatch: pytest.MonkeyPatch):
  prompts, done = [[i + 1] * (i % 3 + 1) for i in range(7)], []
  alone = [model.generate([prompt], 4)[0] for prompt in prompts]
  monkeypatch.setattr(language_model, "PROMPTS", 3)
  assert model.generate(prompts, 4, advance=lambda steps: done.append(steps)) == alone
  assert done == [3, 3, 1]


def test_a_stop_string_ends_a_continuation(model: language_model.LanguageModel):
  whole, = model.generate(["the router"], 12)
  stop = whole[3:5]
  steps = []
  short, = model.generate(["the router"], 12, until=(stop,), show=lambda tokens: steps.append(list(tokens)))
  assert stop in short and whole.startswith(short) and len(short) < len(whole)
  assert model.decode(steps[-1]) == short and [len(s) for s in steps] == list(range(1, len(steps) + 1))
  assert stop not in model.decode(steps[-2])


def test_without_a_tokenizer_texts_are_refused(checkpoint: Path, tmp_path: Path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
  model = language_model.load(tmp_path)
  assert len(model.generate([[1, 2]], 2)[0]) == 2
  with pytest.raises(language_model.ModelError, match="tokenizer.json"):
    model.generate(["the"], 2)


def command(*arguments: str) -> str:
  out = io.StringIO()
  language_model.command_generate(arguments, out)
  return out.getvalue()


def test_the_command_shows_a_prompt_and_its_continuation(checkpoint: Path, model: language_model.LanguageModel):
  options = ["--prompt=the router sends", "--max_new_tokens=9"]
  new, = model.generate(["the router sends"], 9)
  assert command(f"--checkpoint={checkpoint}", *options) == f"the router sends{new}\n"
  sampled = [command(f"--checkpoint={checkpoint}", *options, "--temperature=1.5", f"--seed={s}") for s in (1, 2, 1)]
  assert sampled[0] == sampled[2] != sampled[1]


def test_the_command_continues_every_line_of_a_file(checkpoint: Path, tmp_path: Path,
                                                    model: language_model.LanguageModel):
  (tmp_path / "prompts.txt").write_text("the router\n\nbits are\nnothing\n")
  lines = command(f"--checkpoint={checkpoint}", f"--file={tmp_path / 'prompts.txt'}", "--max_new_tokens=5").splitlines()
  found = [json.loads(line) for line in lines]
  prompts = ["the router", "bits are", "nothing"]
  assert [row["prompt"] for row in found] == prompts
  assert [row["continuation"] for row in found] == model.generate(prompts, 5)


def test_characters_of_several_tokens_are_shown_whole(model: language_model.LanguageModel,
                                                      monkeypatch: pytest.MonkeyPatch):
  tokens = model.encode("naïve € end")

  def generate(self, prompts, *settings, show):
    for count in range(len(tokens)):
      show(tokens[: count + 1])
    return [tokens]

  monkeypatch.setattr(language_model.LanguageModel, "generate", generate)
  written = []
  out = io.StringIO()
  monkeypatch.setattr(out, "write", lambda part: written.append(part))
  assert language_model._one(model, "> ", (1, 0.0, 0), out) == len(tokens)
  assert "".join(written) == "> naïve € end\n" and len(written) > 5


@pytest.mark.parametrize(("arguments", "said"), [
    (["--prompt=a"], "usage"), (["--checkpoint=X"], "usage"), (["--checkpoint=X", "--prompt=a", "--file=b"], "usage"),
    (["--checkpoint=X", "--promt=a"], "promt")])
def test_wrong_options_are_named(arguments: list[str], said: str):
  with pytest.raises(runs.UsageError, match=said):
    command(*arguments)


def test_errors_of_a_user_are_no_tracebacks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
  (tmp_path / "empty.txt").write_text("\n")
  (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
  place = f"--checkpoint={checkpoint}"
  for arguments, said in [
      ([place, f"--file={tmp_path / 'empty.txt'}"], "no prompt"), ([place, f"--file={tmp_path / 'none'}"], "none"),
      ([place, f"--file={tmp_path / 'binary.txt'}"], "UTF-8"),
      ([place, "--prompt=a", "--temperature=-1"], "temperature"),
      (["--checkpoint=nowhere", "--prompt=a"], "nowhere"), ([place, "--prompt=a", "--max_new_tokens=0"], "at least 1")]:
    assert main.main(["main", "generate", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("given", "said"), [
    ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16"),
    ({"capacity": "none"}, "capacity 'none' is not one of sequence, call, off"),
])
def test_unknown_modes_are_named(checkpoint: Path, given: dict[str, str], said: str):
  with pytest.raises(language_model.ModelError, match=said):
    moeq_jax.load(checkpoint, **given)
