"""Scores of channels: formulas, a toy model whose Hessian is known, and what is declared for bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from moeq_jax import channels, codecs, registry
from moeq_jax.encode import channels as encoding
from moeq_jax.scores import channels as scores
from tests import tiny
from tests.calibrate import channels_test
from tests.encode import channels_test as encode_test


def evidence(**changes) -> scores.Evidence:
  experts = [tiny.functions().experts(block) for block in tiny.model().blocks]
  return dataclasses.replace(scores.Evidence(encode_test.errors(), experts, channels_test.stats()), **changes)


# ---------------------------------------------------------------------------------------------------------------------
# A toy model with a known Hessian
# ---------------------------------------------------------------------------------------------------------------------

D, F, E, T = 24, 32, 3, 600


@functools.cache
def toy() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
  """Experts `{name: [E, K, N]}`, tokens `[T, D]`, each one's expert, and the output's Hessian `[D, D]`: the loss of a
  token is `1/2 d^T H d` for a change d of the output, plus a random linear term whose variance is H, so that the Fisher
  matrix is the Gauss-Newton matrix. Inputs are correlated, rows of the weights have unequal scales."""
  rng = np.random.default_rng(0)
  row = lambda n, spread: np.exp(rng.normal(0, spread, n))
  w = {"gate": rng.normal(0, D**-0.5, (E, D, F)) * row(F, 0.7), "up": rng.normal(0, D**-0.5, (E, D, F)) * row(F, 0.7),
       "down": rng.normal(0, F**-0.5, (E, F, D)) * row(D, 0.7)}
  mix = np.linalg.qr(rng.normal(size=(D, D)))[0] * row(D, 0.5)
  x = rng.normal(size=(T, D)) @ mix + 0.3
  hessian = np.diag(row(D, 1.0))
  return {name: v.astype(np.float32) for name, v in w.items()}, x.astype(np.float32), np.arange(T) % E, hessian


def outputs(w: dict[str, jax.Array], x: jax.Array, perturb: dict[str, jax.Array] | None = None,
            ) -> tuple[jax.Array, jax.Array]:
  """One expert: outputs and mids, with something added to each projection's rows."""
  added = perturb or dict.fromkeys(w, 0.0)
  a, b = x @ w["gate"] + added["gate"], x @ w["up"] + added["up"]
  mid = jax.nn.silu(a) * b
  return mid @ w["down"] + added["down"], mid


@functools.cache
def toy_evidence(spec: str, axis: str) -> scores.Evidence:
  w, x, owner, hessian = toy()
  rng = np.random.default_rng(1)
  fields = {"input_sq": [], "mid_sq": []} | {f"grad_sq_{name}": [] for name in w}
  for e in range(E):
    own, mine = {name: jnp.asarray(v[e]) for name, v in w.items()}, jnp.asarray(x[owner == e])
    noise = jnp.asarray(rng.normal(size=(len(mine), D)) @ np.sqrt(hessian), jnp.float32)
    zero = {name: jnp.zeros((len(mine), v.shape[2])) for name, v in w.items()}
    gradient = jax.grad(lambda p, own=own, mine=mine, noise=noise: jnp.sum(noise * outputs(own, mine, p)[0]))(zero)
    fields["input_sq"].append(jnp.sum(mine**2, 0))
    fields["mid_sq"].append(jnp.sum(outputs(own, mine)[1] ** 2, 0))
    for name in w:
      fields[f"grad_sq_{name}"].append(jnp.sum(gradient[name] ** 2, 0))
  flat = np.zeros((1, E, 2, 3))
  made = {name: np.asarray(value, np.float32)[None] for name, value in fields.items()}
  tokens = np.bincount(owner)[None]
  stats = channels.ChannelStats(tokens, tokens * 1.0, tokens * 1.0, tokens * 1.0, condition=flat + 1, log_am_gm=flat,
                                damping=0.01, total_tokens=T, batches=1, **made)
  codec = codecs.get(spec)
  layers = [encoding.encode_layer(w, stats, 0, codec=codec, widths=(2, 3, 4), axis=axis)]
  shapes = {name: v.shape[1:] for name, v in w.items()}
  return scores.Evidence(encoding.error_table(layers, shapes, widths=(2, 3, 4), codec=codec, axis=axis), [w], stats)


