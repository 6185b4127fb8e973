"""Does down deserve more bits than up?

Claim under test, of the abstract of "Automated Fine-Grained Mixture-of-Experts Quantization" (Findings of ACL 2025,
1386): down-projections need more precision than up-projections. Here, for every codec and on every model at hand:

  predicted   the share of experts whose Fisher x error, at 2 bits, is larger in down than in up, and than in gate
  measured    the loss when one projection of all experts has 2 bits and the others are as they were; and when one of
              the three has 3 bits and the others 2: the same average, another projection
  outliers    kurtosis of every output channel's weights, by projection: how unlike experts are

Command:   ./launch.sh sweep --config=experiments/down_vs_up.py --workdir=runs/down_vs_up
Hardware:  2 CPU cores, 3 GiB
Expected:  about ten minutes; two models with three calibration sets each, one folder a point. The last writes
           comparisons.jsonl and figures/down-vs-up.png beside them
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib import figure, ticker
from rich import console as rich_console
from rich import table as rich_table

from configs import quickstart
from experiments import paper_weaknesses
from moeq_jax import artifacts, codecs, progress, results, runs, workspace
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.evaluate import perplexity
from moeq_jax.report import figures

CHECKPOINTS = ("experiments/models/moeq-small", "experiments/models/moeq-experts64")
CODECS = ("rtn(group=64)", "hqq(group=64)", "gptq(group=64)")
PROJECTIONS = ("gate", "up", "down")
WIDTHS = (2, 3)
FULL = 16
ARMS = {f"only {name} at 2 bits": {p: 2 if p == name else FULL for p in PROJECTIONS} for name in PROJECTIONS} | {
    f"{name} at 3 bits, others at 2": {p: 3 if p == name else 2 for p in PROJECTIONS} for name in PROJECTIONS}
COMPARISONS = (("only {} at 2 bits", 1), ("{} at 3 bits, others at 2", -1))  # sign: above 0 says that down needs more
COLORS = {"gate": "#7a7a7a", "up": "#00507d", "down": "#c24e00"}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; takes no argument."""
  del arg
  config = quickstart.get_config()
  config.file = "experiments/down_vs_up.py"
  config.task = "experiment"
  config.calibration_seed = 0
  config.calibration = 16  # sequences of each domain
  config.evaluation = 16
  config.codecs = CODECS
  return config


def sweep(add) -> None:
  """One point per model and calibration set."""
  for checkpoint in CHECKPOINTS:
    for seed in (0, 1, 2):
      add({"checkpoint": checkpoint, "calibration_seed": seed})


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Measures one model with one calibration set into `rows.jsonl` and `losses.jsonl`; goes on where it was.

  Args:
    config: see `get_config`.
    workdir: of this point; what is compared over all points beside it goes where `runs.points` says.
  """
  subject = workspace.open_checkpoint(config.checkpoint, config.compute_dtype)
  calibration, evaluation = paper_weaknesses.read_text(config, subject.tokenizer)
  with progress.bar("calibrate", len(calibration)) as advance:
    stats = statistics.collect(subject.functions, subject.top, subject.blocks, calibration, advance=advance)
  ready, routed = candidates.shrink_unrouted(stats), stats.tokens > 0
  against = perplexity.reference(subject.functions, subject.top, subject.blocks, evaluation)
  stamp = {"model": subject.directory.name, "seed": config.calibration_seed,
           "config_hash": artifacts.digest(runs.plain(config))}
  done = {row["id"] for row in results.read(workdir / "losses.jsonl")}
  for name in config.codecs:
    codec = codecs.get(name)
    wanted = [arm for arm in ARMS if f"{arm}@{codec}" not in done]
    if not wanted:
      continue
    layers = []
    with progress.bar(f"encode {codec}", subject.shape[0]) as advance:
      for layer, block in enumerate(subject.sparse_blocks()):
        experts = subject.functions.experts(block)
        layers.append(candidates.encode_layer(experts, ready, layer, codec=codec, widths=WIDTHS))
        advance()
    fisher = np.stack([layer.errors["fisher"][..., 0] for layer in layers])[routed]  # [experts with tokens, P]
    gate, up, down = (fisher[:, PROJECTIONS.index(p)] for p in PROJECTIONS)
    results.append(workdir / "rows.jsonl", {
        "id": f"predicted@{codec}", "codec": str(codec), "experts": len(fisher), "unrouted": int((~routed).sum()),
        "down_above_up": float(np.mean(down > up)), "down_above_gate": float(np.mean(down > gate)),
        "median_down_by_up": float(np.median(down / up)), "cost_gate": float(gate.sum()), "cost_up": float(up.sum()),
        "cost_down": float(down.sum())} | stamp)
    with progress.bar(f"evaluate {codec}", len(wanted)) as advance:
      for arm in wanted:
        blocks = _blocks(subject, layers, codec, ARMS[arm])
        loss = perplexity.measure(subject.functions, subject.top, blocks, evaluation, against).loss
        delta, stderr = perplexity.paired(loss, against.loss)
        results.append(workdir / "rows.jsonl", {"id": f"{arm}@{codec}", "codec": str(codec), "arm": arm,
                                                "loss_delta": delta, "loss_delta_ci95": 1.96 * stderr} | stamp)
        results.append(workdir / "losses.jsonl", {"id": f"{arm}@{codec}", "model": stamp["model"], "arm": arm,
                                                  "codec": str(codec)}
                       | {f"sequence_{i:06d}": float(x) for i, x in enumerate(loss - against.loss)})
        advance(note=f"{arm}: {delta:+.4f}")
  artifacts.save_arrays(workdir / "kurtosis.npz", kurtosis(subject), {"model": stamp["model"]})
  summarise(*runs.points(workdir))


def _blocks(subject: workspace.Subject, layers: Sequence[artifacts.LayerCodes], codec: codecs.Codec,
            bits: Mapping[str, int]) -> list[Any]:
  """The model's blocks with the projections that have fewer than 16 bits as their codes stand for them."""
  placed, layer = list(subject.blocks), iter(layers)
  for place, block in enumerate(placed):
    if subject.functions.sparse(block):
      bank = next(layer).codes
      decoded = {}
      for name in (p for p in bank if bits[p] < FULL):
        chosen = codecs.Encoded(*(jnp.asarray(field[WIDTHS.index(bits[name])]) for field in bank[name]))
        decoded[name] = codecs.decode(chosen, codec.group, bank[name].codes.shape[2])
      placed[place] = subject.functions.with_experts(block, decoded)
  return placed


