"""What the weaknesses of arXiv 2604.06515 and of its official code change, where moeq-small can tell.

Claims under test, one arm against another, everything else equal (docs/paper.md has them one by one):

  gptq       GPTQ without feedback inside blocks, and with the official range search, is worse at 1 to 3 bits
  maxvar     the variance of the largest-norm row is not the largest variance
  final      the final norm ranks as the norm change does
  variance   high variance first or low variance first
  levels     three levels at 1.75 bits, by the text's counts and by the code's
  promotion  several promoted experts in router order or reversed
  reversed   the small norm change first, or the large one
  router     routers quantized to 8 and to 4 bits
  layers     the same score, the same counts in every layer or one budget for all layers

Command:   ./launch.sh sweep --config=experiments/paper_weaknesses.py --workdir=runs/paper_weaknesses
           `:light` is round-to-nearest on less text: a minute, without the claim on GPTQ; `:matrices` compares GPTQ's
           variants by the output error of one layer: half a minute
Hardware:  2 CPU cores, 3 GiB
Expected:  about a quarter of an hour on idle cores; three calibration sets, one folder each. The last prints the
           comparisons; rows, comparisons and rank correlations are then in runs/paper_weaknesses/all.jsonl, which is
           experiments/results/paper_weaknesses.jsonl
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.stats
from rich import console as rich_console
from rich import table as rich_table

from configs import common, quickstart
from moeq_jax import artifacts, codecs, data, progress, results, runs, scores, workspace
from moeq_jax.allocate import methods, tiers
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.evaluate import perplexity

WIDTHS = (1, 2, 3)
OFFICIAL = "gptq_official(group=128)"
CODECS = ("gptq(group=128)", OFFICIAL, "gptq_official(group=128, feedback=always)",
          "gptq_official(group=128, search=squared)", "rtn(group=128)")
CHANGE, NORM = "router_norm_change", "router_norm"
SEEDS = (0, 1, 2)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `light` or `matrices`."""
  arg = common.parse_arg(arg, light=False, matrices=False)
  config = quickstart.get_config()
  config.file = "experiments/paper_weaknesses.py"
  config.task = "experiment"
  config.calibration_seed = 0
  config.evaluation = 16  # sequences of each domain
  config.codecs = CODECS  # the first has all arms, the others uniform widths
  config.matrices = arg.matrices
  if arg.light or arg.matrices:
    config.update(calibration=8, evaluation=8, batch=24)
  if arg.light:
    config.update(codecs=("rtn(group=128)",))
  return config


def sweep(add) -> None:
  """One point per calibration set: other windows of the training text."""
  for seed in SEEDS:
    add({"calibration_seed": seed})


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
  """A plan to be measured.

  Attributes:
    name: of the arm, unique with codec and budget.
    codec: spec.
    budget: bits asked for.
    bits: `[L, E]`, or None for full precision.
    router_bits: of the routers; 16 leaves them as they are.
  """

  name: str
  codec: str
  budget: float
  bits: np.ndarray | None
  router_bits: int = 16


# What is compared under one codec: claim, budgets, arm, the arm that it is held against.
COMPARISONS = [
    *(("router", (2, 3), f"uniform, routers at {r} bits", "uniform") for r in (8, 4)),
    *(("router", (16,), f"full precision, routers at {r} bits", "full precision") for r in (8, 4)),
    *(("maxvar", (2, 2.5), f"zeta {z:g}, MaxVar of the largest-norm row", f"zeta {z:g}") for z in (1.5, 2)),
    *(("maxvar", (2, 2.5), f"zeta {z:g}", "norm change") for z in (1.5, 2, 3)),
    ("final", (2, 2.5), "final norm", "norm change"),
    ("variance", (2, 2.5), "low variance first", "high variance first"),
    ("variance", (2, 2.5), "norm change", "high variance first"),
    ("reversed", (2, 2.5), "norm change, large first", "norm change"),
    ("levels", (1.75,), "three levels, code", "three levels, paper"),
    ("levels", (1.75,), "two levels", "three levels, paper"),
    ("levels", (2.5,), "three levels, paper", "norm change"),
    *(("promotion", (2, 2.5), f"zeta {z:g}, reversed", f"zeta {z:g}") for z in (1.5, 2)),
    *(("layers", (2, 2.5), f"knapsack({s})", f"tiers({s})") for s in (CHANGE, "output_error")),
]
# Codecs that are compared at uniform widths.
_NAMES = [str(codecs.get(name)) for name in CODECS]  # as ids have them
CODEC_PAIRS = [*((other, _NAMES[0]) for other in _NAMES[1:]), (_NAMES[1], _NAMES[2]), (_NAMES[1], _NAMES[3])]


