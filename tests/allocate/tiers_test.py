"""The paper's tier rule: every table and edge of its description, and properties of the re-ranking."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax.allocate import tiers

# Average, then (n_low, n_mid, n_high) of the official code for 8 and 64 experts at 3, 2 and 1 bits, then of the paper's
# text where it says something else.
THREE_LEVELS = [
    (1.25, (6, 2, 0), (48, 16, 0), None, None),
    (1.5, (4, 4, 0), (32, 32, 0), None, None),
    (1.625, (3, 5, 0), (24, 40, 0), None, None),
    (1.75, (4, 2, 2), (32, 16, 16), (3, 4, 1), (26, 28, 10)),
    (1.875, (3, 3, 2), (26, 20, 18), None, (24, 24, 16)),
    (2.0, (2, 4, 2), (21, 22, 21), None, None),
    (2.125, (2, 3, 3), (18, 20, 26), None, None),
    (2.25, (2, 2, 4), (16, 16, 32), None, None),
    (2.375, (2, 1, 5), (20, 0, 44), None, None),
    (2.5, (2, 0, 6), (16, 0, 48), None, None),
    (2.625, (1, 1, 6), (12, 0, 52), None, None),
    (2.75, (1, 0, 7), (8, 0, 56), None, None),
    (2.875, (0, 1, 7), (4, 0, 60), None, None),
]


def violated(order, maxvar, zeta: float, at_least: bool) -> bool:
  """Whether some expert stands below one that it has to pass."""
  ranked = np.asarray(maxvar)[order]
  above, below = ranked[:, None], ranked[None]
  passes = ((below >= zeta * above) & (below > above)) if at_least else below > zeta * above
  return bool(np.triu(passes, 1).any())


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average, code_8, code_64, paper_8, paper_64", THREE_LEVELS)
def test_three_levels(average, code_8, code_64, paper_8, paper_64):
  assert tiers.counts_three(8, average, 1, 2, 3, variant="code") == code_8
  assert tiers.counts_three(64, average, 1, 2, 3, variant="code") == code_64
  assert tiers.counts_three(8, average, 1, 2, 3) == (paper_8 or code_8)
  assert tiers.counts_three(64, average, 1, 2, 3) == (paper_64 or code_64)


def test_the_code_breaks_the_text_s_condition_where_the_table_says_so():
  """No more low than middle experts in the middle region; its borders are 1.667 and 2.333 bits."""
  middle = [row for row in THREE_LEVELS if 5 / 3 <= row[0] <= 7 / 3]
  broken = {(average, k) for average, code_8, code_64, *_ in middle for k, n in ((8, code_8), (64, code_64))
            if n[0] > n[1]}
  assert broken == {(1.75, 8), (1.75, 64), (1.875, 64)}
  for average, *_ in middle:
    for k in (8, 64):
      lows, mids, highs = tiers.counts_three(k, average, 1, 2, 3)
      assert lows <= mids
      assert lows + 1 > mids - 2 or highs + 1 > k  # one more pair would break it


def test_the_code_s_counts_explain_the_published_seconds():
  """The paper's inference times (digitised, +-1 s) follow the number of 3-bit experts in these counts: their speed is
  that of unpacking 3-bit codes."""
  seconds = dict(zip((1.5, 1.625, 1.75, 1.875, 2.0, 2.125, 2.25, 2.375, 2.5),
                     (312, 310, 348, 346, 346, 361, 384, 401, 414), strict=True))
  high = {average: tiers.counts_three(8, average, 1, 2, 3, variant="code")[2] for average in seconds}
  assert list(high.values()) == [0, 0, 2, 2, 2, 3, 4, 5, 6]
  residuals = {average: seconds[average] - (310.5 + 18.0 * high[average]) for average in seconds}
  assert max(map(abs, residuals.values())) < 5
  slope, start = np.polyfit(list(high.values()), list(seconds.values()), 1)
  assert (slope, start) == (pytest.approx(18.0, abs=0.6), pytest.approx(310.5, abs=2))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16, 60, 64])
@pytest.mark.parametrize("low, mid, high", [(1, 2, 3), (2, 3, 4), (2, 4, 6)])
def test_three_levels_are_what_the_paper_s_text_asks_for(k, low, mid, high):
  """Of all counts with the average, the one that is best by the text's words."""
  step = mid - low
  for total in range(2 * k + 1):
    average = low + step * total / k
    options = [(k - m - h, m, h) for h in range(k + 1) for m in range(k - h + 1) if m + 2 * h == total]
    if 3 * total > 4 * k:
      expected = max(options, key=lambda n: n[2])
    elif 3 * total < 2 * k:
      expected = min(options, key=lambda n: n[0])
    else:
      expected = max((n for n in options if n[0] <= n[1]), key=lambda n: n[2])
    if 3 * total not in (2 * k, 4 * k):  # on a border between regions, a rounded average may fall to either side
      assert tiers.counts_three(k, average, low, mid, high) == expected


