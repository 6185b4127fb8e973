"""The task `theory`: two-layer models of many settings and seeds, trained, measured and quantized into rows.

`rows.jsonl` holds, for each setting (a spec of `theory.two_layer.Setting`), one row per seed and, if the setting is
quantized, one row per grid of widths:

  kind                          `seed` or `grid`
  spec, seed                    of the model; a grid row is over all seeds
  lambda_*, activation_*, ..    as in `theory/measures.py`; `lambda_order` and `lambda_irrelevant_below` are 1 where all
                                rare experts have a smaller Lambda than all frequent ones, and all irrelevant ones a
                                smaller one than all rare
  max_variance_ratio[_relevant] greatest MaxVar divided by the least, of all (of the relevant) experts
  square_<quantizer>_<kind>_<w> mean square of the relative error of h_s(own token) at width number w
  need_<quantizer>_<experts>    bits from which on no test input is wrong, if only these experts are quantized
  wrong_rare_<quantizer>        of the inputs that are wrong if only frequent experts are, over all widths: share with
                                the rare token
  noise_<quantizer>_<experts>_<source>_<bits>   root mean square, over inputs with the rare token, of the error of y f
  saved_, average_<quantizer>_<ranked>_<source>_<order>   as in `theory/plans.py`
  free                          grid rows: in how many of the `draws` (seeds x bases) no input is wrong, rows b_l
                                separated by `;`, columns b_h by blanks
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from moeq_jax import artifacts, progress, results, runs
from moeq_jax.report import theory as theory_tables
from moeq_jax.report import theory_figures
from moeq_jax.theory import measures, plans, quantization, two_layer

VERSION = 1
# What is ranked, with which part of the error: irrelevant experts are in the ranking (`all`), or out of it and in full
# precision (`relevant`).
CASES = (("relevant", "all"), ("relevant", "own"), ("relevant", "cross"), ("all", "all"))
NOISE_BITS = (2, 4)

Fields = dict[str, Any]


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Measures every setting into `workdir/rows.jsonl`, then writes `tables.md` and `figures/`.

  A setting's rows are written when all its seeds are measured; a killed run begins again with the setting it was at.

  Raises:
    ValueError: a setting that cannot be read, or is given twice; or no seeds.
  """
  specs = [*config.quantized, *config.trained]
  settings = {spec: two_layer.Setting.parse(spec) for spec in specs}
  if len(settings) < len(specs) or config.seeds < 2:
    raise ValueError("config.quantized and config.trained name each setting once, and config.seeds is at least 2")
  path, stamp = workdir / "rows.jsonl", {"config_hash": artifacts.digest(runs.plain(config)), "version": VERSION}
  found = results.read(path)
  if any(row.get(name) != value for row in found for name, value in stamp.items()):
    path.unlink()  # of another version
  done = {row["spec"] for row in results.read(path) if row["id"] == _last(row["spec"], config)}
  work = len(specs) * config.seeds
  with progress.bar("theory", work, start=len(done & set(specs)) * config.seeds) as advance:
    for spec, setting in settings.items():
      if spec not in done:
        for row in measure(spec, setting, config, spec in config.quantized, advance):
          results.append(path, row | stamp)
  rows = results.read(path)
  artifacts.write_bytes(workdir / "tables.md", theory_tables.text(rows).encode())
  for picture in theory_figures.pictures(rows):
    artifacts.write_bytes(workdir / "figures" / f"{picture.name}.png", picture.png)


def _last(spec: str, config: ml_collections.ConfigDict) -> str:
  """The id of the last row of a setting."""
  if spec not in config.quantized:
    return f"{spec}/{config.seeds - 1}"
  return "/".join([spec, list(quantization.QUANTIZERS)[-1], *CASES[-1], plans.ORDERS[-1]])


def measure(spec: str, setting: two_layer.Setting, config: ml_collections.ConfigDict, quantize: bool,
            advance: Callable[..., None]) -> list[results.Row]:
  """The rows of one setting: of all seeds, and of all grids.

  Raises:
    ValueError: training did not reach the setting's margin.
  """
  trained = two_layer.train(setting, range(config.seeds), config.test, config.every, config.most,
                            lambda note: advance(f"{spec}: {note}", steps=0))
  if not trained.reached.all():
    late = np.flatnonzero(~trained.reached).tolist()
    raise ValueError(f"{spec}: seeds {late} did not reach margin {setting.margin} in config.most={config.most} steps; "
                     "more steps, a smaller margin, or fewer tokens")
  rows, grids = [], {}
  for seed in range(config.seeds):
    before, after = (jax.tree.map(lambda a, n=seed: a[n], p) for p in (trained.before, trained.after))
    test = two_layer.test_batch(seed, setting, config.test)
    row = {"id": f"{spec}/{seed}", "kind": "seed", "spec": spec, "seed": seed, "steps": int(trained.steps[seed])}
    row |= _orders(measures.row(before, after, setting, test))
    if quantize:
      row |= _quantized(seed, setting, before, after, test, config.bases, grids)
    rows.append(row)
    advance(spec)
  draws = config.seeds * config.bases
  return rows + [{"id": "/".join([spec, *case]), "kind": "grid", "spec": spec, "draws": draws, "free": _text(grid)} |
                 dict(zip(("quantizer", "ranked", "source", "order"), case, strict=True))
                 for case, grid in grids.items()]


