"""Evaluating an opened model: the commands `evaluate` and `serve`, and the model as lm-evaluation-harness asks it."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moeq_jax import artifacts, language_model, options, progress, registry, runs
from moeq_jax.evaluate import lm_eval, questions, tasks, text

EVALUATE = "evaluate --checkpoint=DIR --tasks=NAME[,NAME] [--against=DIR] [--limit=N] [--output=FILE.jsonl]"
SERVE = "serve --checkpoint=DIR"


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------


def command_evaluate(arguments: Sequence[str], out: TextIO | None = None) -> None:
  """Puts sets of questions to one or two models, prints accuracies and paired differences.

  Raises:
    runs.UsageError: a wrong option, an unknown set.
    ValueError: a model cannot be opened or has no tokenizer.
  """
  defaults = {"checkpoint": None, "against": None, "tasks": None, "limit": 0, "output": None, "dtype": "float32",
              "capacity": "sequence"}
  chosen, _ = options.parse(arguments, EVALUATE, defaults)
  places = [options.needed(chosen.checkpoint, EVALUATE), *([chosen.against] if chosen.against else [])]
  asked = read_questions(options.needed(chosen.tasks, EVALUATE).split(","), chosen.limit)
  answers = [ask(language_model.load(place, chosen.dtype, chosen.capacity), asked) for place in places]
  for line in summary(places, answers):
    print(line, file=out or sys.stdout)
  if chosen.output:
    artifacts.write_bytes(Path(chosen.output), b"".join(json.dumps(row).encode() + b"\n" for row in rows(answers)))


def read_questions(names: Sequence[str], limit: int = 0) -> dict[str, list[questions.Question]]:
  """The questions of some sets; `limit`: of each the first ones, 0 for all.

  Raises:
    runs.UsageError: an unknown set, or a limit below 0.
  """
  for name in names:
    if name not in questions.SETS:
      near = registry.did_you_mean(name, questions.SETS)
      raise runs.UsageError(f"unknown task {name!r}{near} (tasks: {', '.join(questions.SETS)})")
  if limit < 0:
    raise runs.UsageError(f"--limit={limit}: the number of rows of each set, or 0 for all")
  return {name: questions.read(name, limit or None) for name in names}


def ask(model: language_model.LanguageModel,
        asked: Mapping[str, Sequence[questions.Question]]) -> dict[str, list[tasks.Answer]]:
  """The model's answers to the questions of every set."""
  scorer = model.scorer()
  return {name: tasks.score(of_set, scorer) for name, of_set in asked.items()}


def summary(places: Sequence[str], answers: Sequence[Mapping[str, Sequence[tasks.Answer]]]) -> Iterable[str]:
  """The lines that `evaluate` prints: accuracies of each model, then what the first differs in from the second."""
  show = lambda estimate: f"{estimate.mean:.4f} ± {estimate.half:.4f}".rjust(18)
  signed = lambda estimate: f"{estimate.mean:+.4f} ± {estimate.half:.4f}".rjust(18)
  for place, of_model in zip(places, answers, strict=True):
    yield f"{place}  (± half of a 95% interval)"
    yield "  ".join([f"{'task':<14}{'rows':>6}", *(f"{metric:>18}" for metric in tasks.METRICS)])
    for name, found in of_model.items():
      accuracy = tasks.accuracy(found)
      yield "  ".join([f"{name:<14}{len(found):>6}", *(show(accuracy[metric]) for metric in tasks.METRICS)])
    yield ""
  if len(places) == 2:
    yield f"{places[0]} minus {places[1]}, row by row"
    columns = ("acc", "acc_norm", "changed", "gold_nats")
    yield "  ".join([f"{'task':<14}{'rows':>6}", *(f"{name:>18}" for name in columns)])
    for name, found in answers[0].items():
      moved = tasks.paired(found, answers[1][name])
      yield "  ".join([f"{name:<14}{len(found):>6}", *(signed(moved[column]) for column in columns)])
    yield "changed: share of questions answered otherwise (acc); gold_nats: log-likelihood of the right answer"


