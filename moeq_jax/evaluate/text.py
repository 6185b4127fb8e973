"""Log-likelihoods of texts from those of tokens: where a context ends, where a window begins, where an answer stops.

The conventions are those of lm-evaluation-harness 0.4.13, so that the same rows give the same numbers there:

- spaces at the end of a context belong to the continuation, because tokenizers join a space to the word after it;
- context and continuation are tokenized together, and what stands after the context's own tokens is the continuation
  (an encoder-decoder gets two texts, tokenized apart);
- an empty context is one prefix token, the beginning or the end of text;
- a text longer than the model's context is cut into windows in which every token is predicted once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

Tokens = list[int]
Pair = tuple[Tokens, Tokens]


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A model as it scores texts.

  Attributes:
    encode: `(text, special) -> token ids`; `special`: with the tokens that the tokenizer puts around a text.
    loglikelihoods: `[(context, continuation)] -> [(nats, greedy)]`: sum of log-probabilities of the continuation's
      tokens, and whether each of them was the likeliest.
    prefix: gives the token that stands for an empty context; called only where one does.
    length: most tokens that the model sees at once.
    joint: one sequence holds context and continuation (decoders); else they are the inputs and the targets.
  """

  encode: Callable[[str, bool], Tokens]
  loglikelihoods: Callable[[Sequence[Pair]], list[tuple[float, bool]]]
  prefix: Callable[[], int]
  length: int
  joint: bool = True


def encode_pair(scorer: Scorer, context: str, continuation: str) -> Pair:
  """The tokens of a context and of its continuation.

  Raises:
    ValueError: the continuation adds no token.
  """
  bare = context.rstrip()
  continuation = context[len(bare) :] + continuation
  if not bare:
    tokens = scorer.encode(continuation, False)
    prefix = scorer.prefix()
    pair = (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
  elif scorer.joint:
    before = scorer.encode(bare, True)
    pair = before, scorer.encode(bare + continuation, True)[len(before) :]
  else:
    pair = scorer.encode(bare, True), scorer.encode(continuation, False)
  if not pair[1]:
    raise ValueError(f"the continuation {continuation!r} of {context[-40:]!r} adds no token: nothing can be scored")
  return pair


def loglikelihoods(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
  """`[(nats, greedy)]` of each `(context, continuation)`."""
  return scorer.loglikelihoods([encode_pair(scorer, *pair) for pair in pairs])


def windows(tokens: Tokens, prefix: int, length: int) -> Iterator[Pair]:
  """Cuts a text into pairs to be scored, so that each token is predicted once with as much context as there is.

  The first window predicts up to `length` tokens after the prefix; each further one predicts the next `length`, and the
  last one, which has fewer left, takes the tokens before them as context.
  """
  for start in range(0, len(tokens), length):
    stop = min(start + length, len(tokens))
    first = max(stop - length - 1, 0) if start else 0
    yield (tokens[first:start] if start else [prefix]), tokens[start:stop]


def rolling(scorer: Scorer, texts: Sequence[str]) -> list[float]:
  """The log-likelihood of each text as a whole, in nats."""
  cut = [list(windows(scorer.encode(text, True), scorer.prefix(), scorer.length)) for text in texts]
  found = iter(scorer.loglikelihoods([pair for pairs in cut for pair in pairs]))
  return [sum(next(found)[0] for _ in pairs) for pairs in cut]


def until(text: str, stops: Sequence[str]) -> str:
  """What stands before the first of the stop strings."""
  return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]
