"""The threshold rule: shares that meet the average, shifts by traces, ranks, and never better than the knapsack."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moeq_jax.allocate import blocks, thresholds
from tests.allocate import blocks_test


@hypothesis.given(st.sampled_from([(1, 2), (2, 4), (1, 2, 3), (2, 3, 8), (1, 4, 8)]), st.floats(0, 1), st.floats(0, 1))
def test_shares_meet_the_average(widths, place: float, spread: float):
  average = widths[0] + place * (widths[-1] - widths[0])
  share = thresholds.shares(average, widths, spread)
  assert (share >= -1e-12).all() and share.sum() == pytest.approx(1)
  assert share @ widths == pytest.approx(average)
  if len(widths) == 3:
    assert 1 - share[1] >= spread - 1e-12


def test_a_known_split():
  np.testing.assert_allclose(thresholds.shares(2.5, (2, 3)), [0.5, 0.5])
  np.testing.assert_allclose(thresholds.shares(2.25, (1, 2, 3), 0.5), [0.125, 0.5, 0.375])
  np.testing.assert_allclose(thresholds.shares(2.9, (1, 2, 3), 0.5), [0, 0.1, 0.9], atol=1e-12)


def test_a_projection_of_sixteen_times_the_trace_gets_two_bits_more():
  found = thresholds.shifted(2.5, [1, 1, 16], [10, 10, 10], (0, 8))
  np.testing.assert_allclose(found, [2.5 - 2 / 3, 2.5 - 2 / 3, 2.5 + 4 / 3])
  np.testing.assert_allclose(thresholds.shifted(2.5, [3, 3, 6], [10, 10, 20], (1, 4)), [2.5] * 3)  # equal by weight
  clipped = thresholds.shifted(2.0, [1, 1, 1e12], [10, 10, 10], (1, 3))
  np.testing.assert_allclose(clipped, [1.5, 1.5, 3])
  np.testing.assert_allclose(thresholds.shifted(2.0, [0, 0, 0], [1, 2, 3], (1, 3)) @ [1, 2, 3], 12)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(0, 1000), st.floats(1, 3), st.sampled_from([(1, 3), (1, 2, 3)]), st.booleans())
def test_plans_keep_the_budget_and_rank_by_score(seed: int, average: float, widths, traced: bool):
  table = blocks_test.costs(seed, widths=(1, 2, 3))
  score = np.random.default_rng(seed).random(table.cost.shape[:3])
  plan = thresholds.plan(score, table, average, widths, traces=[1, 2, 9] if traced else None)
  assert plan.average_bits() <= average + 1e-9
  assert plan.average_bits() >= average - 3 * (widths[-1] - widths[0]) / 32  # at most a row or two a projection short
  for name in table.projections:
    own, ranked = plan.bits[..., table.part(name)].ravel(), score[..., table.part(name)].ravel()
    assert (np.diff(own[np.argsort(ranked)]) >= 0).all()
  assert blocks.plan(table, average).lower_bound <= np.take_along_axis(
      table.cost, np.searchsorted(table.widths, plan.bits)[..., None], 3).sum()


def test_down_gets_more_where_its_trace_is_larger():
  table = blocks_test.costs(0, neurons=64, widths=(1, 2, 3))
  score = np.random.default_rng(0).random(table.cost.shape[:3])
  parts = thresholds.plan(score, table, 2.0, (1, 2, 3), traces=[1, 1, 4]).by_projection()
  means = [part.mean() for part in parts.values()]
  assert means[2] - means[0] == pytest.approx(1, abs=0.02) and means[0] == pytest.approx(means[1], abs=0.02)
  assert len({np.mean(part) for part in thresholds.plan(score, table, 2.0, (1, 2, 3)).by_projection().values()}) == 1


def test_bad_input_is_named():
  table = blocks_test.costs(0, widths=(1, 2, 3))
  score = np.ones(table.cost.shape[:3])
  for change, said in (({"widths": (1, 2, 3, 4)}, "two or three widths"), ({"average": 0.5}, "possible range"),
                       ({"spread": 2.0}, "a spread in"), ({"traces": [1, -1, 1]}, "must be finite and not negative"),
                       ({"score": score[..., :-1]}, "the score has shape"), ({"score": score * np.nan}, "not finite")):
    given = {"score": score, "costs": table, "average": 2.0, "widths": (1, 2, 3)} | change
    with pytest.raises(ValueError, match=said):
      thresholds.plan(**given)
