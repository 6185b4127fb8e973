"""Pairs of a text and its summary that are the same on every machine.

Code: a function's source, without its docstring, and the first sentence of that docstring, read with `ast` from the
exactly pinned packages of `data.py`. Encyclopedia: an article's introduction and its short description. Held out are
whole packages and whole articles, the same as in `data.py`, so that a model pre-trained on its text has not seen them.

No pair occurs twice, by its text or, in code, by its summary. A training function is dropped, too, if its text or its
summary is that of a held-out one, or if half of its longer lines are lines of held-out functions. Descriptions of
articles are short ("American actor") and recur on both sides: they are labels, not copies.
"""

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator

from moeq_jax import data

VERSION = 1
DOMAINS = ("code", "wiki")
LINES = (3, 150)  # of a function without its docstring
WORDS = (3, 40)  # of a docstring's first sentence
DESCRIPTION_WORDS = (2, 40)
XSUM_PACKAGE = (*data.PASSAGES_PACKAGE[:3], "data/XSum/test.jsonl")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
# Begins a part of a docstring, not a summary.
_SECTION = re.compile(r"(args?|arguments|parameters|returns?|raises|yields|examples?|notes?)\s*:", re.IGNORECASE)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A text and its summary.

  Attributes:
    domain: one of `DOMAINS`, or `xsum`.
    name: where it stands: file and function, or the article's title.
    text: what is read.
    summary: what is to be written, on one line.
  """

  domain: str
  name: str
  text: str
  summary: str


def first_sentence(docstring: str) -> str:
  """The first sentence of a docstring's first paragraph, on one line."""
  paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
  return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def functions(document: data.Document) -> Iterator[Pair]:
  """The documented functions and methods of a Python file, in the order of their first lines."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # old escapes in strings
      tree = ast.parse(document.text)
  except (SyntaxError, ValueError):
    return
  lines = document.text.split("\n")
  nodes = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS) and ast.get_docstring(node, clean=False)]
  for node in sorted(nodes, key=lambda n: n.lineno):
    summary = first_sentence(ast.get_docstring(node, clean=False))
    text = _without_docstring(node, lines)
    if (LINES[0] <= text.count("\n") + 1 <= LINES[1] and WORDS[0] <= len(summary.split()) <= WORDS[1]
        and summary not in text and not _SECTION.match(summary)):
      yield Pair("code", f"{document.name}:{node.name}", text, summary)


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
  """The lines of a function but those of its docstring; empty if nothing else is in it or they share a line."""
  docstring = node.body[0]
  if len(node.body) == 1 or node.body[1].lineno == docstring.end_lineno or docstring.lineno == node.lineno:
    return ""
  first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
  kept = lines[first - 1:docstring.lineno - 1] + lines[docstring.end_lineno:node.end_lineno]
  return textwrap.dedent("\n".join(kept)).strip("\n")


def descriptions() -> Iterator[Pair]:
  """The articles that have a description, ordered by title."""
  summaries = json.loads(data.asset(*data.WIKI_PACKAGE).read_text(encoding="utf-8"))
  for title in sorted(summaries):
    text, summary = summaries[title]["extract"].strip(), " ".join((summaries[title].get("description") or "").split())
    if text and DESCRIPTION_WORDS[0] <= len(summary.split()) <= DESCRIPTION_WORDS[1]:
      yield Pair("wiki", title, text, summary)


def xsum() -> list[Pair]:
  """News reports and their one-sentence summaries (XSum), for evaluation only."""
  lines = data.asset(*XSUM_PACKAGE).read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines if line.strip()]
  found = [Pair("xsum", str(i), row["document"], " ".join(row["summary"].split())) for i, row in enumerate(rows)]
  return [pair for pair in found if pair.text.strip() and pair.summary]


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
  """Lower case, words only: what two texts are compared by."""
  return " ".join(re.findall(r"\w+", text.lower()))


def distinct(found: Iterable[Pair], seen: set[tuple[str, str]]) -> Iterator[Pair]:
  """The pairs whose text, and in code whose summary, is in none before it; `seen` grows."""
  for pair in found:
    marks = {("text", plain(pair.text))} | ({("summary", plain(pair.summary))} if pair.domain == "code" else set())
    if not marks & seen:
      seen |= marks
      yield pair


def long_lines(text: str) -> set[str]:
  """The lines that are long enough to be recognised (see `data.MIN_RECURRING`), without their indentation."""
  return {line.strip() for line in text.split("\n") if len(line.strip()) >= data.MIN_RECURRING}


def held_out() -> list[Pair]:
  """The functions of the held-out packages and the held-out articles."""
  code = (p for name, version in data.HELD_OUT_PACKAGES.items() for d in data.package_files(name, version)
          for p in functions(d))
  wiki = (p for p in descriptions() if data.is_held_out(p.name))
  return [pair for part in (code, wiki) for pair in distinct(part, set())]


def training(few: bool = False) -> list[Pair]:
  """The functions of the training packages and the articles that are not held out, nothing of them held out.

  Args:
    few: only the functions of two packages (`data.CALIBRATION_PACKAGES`), which are read in seconds.
  """
  apart = held_out()
  seen: set[tuple[str, str]] = set()
  for _ in distinct(apart, seen):
    pass
  lines = set().union(*(long_lines(p.text) for p in apart if p.domain == "code"))
  packages = [name for name in data.TRAIN_PACKAGES if not few or name in data.CALIBRATION_PACKAGES]
  code = (p for name in packages for d in data.package_files(name, data.TRAIN_PACKAGES[name])
          for p in functions(d) if not _copied(p, lines))
  wiki = (p for p in descriptions() if not data.is_held_out(p.name))
  return [pair for part in (code, wiki) for pair in distinct(part, seen)]


def _copied(pair: Pair, lines: set[str]) -> bool:
  """Whether half of the longer lines of a function are among `lines`."""
  own = long_lines(pair.text)
  return 2 * len(own & lines) >= max(len(own), 1)
