"""ROUGE of generated summaries (Lin 2004) by the rouge-score library: F-measures, no stemming, as in arXiv 2604.06515.

`rougeLsum` takes sentences as lines. The library would find them with a model that it downloads; here they end at a
full stop, exclamation or question mark before a space. Every text of one line of our pairs is one or few of these.

Policy: a generation without a word (empty, or punctuation only) scores 0 and counts like any other; it is never left
out of the mean, and `measure` says how many there are. A reference without a word is an error: no summary can match it.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer

KINDS = ("rouge1", "rouge2", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[a-z0-9]")


class RougeError(ValueError):
  """Texts that cannot be compared; the message names the one at fault."""


@dataclasses.dataclass(frozen=True)
class Rouge:
  """The scores of each text.

  Attributes:
    scores: `[n, 3]` F-measures in [0, 1], in the order of `KINDS`.
    empty: how many generations had no word; they are in `scores` as 0.
  """

  scores: np.ndarray
  empty: int


def sentences(text: str) -> str:
  """The text with each sentence on a line of its own."""
  return "\n".join(_SENTENCE_END.split(text.strip()))


def measure(generated: Sequence[str], references: Sequence[str]) -> Rouge:
  """Compares generated texts with their references.

  Raises:
    RougeError: no texts, as many generations as references are needed, or a reference without a word.
  """
  if not references or len(generated) != len(references):
    raise RougeError(f"{len(generated)} generations for {len(references)} references: at least one of each, and as many"
                     " of one as of the other, are needed")
  for place, reference in enumerate(references):
    if not _WORD.search(reference.lower()):
      raise RougeError(f"reference {place} ({reference!r}) has no word (Latin letters or digits), so that ROUGE is not"
                       " defined: leave the pair out")
  scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=False)
  rows = [scorer.score(sentences(reference), sentences(text))
          for text, reference in zip(generated, references, strict=True)]
  empty = sum(not _WORD.search(text.lower()) for text in generated)
  return Rouge(np.array([[row[kind].fmeasure for kind in KINDS] for row in rows], np.float64), empty)
