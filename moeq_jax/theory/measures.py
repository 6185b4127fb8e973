"""What is measured of a trained two-layer model before it is quantized. Letters as in `two_layer.py`."""

import numpy as np

from moeq_jax.theory import two_layer

KINDS = ("frequent", "rare", "irrelevant")


def experts_of(setting: two_layer.Setting) -> dict[str, np.ndarray]:
  """Which experts are aligned to a frequent, a rare, an irrelevant token: `[E]` bool for each of `KINDS`."""
  own, rare = setting.own_feature(), setting.features()[1]
  return {"frequent": (own >= 0) & ~rare[own], "rare": (own >= 0) & rare[own], "irrelevant": own < 0}


def norm_change(before: two_layer.Params, after: two_layer.Params) -> np.ndarray:
  """Lambda_s = |w_s after| - |w_s before|, `[E]`: the difference of norms (arXiv 2604.06515, section 3)."""
  first, last = (np.linalg.norm(np.asarray(p.router, np.float64), axis=-1) for p in (before, after))
  return last - first


def activations(params: two_layer.Params, setting: two_layer.Setting) -> np.ndarray:
  """h_s of the own token, `[E]`; NaN for irrelevant experts. Theorem 4.3 orders these by frequency."""
  own = setting.own_feature()
  rows = np.asarray(params.experts, np.float64)[np.arange(setting.experts), own]
  return np.where(own >= 0, np.maximum(rows, 0).mean(-1), np.nan)


def max_variance(dense: np.ndarray) -> np.ndarray:
  """MaxVar_s `[E]`: the greatest biased variance of a neuron's weights, of dense `[E, D, F]` (section 3)."""
  return np.asarray(dense, np.float64).var(axis=1).max(axis=-1)


def proficiency(params: two_layer.Params, setting: two_layer.Setting, test: two_layer.Batch) -> np.ndarray:
  """p_v^(s) `[E, R]`: share of the inputs with relevant token v in which expert s keeps v with a gate of at least 1/J.

  From the predecessor (arXiv 2405.16646). NaN for a token that no test input has.
  """
  chosen, gates = (np.asarray(a) for a in two_layer.route(params.router, test.tokens, setting.kept))
  feature = np.asarray(test.feature)
  held = ((chosen == feature[:, None]) & (gates >= 1 / setting.kept)).any(-1)
  present = [feature == v for v in range(len(setting.features()[0]))]
  return np.stack([held[:, p].mean(-1) if p.any() else np.full(len(held), np.nan) for p in present], axis=-1)


def margins(params: two_layer.Params, setting: two_layer.Setting, test: two_layer.Batch) -> np.ndarray:
  """y f(x) `[B]`."""
  return np.asarray(test.labels * two_layer.outputs(params, setting, test.tokens))


def without_irrelevant(params: two_layer.Params, setting: two_layer.Setting, test: two_layer.Batch) -> float:
  """Share of test inputs that are wrong when the irrelevant experts are removed (the predecessor prunes them)."""
  terms = two_layer.weigh(params.experts, setting, *two_layer.route(params.router, test.tokens, setting.kept))
  kept = np.asarray(terms)[~experts_of(setting)["irrelevant"]].sum((0, 2))
  return float((np.asarray(test.labels) * kept <= 0).mean())


def row(before: two_layer.Params, after: two_layer.Params, setting: two_layer.Setting,
        test: two_layer.Batch) -> dict[str, float | None]:
  """All of the above for one seed, as fields of a row; means over the experts, or test inputs, of a kind."""
  kinds, change = experts_of(setting), norm_change(before, after)
  first, last = activations(before, setting), activations(after, setting)
  skill, margin = proficiency(after, setting, test), margins(after, setting, test)
  rare = setting.features()[1][np.asarray(test.feature)]
  found: dict[str, float | None] = {"router_norm_before": float(np.linalg.norm(before.router, axis=-1).mean())}
  for kind in KINDS:
    found[f"lambda_{kind}"] = float(change[kinds[kind]].mean())
    found[f"lambda_{kind}_least"] = float(change[kinds[kind]].min())
    found[f"lambda_{kind}_greatest"] = float(change[kinds[kind]].max())
  own = setting.own_feature()
  for kind in KINDS[:2]:
    of, inputs = kinds[kind], rare == (kind == "rare")
    found[f"activation_{kind}"] = float(last[of].mean())
    found[f"activation_{kind}_before"] = float(first[of].mean())
    found[f"proficiency_{kind}"] = _number(np.mean([skill[e, own[e]] for e in np.flatnonzero(of)]))
    found[f"margin_{kind}"] = _number(np.median(margin[inputs]) if inputs.any() else np.nan)
    found[f"margin_{kind}_least"] = _number(margin[inputs].min() if inputs.any() else np.nan)
  found["proficiency_irrelevant_frequent"] = _number(skill[kinds["irrelevant"]][:, ~setting.features()[1]].max())
  found["error"] = float((margin <= 0).mean())
  found["error_without_irrelevant"] = without_irrelevant(after, setting, test)
  return found


def _number(value: float) -> float | None:
  """A float, None for NaN: what a row can hold."""
  return None if np.isnan(value) else float(value)