def kurtosis(subject: workspace.Subject) -> dict[str, np.ndarray]:
  """`{projection: [L, E, N]}`: E[(w - mean)^4] / var^2 of the weights of every output channel; 3 for Gaussian ones."""
  found: dict[str, list[np.ndarray]] = {name: [] for name in PROJECTIONS}
  for block in subject.sparse_blocks():
    for name, w in subject.functions.experts(block).items():
      w = np.asarray(w, np.float64)
      centred = w - w.mean(axis=1, keepdims=True)
      found[name].append((centred**4).mean(axis=1) / np.maximum((centred**2).mean(axis=1) ** 2, 1e-30))
  return {name: np.stack(parts) for name, parts in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------


def summarise(directory: Path, points: Sequence[Path]) -> None:
  """Compares down with up and with gate over all points: `comparisons.jsonl`, a table, and the figure."""
  path = directory / "comparisons.jsonl"
  path.unlink(missing_ok=True)
  stamp = {"config_hash": runs.hash_of(points)}
  losses: dict[tuple[str, str, str], list[np.ndarray]] = {}
  for point in points:
    for row in results.read(point / "losses.jsonl"):
      losses.setdefault((row["model"], row["codec"], row["arm"]), []).append(results.numbered(row, "sequence_"))
  shown = rich_table.Table("model", "codec", "what", "down minus", "nats", "of each set")
  for model, codec in sorted({key[:2] for key in losses}):
    for pattern, sign in COMPARISONS:
      for other in ("up", "gate"):
        sides = [losses.get((model, codec, pattern.format(name)), []) for name in ("down", other)]
        both = list(zip(*sides, strict=True))
        if not both:
          continue
        delta, stderr = perplexity.paired(*(sign * np.mean(part, axis=0) for part in zip(*both, strict=True)))
        row = {"id": f"{model}@{codec}: {pattern.format('down')} - {pattern.format(other)}", "model": model,
               "codec": codec, "against": other, "arm": pattern.format("down"), "down_needs_more": delta,
               "ci95": 1.96 * stderr, "sets": len(both),
               **{f"set_{i}": float(sign * (a - b).mean()) for i, (a, b) in enumerate(both)}} | stamp
        results.append(path, row)
        shown.add_row(model, codec, pattern.format("P"), other, f"{delta:+.4f} ± {1.96 * stderr:.4f}",
                      " ".join(f"{sign * (a - b).mean():+.4f}" for a, b in both))
  rich_console.Console(width=160).print(shown)
  _figure(directory, points)


def _figure(directory: Path, points: Sequence[Path]) -> None:
  """Left: what one projection alone costs, by codec; right: kurtosis of channels, expert by expert."""
  comparisons = results.read(directory / "comparisons.jsonl")
  rows = [row for point in points for row in results.read(point / "rows.jsonl") if "arm" in row]
  models = sorted({row["model"] for row in comparisons})
  if not models:
    return
  with figures.settled():
    fig = figure.Figure(figsize=(11, 3.6 * len(models)), layout="constrained")
    panels = fig.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(panels, models, strict=True):
      names = sorted({row["codec"] for row in rows if row["model"] == model}, key=list(CODECS).index)
      for number, projection in enumerate(PROJECTIONS):
        arm = f"only {projection} at 2 bits"
        wanted = [(model, codec, arm) for codec in names]
        values = [[r["loss_delta"] for r in rows if (r["model"], r["codec"], r["arm"]) == key] for key in wanted]
        left.bar(np.arange(len(names)) + 0.27 * (number - 1), [np.mean(v) for v in values], 0.25, label=projection,
                 color=COLORS[projection])
      left.set(title=f"{model}: loss with one projection at 2 bits", ylabel="nats per token above full precision")
      left.set_xticks(range(len(names)), names)
      left.legend()
      file = next(f for point in points if (f := point / "kurtosis.npz").is_file()
                  and artifacts.load_arrays(f)[1]["model"] == model)
      for projection, values in artifacts.load_arrays(file)[0].items():
        flat = values.reshape(-1, values.shape[-1])  # [experts, channels]
        flat = flat[np.argsort(np.median(flat, axis=1))]
        middle, high = np.median(flat, axis=1), np.quantile(flat, 0.99, axis=1)
        right.plot(middle, color=COLORS[projection], label=f"{projection}: median channel")
        right.plot(high, color=COLORS[projection], linewidth=0.8, linestyle="--", label=f"{projection}: 99%")
      right.set(title=f"{model}: kurtosis of output channels", xlabel="experts, by their median", ylabel="kurtosis",
                yscale="log")
      for which in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        which(ticker.FormatStrFormatter("%g"))
      right.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    (directory / "figures").mkdir(exist_ok=True)
    fig.savefig(directory / "figures" / "down-vs-up.png")
