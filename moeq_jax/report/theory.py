"""The tables of the task `theory`: means and 95% intervals over seeds, from the rows that `theory_run.py` describes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from moeq_jax.theory import quantization, two_layer

Row = Mapping[str, Any]
QUANTIZERS = {"common": "common step", "row": "per row"}
HIGH_RESOLUTION = range(quantization.LEVELS.index(16), len(quantization.LEVELS))  # 4 bits and more
LOW_RESOLUTION = range(quantization.LEVELS.index(4), quantization.LEVELS.index(8) + 1)  # 2 to 3 bits
RESAMPLES = 1000


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def by_spec(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """The rows of seeds, by setting, in the order of their first appearance."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    if row["kind"] == "seed":
      found.setdefault(row["spec"], []).append(row)
  return found


def mean_and_half_width(values: Iterable[float | None]) -> tuple[float, float] | None:
  """Mean and half width of Student's 95% interval; None for fewer than two values that are not None."""
  known = np.array([v for v in values if v is not None], np.float64)
  if len(known) < 2:
    return None
  return float(known.mean()), float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))


def predicted_ratio(setting: two_layer.Setting) -> float:
  """(1 - alpha) / alpha."""
  return (1 - setting.alpha) / setting.alpha


def log_ratio(row: Row, learned: bool) -> float:
  """log2 of the activation of the frequent experts over that of the rare ones; `learned`: of what training added."""
  frequent, rare = (row[f"activation_{k}"] - learned * row[f"activation_{k}_before"] for k in ("frequent", "rare"))
  return math.log2(frequent / rare) if frequent > 0 and rare > 0 else math.nan


