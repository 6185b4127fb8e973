"""Span corruption: the text can be put together again, lengths follow from the text's length, and draws are uniform."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax import span_corruption
from moeq_jax.span_corruption import SpanError

FIRST = 999


def corrupt(tokens, seed: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
  options = {"sentinel_first": FIRST} | options
  return span_corruption.span_corruption(np.asarray(tokens), rng=np.random.default_rng(seed), **options)


def is_sentinel(token: int) -> bool:
  return token > 500


def spans_of(targets: np.ndarray) -> dict[int, list[int]]:
  """What stands after each sentinel."""
  spans: dict[int, list[int]] = {}
  for token in targets.tolist():
    if is_sentinel(token):
      assert token not in spans
      spans[token] = current = []
    else:
      current.append(token)
  return spans


def rebuilt(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
  spans = spans_of(targets)
  return [t for token in inputs.tolist() for t in (spans[token] if is_sentinel(token) else [token])]


@given(st.lists(st.integers(0, 500), min_size=2, max_size=120), st.floats(0.01, 0.99), st.floats(1, 12),
       st.integers(0, 99))
def test_inputs_and_targets_hold_the_text(tokens: list[int], density: float, mean: float, seed: int):
  inputs, targets = corrupt(tokens, seed, density=density, mean=mean)
  assert inputs.dtype == targets.dtype == np.int32
  assert rebuilt(inputs, targets) == tokens
  *spans, last = spans_of(targets).items()
  assert [sentinel for sentinel, _ in spans] == [token for token in inputs if is_sentinel(token)]
  assert [sentinel for sentinel, _ in [*spans, last]] == [FIRST - i for i in range(len(spans) + 1)]
  assert all(span for _, span in spans) and last[1] == []
  places = [place for place, token in enumerate(inputs) if is_sentinel(token)]
  assert all(np.diff(places) > 1)  # spans do not touch
  assert 1 <= sum(len(span) for _, span in spans) <= len(tokens) - 1


@given(st.lists(st.integers(0, 500), min_size=8, max_size=120), st.floats(0.05, 0.4), st.floats(2, 12))
def test_the_end_of_a_text_is_one_span_and_targets_are_as_long(tokens: list[int], density: float, mean: float):
  inputs, targets = span_corruption.ending(np.asarray(tokens), sentinel_first=FIRST, density=density, mean=mean)
  assert rebuilt(inputs, targets) == tokens
  assert list(spans_of(targets)) == [FIRST, FIRST - 1] and inputs[-1] == FIRST and sum(map(is_sentinel, inputs)) == 1
  assert len(targets) == len(corrupt(tokens, density=density, mean=mean)[1])


def test_an_end_that_would_be_the_whole_text_is_named():
  with pytest.raises(SpanError, match="whole text of 4 tokens"):
    span_corruption.ending(np.arange(4), sentinel_first=FIRST, density=0.9, mean=1.0)


@given(st.lists(st.integers(0, 500), min_size=8, max_size=120), st.floats(0.05, 0.4), st.floats(2, 12),
       st.integers(0, 99))
def test_a_repetition_repeats_what_follows_its_mark_and_is_as_long(tokens: list[int], density: float, mean: float,
                                                                   seed: int):
  inputs, targets = span_corruption.repetition(np.asarray(tokens), sentinel_first=FIRST, density=density, mean=mean,
                                               rng=np.random.default_rng(seed))
  others = corrupt(tokens, seed, density=density, mean=mean)
  assert [inputs.shape, targets.shape] == [side.shape for side in others]
  (place,) = np.flatnonzero(inputs > 500)
  np.testing.assert_array_equal(inputs[place:place + len(targets)], targets)
  assert np.delete(inputs, place).tolist() == tokens[:len(inputs) - 1]
  assert not np.isin(targets[0], np.concatenate(others))  # a mark that stands for no span


def test_a_repetition_may_begin_anywhere_and_is_never_longer_than_its_text():
  rng = np.random.default_rng(0)
  repeat = lambda density: span_corruption.repetition(np.arange(12), sentinel_first=FIRST, density=density, rng=rng)
  assert {repeat(0.25)[1][1] for _ in range(99)} == set(range(6))  # 4 of the 9 tokens of the inputs
  with pytest.raises(SpanError, match="8 targets are to repeat 7 tokens.*smaller density"):
    repeat(0.5)


def test_as_many_tokens_and_spans_as_asked_for():
  inputs, targets = corrupt(np.arange(400) % 400)
  assert len(spans_of(targets)) == 20 + 1
  assert (len(inputs), len(targets)) == (400 - 60 + 20, 60 + 20 + 1)
  inputs, targets = corrupt(np.arange(400), density=0.5, mean=10.0)
  assert (len(inputs), len(targets)) == (200 + 20, 200 + 20 + 1)


def test_lengths_depend_on_the_length_alone_and_draws_on_the_generator():
  both = [corrupt(np.arange(300), seed) for seed in (0, 0, 1)]
  assert len({(len(inputs), len(targets)) for inputs, targets in both}) == 1
  np.testing.assert_array_equal(both[0][0], both[1][0])
  assert not np.array_equal(both[0][0], both[2][0])


def test_every_way_to_place_the_spans_is_as_likely():
  """3 of 6 tokens in 2 spans: 1+2 or 2+1, with 1 to 3 tokens of text between them."""
  rng, found = np.random.default_rng(0), collections.Counter()
  for _ in range(6000):
    inputs, _ = span_corruption.span_corruption(np.arange(6), sentinel_first=FIRST, density=0.5, mean=1.5, rng=rng)
    found[tuple(inputs.tolist())] += 1
  assert len(found) == 2 * 6
  expected = 6000 / len(found)
  assert sum((count - expected) ** 2 / expected for count in found.values()) < 31.3  # chi-square, 11 degrees: 0.1%


def test_the_shortest_text():
  outcomes = {tuple(map(tuple, corrupt([7, 8], seed))) for seed in range(30)}
  assert outcomes == {((FIRST, 8), (FIRST, 7, FIRST - 1)), ((7, FIRST), (FIRST, 8, FIRST - 1))}


def test_sentinels_may_begin_right_above_the_text():
  inputs, targets = corrupt(np.arange(900), sentinel_first=945)  # 46 of them, down to 900
  assert sorted({*inputs.tolist(), *targets.tolist()}) == list(range(946))
  with pytest.raises(SpanError, match="46 sentinels from 944 down"):
    corrupt(np.arange(900), sentinel_first=944)


@pytest.mark.parametrize(("tokens", "options", "said"), [
    ([5], {}, "at least 2 tokens"),
    ([[1, 2], [3, 4]], {}, r"shape \[2, 2\]"),
    ([1, 2, 998], {}, "2 sentinels from 999 down.*take shorter texts"),
    ([1, -100, 3], {}, "from -100 to 3"),
    ([1, 2, 3], {"sentinel_first": 0}, "would be a sentinel"),
    ([1, 2, 3], {"density": 0.0}, "density=0.0"),
    ([1, 2, 3], {"density": 1.0}, "density=1.0"),
    ([1, 2, 3], {"mean": 0.5}, "mean=0.5"),
    ([1, 2, 3], {"mean": float("nan")}, "mean=nan"),
])
def test_what_cannot_be_corrupted_is_named(tokens, options: dict, said: str):
  with pytest.raises(SpanError, match=said):
    corrupt(tokens, **options)


@pytest.mark.parametrize(("tokens", "reserved", "first"), [
    (range(20), (), 99), ([99, *range(19)], (), 98), ([97, *range(19)], (), 96), ([*range(19), 60], (99, 97, 61), 96)])
def test_unused_sentinels_are_the_largest_free_run(tokens, reserved, first: int):
  tokens = np.array([*tokens])
  found = span_corruption.unused_sentinel(tokens, 100, reserved=reserved, density=0.3)
  assert found == first
  inputs, targets = span_corruption.span_corruption(tokens, sentinel_first=found, density=0.3,
                                                    rng=np.random.default_rng(0))
  assert not set(range(found - 2, found + 1)) & {*tokens.tolist(), *reserved}  # two spans, three sentinels
  assert inputs.max() < 100 and targets[0] == found


def test_a_text_that_uses_every_id_is_refused():
  with pytest.raises(SpanError, match=r"no 3 neighbouring ids of 20 unused.*take shorter texts"):
    span_corruption.unused_sentinel(np.arange(20), 20, density=0.3)
