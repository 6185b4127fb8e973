"""The commands `evaluate` and `serve`: what they print and answer is what the model says when it is asked directly."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moeq_jax import evaluation, language_model, main, runs
from moeq_jax.evaluate import lm_eval, questions, tasks, text
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> language_model.LanguageModel:
  return language_model.load(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------


def test_two_models_are_compared_row_by_row(checkpoint: Path, model: language_model.LanguageModel, tmp_path: Path):
  out, places = io.StringIO(), [str(checkpoint), "experiments/models/moeq-small"]
  evaluation.command_evaluate(
      [f"--checkpoint={places[0]}", f"--against={places[1]}", "--tasks=piqa,openbookqa", "--limit=3",
       f"--output={tmp_path / 'new' / 'rows.jsonl'}"], out)
  rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
  assert [(row["task"], row["row"]) for row in rows] == [(t, i) for t in ("piqa", "openbookqa") for i in range(3)]
  other, found = language_model.load(places[1]), {}
  for name in ("piqa", "openbookqa"):
    asked = questions.read(name, 3)
    found[name] = [tasks.score(asked, each.scorer()) for each in (model, other)]
    for row, ours, theirs in zip([row for row in rows if row["task"] == name], *found[name], strict=True):
      assert row["loglikelihoods"] == pytest.approx(ours.row()["loglikelihoods"], abs=1e-4)
      assert row["against"]["loglikelihoods"] == pytest.approx(theirs.row()["loglikelihoods"], abs=1e-4)
      assert row["against"]["chosen"] == theirs.chosen and row["gold"] == ours.gold
  printed = out.getvalue()
  assert f"{places[0]} minus {places[1]}" in printed
  moved = tasks.paired(*found["piqa"])["gold_nats"]
  assert f"{moved.mean:+.4f} ± {moved.half:.4f}" in printed


def test_one_model_has_no_comparison(checkpoint: Path):
  out = io.StringIO()
  evaluation.command_evaluate([f"--checkpoint={checkpoint}", "--tasks=piqa", "--limit=1"], out)
  assert "minus" not in out.getvalue() and "piqa" in out.getvalue()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--tasks=piqa"], "usage"), (["--checkpoint=X"], "usage"),
    (["--checkpoint=X", "--tasks=pica"], "unknown task 'pica'.*piqa"),
    (["--checkpoint=X", "--tasks=piqa", "--limit=-1"], "--limit=-1"),
    (["--checkpoint=X", "--tasks=piqa", "--limit=a"], "limit"), (["--checkpoint=X", "--task=piqa"], "--tasks")])
def test_wrong_options_are_named_before_a_model_is_opened(arguments: list[str], said: str):
  with pytest.raises(runs.UsageError, match=said):
    evaluation.command_evaluate(arguments)


def test_a_model_that_cannot_be_opened_is_named(capsys: pytest.CaptureFixture):
  assert main.main(["main", "evaluate", "--checkpoint=nowhere", "--tasks=piqa", "--limit=1"]) == 2
  assert "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The harness
# ---------------------------------------------------------------------------------------------------------------------


def settings(until: list[str], count: int = 8, temperature: float = 0.0) -> dict[str, Any]:
  return {"until": until, "max_new_tokens": count, "temperature": temperature}


def test_answers_are_those_of_the_model(model: language_model.LanguageModel):
  answer = evaluation.answering(model)
  pairs = [["the router", " sends"], ["", "bits"]]
  assert answer("loglikelihood", pairs) == text.loglikelihoods(model.scorer(), [tuple(pair) for pair in pairs])
  assert answer("rolling", ["the router sends", ""]) == text.rolling(model.scorer(), ["the router sends", ""])
  with pytest.raises(language_model.ModelError, match="unknown method 'other'.*rolling"):
    answer("other", [])


def test_contexts_of_several_settings_are_continued_in_their_order(model: language_model.LanguageModel):
  whole = model.generate(["the router"], 8)[0]
  stop = whole[4:6]
  asked = [["the router", settings([stop])], ["bits are", settings([], 3)], ["", settings([])],
           ["the router", settings([])]]
  found = evaluation.answering(model)("generate", asked)
  assert found == [whole[: whole.find(stop)], model.generate(["bits are"], 3)[0],
                   model.decode(model.generate([[model.prefix]], 8)[0]), whole]


def test_a_long_context_loses_its_first_tokens(checkpoint: Path, tmp_path: Path):
  for name in ("model.safetensors", "tokenizer.json"):
    (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
  values = json.loads((checkpoint / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 16}))
  model = language_model.load(tmp_path)
  answer, context = evaluation.answering(model), "the router sends every token to two experts and then some more"
  tokens = model.encode(context)
  assert len(tokens) > 12
  assert answer("generate", [[context, settings([], 4)]]) == [model.decode(model.generate([tokens[-12:]], 4)[0])]
  with pytest.raises(language_model.ModelError, match="16 new tokens leave no room.*16 positions"):
    answer("generate", [[context, settings([], 16)]])


def served(opener: Any, *lines: str) -> list[dict[str, Any]]:
  out = io.StringIO()
  evaluation.serve(opener, lines, out)
  return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_request_that_is_refused_gets_its_error_and_the_next_is_read(model: language_model.LanguageModel):
  good = {"method": "rolling", "requests": ["the router"]}
  ready, *answers = served(
      lambda: model, json.dumps(good | {"id": 1}), json.dumps({"id": 2, "method": "other", "requests": []}), "{",
      json.dumps(good), json.dumps({"id": 4, "method": "loglikelihood", "requests": [["a", ""]]}), "[]",
      json.dumps({"id": 5, "method": "generate", "requests": [["a", {}]]}), json.dumps(good | {"id": 6}))
  assert ready == {"ready": {"length": model.length, "joint": True, "tokens": 320}}
  assert answers[0] == {"id": 1, "result": text.rolling(model.scorer(), ["the router"])}
  assert answers[-1] == answers[0] | {"id": 6}
  errors = {place: message["error"] for place, message in enumerate(answers) if "error" in message}
  assert sorted(errors) == [1, 2, 3, 4, 5, 6]
  assert "unknown method" in errors[1] and "adds no token" in errors[4] and "max_new_tokens" in errors[6]


def test_a_model_that_cannot_be_opened_is_the_first_answer():
  [message] = served(lambda: language_model.load("nowhere"), '{"id": 1}')
  assert "nowhere" in message["error"]


def test_the_model_of_the_harness_is_opened_as_asked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
  asked = []
  monkeypatch.setattr(language_model, "load", lambda *how: asked.append(how))
  evaluation.harness(checkpoint, "bfloat16", capacity="off")
  assert asked == [(checkpoint, "bfloat16", "off")]


def test_in_one_process_or_two_the_answers_are_equal(checkpoint: Path):
  asked = [types.SimpleNamespace(args=("the router", " sends")), types.SimpleNamespace(args=("bits", " are few"))]
  near, far = evaluation.harness(checkpoint), lm_eval.Moeq(checkpoint=str(checkpoint), python=sys.executable)
  assert far._answer.about["tokens"] == 320
  for one, other in zip(near.loglikelihood(asked), far.loglikelihood(asked), strict=True):
    assert one == (pytest.approx(other[0], abs=1e-5), other[1])
  far._answer.close()
  with pytest.raises(lm_eval.ServerError, match="nowhere"):
    lm_eval.Moeq(checkpoint="nowhere", python=sys.executable)