def test_the_middle_region_holds_its_borders():
  assert tiers.counts_three(6, 5.0, 1, 4, 7) == tiers.counts_three(6, 5.0, 1, 4, 7, variant="code") == (1, 2, 3)
  assert tiers.counts_three(6, 3.0, 1, 4, 7) == (2, 4, 0)
  assert tiers.counts_three(6, 3.0, 1, 4, 7, variant="code") == (3, 2, 1)


@pytest.mark.parametrize("k", [8, 16, 64])
def test_the_average_is_met_where_it_can_be(k):
  for total in range(2 * k + 1):
    average = 1 + total / k
    for variant in ("paper", "code"):
      counts = tiers.counts_three(k, average, 1, 2, 3, variant=variant)
      assert min(counts) >= 0 and sum(counts) == k
      assert np.dot(counts, (1, 2, 3)) == average * k
    if total <= k:
      counts = tiers.counts_two(k, average, 1, 2)
      assert sum(counts) == k and np.dot(counts, (1, 2)) == average * k


@pytest.mark.parametrize("share, high", [
    (0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (0.51, 1), (2.49, 2), (0.0, 0), (8.0, 8)])
def test_half_an_expert_is_rounded_to_even(share, high):
  assert tiers.counts_two(8, 1 + share / 8, 1, 2) == (8 - high, high)


@pytest.mark.parametrize("average, counts", [
    (2.0625, (8, 0)), (2.1875, (6, 2)), (2.3125, (6, 2)), (2.4375, (4, 4)), (2.5625, (4, 4)), (2.6875, (2, 6)),
    (2.8125, (2, 6)), (2.9375, (0, 8)), (2.07, (7, 1)), (2.19, (6, 2)), (2.18, (7, 1)), (2.0, (8, 0)), (3.0, (0, 8))])
def test_golden_two_levels_of_eight_experts(average, counts):
  """Halves go to the even number of experts: 0.5 to 0, 1.5 and 2.5 to 2, 3.5 and 4.5 to 4."""
  assert tiers.counts_two(8, average, 2, 3) == counts


@pytest.mark.parametrize("average", [2.25, 2.5, 2.75])
def test_two_levels_of_mixtral(average):
  assert tiers.counts_two(8, average, 2, 3) == (8 - int(8 * (average - 2)), int(8 * (average - 2)))
  assert tiers.counts_two(64, average, 1, 3) == (64 - int(32 * (average - 1)), int(32 * (average - 1)))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_three_levels_must_be_equally_spaced(variant):
  with pytest.raises(ValueError, match="equally spaced"):
    tiers.counts_three(8, 2.5, 1, 2, 4, variant=variant)


def test_impossible_counts_are_refused():
  with pytest.raises(ValueError, match=r"3.5 bits is out of the possible range \[1, 3\]"):
    tiers.counts_two(8, 3.5, 1, 3)
  with pytest.raises(ValueError, match=r"0.5 bits is out of the possible range \[1, 3\]"):
    tiers.counts_three(8, 0.5, 1, 2, 3)
  with pytest.raises(ValueError, match="ascending"):
    tiers.counts_two(8, 2.5, 3, 2)
  with pytest.raises(ValueError, match="at least one expert"):
    tiers.counts_two(0, 2.5, 2, 3)
  with pytest.raises(ValueError, match="'paper' or 'code'"):
    tiers.counts_three(8, 2.5, 1, 2, 3, variant="text")


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def test_small_scores_come_first_and_ties_keep_their_order():
  score = np.array([[3.0, 1.0, 2.0, 1.0], [0.0, -1.0, 5.0, 5.0]])
  np.testing.assert_array_equal(tiers.order(score), [[1, 3, 2, 0], [1, 0, 2, 3]])
  np.testing.assert_array_equal(tiers.order(score, descending=True), [[0, 2, 1, 3], [2, 3, 0, 1]])


def test_scores_must_be_finite():
  with pytest.raises(ValueError, match=r"expert \(1, 2\)"):
    tiers.order(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, np.nan]]))


