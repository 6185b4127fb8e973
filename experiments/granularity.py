"""How fine should the units be that have a width of their own, and what does a rotation change?

Claim under test, of the abstract of "Automated Fine-Grained Mixture-of-Experts Quantization" (Findings of ACL 2025,
1386): experts differ by channel, so widths should. All arms here have equal *effective* bits: scales and zeros (32 bits
a group), the order of an expert's neurons (16 bits each, where they are sorted) and the widths themselves (2 bits a
unit) are paid for out of one budget, so that finer units have fewer bits left for codes.

  uniform        one width; between two widths, experts drawn for either, two draws
  expert         a width for each expert
  projection     for each projection of each expert
  channel        for each output channel; the finest. Simulated: no kernel runs it
  thresholds     for each output channel, by the threshold rule on the statistical score (`allocate/thresholds.py`);
                 `thresholds fisher` on that score times the Fisher trace of the channel's matrix
  block 64       for 64 sorted neurons: N-stripes of gate and up, K-blocks of down; `block 32` and `block 16` cut gate
                 and up finer, and leave down at 64, which is a scale group
  expert sorted  a width for each expert, and the neurons sorted all the same: what is due to the order alone
  only P         one projection at 2 bits, the others in full precision: down against up, in either basis

Every plan but those by thresholds is the knapsack's on Fisher x error in nats. Loss is that of the decoded weights in
the plain model, which is what the packed ones give (tests/granularity_test.py). With `config.rotation` the hidden
dimension of every expert is rotated first (`encode/rotation.py`) and the decoded weights are rotated back.

Command:   ./launch.sh sweep --config=experiments/granularity.py --workdir=runs/granularity
           ./launch.sh run --config=experiments/granularity.py:light --config.checkpoint=A --workdir=runs/granularity/A
           `:light` has short sequences, the main arms and one budget: for models of 100 million parameters
Hardware:  2 CPU cores, 3 GiB
Expected:  about five minutes a point on an idle machine. Every point adds to comparisons.jsonl and figures/ beside it
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import common, quickstart
from experiments import granularity_codes, granularity_summary, paper_weaknesses
from moeq_jax import artifacts, channels, codecs, progress, results, runs, workspace
from moeq_jax.allocate import blocks as block_plans
from moeq_jax.allocate import thresholds
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates, neurons, rotation
from moeq_jax.evaluate import perplexity
from moeq_jax.scores import channels as scores

CHECKPOINT = "experiments/models/moeq-small"
CODECS = ("gptq(group=64)", "rtn(group=64)")
BUDGETS = (2.0, 2.5, 3.0)  # effective bits without scales and zeros
WIDTHS, Bank = granularity_codes.WIDTHS, granularity_codes.Bank
ARMS = ("uniform", "expert", "projection", "channel", "thresholds", "block 64", "expert sorted")
RULES = ("thresholds", "thresholds fisher")
SORTED = ("expert sorted", "block 64", "block 32", "block 16")
ALONE = tuple(f"only {name}" for name in artifacts.PROJECTIONS)
WIDTH_BITS = 2  # that say which of four widths a unit has
DRAWS = 2
FULL = 16


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The config; `arg` may be `light`."""
  arg = common.parse_arg(arg, light=False)
  config = quickstart.get_config()
  config.file = "experiments/granularity.py"
  config.task = "experiment"
  config.calibration_seed = 0
  config.calibration = 8  # sequences of each domain
  config.evaluation = 8
  config.codecs = CODECS
  config.budgets = BUDGETS
  config.arms = ARMS
  config.rotation = "none"  # or "hadamard"
  config.rotation_seed = 0
  if arg.light:
    config.update(length=64, calibration=4, evaluation=4, budgets=(3.0,), codecs=("rtn(group=64)",),
                  arms=("uniform", "expert", "projection", "channel", "block 64"))
  return config


def sweep(add) -> None:
  """One point per calibration set, and one in the rotated basis; other models by `--config.checkpoint` of a run."""
  for seed in (0, 1, 2):
    add({"checkpoint": CHECKPOINT, "rotation": "none", "calibration_seed": seed})
  add({"checkpoint": CHECKPOINT, "rotation": "hadamard", "calibration_seed": 0})


