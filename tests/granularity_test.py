"""The experiment on granularity: equal effective bits, nested sets, and weights that are those of packed execution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import granularity, granularity_codes, granularity_summary
from moeq_jax import codecs, kernels
from moeq_jax.allocate import blocks as block_plans
from moeq_jax.encode import channels as channel_errors
from moeq_jax.encode import neurons
from moeq_jax.scores import channels as scores
from tests import tiny

CODEC = codecs.get("gptq(group=32)")


@pytest.fixture(scope="module")
def experts() -> list[dict[str, np.ndarray]]:
  functions = tiny.functions()
  return [{name: np.asarray(w, np.float32) for name, w in functions.experts(block).items()}
          for block in tiny.model().blocks]


@pytest.fixture(scope="module")
def bank(experts) -> granularity.Bank:
  return granularity_codes.encode_all(experts, tiny.stats(), CODEC)


@pytest.fixture(scope="module")
def ordered(bank) -> granularity.Bank:
  return granularity_codes.in_order(bank, CODEC)


def _bank_of(arm: str, bank: granularity.Bank, ordered: granularity.Bank) -> granularity.Bank:
  return ordered if arm in granularity.SORTED else bank


def test_costs_are_those_of_the_channels(bank, experts):
  vectors = granularity_codes.channel_stats(bank.moments)
  for axis, costs in bank.costs.items():
    for layer, weights in enumerate(experts):
      wanted = channel_errors.encode_layer(weights, vectors, layer, codec=CODEC, widths=granularity_codes.WIDTHS,
                                           axis=axis, moments=bank.moments)
      scale = wanted["fisher"].max()
      np.testing.assert_allclose(costs.cost[layer] / scale, wanted["fisher"] / scale, rtol=1e-3, atol=1e-6)


def test_sorted_banks_are_those_of_the_sorted_experts(bank, ordered):
  order = ordered.costs["neurons"].order
  sorted_experts = [neurons.sort_experts(w, order[layer]) for layer, w in enumerate(bank.experts)]
  wanted = granularity_codes.encode_all(sorted_experts, neurons.sort_stats(tiny.stats(), order), CODEC)
  for layer, (one, other) in enumerate(zip(ordered.coded, wanted.coded, strict=True)):
    seen = tiny.stats().tokens[layer] > 0  # moments of the others are means over experts
    for name in one:
      differ = np.asarray(one[name].codes.codes) != np.asarray(other[name].codes.codes)
      assert differ[:, seen].mean() < 1e-3, name
  np.testing.assert_allclose(ordered.costs["neurons"].cost, wanted.costs["neurons"].cost, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("arm", granularity.ARMS[1:])
def test_every_arm_spends_the_same_effective_bits(bank, ordered, arm: str):
  own = _bank_of(arm, bank, ordered)
  costs, constraint = granularity.units_of(arm, own, CODEC.group)
  chosen = granularity.plan(arm, 2.5, own, CODEC.group)
  spent = chosen.average_bits() + granularity.overhead(costs, constraint)
  assert 2.5 - 1 / 12 < spent <= 2.5 + 1e-9  # a whole expert of 12 is the coarsest step
  # What the overhead is made of: 2 bits a unit, 16 a neuron where they are sorted.
  layers, number, parts, _ = costs.cost.shape
  units = {"none": layers * number * parts, "projection": layers * number * 3, "expert": layers * number}[constraint]
  neuron_bits = 16 / (3 * 64) if arm in granularity.SORTED else 0
  assert granularity.overhead(costs, constraint) == pytest.approx(2 * units / (12 * 3 * 64 * 96) + neuron_bits)


def test_finer_sets_are_never_dearer_at_equal_nominal_bits(bank, ordered):
  for own, arms in ((bank, ("expert", "projection", "channel")), (ordered, ("expert sorted", "block 64", "block 16"))):
    # block 64 does not divide 96 neurons: its last block has 32
    plans = [block_plans.plan(units[0], 2.2, units[1])
             for units in (granularity.units_of(arm, own, CODEC.group) for arm in arms)]
    for coarse, fine in zip(plans, plans[1:]):
      assert fine.lower_bound <= coarse.predicted * (1 + 1e-9)
      assert fine.predicted <= coarse.predicted * (1 + 1e-9)


def test_decoded_weights_are_what_the_packed_ones_compute(ordered):
  chosen = granularity.plan("block 32", 2.5, ordered, CODEC.group)
  assert len(np.unique(chosen.bits)) > 1
  moments = {"gate": ordered.moments.moment_in[0], "up": ordered.moments.moment_in[0],
             "down": ordered.moments.moment_mid[0]}
  bits = {name: values[0] for name, values in chosen.by_projection().items()}
  packed = neurons.pack_layer(neurons.encode_layer(ordered.experts[0], bits, moments, codec=CODEC), CODEC.group)
  sizes = np.array([4, 3, 0, 2, 5, 1])
  for name, q in packed.items():
    wide = granularity.widths_of(chosen, name, ordered.experts[0][name].shape[1:])[0]
    values = np.asarray(granularity.decode(ordered, 0, name, wide, CODEC))
    x = np.random.default_rng(0).normal(size=(15, q.K)).astype(np.float32)
    wanted = np.concatenate([x[end - size:end] @ values[e] for e, (size, end) in enumerate(zip(sizes, sizes.cumsum()))])
    y = kernels.grouped_matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, q), jnp.asarray(sizes))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-3, atol=1e-3)


def test_uniform_widths_between_two_are_drawn(bank):
  first, second = (granularity.drawn(2.5, bank, draw) for draw in (0, 1))
  assert first.average_bits() == second.average_bits() == 2.5
  assert not np.array_equal(first.bits, second.bits) and set(first.bits.ravel()) == {2, 3}
  assert (granularity.drawn(3.0, bank, 0).bits == 3).all()


def test_thresholds_give_high_scores_more_bits(bank, experts):
  chosen = granularity.plan("thresholds", 2.0, bank, CODEC.group)
  kurtosis = scipy.stats.kurtosis(experts[0]["up"], axis=1) + 3
  up = chosen.by_projection()["up"][0]
  score = kurtosis * experts[0]["up"].var(axis=1)
  assert score[up == 3].mean() > score[up == 2].mean() > score[up == 1].mean()


def test_outliers(experts):
  found = granularity.outliers(experts)
  np.testing.assert_allclose(found["kurtosis_down"][1], scipy.stats.kurtosis(experts[1]["down"], axis=1) + 3, rtol=1e-4)
  w = np.abs(experts[0]["gate"])
  np.testing.assert_allclose(found["max_median_gate"][0], w.max(1) / np.median(w, axis=1), rtol=1e-4)


def test_comparisons_pair_sequences_of_the_same_calibration_set():
  key = lambda arm, basis="none": ("m", "rtn", basis, arm, 2.5)
  losses = {key("uniform"): {0: np.array([3.0, 5.0]), 1: np.array([4.0, 6.0])},
            key("expert"): {1: np.array([1.0, 2.0])}, key("expert", "hadamard"): {1: np.array([0.5, 2.5])}}
  rows = {row["what"]: row for row in granularity_summary.compare(losses)}
  found = rows["uniform - expert"]
  assert (found["difference"], found["sets"], found["set_1"]) == (3.5, 1, 3.5) and "set_0" not in found
  assert found["ci95"] == pytest.approx(1.96 * np.std([3, 4], ddof=1) / np.sqrt(2))
  assert rows["expert: rotated - not"]["difference"] == 0.0


def test_thresholds_with_fisher_traces_give_bits_to_the_matrices_that_matter(bank):
  plain, fisher = (granularity.plan(arm, 2.0, bank, CODEC.group) for arm in granularity.RULES)
  traces = scores.fisher_traces(granularity_codes.channel_stats(bank.moments), fisher.projections)[..., 1]  # of up
  bits = [np.ravel([part.mean(-1) for part in plan.by_projection()["up"]]) for plan in (plain, fisher)]
  rank = [scipy.stats.spearmanr(own, traces.ravel()).statistic for own in bits]
  assert rank[1] > 0.9 > rank[0]
