"""Texts as pairs of tokens, against a bigram model over words whose log-likelihoods are sums that anyone can do."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.evaluate import text
from tests.evaluate import toy


def test_context_and_continuation_are_the_tokens_of_the_whole():
  scorer = toy.scorer()
  context, continuation = text.encode_pair(scorer, "the cat", " sat down")
  assert toy.decode(context) == "the cat" and toy.decode(continuation) == " sat down"


@pytest.mark.parametrize("spaces", [" ", "  ", "\n", " \t "])
def test_spaces_at_the_end_of_the_context_move_to_the_continuation(spaces: str):
  scorer = toy.scorer()
  pair = text.encode_pair(scorer, "the cat" + spaces, "sat")
  assert pair == text.encode_pair(scorer, "the cat", spaces + "sat")
  assert toy.decode(pair[0]) == "the cat" and toy.decode(pair[1]) == spaces + "sat"


def test_tokens_that_cross_the_boundary_count_where_they_end():
  """`un` + `do` is one token `undo`: the context keeps as many tokens as it has alone."""
  whole = {"un": [1], "undo it": [2, 3]}
  scorer = dataclasses.replace(toy.scorer(), encode=lambda part, special: whole[part])
  assert text.encode_pair(scorer, "un", "do it") == ([1], [3])


@pytest.mark.parametrize("context", ["", " ", "\n "])
def test_an_empty_context_is_the_prefix(context: str):
  scorer = toy.scorer()
  pair = text.encode_pair(scorer, context, "the cat")
  assert pair == ([toy.PREFIX], scorer.encode(context + "the cat", False))
  assert text.encode_pair(scorer, "", toy.decode([toy.PREFIX, 5])) == ([toy.PREFIX], [5])


def test_an_encoder_decoder_gets_two_texts_tokenized_apart():
  scorer = dataclasses.replace(toy.scorer(), joint=False, encode=lambda part, special: [len(part), *[9] * special])
  assert text.encode_pair(scorer, "inputs ", "targets") == ([6, 9], [8])


def test_a_continuation_without_tokens_is_refused():
  with pytest.raises(ValueError, match="adds no token"):
    text.encode_pair(toy.scorer(), "the cat", "")


def test_loglikelihoods_are_sums_over_the_continuation():
  scorer, tokens = toy.scorer(), toy.encode("the cat sat on")
  (nats, greedy), = text.loglikelihoods(scorer, [("the cat", " sat on")])
  expected = sum(toy.TABLE[a, b] for a, b in zip(tokens[1:-1], tokens[2:]))
  assert nats == pytest.approx(expected) and not greedy


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 20))
def test_windows_predict_every_token_once_with_all_the_context_that_fits(tokens: list[int], length: int):
  found = list(text.windows(tokens, 99, length))
  assert [token for _, predicted in found for token in predicted] == tokens
  seen = 0
  for context, predicted in found:
    assert context == ([99, *tokens][: seen + 1])[-len(context) :] and context
    assert len(context) + len(predicted) <= length + 1
    assert len(context) + len(predicted) == min(length, len(tokens)) + 1  # as much context as there is room for
    seen += len(predicted)


def test_a_long_text_is_the_sum_of_its_windows():
  """A bigram model needs one token of context, which every window has."""
  words = " ".join(["the", "cat", "sat", "on", "it"] * 7)
  tokens = toy.encode(words)
  whole = sum(toy.TABLE[a, b] for a, b in zip([toy.PREFIX, *tokens[:-1]], tokens))
  for length in (1, 3, 10, 100):
    scorer = dataclasses.replace(toy.scorer(), length=length)
    assert text.rolling(scorer, [words, "", "the"]) == pytest.approx([whole, 0.0, toy.TABLE[toy.PREFIX, tokens[0]]])


def test_nothing_of_a_stop_string_is_kept():
  assert text.until("one. two\nthree", ["\n", ". "]) == "one"
  assert text.until("one", ["\n"]) == "one" and text.until("one", []) == "one"
  assert text.until("one", [""]) == "one" and text.until("\none", ["\n"]) == ""


def test_the_table_of_the_toy_is_a_distribution():
  assert np.exp(toy.TABLE).sum(1) == pytest.approx(np.ones(len(toy.TABLE)))
  assert math.isfinite(toy.TABLE.sum())