def arms(codec: str, evidence: scores.Evidence, everything: bool) -> list[Arm]:
  """The arms of one codec: uniform widths, and all others if `everything` is asked for."""
  shape = evidence.routers.shape[:2]
  found = [Arm("uniform", codec, float(b), np.full(shape, b)) for b in WIDTHS]
  if not everything:
    return found
  found += [dataclasses.replace(arm, name=f"uniform, routers at {bits} bits", router_bits=bits)
            for arm in found[1:] for bits in (8, 4)]
  found += [Arm(f"full precision, routers at {bits} bits", codec, 16.0, None, bits) for bits in (8, 4)]
  found.append(Arm("full precision", codec, 16.0, None))
  score = {name: scores.sensitivity(name, evidence) for name in (
      CHANGE, NORM, "max_var", "max_var(variant='code')", "output_error")}
  order = {name: tiers.order(values, descending=True) for name, values in score.items()}
  for budget in (2.0, 2.5):
    plan = functools.partial(_tiers, codec, budget, shape[1])
    found += [plan("norm change", order[CHANGE]), plan("final norm", order[NORM]),
              plan("norm change, large first", tiers.order(score[CHANGE])),
              plan("high variance first", order["max_var"]), plan("low variance first", tiers.order(score["max_var"])),
              plan(f"tiers({CHANGE})", order[CHANGE]), plan("tiers(output_error)", order["output_error"])]
    for zeta in (1.5, 2.0, 3.0):
      found.append(plan(f"zeta {zeta:g}", _reranked(order[CHANGE], score["max_var"], zeta, "paper")))
    for zeta in (1.5, 2.0):
      found += [plan(f"zeta {zeta:g}, reversed", _reranked(order[CHANGE], score["max_var"], zeta, "code")),
                plan(f"zeta {zeta:g}, MaxVar of the largest-norm row",
                     _reranked(order[CHANGE], score["max_var(variant='code')"], zeta, "paper"))]
    ask = methods.Inputs(WIDTHS, shape, lambda spec: scores.as_cost(spec, evidence), None, 1, 0)
    found += [Arm(f"knapsack({s})", codec, budget, methods.candidates(f"knapsack({s})", budget, ask)[0].plan.bits)
              for s in (CHANGE, "output_error")]
  for budget, names in ((1.75, ("paper", "code")), (2.5, ("paper",))):
    for variant in names:
      counts = tiers.counts_three(shape[1], budget, *WIDTHS, variant=variant)
      found.append(Arm(f"three levels, {variant}", codec, budget, tiers.assign(order[CHANGE], counts, WIDTHS)))
  found.append(_tiers(codec, 1.75, shape[1], "two levels", order[CHANGE]))
  return found


def _tiers(codec: str, budget: float, experts: int, name: str, orders: np.ndarray) -> Arm:
  counts = methods.tier_counts(budget, WIDTHS, experts, 2)
  return Arm(name, codec, budget, tiers.assign(orders, tuple(counts.values()), tuple(counts)))


