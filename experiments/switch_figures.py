"""Figures and tables of the Switch track, from the folders that its runs leave.

Command:   PYTHONPATH=. .venv/bin/python -m experiments.switch_figures runs/switch
           (with pretrained/, finetuned/seed=N/ and track/POINT/ inside, as the docstrings of the two configs of the
           training and of experiments/switch_track.py have them); a second argument names another folder in place of
           track/, such as xsum/ or one_bit/, whose files have that name, too
Writes:    docs/figures/switch_*.png, experiments/results/switch_track*.jsonl; prints the tables in Markdown
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cm, colormaps, colors, figure

from moeq_jax import artifacts, registry
from moeq_jax.evaluate import perplexity, rouge
from moeq_jax.models import convert
from moeq_jax.report import figures
from moeq_jax.switch_track import correlations, measure

ROOT = Path(__file__).resolve().parents[1]
ORDERS = {  # method -> label, colour
    "tiers(router_norm_change, zeta=0)": ("norm change", "#c24e00"),
    "tiers(router_norm_change)": ("norm change + MaxVar", "#e69f00"),
    "tiers(router_norm_change, reverse=True, zeta=0)": ("norm change, reversed", "#a3417a"),
    "tiers(router_norm, zeta=0)": ("final norm", "#d8a070"),
    "tiers(frequency, zeta=0)": ("frequency", "#009e73"),
    "tiers(gate_weight, zeta=0)": ("gate weight", "#66c5ab"),
    "random": ("random (mean of draws)", "#7a7a7a"),
    "knapsack(router_grad_error)": ("knapsack: router gradient x error", "#00507d"),
    "knapsack(output_error)": ("knapsack: output error", "#56b4e9"),
    "uniform": ("uniform", "#000000"),
}
REFERENCE = "tiers(router_norm_change, zeta=0)"

Run = dict[str, Any]  # {"rows": [row], "examples": {id: Examples}, "summary": summary.json}


def read(folder: Path) -> Run:
  """A run of the track: rows, results of every pair, and summary."""
  rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
  load = lambda row: measure.Examples.load(folder / "examples" / f"{row['id']}.npz")
  return {"rows": rows, "examples": {row["id"]: load(row) for row in rows},
          "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8"))}


def plans(run: Run, method: str, budget: float) -> list[dict[str, Any]]:
  """The rows of a method at a budget: one, or one a draw."""
  same = registry.canonical(method)
  return [r for r in run["rows"] if r["budget"] == budget and registry.canonical(r["method"]) == same]


def values(run: Run, method: str, budget: float, field: str) -> np.ndarray | None:
  """`loss` (nats, summed over a pair's targets) or `rouge2` of every pair, the mean over draws; None if not there."""
  found = [run["examples"][row["id"]] for row in plans(run, method, budget)]
  arrays = [e.loss if field == "loss" else e.rouge[:, rouge.KINDS.index(field)] for e in found]
  arrays = [array for array in arrays if len(array)]
  return np.mean(arrays, axis=0) if arrays else None


def budgets(runs: Sequence[Run]) -> list[float]:
  """All budgets, ascending."""
  return sorted({row["budget"] for run in runs for row in run["rows"] if row["budget"]})


def curve(runs: Sequence[Run], method: str, field: str) -> tuple[list[float], np.ndarray, np.ndarray]:
  """Budgets of a method, the mean over seeds of the field of its rows, and the deviation over seeds."""
  shown, means, spread = [], [], []
  for budget in budgets(runs):
    seeds = [[row[field] for row in plans(run, method, budget) if field in row] for run in runs]
    if all(seeds):
      own = [float(np.mean(seed)) for seed in seeds]
      shown.append(budget)
      means.append(np.mean(own))
      spread.append(np.std(own, ddof=1) if len(own) > 1 else 0.0)
  return shown, np.array(means), np.array(spread)


def against_bits(runs: Sequence[Run], field: str, title: str, axis: str) -> bytes:
  """The figure of a difference to full precision against the budget: mean and deviation over seeds of each order."""
  with figures.settled():
    picture = figure.Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = picture.add_subplot()
    for place, (method, (label, colour)) in enumerate(ORDERS.items()):
      x, y, spread = curve(runs, method, field)
      if x:
        line = "none" if method == "uniform" else "--" if method == "random" else "-"
        axes.errorbar(np.array(x) + 0.004 * (place - 4.5), y, spread, label=label, color=colour,
                      linestyle=line, marker=figures.MARKERS[place], markersize=5, capsize=2, linewidth=1.4)
    axes.axhline(0.0, color="#9aa0a6", linestyle=":", label="full precision")
    axes.set(xlabel="nominal bits per expert weight", ylabel=axis, title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figures.picture(field, title, picture).png


def norm_paths(logs: Mapping[str, Sequence[Mapping[str, Any]]], frequency: np.ndarray) -> bytes:
  """The figure of router norms over training: rows are phases, columns MoE layers, colours how often an expert is used.

  Args:
    logs: rows of the training log by phase.
    frequency: `[L, E]` of the fine-tuned model.
  """
  with figures.settled():
    layers = frequency.shape[0]
    picture = figure.Figure(figsize=(3.0 * layers + 1.0, 2.8 * len(logs)), layout="constrained")
    grid = picture.subplots(len(logs), layers, sharey="row", squeeze=False)
    scale = colors.LogNorm(max(frequency[frequency > 0].min(), 1e-3), frequency.max())
    palette = colormaps["viridis"]
    for (phase, rows), line in zip(logs.items(), grid, strict=True):
      steps, norms = [row["step"] for row in rows], np.array([row["router_norm"] for row in rows])
      for layer, axes in enumerate(line):
        for expert in np.argsort(frequency[layer]):
          colour = palette(scale(max(frequency[layer, expert], scale.vmin)))
          axes.plot(steps, norms[:, layer, expert], color=colour, linewidth=0.9)
        axes.set_title(f"MoE layer {layer}")
        axes.set_xlabel("step")
      line[0].set_ylabel(f"{phase}\nnorm of router row")
    picture.colorbar(cm.ScalarMappable(scale, palette), ax=grid, label="share of tokens", shrink=0.8, format="%g")
    return figures.picture("router_norms", "norms of router rows over training", picture).png


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], field: str, digits: int) -> str:
  """Mean ± deviation over seeds of a field, a line for each order and a column for each budget."""
  columns = budgets(runs)
  lines = ["| order | " + " | ".join(f"{b:g}" for b in columns) + " |", "|---" * (len(columns) + 1) + "|"]
  for method, (label, _) in ORDERS.items():
    x, y, spread = curve(runs, method, field)
    cells = {b: f"{m:.{digits}f} ± {s:.{digits}f}" for b, m, s in zip(x, y, spread, strict=True)}
    lines.append(f"| {label} | " + " | ".join(cells.get(b, "") for b in columns) + " |")
  return "\n".join(lines)


