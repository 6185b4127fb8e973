"""Span corruption (T5, arXiv 1910.10683, section 3.1.4): plain text as inputs and targets of an encoder-decoder.

Spans of the text are taken out. In the inputs a sentinel stands for each span, every sentinel another one; the targets
hold the spans, each after its sentinel, and a last sentinel that ends them:

  text     thank you for inviting me to your party last week
  inputs   thank you <X> me to your party <Y> week
  targets  <X> for inviting <Y> last <Z>

The released T5 code leaves the last sentinel out and ends with the end-of-text token instead. No such token is added
here, to neither side.
"""

from collections.abc import Sequence

import numpy as np


class SpanError(ValueError):
  """A text cannot be corrupted: the message says why, and what helps."""


def span_corruption(tokens: np.ndarray, *, sentinel_first: int, density: float = 0.15, mean: float = 3.0,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Takes random spans out of a text.

  How many tokens and spans are taken out follows from the length of the text alone, so that texts of one length give
  inputs and targets of one length. Spans are not empty and do not touch; all ways to place them are equally likely.

  Args:
    tokens: `[n]` integers, the text, at least 2.
    sentinel_first: the sentinel of the first span, the largest id; those that follow count down from it.
    density: share of the tokens that is taken out, between 0 and 1 (exclusive).
    mean: mean length of a span in tokens, at least 1.
    rng: draws the spans.

  Returns:
    Inputs and targets, int32, of about `n (1 - density + density / mean)` and `n (density + density / mean)` tokens.

  Raises:
    SpanError: the text is too short, holds what would be a sentinel, or density or mean make no sense.
  """
  tokens = np.asarray(tokens)
  noise, spans = _counts(tokens, density, mean)
  sentinels = _sentinels(tokens, sentinel_first, spans)
  taken = _composition(noise, spans, rng)
  kept = _composition(len(tokens) - noise + 2, spans + 1, rng)
  kept[[0, -1]] -= 1  # text before the first and after the last span may be missing
  edges = np.cumsum(np.stack([kept[:-1], taken], axis=1).reshape(-1))
  *parts, rest = np.split(tokens, edges)
  alternate = lambda first, second: [part for pair in zip(first, second, strict=True) for part in pair]
  inputs = [*alternate(parts[::2], sentinels[:-1, None]), rest]
  targets = [*alternate(sentinels[:-1, None], parts[1::2]), sentinels[-1:]]
  return np.concatenate(inputs).astype(np.int32), np.concatenate(targets).astype(np.int32)


def ending(tokens: np.ndarray, *, sentinel_first: int, density: float = 0.15,
           mean: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
  """Takes the end of a text out as one span (the sequential denoiser of UL2, arXiv 2205.05131, section 3.1.2).

  The targets are a text that goes on, which cannot be written without reading what came before; short spans can be
  guessed from their neighbours in the targets.

  Args:
    tokens, sentinel_first: as for `span_corruption`.
    density, mean: the span is so long that the targets are as long as those of `span_corruption`.

  Returns:
    Inputs and targets, int32.

  Raises:
    SpanError: as for `span_corruption`, or a span that would be the whole text.
  """
  tokens = np.asarray(tokens)
  noise, spans = _counts(tokens, density, mean)
  taken = noise + spans - 1
  if taken >= len(tokens):
    raise SpanError(f"density={density}, mean={mean}: targets as long as those of {spans} spans are the whole text of"
                    f" {len(tokens)} tokens; take a smaller density")
  sentinels = _sentinels(tokens, sentinel_first, 1)
  inputs = [tokens[:-taken], sentinels[:1]]
  targets = [sentinels[:1], tokens[-taken:], sentinels[1:]]
  return np.concatenate(inputs).astype(np.int32), np.concatenate(targets).astype(np.int32)


def repetition(tokens: np.ndarray, *, sentinel_first: int, density: float = 0.15, mean: float = 3.0,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Takes nothing out: a sentinel stands at a random place of the inputs, and the targets repeat what follows it.

  A decoder that does not read its encoder can do no better here than a language model; one that does is right.

  Args:
    tokens, sentinel_first: as for `span_corruption`. The sentinel is the one after those that `span_corruption` of this
      text would use, and so says which of the two is asked for.
    density, mean: inputs and targets are as long as those of `span_corruption`.
    rng: draws the place.

  Returns:
    Inputs and targets, int32.

  Raises:
    SpanError: as for `span_corruption`, or targets that would be longer than the inputs.
  """
  tokens = np.asarray(tokens)
  noise, spans = _counts(tokens, density, mean)
  repeated, kept = noise + spans, len(tokens) - noise + spans - 1
  if repeated > kept:
    raise SpanError(f"density={density}, mean={mean}: {repeated} targets are to repeat {kept} tokens of input; take a"
                    " smaller density")
  mark = _sentinels(tokens, sentinel_first, spans + 1)[-1:]
  place = rng.integers(kept - repeated + 1)
  inputs = [tokens[:place], mark, tokens[place:kept]]
  return (np.concatenate(inputs).astype(np.int32),
          np.concatenate([mark, tokens[place:place + repeated]]).astype(np.int32))


def _sentinels(tokens: np.ndarray, first: int, spans: int) -> np.ndarray:
  """Those of `spans` spans and of the end; raises `SpanError` if the text holds one of them."""
  sentinels = first - np.arange(spans + 1)
  if tokens.min() < 0 or sentinels[-1] < 0 or np.isin(tokens, sentinels).any():
    raise SpanError(f"tokens from {tokens.min()} to {tokens.max()}, {spans + 1} sentinels from {first} down: a token of"
                    " the text would be a sentinel; take shorter texts, fewer spans or other sentinels")
  return sentinels


def unused_sentinel(tokens: np.ndarray, vocabulary: int, *, reserved: Sequence[int] = (), density: float = 0.15,
                    mean: float = 3.0) -> int:
  """The largest `sentinel_first` whose sentinels all lie in the vocabulary and do not occur in the text: for models
  whose vocabulary has no tokens made for that.

  Args:
    tokens: `[n]` integers, the text.
    vocabulary: number of token ids.
    reserved: ids that have another meaning, such as that of padding.
    density, mean: as for `span_corruption`.

  Raises:
    SpanError: the text leaves no such run of ids free.
  """
  tokens = np.asarray(tokens)
  wanted = _counts(tokens, density, mean)[1] + 1
  taken = np.unique([*tokens.tolist(), *reserved])
  edges = np.concatenate([[-1], taken, [vocabulary]])
  free = np.flatnonzero(np.diff(edges) > wanted)
  if not free.size:
    raise SpanError(f"a text of {len(tokens)} tokens leaves no {wanted} neighbouring ids of {vocabulary} unused, which"
                    " would stand for its spans; take shorter texts (config.length)")
  return int(edges[free[-1] + 1]) - 1


def _counts(tokens: np.ndarray, density: float, mean: float) -> tuple[int, int]:
  """How many tokens to take out, and in how many spans."""
  if not (0 < density < 1 and 1 <= mean < float("inf")):
    raise SpanError(f"density={density}, mean={mean}: a share between 0 and 1 and spans of at least 1 token are needed")
  if tokens.ndim != 1 or len(tokens) < 2:
    raise SpanError(f"tokens of shape {list(tokens.shape)}: one text of at least 2 tokens is needed")
  noise = min(max(round(len(tokens) * density), 1), len(tokens) - 1)
  return noise, max(1, min(round(noise / mean), noise, len(tokens) - noise + 1))


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """`[parts]` positive integers that sum to `total`, each way as likely as any other."""
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
  return np.diff(cuts, prepend=0, append=total)