def test_outliers_come_to_the_top_in_the_code_reversed():
  maxvar = np.array([1, 1, 1, 1, 1, 1, 10, 10])
  assert tiers.rerank(np.arange(8), maxvar, variant="code").tolist() == [7, 6, 0, 1, 2, 3, 4, 5]
  assert tiers.rerank(np.arange(8), maxvar).tolist() == [6, 7, 0, 1, 2, 3, 4, 5]


def test_an_outlier_stops_below_experts_that_it_does_not_pass():
  maxvar = np.array([4.0, 1.0, 4.0, 9.0, 1.0])
  for variant in ("paper", "code"):
    assert tiers.rerank([0, 1, 2, 3, 4], maxvar, variant=variant).tolist()[0] == 0
    assert tiers.rerank([0, 1, 2, 3, 4], maxvar, zeta=2, variant=variant).tolist()[0] == 3
  assert tiers.rerank([0, 1, 2, 3, 4], maxvar).tolist() == [0, 2, 3, 1, 4]
  assert tiers.rerank([0, 1, 2, 3, 4], maxvar, variant="code").tolist() == [0, 3, 2, 1, 4]


def test_exactly_zeta_times_is_enough_in_the_paper_and_not_in_the_code():
  assert tiers.rerank([0, 1], [1.0, 3.0]).tolist() == [1, 0]
  assert tiers.rerank([0, 1], [1.0, 3.0], variant="code").tolist() == [0, 1]
  assert tiers.rerank([0, 1], [1.0, 3.01], variant="code").tolist() == [1, 0]


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_zero_variance_passes_nothing_and_is_passed_by_any_other(variant):
  assert tiers.rerank([2, 0, 1], np.zeros(3), variant=variant).tolist() == [2, 0, 1]
  assert tiers.rerank([2, 0, 1], [0.0, 1e-9, 0.0], variant=variant).tolist() == [1, 2, 0]
  assert tiers.rerank([1, 0], [0.0, 5.0], variant=variant).tolist() == [1, 0]


@hypothesis.given(st.integers(0, 2**32), st.integers(2, 5), st.sampled_from([8, 16, 64]))
def test_several_outliers_of_one_size_are_reversed_in_the_code_and_kept_in_order_in_the_paper(seed, outliers, k):
  random = np.random.default_rng(seed)
  order = random.permutation(k)
  maxvar = np.full(k, 1.0)
  promoted = np.sort(random.choice(np.arange(1, k), outliers, replace=False))
  maxvar[order[promoted]] = 10.0
  rest = [e for e in order.tolist() if maxvar[e] == 1]
  head = order[promoted].tolist()
  assert tiers.rerank(order, maxvar).tolist() == head + rest
  assert tiers.rerank(order, maxvar, variant="code").tolist() == head[::-1] + rest


@pytest.mark.parametrize("order, maxvar, paper, code", [
    # two sizes of outliers: the larger one passes the smaller by a factor of at least zeta, too
    ([0, 1, 2, 3], [1, 1, 3.5, 12.0], [3, 2, 0, 1], [3, 2, 0, 1]),
    # not by that factor: each goes above the small ones only, and the code leaves them reversed
    ([0, 1, 2, 3], [1, 1, 5.0, 12.0], [2, 3, 0, 1], [3, 2, 0, 1]),
    ([0, 1, 2, 3], [1, 1, 12.0, 5.0], [2, 3, 0, 1], [3, 2, 0, 1]),
    # exactly zeta times: in the paper "at least", in the code more
    ([0, 1, 2, 3], [2, 2, 6.0, 1.0], [2, 0, 1, 3], [0, 1, 2, 3]),
    # an outlier that stands on top already stays
    ([2, 0, 1, 3], [1, 1, 9.0, 9.0], [2, 3, 0, 1], [2, 3, 0, 1]),
    # chains: 9 passes 3 and 1, 3 passes 1 but not 2
    ([0, 1, 2, 3], [1, 2, 3.0, 9.0], [3, 2, 0, 1], [3, 0, 1, 2]),
    # another order of the router than that of the numbers
    ([3, 1, 0, 2], [8, 1, 8.0, 1.0], [0, 2, 3, 1], [2, 0, 3, 1]),
])
def test_golden_orders(order, maxvar, paper, code):
  assert tiers.rerank(order, maxvar).tolist() == paper
  assert tiers.rerank(order, maxvar, variant="code").tolist() == code


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.integers(0, 2**32), st.sampled_from([4, 8, 16]), st.sampled_from([1.5, 3.0]),
                  st.sampled_from(["paper", "code"]), st.booleans())