def true_increase(spec: str, axis: str, bits: int) -> np.ndarray:
  """`[E, J]`: what the loss per token really grows by when one row alone is quantized: `1/2 mean d^T H d`."""
  w, x, owner, hessian = toy()
  codec, found = codecs.get(spec), []
  run = jax.jit(jax.vmap(lambda own, x: outputs(own, x)[0], in_axes=(0, None)))
  for e in range(E):
    own, mine = {name: jnp.asarray(v[e]) for name, v in w.items()}, jnp.asarray(x[owner == e])
    before, row = np.asarray(outputs(own, mine)[0], np.float64), []
    for name in w:
      decoded = codecs.decode(codec.encode(own[name], bits), codec.group, own[name].shape[0])
      side = channels.along(name, axis)
      chosen = jnp.eye(own[name].shape[side])[:, None, :] if side else jnp.eye(own[name].shape[side])[:, :, None]
      many = own[name][None] + chosen * (decoded - own[name])[None]
      copies = {other: jnp.broadcast_to(v, (len(many), *v.shape)) for other, v in own.items()} | {name: many}
      d = np.asarray(run(copies, mine), np.float64) - before
      row.append(0.5 * np.einsum("jtd,de,jte->j", d, hessian, d) / T)
    found.append(np.concatenate(row))
  return np.stack(found)


@pytest.mark.parametrize("axis", channels.AXES)
@pytest.mark.parametrize("spec", ["rtn(group=0)", "hqq(group=0)"])
def test_predicted_rows_rank_as_the_true_loss_increase(spec: str, axis: str):
  """Spearman above 0.9 at 4 bits, over all rows of all matrices and within each matrix."""
  found = toy_evidence(spec, axis)
  predicted, true = scores.fisher_error(found, zeta=0.0)[0, ..., -1], true_increase(spec, axis, 4)
  assert scipy_stats.spearmanr(predicted.ravel(), true.ravel()).statistic > 0.9
  for place in range(3):
    part = found.errors.projection == place
    for e in range(E):
      assert scipy_stats.spearmanr(predicted[e, part], true[e, part]).statistic > 0.9, (place, e)
  # And not only the ranks: the sum over rows is the loss increase to a factor.
  assert 0.5 < predicted.sum() / true.sum() < 2


def test_the_ranks_could_be_wrong():
  """Weight errors alone, which know neither inputs nor gradients, do not reach what the test above asks."""
  found = toy_evidence("rtn(group=0)", "outputs")
  true = true_increase("rtn(group=0)", "outputs", 4)
  assert scipy_stats.spearmanr(found.errors.weight[0, ..., -1].ravel(), true.ravel()).statistic < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------------------------


def expected_statistical(w: np.ndarray, kind: str, alpha: float) -> np.ndarray:
  """Of the rows of `w`, in float64 numpy."""
  centred = w - w.mean(1, keepdims=True)
  variance = w.var(1)
  share = (np.abs(centred) > 3 * np.sqrt(variance)[:, None]).mean(1)
  if kind == "kurtosis":
    k = scipy_stats.kurtosis(w, axis=1, fisher=False)
  elif kind == "max_median":
    k = np.abs(w).max(1) / np.median(np.abs(w), axis=1)
  else:
    right = np.linalg.svd(w)[2][0]
    k = 1 + (w @ right) ** 2 / (w**2).sum(1)
  over = lambda v: v / v.mean() if v.mean() else np.ones_like(v)
  return alpha * over(k) * over(variance) + (1 - alpha) * over(share)