def rows(answers: Sequence[Mapping[str, Sequence[tasks.Answer]]]) -> Iterable[dict[str, Any]]:
  """One JSON-able row for each question; with two models, the second's answer under `against`."""
  for name, found in answers[0].items():
    for index, answer in enumerate(found):
      row = {"task": name, "row": index} | answer.row()
      yield row | ({"against": answers[1][name][index].row()} if len(answers) == 2 else {})


# ---------------------------------------------------------------------------------------------------------------------
# The harness
# ---------------------------------------------------------------------------------------------------------------------


def answering(model: language_model.LanguageModel) -> lm_eval.Answer:
  """What answers the requests of `evaluate/lm_eval.py` with a model."""
  methods: dict[str, Callable[[list[Any]], list[Any]]] = {
      "loglikelihood": lambda requests: text.loglikelihoods(model.scorer(), [tuple(pair) for pair in requests]),
      "rolling": lambda requests: text.rolling(model.scorer(), requests),
      "generate": lambda requests: _generate(model, requests),
  }

  def answer(method: str, requests: list[Any]) -> list[Any]:
    if method not in methods:
      raise language_model.ModelError(f"unknown method {method!r} (methods: {', '.join(methods)})")
    return methods[method](requests)

  return answer


def _generate(model: language_model.LanguageModel, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
  """Continues contexts; those with the same settings run together."""
  groups: dict[str, list[int]] = {}
  for index, (_, settings) in enumerate(requests):
    groups.setdefault(json.dumps(settings, sort_keys=True), []).append(index)
  found = [""] * len(requests)
  with progress.bar("generate", len(requests)) as advance:
    for members in groups.values():
      settings = requests[members[0]][1]
      room = model.length - (settings["max_new_tokens"] if model.joint else 0)
      if room < 1:
        raise language_model.ModelError(f"{settings['max_new_tokens']} new tokens leave no room for a context in a"
                                        f" model of {model.length} positions; ask for fewer")
      contexts = [(model.encode(requests[i][0]) or [model.prefix])[-room:] for i in members]
      new = model.generate(contexts, settings["max_new_tokens"], settings["temperature"], until=settings["until"],
                           advance=advance)
      for index, tokens in zip(members, new, strict=True):
        found[index] = text.until(model.decode(tokens), settings["until"])
  return found


def harness(directory: str | Path, dtype: str = "float32", capacity: str = "sequence") -> lm_eval.Moeq:
  """A model for `lm_eval.simple_evaluate(model=...)`, in this process: lm-evaluation-harness must be installed here.

  Raises:
    ValueError: the model cannot be opened.
  """
  return lm_eval.Moeq(answer=answering(language_model.load(directory, dtype, capacity)))


def command_serve(arguments: Sequence[str]) -> None:
  """Answers requests on standard input until it ends; see `evaluate/lm_eval.py`."""
  chosen, _ = options.parse(arguments, SERVE, {"checkpoint": None, "dtype": "float32", "capacity": "sequence"})
  checkpoint = options.needed(chosen.checkpoint, SERVE)
  with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not stand among the answers
    serve(lambda: language_model.load(checkpoint, chosen.dtype, chosen.capacity), sys.stdin, out)


def serve(opener: Callable[[], language_model.LanguageModel], requests: Iterable[str], out: TextIO) -> None:
  """Opens a model and answers one request a line; a request that is refused gets its error, and the next is read."""
  def send(message: Mapping[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()

  try:
    model = opener()
  except (ValueError, OSError) as error:
    return send({"error": str(error)})
  answer = answering(model)
  send({"ready": {"length": model.length, "joint": model.joint, "tokens": model.config.vocab_size}})
  for line in requests:
    number = None
    try:
      request = json.loads(line)
      number = request["id"]
      send({"id": number, "result": answer(request["method"], request["requests"])})
    except (ValueError, LookupError, TypeError) as error:
      send({"id": number, "error": f"{type(error).__name__}: {error}"})