# ---------------------------------------------------------------------------------------------------------------------
# Plans of equal effective bits
# ---------------------------------------------------------------------------------------------------------------------


def overhead(costs: channels.BlockCosts, constraint: str = "none") -> float:
  """Bits per weight for the widths of all units and, where neurons were sorted, their order; without scales, zeros."""
  units = int(block_plans.units(costs, constraint).max()) + 1
  weights = int(np.broadcast_to(costs.sizes, costs.cost.shape[:3]).sum())
  empty = block_plans.as_plan(costs, np.zeros(costs.cost.shape[:3], np.int64), "", 0.0)
  return WIDTH_BITS * units / weights + empty.permutation_bits()


def units_of(arm: str, bank: Bank, group: int) -> tuple[channels.BlockCosts, str]:
  """The cost table and the constraint of an arm; `bank` is that of sorted neurons for the arms in `SORTED`."""
  if arm.startswith("block"):
    block = int(arm.removeprefix("block "))
    return block_plans.merged(bank.costs["neurons"], block, neurons.down_block(block, group)), "none"
  if arm == "expert sorted":
    return bank.costs["neurons"], "expert"
  return bank.costs["outputs"], {"channel": "none"}.get(arm, "none" if arm in RULES else arm)


def plan(arm: str, budget: float, bank: Bank, group: int) -> channels.BlockPlan:
  """The plan of an arm whose codes, widths and order together take `budget` bits per weight."""
  costs, constraint = units_of(arm, bank, group)
  nominal = budget - overhead(costs, constraint)
  if arm not in RULES:
    return block_plans.plan(costs, nominal, constraint)
  vectors = granularity_codes.channel_stats(bank.moments)
  shape = {name: tuple(w.shape[1:]) for name, w in bank.experts[0].items()}
  projection, sizes = channels.units([(shape[n][1], shape[n][0]) for n in costs.projections])
  errors = channels.ChannelErrors(None, None, WIDTHS, "", group, costs.projections, projection, sizes, costs.axis)
  score = scores.statistical(scores.Evidence(errors, bank.experts, vectors))
  if arm == "thresholds fisher":
    score = score * scores.multiplier(vectors, costs.projections, eta=1.0, zeta=0.0)[..., projection]
  traces = scores.fisher_traces(vectors, costs.projections).sum((0, 1))
  widths = (1, 2, 3) if nominal < 2.25 else (2, 3, 4)
  return thresholds.plan(score, costs, nominal, widths, traces=traces)


def drawn(budget: float, bank: Bank, draw: int) -> channels.BlockPlan:
  """Uniform widths; between two of them, as many experts as the budget allows, drawn, have the higher one."""
  costs = bank.costs["outputs"]
  layers, experts, channel, _ = costs.cost.shape
  low, count = int(budget), layers * experts
  high = np.random.default_rng([draw, 7]).permutation(count) < round((budget - low) * count)
  bits = (low + high.reshape(layers, experts, 1)) * np.ones(channel, np.int64)
  return block_plans.as_plan(costs, bits, "uniform", budget)


def widths_of(chosen: channels.BlockPlan, name: str, shape: tuple[int, int]) -> np.ndarray:
  """The width of every channel of a projection along the axis of its units: `[L, E, 1, N]` or `[L, E, K, 1]`."""
  bits, along = chosen.by_projection()[name], channels.along(name, chosen.axis)
  bits = np.repeat(bits, chosen.down_block if name == "down" else chosen.block, axis=2)[..., :shape[along]]
  return bits[:, :, None, :] if along else bits[..., None]


@functools.partial(jax.jit, static_argnums=0)
def _chosen(group: int, codes: codecs.Encoded, bits: jax.Array) -> jax.Array:
  """The decoded weights `[E, K, N]` at the widths `bits`, which broadcast to them, from codes at every width."""
  rows = codes.codes.shape[2]
  values = [codecs.decode(codecs.Encoded(*(part[i] for part in codes)), group, rows) for i in range(len(WIDTHS))]
  return jnp.select([bits == width for width in WIDTHS], values)