@pytest.mark.parametrize("kind", scores.KINDS)
@pytest.mark.parametrize("axis", channels.AXES)
def test_the_statistical_score_is_its_formula(kind: str, axis: str):
  rng = np.random.default_rng(0)
  experts = {"gate": rng.standard_t(3, (2, 40, 9)), "up": rng.normal(size=(2, 40, 9)),
             "down": rng.standard_t(3, (2, 9, 40))}
  experts["up"] += 2 * rng.normal(size=(2, 40, 1)) * rng.normal(size=(2, 1, 9))  # a top singular direction
  experts["down"] *= np.exp(rng.normal(0, 1, (2, 9, 1)))
  shapes, codec = {name: w.shape[1:] for name, w in experts.items()}, codecs.get("rtn")
  empty = encoding.error_table([{"weight": np.zeros((2, 1, 1))}], shapes, widths=(2,), codec=codec, axis=axis)
  found = scores.statistical(scores.Evidence(empty, [experts]), kind, 0.3)
  rows = [w.transpose(0, 2, 1) if channels.along(name, axis) else w for name, w in experts.items()]
  wanted = [np.concatenate([expected_statistical(part[e], kind, 0.3) for part in rows]) for e in range(2)]
  np.testing.assert_allclose(found[0], wanted, rtol=2e-3)


def test_costs_are_their_formulas():
  e = evidence()
  stats, errors = e.stats, e.errors
  n = np.maximum(stats.tokens, 1) * stats.total_tokens
  traces = np.stack([stats.inputs(p).sum(-1, dtype=float) * stats.gradients(p).sum(-1, dtype=float) / n
                     for p in errors.projections], -1)
  np.testing.assert_allclose(scores.fisher_traces(stats, errors.projections), traces)
  np.testing.assert_allclose(scores.fisher_error(e, zeta=0), errors.fisher)
  logs = scores.conditions(stats, errors.projections)
  factor = np.exp(logs - logs.mean())
  np.testing.assert_allclose(scores.fisher_error(e), errors.fisher * factor[..., errors.projection, None], rtol=1e-12)
  statistical = scores.statistical(e)[..., None] * errors.weight
  both = (traces / traces.mean() * factor)[..., errors.projection, None]
  np.testing.assert_allclose(scores.statistical_error(e), statistical * both, rtol=1e-12)
  np.testing.assert_allclose(scores.statistical_error(evidence(stats=None)), statistical, rtol=1e-12)