def paired_table(runs: Sequence[Run], field: str, digits: int, factor: float = 1.0) -> str:
  """Each order minus norm change: mean over seeds and pairs, and the 95% interval over pairs."""
  columns = [b for b in budgets(runs) if all(plans(run, REFERENCE, b) for run in runs)]
  lines = ["| order minus norm change | " + " | ".join(f"{b:g}" for b in columns) + " |",
           "|---" * (len(columns) + 1) + "|"]
  for method, (label, _) in ORDERS.items():
    cells = []
    for budget in columns:
      pairs = [(values(run, method, budget, field), values(run, REFERENCE, budget, field)) for run in runs]
      if method == REFERENCE or any(own is None or other is None for own, other in pairs):
        cells.append("")
        continue
      own, other = (factor * np.mean(side, axis=0) for side in zip(*pairs, strict=True))
      delta, stderr = perplexity.paired(own, other)
      cells.append(f"{delta:+.{digits}f} ± {1.96 * stderr:.{digits}f}")
    if any(cells):
      lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def correlation_table(runs: Sequence[Run]) -> str:
  """Spearman's rank correlations, mean over layers, a column for each seed."""
  names = list(runs[0]["summary"]["correlations"])
  lines = ["| rank correlation inside layers | " + " | ".join(f"seed {i}" for i in range(len(runs))) + " | mean |",
           "|---" * (len(runs) + 2) + "|"]
  for name in names:
    seeds = [run["summary"]["correlations"][name]["mean"] for run in runs]
    cells = " | ".join("" if v is None else f"{v:+.2f}" for v in seeds)
    known = [v for v in seeds if v is not None]
    lines.append(f"| {name} | {cells} | {np.mean(known):+.2f} |" if known else f"| {name} | {cells} | |")
  return "\n".join(lines)