def decode(bank: Bank, layer: int, name: str, bits: np.ndarray, codec: codecs.Codec) -> jax.Array:
  """The weights `[E, K, N]` of one projection of one layer as a plan stores them.

  Args:
    bank: of codes.
    layer, name: which.
    bits: `[E, 1, N]` or `[E, K, 1]` widths. Where they change along K, GPTQ encodes again, since it feeds the errors of
      one block back into the next.
    codec: of the bank.
  """
  if codec.needs_moment and (bits != bits[:, :1]).any():
    moment = getattr(bank.moments, candidates.MOMENT[name])[layer]
    again = neurons.encode_layer({name: bank.experts[layer][name]}, {name: bits[:, ::codec.group, 0]}, {name: moment},
                                 codec=codec)
    codes, _ = again[name]
    return codecs.decode(codecs.Encoded(*map(jnp.asarray, codes)), codec.group, bits.shape[1])
  return _chosen(codec.group, codecs.Encoded(*map(jnp.asarray, bank.coded[layer][name].codes)), jnp.asarray(bits))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Measures one model in one basis into `rows.jsonl` and `losses.jsonl`; goes on where it was.

  Args:
    config: see `get_config`.
    workdir: of this point; what is compared over all points beside it goes where `runs.points` says.

  Raises:
    ValueError: an unknown rotation.
  """
  if config.rotation not in ("none", "hadamard"):
    raise ValueError(f"config.rotation={config.rotation!r} is neither 'none' nor 'hadamard'")
  subject = workspace.open_checkpoint(config.checkpoint, config.compute_dtype)
  point = Point(config, workdir, subject)
  for name in config.codecs:
    point.measure(codecs.get(name))
  artifacts.save_arrays(workdir / "outliers.npz", outliers(point.experts), {
      "model": subject.directory.name, "rotation": config.rotation})
  granularity_summary.summarise(*runs.points(workdir))


class Point:
  """One model, one basis, one calibration set: what all codecs share, and where rows go."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: Path, subject: workspace.Subject):
    self.config, self.workdir, self.subject = config, workdir, subject
    calibration, self.evaluation = paper_weaknesses.read_text(config, subject.tokenizer)
    hidden = subject.config.hidden_size
    self.turn = rotation.matrix(hidden, config.rotation_seed) if config.rotation == "hadamard" else None
    functions = subject.functions if self.turn is None else rotation.watched(subject.functions, self.turn)
    with progress.bar("calibrate", len(calibration)) as advance:
      self.stats = statistics.collect(functions, subject.top, subject.blocks, calibration, advance=advance)
    plain = [subject.functions.experts(block) for block in subject.sparse_blocks()]
    turned = plain if self.turn is None else [rotation.rotate(bank, self.turn) for bank in plain]
    self.experts = [{name: np.asarray(w, np.float32) for name, w in bank.items()} for bank in turned]
    self.full = self.losses(subject.blocks)
    self.stamp = {"model": subject.directory.name, "seed": config.calibration_seed, "rotation": config.rotation,
                  "config_hash": artifacts.digest(runs.plain(config))}

  def losses(self, blocks: Sequence[Any]) -> np.ndarray:
    """Mean loss of every held-out sequence."""
    return perplexity.reference(self.subject.functions, self.subject.top, blocks, self.evaluation).loss

  def measure(self, codec: codecs.Codec) -> None:
    """All arms of one codec."""
    wanted = [(arm, budget) for budget in self.config.budgets for arm in self.config.arms]
    wanted = [(arm, FULL) for arm in ALONE] + sorted(wanted, key=lambda pair: pair[0] in SORTED)  # one bank at a time
    done = {row["id"] for row in results.read(self.workdir / "losses.jsonl")}
    wanted = [pair for pair in wanted if f"{pair[0]}@{pair[1]:g}@{codec}" not in done]
    if not wanted:
      return
    bank = granularity_codes.encode_all(self.experts, self.stats, codec)
    self.nested(bank, codec, ("expert", "projection", "channel"), "channels")
    is_sorted = False
    with progress.bar(f"evaluate {codec}", len(wanted)) as advance:
      for arm, budget in wanted:
        if arm in SORTED and not is_sorted:
          bank, is_sorted = granularity_codes.in_order(bank, codec), True
          self.nested(bank, codec, ("expert sorted", "block 64", "block 32", "block 16"), "blocks")
        delta = self.arm(arm, budget, bank, codec)
        advance(note=f"{arm} at {budget:g}: {delta:+.4f}")

  def nested(self, bank: Bank, codec: codecs.Codec, arms: Sequence[str], which: str) -> None:
    """Predicted cost and lower bound of nested sets of units, from coarse to fine, at equal *nominal* bits."""
    for budget in self.config.budgets:
      for arm in arms:
        chosen = block_plans.plan(*_swapped(units_of(arm, bank, codec.group), budget))
        results.append(self.workdir / "rows.jsonl", {
            "id": f"nested {which}: {arm}@{budget:g}@{codec}", "codec": str(codec), "nested": which, "units": arm,
            "nominal_bits": budget, "predicted": chosen.predicted, "lower_bound": chosen.lower_bound} | self.stamp)

  def arm(self, arm: str, budget: float, bank: Bank, codec: codecs.Codec) -> float:
    """Measures one arm at one budget; returns the mean increase of the loss."""
    if arm in ALONE:
      plans = [drawn(2.0, bank, 0)]
    elif arm == "uniform":
      plans = [drawn(budget, bank, draw) for draw in range(DRAWS if budget % 1 else 1)]
    else:
      plans = [plan(arm, budget, bank, codec.group)]
    only = arm.removeprefix("only ") if arm in ALONE else None
    loss = np.mean([self.losses(self.quantized(bank, chosen, codec, only)) for chosen in plans], axis=0)
    delta, stderr = perplexity.paired(loss, self.full)
    row = {"id": f"{arm}@{budget:g}@{codec}", "codec": str(codec), "arm": arm, "budget": float(budget),
           "loss_delta": delta, "loss_delta_ci95": 1.96 * stderr, "predicted": plans[0].predicted,
           "lower_bound": plans[0].lower_bound}
    if only is None:
      nominal = float(np.mean([chosen.average_bits() for chosen in plans]))
      more = 0.0 if arm == "uniform" else overhead(*units_of(arm, bank, codec.group))
      row |= {"nominal_bits": nominal, "overhead_bits": more, "effective_bits": nominal + more + 32 / codec.group}
      row |= {f"bits_{name}": float(np.mean([p.by_projection()[name].mean() for p in plans]))
              for name in plans[0].projections}
    results.append(self.workdir / "rows.jsonl", row | self.stamp)
    sequences = {f"sequence_{i:06d}": float(x) for i, x in enumerate(loss - self.full)}
    results.append(self.workdir / "losses.jsonl", {"id": row["id"], "codec": str(codec), "arm": arm,
                                                   "budget": float(budget)} | self.stamp | sequences)
    return delta

  def quantized(self, bank: Bank, chosen: channels.BlockPlan, codec: codecs.Codec, only: str | None) -> list[Any]:
    """The model's blocks with what a plan makes of their experts (of the projection `only`), rotated back."""
    placed, layer = list(self.subject.blocks), -1
    for place, block in enumerate(placed):
      if not self.subject.functions.sparse(block):
        continue
      layer += 1
      decoded = {}
      for name in [only] if only else candidates.names(bank.experts[layer]):
        shape = bank.experts[layer][name].shape[1:]
        decoded[name] = decode(bank, layer, name, widths_of(chosen, name, shape)[layer], codec)
      if self.turn is not None:
        decoded = rotation.restore(decoded, self.turn)
      placed[place] = self.subject.functions.with_experts(block, decoded)
    return placed


def _swapped(units: tuple[channels.BlockCosts, str], budget: float) -> tuple[channels.BlockCosts, float, str]:
  return units[0], budget, units[1]


def outliers(experts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """`{"kurtosis_P", "max_median_P": [L, E, N]}` of the weights of every output channel: fourth central moment by
  squared variance (3 for normal ones), and largest by median absolute weight."""
  found: dict[str, list[np.ndarray]] = {}
  for bank in experts:
    for name, w in bank.items():
      w = np.asarray(w, np.float64)
      centred, size = w - w.mean(axis=1, keepdims=True), np.abs(w)
      variance = np.maximum((centred**2).mean(axis=1), 1e-30)
      found.setdefault(f"kurtosis_{name}", []).append((centred**4).mean(axis=1) / variance**2)
      found.setdefault(f"max_median_{name}", []).append(size.max(axis=1) / np.maximum(np.median(size, axis=1), 1e-30))
  return {name: np.stack(parts) for name, parts in found.items()}