def test_the_condition_counts_for_codecs_that_round_and_not_for_gptq():
  e = evidence()
  gptq = dataclasses.replace(e, errors=dataclasses.replace(e.errors, codec="gptq(group=32)"))
  assert [scores.default_zeta(spec) for spec in ("rtn", "hqq(group=64)", "gptq(group=64)")] == [1, 1, 0]
  assert set(scores.ZETA) == set(codecs.TABLE)
  np.testing.assert_allclose(scores.fisher_error(gptq), e.errors.fisher)
  assert not np.allclose(scores.fisher_error(e), e.errors.fisher, rtol=0.01)
  assert scores.as_cost("fisher_error", gptq).units == "nats"
  assert scores.as_cost("fisher_error", e).units == "arbitrary"
  assert scores.as_cost("fisher_error(zeta=0)", e).units == "nats"
  table = scores.as_cost("statistical_error(kind='singular', alpha=1)", e)
  assert table.units == "arbitrary" and table.score == "statistical_error(alpha=1, kind=singular)"
  assert table.cost.shape == e.errors.weight.shape and (table.cost >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", scores.KINDS)
def test_rows_of_zeros_and_matrices_without_outliers(kind: str):
  experts = [{name: np.array(w, np.float32) for name, w in layer.items()} for layer in evidence().experts]
  experts[0]["up"][1, :, 7] = 0  # a row of zeros
  experts[0]["up"][1, :, 8] = 0.25  # a constant row
  experts[0]["down"][2] = 0  # a matrix of zeros
  experts[1]["gate"][0] = np.sign(experts[1]["gate"][0])  # no outliers anywhere
  experts[1]["gate"][1, :, 3] = 0
  experts[1]["gate"][1, 5, 3] = 1  # one weight that is not zero
  found = scores.statistical(evidence(experts=experts), kind)
  assert np.isfinite(found).all() and (found >= 0).all()
  assert found[0, 1, 96 + 7] == found[0, 1, 96 + 8] == 0 < found[0, 1, 96 + 9]
  np.testing.assert_array_equal(found[0, 2, 192:], 0)
  assert (found[1, 0, :96] > 0.5).all()


def test_experts_with_fewer_tokens_than_channels_get_the_others_condition():
  stats = channels_test.stats()
  tokens = stats.tokens.copy()
  tokens[0, 2], tokens[1] = 5, 3
  few = dataclasses.replace(stats, tokens=tokens)
  found, names = scores.conditions(few, ("gate", "up", "down")), ("gate", "up", "down")
  enough = tokens[0] >= 64
  assert enough.any() and not enough[2]
  mean = (few.log_am_gm[0, :, 0, 1] * tokens[0] * enough).sum() / (tokens[0] * enough).sum()
  assert found[0, 2, 0] == pytest.approx(mean) and found[0, enough, 0] == pytest.approx(few.log_am_gm[0, enough, 0, 1])
  np.testing.assert_allclose(found[1, :, 0], mean)  # no expert of this layer saw enough: those of the others did
  assert np.isfinite(scores.multiplier(few, names, eta=1, zeta=1)).all()


def test_a_projection_that_no_expert_saw_enough_tokens_for_does_not_become_cheap(caplog: pytest.LogCaptureFixture):
  """Down has more input channels than gate and up here, and tokens lie between: it would seem perfectly conditioned."""
  stats, names = channels_test.stats(), ("gate", "up", "down")
  sizes = [stats.inputs(name).shape[-1] for name in names]
  assert sizes[2] > sizes[0]
  between = dataclasses.replace(stats, tokens=np.full_like(stats.tokens, sizes[2] - 1))
  np.testing.assert_array_equal(scores.conditions(between, names), 0)
  assert "input of down has channels (96, at most 95 tokens)" in caplog.text
  plain = scores.multiplier(between, names, eta=1, zeta=0)
  np.testing.assert_array_equal(scores.multiplier(between, names, eta=1, zeta=1), plain)


def test_an_expert_without_tokens_costs_nothing_by_gradients_and_something_by_weights():
  e = evidence()
  layer, expert = tiny.UNROUTED
  assert not scores.fisher_error(e)[layer, expert].any() and scores.weight_error(e)[layer, expert].all()


def test_what_is_wrong_is_named():
  e = evidence()
  for spec, error, said in (
      ("fisher_eror", registry.SpecError, "did you mean 'fisher_error'"),
      ("fisher_error(eta=1)", registry.SpecError, "eta"), ("fisher_error(0)", registry.SpecError, "given by name"),
      ("statistical_error(kind='max')", ValueError, "unknown kind"),
      ("statistical_error(alpha=2)", ValueError, "in \\[0, 1\\]")):
    with pytest.raises(error, match=said):
      scores.as_cost(spec, e)
  with pytest.raises(ValueError, match="no calibration, so there are no gradients"):
    scores.as_cost("fisher_error", evidence(stats=None))
  damaged = [{name: np.array(w) for name, w in layer.items()} for layer in e.experts]
  damaged[1]["down"][3, 2, 2] = np.inf
  with pytest.raises(ValueError, match="layer 1, down of expert 3"):
    scores.statistical(evidence(experts=damaged))
  fisher = e.errors.fisher.copy()
  fisher[1, 2, 200, 0] = np.nan
  with pytest.raises(ValueError, match="not finite for down of layer 1, expert 2"):
    scores.as_cost("fisher_error(zeta=0)", evidence(errors=dataclasses.replace(e.errors, fisher=fisher)))
