"""Puts the runs of experiments/mixtral_track.py together: rows, rank correlations, paired differences, a figure.

Command:   PYTHONPATH=. .venv/bin/python -m experiments.mixtral_track_summary runs/mixtral_track
Writes:    experiments/results/mixtral_track.jsonl and mixtral_track_ranks.jsonl, docs/figures/mixtral-track.png;
           prints the tables of docs/mixtral_track.md

The folder holds one of a sweep's work directory for each model. Runs that are not finished are left out, and named.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import figure
from scipy import stats

from experiments import mixtral_track
from moeq_jax import artifacts, registry, results
from moeq_jax.report import damage as damage_lib
from moeq_jax.report import figures

ROOT = Path(__file__).resolve().parents[1]
BASE = {"codec": "gptq(group=64)", "router_bits": 16, "sequential": False, "calibration_set": 0}
RULE, REVERSE = mixtral_track.RULE, mixtral_track.REVERSE
OTHERS = (REVERSE, "random", "uniform", "tiers(router_norm_change, zeta=0)", *mixtral_track.THREE, "tiers(frequency)")
COLOURS = ("#00507d", "#c24e00", "#009e73", "#a3417a")

Losses = dict[str, list[np.ndarray]]


def runs(folder: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
  """`(model, config, work directory)` of every finished point."""
  for place in sorted(folder.glob("*/*/")):
    if (place / "finished.json").is_file():
      yield place.parent.name, json.loads((place / "config.json").read_text(encoding="utf-8")), place
    else:
      print(f"{place}: not finished, left out", file=sys.stderr)


def factor(config: Mapping[str, Any]) -> str:
  """What a point changes from the base, for example `router_bits=4`; `base` for nothing."""
  changed = [f"{name}={config[name]}" for name, usual in BASE.items() if config[name] != usual]
  return ", ".join(changed) or "base"


def losses(place: Path) -> dict[float, Losses]:
  """Per budget and method, the loss of every sequence of each of its draws."""
  rows = {row["id"]: row for row in results.read(place / "rows.jsonl")}
  found: dict[float, Losses] = {}
  for row in results.read(place / "losses.jsonl"):
    told = rows[row["id"]]
    if told["budget"] is not None:
      by_method = found.setdefault(told["budget"], {})
      by_method.setdefault(told["method"], []).append(results.numbered(row, "sequence_"))
  return found


def paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float]:
  """Mean difference in nats per token and half of its 95% interval, paired over sequences; draws are averaged first."""
  difference = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
  return float(difference.mean()), float(1.96 * difference.std(ddof=1) / np.sqrt(len(difference)))


def _few(count: int) -> float:
  """Half of a 95% interval of a mean of few values, in standard errors (Student's t)."""
  return float(stats.t.ppf(0.975, count - 1))


def ranks(model: str, place: Path) -> list[results.Row]:
  """For every score, its rank correlation with measured damage inside layers: mean over layers, and 95% interval.

  Scores keep the sign of their own quantity: a small norm change is a small number, so that the paper's rule wants a
  negative correlation for it.
  """
  report = json.loads((place / "report.json").read_text(encoding="utf-8"))
  if not report["damage"]:
    return []
  damage, found = damage_lib.Damage.parse(report["damage"]), []
  stamp = artifacts.digest(json.loads((place / "config.json").read_text(encoding="utf-8")))
  for name, values in report["scores"].items():
    sign = -1 if name.startswith("router_norm") else 1  # the report holds sensitivities by the paper's claim
    agreed = damage_lib.agreement(name, sign * np.array(values, np.float64), damage)
    layers = np.array([value for value in agreed.layers if value is not None])
    found.append({
        "id": f"{model}/{name}", "model": model, "score": name, "config_hash": stamp,
        "inside": agreed.inside, "over_all": agreed.over_all,
        "inside_ci95": float(_few(len(layers)) * layers.std(ddof=1) / np.sqrt(len(layers))), "layers": len(layers),
        "layers_positive": int((layers > 0).sum()), "damage_bits": damage.bits, "damage_tokens": damage.tokens,
        "damage_noise_share": damage.noise_share(), "chance": damage_lib.chance(damage),
    })
  return found


def parts(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Which of the evaluated sequences are of each domain, and `all` of them, `[n]` bool each."""
  domains = sorted(config["domains"])
  of = np.repeat(domains, config["evaluation"])
  return {"all": np.ones(len(of), bool)} | {domain: of == domain for domain in domains}


def collect(folder: Path) -> tuple[list[results.Row], list[results.Row], list[dict[str, Any]]]:
  """All rows; the rank correlations; and the paired differences of the rule from its reverse, random and uniform."""
  rows, ranked, differences = [], [], []
  for model, config, place in runs(folder):
    told = {"model": model, "factor": factor(config)} | {name: config[name] for name in BASE if name != "codec"}
    rows += [row | told | {"id": f"{model}/{place.name}/{row['id']}"} for row in results.read(place / "rows.jsonl")]
    ranked += ranks(model, place)
    for budget, by_method in losses(place).items():
      for other in [other for other in OTHERS if RULE in by_method and registry.canonical(other) in by_method]:
        ours, theirs = by_method[RULE], by_method[registry.canonical(other)]
        for domain, own in parts(config).items():
          mean, half = paired([loss[own] for loss in ours], [loss[own] for loss in theirs])
          differences.append({"model": model, "factor": factor(config), "budget": budget, "against": other,
                              "domain": domain, "difference": mean, "ci95": half})
  return rows, ranked, differences


def full_precision(place: Path) -> np.ndarray:
  """The loss of every sequence in full precision, by which sequences are known again."""
  names = {row["id"] for row in results.read(place / "rows.jsonl") if row["budget"] is None}
  return next(results.numbered(row, "sequence_") for row in results.read(place / "losses.jsonl") if row["id"] in names)


def over_sets(folder: Path, model: str) -> dict[str, tuple[float, float, int, int]]:
  """The rule minus its reverse and minus uniform at 2.5 bits, averaged over the sets of calibration windows: mean, half
  of a 95% interval, number of sets and of sequences. Only sequences that all sets were evaluated on count: the base
  keeps some of its held-out windows for damage, and its other windows of a domain are then others."""
  sets: Losses = {}
  full: list[np.ndarray] = []
  for name, config, place in runs(folder):
    if name == model and factor(config).split("=")[0] in ("base", "calibration_set"):
      if own := losses(place).get(2.5, {}):
        full.append(full_precision(place))
      for method, draws in own.items():
        sets.setdefault(method, []).append(np.mean(draws, axis=0))
  same = np.ptp(np.array(full), axis=0) < 1e-5 if full else None
  mine = {method: [values[same] for values in found] for method, found in sets.items()}
  others = [other for other in (REVERSE, "uniform") if other in sets]
  return {other: (*paired(mine[RULE], mine[other]), len(sets[other]), int(same.sum())) for other in others}


def write(path: Path, rows: Sequence[results.Row]) -> None:
  """Rows into a file, sorted by id."""
  lines = [json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in sorted(rows, key=lambda row: row["id"])]
  artifacts.write_bytes(path, "".join(lines).encode())


def picture(ranked: Sequence[results.Row], differences: Sequence[Mapping[str, Any]]) -> figure.Figure:
  """Left: rank correlation of scores with damage, by model. Right: the rule minus its reverse under every factor."""
  models = sorted({row["model"] for row in differences})
  colour = dict(zip(models, COLOURS, strict=False))
  with figures.settled():
    fig = figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    _dots(left, models, colour, [(row["model"], row["score"], row["inside"], row["inside_ci95"]) for row in ranked])
    left.set_title("Rank correlation with measured damage, inside layers")
    left.set_xlabel("Spearman's ρ, mean over layers with 95% interval")
    kept = [d for d in differences if d["against"] == REVERSE and d["domain"] == "all"]
    name = lambda d: d["factor"] if d["budget"] == 2.5 else f"{d['budget']:g} bits"
    _dots(right, models, colour, [(d["model"], name(d), d["difference"], d["ci95"]) for d in kept])
    right.set_title("Loss of the paper's order minus its reverse")
    right.set_xlabel("nats per token, 95% interval (above 0: against the rule)")
    right.legend(loc="lower right")
  return fig


def _dots(axes: Any, models: Sequence[str], colour: Mapping[str, str], points: Sequence[tuple]) -> None:
  """A line of `axes` for each label, a dot with its interval for each model."""
  labels = list(dict.fromkeys(label for _, label, _, _ in points))
  for place, model in enumerate(models):
    own = [(labels.index(label), x, half) for name, label, x, half in points if name == model]
    if own:
      y, x, half = np.array(own, float).T
      axes.errorbar(x, y + 0.18 * (place - (len(models) - 1) / 2), xerr=half, fmt="o", color=colour[model], label=model,
                    markersize=4.5, elinewidth=1.2)
  axes.axvline(0, color="#3c4043", linewidth=0.8)
  axes.set_yticks(range(len(labels)), labels)
  axes.invert_yaxis()


def tables(rows: Sequence[results.Row], ranked: Sequence[results.Row], differences: Sequence[Mapping[str, Any]],
           folder: Path) -> str:
  """The tables of the text, as Markdown."""
  signed = lambda x, half: f"{x:+.4f} ± {half:.4f}"
  lines = ["| model | factor | bits | minus | domain | nats per token |", "|---|---|---|---|---|---|"]
  lines += [f"| {d['model']} | {d['factor']} | {d['budget']:g} | {d['against']} | {d['domain']} |"
            f" {signed(d['difference'], d['ci95'])} |" for d in differences]
  lines += ["", "| model | score | inside | layers above 0 | over all |", "|---|---|---|---|---|"]
  lines += [f"| {r['model']} | {r['score']} | {r['inside']:+.2f} ± {r['inside_ci95']:.2f} |"
            f" {r['layers_positive']} of {r['layers']} | {r['over_all']:+.2f} |" for r in ranked]
  domains = sorted({name for row in rows for name in row if name.startswith("loss_") and "delta" not in name})
  lines += ["", f"| model | factor | bits | method | loss | KL | routers agree | {' | '.join(domains)} |",
            "|---" * (7 + len(domains)) + "|"]
  for row in rows:
    cells = [f"{row[name]:.4f}" if row.get(name) is not None else "" for name in domains]
    lines.append(f"| {row['model']} | {row['factor']} | {row['budget'] or 16:g} | {row['method']} |"
                 f" {signed(row['loss_delta'], row['loss_delta_ci95'])} | {row['kl']:.4f} |"
                 f" {row['router_agreement']:.3f} | {' | '.join(cells)} |")
  for model in sorted({row["model"] for row in rows}):
    lines += ["", *(f"{model}: rule minus {other}, mean of {count} calibration sets on {size} common sequences:"
                    f" {signed(mean, half)}" for other, (mean, half, count, size) in over_sets(folder, model).items())]
  return "\n".join(lines)


def main(folder: Path) -> None:
  """Reads the runs in `folder` and writes everything.

  Raises:
    ValueError: no finished run is there.
  """
  rows, ranked, differences = collect(folder)
  if not rows:
    raise ValueError(f"{folder}: no finished run of experiments/mixtral_track.py; run its sweep first")
  write(ROOT / "experiments" / "results" / "mixtral_track.jsonl", rows)
  write(ROOT / "experiments" / "results" / "mixtral_track_ranks.jsonl", ranked)
  picture(ranked, differences).savefig(ROOT / "docs" / "figures" / "mixtral-track.png", metadata={"Software": None})
  print(tables(rows, ranked, differences, folder))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