def since_random_weights(place: Path, runs: Sequence[Run]) -> str:
  """Spearman's rank correlations of the norm change over both trainings, from random routers to fine-tuned ones."""
  lines = []
  for seed, run in enumerate(runs):
    scores = run["summary"]["scores"]
    norms = np.array(scores["router_norm"])
    before = convert.load_routers(place / "pretrained/model/router_init.safetensors", (*norms.shape, width(place)))
    change = norms - np.linalg.norm(before, axis=-1)
    for other in ("frequency", "measured damage"):
      layers = correlations.inside(change, np.array(scores[other]))
      lines.append(f"seed {seed}: norm change since random weights ~ {other}: {correlations.mean(layers):+.2f}")
  return "\n".join(lines)


def width(place: Path) -> int:
  """Columns of a router of the pre-trained model."""
  return json.loads((place / "pretrained/model/config.json").read_text(encoding="utf-8"))["d_model"]


def main(argv: Sequence[str]) -> None:
  """Reads the folders and writes figures, rows and tables."""
  place, folder = Path(argv[1]), argv[2] if len(argv) > 2 else "track"
  runs = [read(path.parent) for path in sorted((place / folder).glob("*/rows.jsonl"))]
  if not runs:
    raise SystemExit(f"{place / folder}: no folder with rows.jsonl; run experiments/switch_track.py first, with this"
                     " --workdir")
  name = "" if folder == "track" else f"_{folder}"
  lines = [json.dumps(row | {"id": f"{row['model']}: {row['id']}"}, sort_keys=True)
           for run in runs for row in run["rows"]]
  where = f" ({folder})" if name else ""
  pictures = {}
  if len(budgets(runs)) > 1:
    pictures["loss"] = against_bits(runs, "loss_delta", f"Switch Transformer: increase of held-out loss{where}",
                                    "nats per target token")
  if not name:
    pictures["rouge2"] = against_bits(runs, "rouge2_delta", "Switch Transformer: change of ROUGE-2", "points of 100")
    log = lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    logs = {"pre-training": log(place / "pretrained/model/training_log.jsonl"),
            "fine-tuning, seed 0": log(place / "finetuned/seed=0/model/training_log.jsonl")}
    pictures["router_norms"] = norm_paths(logs, np.array(runs[0]["summary"]["scores"]["frequency"]))
  artifacts.write_bytes(ROOT / f"experiments/results/switch_track{name}.jsonl", ("\n".join(lines) + "\n").encode())
  for kind, png in pictures.items():
    artifacts.write_bytes(ROOT / f"docs/figures/switch{name}_{kind}.png", png)
  for title, text in (
      ("Full precision", _full(runs)), ("Loss increase", table(runs, "loss_delta", 5)),
      *((kind, table(runs, kind, 2)) for kind in rouge.KINDS),
      ("Loss, paired", paired_table(runs, "loss", 5, 1 / _targets(runs[0]))),
      ("ROUGE-2, paired", paired_table(runs, "rouge2", 2, 100)),
      ("ROUGE-1, paired", paired_table(runs, "rouge1", 2, 100)), ("Correlations", correlation_table(runs)),
      ("Norm change over both trainings", since_random_weights(place, runs)),
      ("Full precision with the text of another pair", _other_texts(runs))):
    print(f"\n{title}\n\n{text}")


def _full(runs: Sequence[Run]) -> str:
  """The figures of full precision, a line for each seed."""
  fields = ("loss", *rouge.KINDS, "empty")
  return "\n".join(", ".join(f"{field} {run['rows'][0][field]:.4g}" for field in fields) for run in runs)


def _other_texts(runs: Sequence[Run]) -> str:
  """What each seed loses with them, in nats per target token."""
  found = [run["summary"]["other_texts"] for run in runs]
  return ", ".join(f"{one['loss_delta']:+.3f} ± {one['loss_delta_ci95']:.3f}" for one in found)


def _targets(run: Run) -> float:
  """Mean targets of a pair."""
  return float(run["examples"]["full"].loss.mean() / run["rows"][0]["loss"])


if __name__ == "__main__":
  main(sys.argv)