def _orders(fields: Fields) -> Fields:
  """Adds whether Lambda orders the experts as their frequencies, and irrelevant ones below."""
  return fields | {
      "lambda_order": int(fields["lambda_rare_greatest"] < fields["lambda_frequent_least"]),
      "lambda_irrelevant_below": int(fields["lambda_irrelevant_greatest"] < fields["lambda_rare_least"])}


def _text(grid: np.ndarray) -> str:
  return ";".join(" ".join(map(str, line)) for line in grid.tolist())


def _quantized(seed: int, setting: two_layer.Setting, before: two_layer.Params, after: two_layer.Params,
               test: two_layer.Batch, bases: int, grids: dict[tuple[str, ...], np.ndarray]) -> Fields:
  """The fields of a seed's row that quantization gives, means over the bases; counts error-free pairs into `grids`."""
  found: dict[str, list[float | None]] = {}
  change = measures.norm_change(before, after)
  for draw in range(bases):
    turn = jnp.asarray(quantization.basis(seed, setting.dim, draw))
    dense = jnp.einsum("dt,etf->edf", turn, after.experts)
    fields = _variances(np.asarray(dense), setting)
    for name in quantization.QUANTIZERS:
      rounded = quantization.quantized(after.experts, turn, jnp.asarray(quantization.LEVELS), name)
      parts = quantization.parts(after, setting, test.tokens, rounded)
      fields |= _relative(name, quantization.relative_errors(after, setting, rounded), setting)
      fields |= _alone(name, parts, setting, test)
      fields |= _plans(name, parts, change, setting, test, grids)
    for key, value in fields.items():
      found.setdefault(key, []).append(value)
  return {key: _mean(values) for key, values in found.items()}


def _mean(values: list[float | None]) -> float | None:
  """The mean of what is not None, rounded to six digits; None if nothing is left."""
  known = [v for v in values if v is not None and np.isfinite(v)]
  return float(f"{np.mean(known):.6g}") if known else None


def _variances(dense: np.ndarray, setting: two_layer.Setting) -> Fields:
  found = measures.max_variance(dense)
  relevant = found[setting.own_feature() >= 0]
  return {"max_variance_ratio": found.max() / found.min(),
          "max_variance_ratio_relevant": relevant.max() / relevant.min()}


def _relative(name: str, errors: np.ndarray, setting: two_layer.Setting) -> Fields:
  """Mean squares of the relative errors `[W, E]` of the own tokens, for each width and kind."""
  fields: Fields = {}
  for kind in ("frequent", "rare"):
    squares = errors[:, measures.experts_of(setting)[kind]] ** 2
    known = squares[:, np.isfinite(squares).all(0)]  # without experts that no neuron answers their token in
    fields |= {f"square_{name}_{kind}_{w:02d}": float(known[w].mean()) if known.size else None
               for w in range(len(known))}
  return fields


def _alone(name: str, parts: quantization.Parts, setting: two_layer.Setting, test: two_layer.Batch) -> Fields:
  """What happens if experts of one kind alone are quantized."""
  kinds, labels = measures.experts_of(setting), np.asarray(test.labels)
  outputs = plans.select(parts, "all")
  everyone = np.ones(setting.experts, bool)
  fields: Fields = {f"need_{name}_{kind}": plans.needed(outputs, labels, of)
                    for kind, of in {**kinds, "every": everyone}.items()}
  rare = setting.features()[1][np.asarray(test.feature)]
  of = kinds["frequent"]
  wrong = labels * (outputs[:-1, of].sum(1) + outputs[-1, ~of].sum(0)) <= 0
  fields[f"wrong_rare_{name}"] = float(wrong[:, rare].sum() / wrong.sum()) if wrong.any() else None
  for kind in ("frequent", "rare"):
    for source, part in zip(("own", "cross"), parts, strict=True):
      for bits in NOISE_BITS:
        error = (part[quantization.LEVELS.index(2**bits)] - part[-1])[kinds[kind]].sum(0)[rare]
        fields[f"noise_{name}_{kind}_{source}_{bits}"] = float(np.sqrt(np.mean(error**2))) if rare.any() else None
  return fields


def _plans(name: str, parts: quantization.Parts, change: np.ndarray, setting: two_layer.Setting,
           test: two_layer.Batch, grids: dict[tuple[str, ...], np.ndarray]) -> Fields:
  """Both orders under every case; error-free pairs are counted into `grids`."""
  fields: Fields = {}
  relevant, labels = ~measures.experts_of(setting)["irrelevant"], np.asarray(test.labels)
  for ranked, source in CASES:
    members = relevant if ranked == "relevant" else np.ones_like(relevant)
    outputs = plans.select(parts, source)
    for order in plans.ORDERS:
      high = plans.high_experts(change, members, order)
      wrong = plans.errors(outputs, labels, high, members & ~high)
      case = (name, ranked, source, order)
      grids[case] = grids.get(case, 0) + (wrong == 0).astype(int)
      saving = plans.savings(wrong)
      fields[f"saved_{name}_{ranked}_{source}_{order}"] = saving.saved
      fields[f"average_{name}_{ranked}_{source}_{order}"] = saving.average
  return fields
