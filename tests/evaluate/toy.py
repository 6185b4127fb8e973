"""A bigram model over words: log-likelihoods that anyone can add up."""

import re
from collections.abc import Sequence

import numpy as np

from moeq_jax.evaluate import text

PREFIX = 0
WORDS: list[str] = ["<s>"]  # grows as words are seen; a word has the space before it
_RNG = np.random.default_rng(0)
_LOGITS = _RNG.normal(0, 2, (512, 512))
TABLE = _LOGITS - np.log(np.exp(_LOGITS).sum(1, keepdims=True))
TABLE = TABLE.astype(np.float64)


def encode(part: str) -> list[int]:
  """One token for each word with the blanks before it."""
  tokens = []
  for word in re.findall(r"<s>|\s*[^\s<]+|\s+", part):
    if word not in WORDS:
      WORDS.append(word)
    tokens.append(WORDS.index(word))
  return tokens


def decode(tokens: Sequence[int]) -> str:
  while max(tokens, default=0) >= len(WORDS):
    WORDS.append(f" w{len(WORDS)}")
  return "".join(WORDS[token] for token in tokens)


def loglikelihoods(pairs: Sequence[text.Pair]) -> list[tuple[float, bool]]:
  """Of each continuation, by the table."""
  found = []
  for context, continuation in pairs:
    before = [*context, *continuation][len(context) - 1 : -1]
    nats = sum(float(TABLE[a, b]) for a, b in zip(before, continuation, strict=True))
    found.append((nats, all(int(TABLE[a].argmax()) == b for a, b in zip(before, continuation, strict=True))))
  return found


def scorer(length: int = 1000) -> text.Scorer:
  return text.Scorer(lambda part, special: encode(part), loglikelihoods, lambda: PREFIX, length)