def _reranked(orders: np.ndarray, maxvar: np.ndarray, zeta: float, variant: str) -> np.ndarray:
  return np.stack([tiers.rerank(o, v, zeta, variant) for o, v in zip(orders, maxvar, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def read_text(config: ml_collections.ConfigDict, tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Batches for calibration, random windows of the training text, another set for each seed; and for evaluation, evenly
  spread windows of the held-out text; equal shares of every domain."""
  rng, domains = np.random.default_rng([config.calibration_seed, 5]), sorted(config.domains)
  parts: list[list[np.ndarray]] = []
  for documents, count in ((data.calibration(), config.calibration), (data.held_out(), config.evaluation)):
    chosen = data.thin([d for d in documents if d.domain in domains], 48 * config.length * count)
    streams, rows = data.encode(chosen, tokenizer), []
    for domain in domains:
      tokens = streams[domain].tokens
      room = len(tokens) // config.length
      starts = np.arange(count) * room // count if parts else rng.choice(room, count, replace=False)
      rows += [tokens[start * config.length:(start + 1) * config.length] for start in starts]
    parts.append([np.stack(rows[i:i + config.batch]).astype(np.int32) for i in range(0, len(rows), config.batch)])
  return parts[0], parts[1]


def with_routers(blocks: Sequence[Any], bits: int) -> list[Any]:
  """The blocks with their routers rounded to nearest, one scale for 128 inputs at 4 bits and for each row at 8."""
  if bits == 16:
    return list(blocks)
  codec = codecs.get("rtn(group=128)" if bits == 4 else "rtn(group=0)")

  def change(path: Any, leaf: Any) -> Any:
    if "router" not in jax.tree_util.keystr(path):
      return leaf
    w = jnp.asarray(leaf, jnp.float32).T  # [D, E]
    return codecs.decode(codec.encode(w, bits), codec.group, w.shape[0]).T.astype(leaf.dtype)

  return [jax.tree_util.tree_map_with_path(change, block) for block in blocks]


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Measures all arms with one calibration set into `rows.jsonl` and `losses.jsonl`; goes on where it was.

  Args:
    config: see `get_config`.
    workdir: of this set; the comparisons over all sets beside it go where `runs.points` says.
  """
  rows_path, losses_path = workdir / "rows.jsonl", workdir / "losses.jsonl"
  done = {row["id"] for row in results.read(losses_path)}
  subject = workspace.open_checkpoint(config.checkpoint, config.compute_dtype)
  calibration, evaluation = read_text(config, subject.tokenizer)
  with progress.bar("calibrate", len(calibration)) as advance:
    stats = statistics.collect(subject.functions, subject.top, subject.blocks, calibration, advance=advance)
  ready = candidates.shrink_unrouted(stats)
  if config.matrices:
    artifacts.write_json(workdir / "matrices.json", matrices(config, subject, ready))
    return
  against = perplexity.reference(subject.functions, subject.top, subject.blocks, evaluation)
  stamp = {"seed": config.calibration_seed, "config_hash": artifacts.digest(runs.plain(config))}
  for number, name in enumerate(config.codecs):
    codec = codecs.get(name)
    if number and all(f"uniform@{b:g}@{codec}" in done for b in WIDTHS):
      continue
    layers = []
    with progress.bar(f"encode {codec}", subject.shape[0]) as advance:
      for layer, block in enumerate(subject.sparse_blocks()):
        layers.append(candidates.encode_layer(subject.functions.experts(block), ready, layer, codec=codec,
                                              widths=WIDTHS))
        advance()
    experts = [subject.functions.experts(block) for block in subject.sparse_blocks()]
    errors = candidates.error_table(layers, widths=WIDTHS, codec=codec)
    evidence = scores.Evidence(stats, errors, subject.routers, subject.routers_init, experts)
    wanted = [arm for arm in arms(str(codec), evidence, number == 0) if _id(arm) not in done]
    seen: dict[tuple[str, int], np.ndarray] = {}  # arms may have equal plans
    with progress.bar(f"evaluate {codec}", len(wanted)) as advance:
      for arm in wanted:
        plan = artifacts.digest(arm.bits) if arm.bits is not None else "", arm.router_bits
        loss = seen[plan] = _loss(subject, evaluation, layers, codec, arm, against) if plan not in seen else seen[plan]
        delta, stderr = perplexity.paired(loss, against.loss)
        row = {"id": _id(arm), "arm": arm.name, "codec": arm.codec, "budget": arm.budget, "loss": float(loss.mean()),
               "nominal_bits": 16.0 if arm.bits is None else float(arm.bits.mean()), "loss_delta": delta,
               "loss_delta_ci95": 1.96 * stderr, "router_bits": arm.router_bits,
               "plan": None if arm.bits is None else artifacts.digest(arm.bits)}
        results.append(rows_path, row | stamp)
        results.append(losses_path, {"id": _id(arm)} | {f"sequence_{i:06d}": float(x) for i, x in enumerate(loss)})
        advance(note=f"{_id(arm)}: {delta:+.4f}")
    if not number:
      artifacts.write_json(workdir / "correlations.json", _correlations(evidence) | stamp)
  summarise(*runs.points(workdir, free=("calibration_seed",)))


def matrices(config: ml_collections.ConfigDict, subject: workspace.Subject, stats: artifacts.Stats) -> dict[str, Any]:
  """The squared output error of the middle MoE layer's experts by each codec, relative to the first one's, at 1, 2 and
  3 bits, on the inputs that calibrate; printed."""
  layer, found = subject.shape[0] // 2, {}
  experts = subject.functions.experts(subject.sparse_blocks()[layer])
  for name in config.codecs:
    codes = candidates.encode_layer(experts, stats, layer, codec=codecs.get(name), widths=WIDTHS)
    found[name] = codes.errors["output"].sum((0, 1))
    ratio = ", ".join(f"{value:.3f}" for value in found[name] / found[config.codecs[0]])
    print(f"layer {layer}, {name}: output error at {', '.join(map(str, WIDTHS))} bits, of the first codec's: {ratio}",
          flush=True)
  return {name: {"widths": list(WIDTHS), "ratio": (errors / found[config.codecs[0]]).tolist()}
          for name, errors in found.items()} | {"layer": layer, "config_hash": artifacts.digest(runs.plain(config))}


def _id(arm: Arm) -> str:
  return f"{arm.name}@{arm.budget:g}@{arm.codec}"


def _loss(subject: workspace.Subject, evaluation: Sequence[np.ndarray], layers: Sequence[Any], codec: codecs.Codec,
          arm: Arm, against: perplexity.Reference) -> np.ndarray:
  blocks = with_routers(subject.blocks, arm.router_bits)
  if arm.bits is not None:
    packed = [apply.pack_layer(codes, bits, widths=WIDTHS, group=codec.group, sized=True)
              for codes, bits in zip(layers, arm.bits, strict=True)]
    blocks = apply.quantized_blocks(subject.functions, blocks, packed)
  return perplexity.measure(subject.functions, subject.top, blocks, evaluation, against).loss


def _correlations(evidence: scores.Evidence) -> dict[str, list[float]]:
  """Rank correlations of two scores inside each layer."""
  values = {name: scores.evaluate(name, evidence) for name in (CHANGE, NORM, "frequency", "max_var",
                                                               "max_var(variant='code')")}
  return {f"{a}, {b}": [float(scipy.stats.spearmanr(x, y).statistic) for x, y in zip(values[a], values[b], strict=True)]
          for a, b in ((NORM, CHANGE), (CHANGE, "frequency"), (NORM, "frequency"), (CHANGE, "max_var"),
                       ("max_var", "max_var(variant='code')"))}


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------


def summarise(directory: Path, points: Sequence[Path]) -> None:
  """Compares the arms, paired over sequences after the mean over calibration sets (one a point), in
  `comparisons.jsonl` of `directory`; `correlations.jsonl` beside it has the rank correlations, layer by layer, and
  `all.jsonl` both and the rows of all points."""
  tables = [{row["id"]: np.array(list(results.numbered(row, "sequence_")))
             for row in results.read(point / "losses.jsonl")} for point in points]
  path, stamp = directory / "comparisons.jsonl", {"config_hash": runs.hash_of(points)}
  path.unlink(missing_ok=True)
  shown = rich_table.Table("claim", "bits", "arm", "against", "difference, nats", "of each set")
  base = next((i for table in tables for i in table if i.startswith("full precision@")), "@@").split("@")[2]
  pairs = [(claim, budget, (arm, base), (other, base)) for claim, budgets, arm, other in COMPARISONS
           for budget in budgets]
  pairs += [("gptq", width, ("uniform", one), ("uniform", two)) for one, two in CODEC_PAIRS for width in WIDTHS]
  for claim, budget, *sides in pairs:
    one, two = (f"{name}@{budget:g}@{codec}" for name, codec in sides)
    both = [(table[one], table[two]) for table in tables if one in table and two in table]
    if not both:
      continue
    each = [float((a - b).mean()) for a, b in both]
    delta, stderr = perplexity.paired(*(np.mean(part, axis=0) for part in zip(*both)))
    row = {"id": f"{claim}: {one} - {two}", "claim": claim, "arm": one, "against": two, "budget": budget,
           "difference": delta, "difference_ci95": 1.96 * stderr, "sets": len(both),
           **{f"set_{i}": value for i, value in enumerate(each)}}
    results.append(path, row | stamp)
    shown.add_row(claim, f"{budget:g}", " ".join(sides[0]), " ".join(sides[1]),
                  f"{delta:+.4f} ± {1.96 * stderr:.4f}", " ".join(f"{value:+.4f}" for value in each))
  found = [json.loads(file.read_text()) for point in points if (file := point / "correlations.json").is_file()]
  console = rich_console.Console(width=200)
  console.print(shown)
  path = directory / "correlations.jsonl"
  path.unlink(missing_ok=True)
  for name in (name for name in (found[0] if found else ()) if "," in name):
    console.print(f"rank correlation inside layers, {name}: "
                  + "; ".join(" ".join(f"{value:+.2f}" for value in one[name]) for one in found))
    for number, one in enumerate(found):
      results.append(path, {"id": f"rank correlation of {name}, set {number}", "config_hash": one["config_hash"],
                            **{f"layer_{layer}": value for layer, value in enumerate(one[name])}})
  (directory / "all.jsonl").unlink(missing_ok=True)
  rows = [row | {"id": f"set {number}: {row['id']}"} for number, point in enumerate(points)
          for row in results.read(point / "rows.jsonl")]
  for row in [*rows, *results.read(directory / "comparisons.jsonl"), *results.read(path)]:
    results.append(directory / "all.jsonl", row)