def shift(rows: Sequence[Row], quantizer: str, widths: Sequence[int]) -> tuple[float, float]:
  """How many bits more the rare experts need, and half the width of the middle 95% of its bootstrap.

  For each of the widths: how far to the right the curve of the rare experts' errors against bits has the error that
  frequent ones have at this width, by linear interpolation of log2 of the error; the mean over the widths. An error is
  the root mean square over seeds of the relative error of h_s(own token). Beyond the last width each bit halves it.
  """
  squares = {kind: np.array([[row[f"square_{quantizer}_{kind}_{w:02d}"] for w in range(len(quantization.LEVELS))]
                             for row in rows], np.float64) for kind in ("rare", "frequent")}

  def lag(seeds: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
      rare, frequent = (np.log2(_mean_of_known(squares[kind][seeds])) / 2 for kind in ("rare", "frequent"))
    return float(_mean_of_known(np.array([[_distance(rare, frequent[w], quantization.BITS[w])] for w in widths]))[0])

  draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
  low, high = np.nanpercentile([lag(draw) for draw in draws], [2.5, 97.5])
  return lag(np.arange(len(rows))), float(high - low) / 2


def _distance(curve: np.ndarray, error: float, bits: float) -> float:
  """How many bits right of `bits` the curve, log2 of the error at every width, comes down to `error`."""
  known = np.isfinite(curve)
  if not np.isfinite(error) or not known.any():
    return math.nan
  widths, falling = np.array(quantization.BITS)[known], np.minimum.accumulate(curve[known])
  if error < falling[-1]:
    return widths[-1] + falling[-1] - error - bits
  return float(np.interp(-error, -falling, widths)) - bits


def _mean_of_known(values: np.ndarray) -> np.ndarray:
  """The mean over the last but one axis of what is not NaN; NaN where nothing is left."""
  known = np.isfinite(values)
  count = known.sum(-2)
  return np.where(count > 0, np.where(known, values, 0).sum(-2) / np.maximum(count, 1), np.nan)


def slope(rows: Mapping[int, Sequence[Row]], field: str) -> float:
  """Slope of log(mean of `field` over seeds) against log d, for rows by d; NaN if a mean is not positive."""
  means = [np.mean([row[field] for row in rows[d]]) for d in sorted(rows)]
  return float(np.polyfit(np.log(sorted(rows)), np.log(means), 1)[0]) if min(means) > 0 else math.nan


def slope_and_half_width(rows: Mapping[int, Sequence[Row]], field: str) -> tuple[float, float]:
  """`slope`, and half the width of the middle 95% of its bootstrap over the seeds of each d."""
  rng = np.random.default_rng(0)
  draws = [slope({d: [r[i] for i in rng.integers(len(r), size=len(r))] for d, r in rows.items()}, field)
           for _ in range(RESAMPLES)]
  low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (math.nan, math.nan)
  return slope(rows, field), float(high - low) / 2


def families(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
  """Settings that differ in d only, as in the sweep of d: name -> d -> rows of seeds.

  Routers that begin with the same norm at every d (`router_init` falls as 1 / sqrt(d)) are a family of their own.
  """
  found: dict[str, dict[int, list[Row]]] = {}
  for spec, members in by_spec(rows).items():
    setting = two_layer.Setting.parse(spec)
    scaled = math.isclose(setting.router_init, 0.01 * (1024 / setting.dim) ** 0.5, rel_tol=1e-3)
    for equal_norm in (True, False):
      if scaled if equal_norm else setting.router_init == 0.01:
        stop = "first 100%" if setting.margin == 0 else f"margin {setting.margin:g}"
        name = f"{setting.design}, alpha {setting.alpha:g}, {stop}{', equal router norm at the start' * equal_norm}"
        found.setdefault(name, {})[setting.dim] = members
  return {name: by_dim for name, by_dim in found.items() if len(by_dim) > 2}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _show(pair: tuple[float, float] | None, digits: int = 2) -> str:
  """`1.23 ± 0.04`."""
  return "none" if pair is None or math.isnan(pair[0]) else f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _mean(rows: Sequence[Row], field: str, digits: int = 2) -> str:
  return _show(mean_and_half_width(row[field] for row in rows), digits)


def _share(rows: Sequence[Row], field: str) -> str:
  return f"{sum(row[field] for row in rows)}/{len(rows)}"


def _factor(pair: tuple[float, float] | None) -> str:
  """A mean of log2 and its half width as a geometric mean and its interval."""
  if pair is None or math.isnan(pair[0]):
    return "none"
  middle, half = pair
  return f"{2**middle:.2f} ({2 ** (middle - half):.2f} to {2 ** (middle + half):.2f})"


def _ratio(rows: Sequence[Row], learned: bool) -> str:
  return _factor(mean_and_half_width([log_ratio(row, learned) for row in rows]))


def learning(rows: Iterable[Row]) -> list[list[str]]:
  """(ii), (iii): Lambda and activations of every setting."""
  table = [["setting", "steps", "activation frequent", "activation rare", "ratio (95%)", "ratio learned (95%)",
            "theory", "Lambda frequent", "Lambda rare", "Lambda irrelevant", "rare < frequent", "irrelevant < rare"]]
  for spec, members in by_spec(rows).items():
    table.append([
        f"`{spec}`", f"{np.mean([r['steps'] for r in members]):.0f}", _mean(members, "activation_frequent", 3),
        _mean(members, "activation_rare", 3), _ratio(members, False), _ratio(members, True),
        f"{predicted_ratio(two_layer.Setting.parse(spec)):.0f}", *(_mean(members, f"lambda_{k}", 4) for k in
                                                                   ("frequent", "rare", "irrelevant")),
        _share(members, "lambda_order"), _share(members, "lambda_irrelevant_below")])
  return table


def irrelevant(rows: Iterable[Row]) -> list[list[str]]:
  """Irrelevant experts: their Lambda against that of rare ones, what they learned, and test errors without them."""
  table = [["setting", "Lambda rare, mean", "Lambda irrelevant, least", "mean", "greatest", "all below all rare",
            "greatest proficiency for a frequent token", "wrong inputs without them"]]
  for spec, members in by_spec(rows).items():
    lost = mean_and_half_width(100 * row["error_without_irrelevant"] for row in members)
    table.append([f"`{spec}`", *(_mean(members, f"lambda_{field}", 4) for field in
                                 ("rare", "irrelevant_least", "irrelevant", "irrelevant_greatest")),
                  _share(members, "lambda_irrelevant_below"), _mean(members, "proficiency_irrelevant_frequent"),
                  f"{_show(lost)}%"])
  return table


def _quantized(rows: Iterable[Row]) -> dict[str, list[Row]]:
  return {spec: members for spec, members in by_spec(rows).items() if "max_variance_ratio" in members[0]}


def shifts(rows: Iterable[Row]) -> list[list[str]]:
  """(iv): the shift in bits between rare and frequent experts."""
  table = [["setting", "MaxVar ratio", "of relevant", "theory", "log2 of ratio found", "common step, 4-8 bits",
            "common step, 2-3 bits", "per row, 4-8 bits", "per row, 2-3 bits"]]
  for spec, members in _quantized(rows).items():
    found = [_show(shift(members, q, w)) for q in QUANTIZERS for w in (HIGH_RESOLUTION, LOW_RESOLUTION)]
    realised = mean_and_half_width([log_ratio(row, learned=False) for row in members])
    table.append([f"`{spec}`", _mean(members, "max_variance_ratio"), _mean(members, "max_variance_ratio_relevant"),
                  f"{math.log2(predicted_ratio(two_layer.Setting.parse(spec))):.2f}", _show(realised), *found])
  return table


def needs(rows: Iterable[Row]) -> list[list[str]]:
  """(v): the bits that experts of one kind need if they alone are quantized, and where the errors fall."""
  table = [["setting", "quantizer", "rare alone", "frequent alone", "irrelevant alone", "every expert",
            "wrong inputs with the rare token, frequent alone"]]
  for spec, members in _quantized(rows).items():
    for quantizer, name in QUANTIZERS.items():
      wrong = mean_and_half_width(row[f"wrong_rare_{quantizer}"] for row in members)
      table.append([f"`{spec}`", name, *(_mean(members, f"need_{quantizer}_{kind}") for kind in
                                         ("rare", "frequent", "irrelevant", "every")),
                    "no errors" if wrong is None else f"{100 * wrong[0]:.0f}%"])
  return table


def noises(rows: Iterable[Row]) -> list[list[str]]:
  """(v): the error of y f on inputs with the rare token, as a share of their median margin, at equal widths.

  The last column is the room for fewer bits in the frequent experts, log2(error from the rare / from the frequent).
  """
  table = [["setting", "quantizer", "bits", "rare experts: own token", "rare experts: cross-talk",
            "frequent experts: own token", "frequent experts: cross-talk", "theory", "room in bits"]]
  for spec, members in _quantized(rows).items():
    for quantizer, name in QUANTIZERS.items():
      for bits in (2, 4):
        shares = [_show(mean_and_half_width(_noise_share(row, quantizer, kind, source, bits) for row in members), 3)
                  for kind in ("rare", "frequent") for source in ("own", "cross")]
        found = _show(mean_and_half_width([room(row, quantizer, bits) for row in members]))
        table.append([f"`{spec}`", name, str(bits), *shares,
                      f"{math.log2(predicted_ratio(two_layer.Setting.parse(spec))):.2f}", found])
  return table


def room(row: Row, quantizer: str, bits: int) -> float | None:
  """log2 of the error that rare experts make on inputs with the rare token over that of frequent ones, equal widths.

  By as much could the frequent experts have fewer bits until they do as much harm there; negative where they do more.
  """
  parts = {kind: [row[f"noise_{quantizer}_{kind}_{source}_{bits}"] for source in ("own", "cross")]
           for kind in ("rare", "frequent")}
  if None in parts["rare"] + parts["frequent"]:
    return None
  return math.log2(math.hypot(*parts["rare"]) / math.hypot(*parts["frequent"]))


def _noise_share(row: Row, quantizer: str, kind: str, source: str, bits: int) -> float | None:
  noise, margin = row[f"noise_{quantizer}_{kind}_{source}_{bits}"], row["margin_rare"]
  return None if noise is None or not margin else noise / margin


def savings(rows: Iterable[Row]) -> list[list[str]]:
  """(v): how far b_l may fall below b_h, by the rule (small Lambda high) and by its reverse."""
  table = [["setting", "quantizer", "theory", "own-token error only: rule", "reverse", "cross-talk only: rule",
            "reverse", "both: rule", "reverse", "both, irrelevant experts ranked too: rule", "reverse"]]
  for spec, members in _quantized(rows).items():
    for quantizer, name in QUANTIZERS.items():
      found = [_mean(members, f"saved_{quantizer}_{case}_{order}") for case in
               ("relevant_own", "relevant_cross", "relevant_all", "all_all") for order in ("small", "large")]
      table.append([f"`{spec}`", name, f"{math.log2(predicted_ratio(two_layer.Setting.parse(spec))):.2f}", *found])
  return table


def averages(rows: Iterable[Row]) -> list[list[str]]:
  """(v): the least average bits of an error-free pair of widths."""
  table = [["setting", "quantizer", "relevant ranked: rule", "reverse", "rule - reverse, paired",
            "irrelevant ranked too: rule", "reverse", "rule - reverse, paired"]]
  for spec, members in _quantized(rows).items():
    for quantizer, name in QUANTIZERS.items():
      line = [f"`{spec}`", name]
      for case in (f"{quantizer}_relevant_all", f"{quantizer}_all_all"):
        pairs = [(r[f"average_{case}_small"], r[f"average_{case}_large"]) for r in members]
        line += [*(_mean(members, f"average_{case}_{order}") for order in ("small", "large")), _show(
            mean_and_half_width(a - b for a, b in pairs if a is not None and b is not None))]
      table.append(line)
  return table


def dimensions(rows: Iterable[Row]) -> list[list[str]]:
  """(i): Lambda against d, with the slopes of log Lambda against log d."""
  kinds = ("frequent", "rare", "irrelevant")
  table = [["family", "d", "router norm at the start", *(f"Lambda {k}" for k in kinds)]]
  for name, by_dim in families(rows).items():
    for dim in sorted(by_dim):
      table.append([name, str(dim), f"{np.mean([r['router_norm_before'] for r in by_dim[dim]]):.3f}",
                    *(_mean(by_dim[dim], f"lambda_{k}", 4) for k in kinds)])
    table.append([name, "slope", "", *(_show(slope_and_half_width(by_dim, f"lambda_{k}")) for k in kinds)])
  return table


TABLES = {"learning": learning, "irrelevant": irrelevant, "dimensions": dimensions, "shifts": shifts, "needs": needs,
          "noises": noises, "savings": savings, "averages": averages}


def markdown(table: Sequence[Sequence[str]]) -> str:
  """A table in markdown; the first line is its head."""
  head, *body = [f"| {' | '.join(line)} |" for line in table]
  return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def text(rows: Sequence[Row]) -> str:
  """All tables, each under its name and what it shows."""
  return "\n\n".join(f"## {name}\n\n{function.__doc__}\n\n{markdown(function(rows))}"
                     for name, function in TABLES.items()) + "\n"