def test_one_pass_leaves_no_violated_pair_and_repeating_it_changes_nothing(seed, k, zeta, variant, whole):
  random = np.random.default_rng(seed)
  order = random.permutation(k)
  maxvar = random.integers(0, 12, k).astype(float) if whole else np.exp(random.normal(0, 1, k))
  ranked = tiers.rerank(order, maxvar, zeta, variant)
  assert sorted(ranked.tolist()) == list(range(k))
  assert not violated(ranked, maxvar, zeta, at_least=variant == "paper")
  np.testing.assert_array_equal(tiers.rerank(ranked, maxvar, zeta, variant), ranked)
  if not violated(order, maxvar, zeta, at_least=variant == "paper"):
    np.testing.assert_array_equal(ranked, order)


@hypothesis.given(st.integers(0, 2**32))
def test_the_paper_s_re_ranking_is_its_text_repeated_until_stable(seed):
  """While some expert has to pass a higher one, the first such expert is moved above the first that it has to pass."""
  random = np.random.default_rng(seed)
  order, maxvar = random.permutation(8), np.exp(random.normal(0, 1, 8))
  ranked = order.tolist()
  while moves := [(below, above) for below in range(8) for above in range(below)
                  if maxvar[ranked[below]] >= 3 * maxvar[ranked[above]]]:
    below, above = moves[0]
    ranked.insert(above, ranked.pop(below))
  assert tiers.rerank(order, maxvar).tolist() == ranked


def test_re_ranking_refuses_bad_input():
  with pytest.raises(ValueError, match="MaxVar of expert 1"):
    tiers.rerank([0, 1], [1.0, np.nan])
  with pytest.raises(ValueError, match="MaxVar of expert 0"):
    tiers.rerank([0, 1], [-1.0, 1.0])
  with pytest.raises(ValueError, match="zeta"):
    tiers.rerank([0, 1], [1.0, 1.0], zeta=0.5)
  with pytest.raises(ValueError, match="not a permutation"):
    tiers.rerank([0, 0], [1.0, 1.0])
  with pytest.raises(ValueError, match="'paper' or 'code'"):
    tiers.rerank([0, 1], [1.0, 1.0], variant="both")


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------


def test_the_top_of_each_order_gets_the_high_bits():
  orders = np.array([[2, 0, 3, 1], [1, 2, 3, 0]])
  expected = [[2, 1, 3, 1], [1, 3, 2, 1]]
  bits = tiers.assign(orders, (2, 1, 1), (1, 2, 3))
  np.testing.assert_array_equal(bits, expected)
  assert bits.dtype == np.int64
  np.testing.assert_array_equal(tiers.assign(orders, (1, 1, 2), (3, 2, 1)), expected)
  np.testing.assert_array_equal(tiers.assign(orders, (0, 4), (2, 4)), np.full((2, 4), 4))


def test_assignments_must_fit():
  orders = np.array([[2, 0, 1], [1, 2, 2]])
  with pytest.raises(ValueError, match="layer 1"):
    tiers.assign(orders, (1, 2), (1, 2))
  with pytest.raises(ValueError, match="sum to 4"):
    tiers.assign(orders[:1], (2, 2), (1, 2))
  with pytest.raises(ValueError, match="one count for each"):
    tiers.assign(orders[:1], (3,), (1, 2))
  with pytest.raises(ValueError, match="different levels"):
    tiers.assign(orders[:1], (1, 2), (2, 2))
