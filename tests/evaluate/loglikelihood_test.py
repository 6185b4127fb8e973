"""Log-likelihoods of tokens against float64 numpy, whatever the batches they run in."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.evaluate import loglikelihood
from tests import tiny

LENGTHS = [(1, 1), (5, 3), (3, 5), (14, 3), (20, 4), (23, 1), (2, 14), (9, 9), (40, 7)]  # of context, continuation


@functools.cache
def pairs() -> list[tuple[list[int], list[int]]]:
  rng = np.random.default_rng(5)
  drawn = [rng.integers(0, tiny.CONFIG.vocab_size, a + b).tolist() for a, b in LENGTHS]
  found = [(tokens[:a], tokens[a:]) for tokens, (a, _) in zip(drawn, LENGTHS, strict=True)]
  best = int(oracle(found[1][0], [0])[0].argmax())
  return found + [(found[1][0], [best]), (found[1][0], [best + 1])]  # one row, two choices of one token


def oracle(context: list[int], continuation: list[int]) -> np.ndarray:
  """Log-probabilities `[n, V]` of the token at each place of the continuation."""
  logits, _ = tiny.forward(np.array([context + continuation]))
  return np.log(tiny.softmax(logits[0]))[len(context) - 1 : -1]


def request(context: list[int], continuation: list[int]) -> loglikelihood.Request:
  row = tuple(context + continuation)[:-1]
  return loglikelihood.Request((row,), len(row) - len(continuation), tuple(continuation))


def run(asked: list[loglikelihood.Request], **options) -> list[tuple[float, bool]]:
  return loglikelihood.loglikelihoods(tiny.functions(), tiny.model().top, list(tiny.model().blocks), asked, fill=(7,),
                                      batch=lambda arrays: jnp.asarray(arrays[0]), **options)


def test_sums_and_greediness_equal_numpy():
  found = run([request(*pair) for pair in pairs()])
  for (context, continuation), (nats, greedy) in zip(pairs(), found, strict=True):
    log = oracle(context, continuation)
    assert nats == pytest.approx(log[np.arange(len(log)), continuation].sum(), rel=1e-5, abs=1e-4)
    assert greedy == bool((log.argmax(-1) == continuation).all())
  assert [greedy for _, greedy in found][-2:] == [True, False]


def test_neither_order_nor_company_changes_a_result():
  asked = [request(*pair) for pair in pairs()]
  whole = run(asked)
  order = np.random.default_rng(0).permutation(len(asked))
  shuffled = run([asked[i] for i in order])
  for place, index in enumerate(order):
    assert shuffled[place][0] == pytest.approx(whole[index][0], abs=1e-4)
  assert run(asked[3:4])[0][0] == pytest.approx(whole[3][0], abs=1e-4)
  assert run([]) == []


def test_the_rows_of_a_large_class_run_in_several_batches(monkeypatch: pytest.MonkeyPatch):
  asked = [request(*pair) for pair in pairs()]
  whole, seen = run(asked), []
  monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 16)
  monkeypatch.setattr(loglikelihood, "HEAD_TOKENS", 4)
  split = run(asked, advance=lambda steps: seen.append(steps))
  assert [nats for nats, _ in split] == pytest.approx([nats for nats, _ in whole], abs=1e-4)
  assert sum(seen) == len({r.row for r in asked}) and len(seen) > 5


def test_logits_of_all_places():
  tokens = tiny.tokens(1)[0]
  got = loglikelihood.logits(tiny.functions(), tiny.model().top, list(tiny.model().blocks), jnp.asarray(tokens))
  np.testing.assert_allclose(got, tiny.forward(tokens)[0], atol=1e-4)


@given(st.integers(1, 5000))
def test_a_size_class_holds_its_sizes_with_little_filling(size: int):
  found = loglikelihood.size_class(size)
  assert found >= size and loglikelihood.size_class(found) == found
  assert found <= 16 or found < 1.5 * size


def test_there_are_few_size_classes():
  assert len({loglikelihood.size_class(size) for size in range(1, 4097)}) == 17


def test_batches_cover_all_rows_and_stay_small():
  rng = np.random.default_rng(0)
  rows = [((1,) * int(n),) for n in rng.integers(1, 300, 200)]
  seen = []
  for members, sizes, count in loglikelihood._batches(rows):
    assert len(members) <= count < 2 * len(members) or count == 1
    assert count * sum(sizes) <= max(loglikelihood.BATCH_TOKENS, sum(sizes))
    assert all(len(rows[m][0]) <= sizes[0] for m in members)
    seen += members
  assert sorted(seen) == list(range(200))
