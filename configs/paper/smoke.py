"""The method of arXiv 2604.06515 from end to end on two small models: norm change, MaxVar, tiers, in both variants.

Command:   ./launch.sh run --config=configs/paper/smoke.py
Hardware:  2 CPU cores, 2 GiB
Expected:  under a minute on idle cores; four rows, and status 0 only if every plan is what the rule says

The Mixtral-like model is the shipped one, with its routers before training, by GPTQ at three levels and 1.75 bits,
where the counts of the paper's text and of its code differ. The Switch-like one is made on the spot, with a pre-trained
checkpoint for its initial routers and experts whose weights vary much more than the others', by row-wise HQQ at two
levels; its weights are random, so its loss says nothing.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import artifacts, results, runs
from moeq_jax.models import convert, families, hf_config

SWITCH = dict(model_type="switch_transformers", vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2,
              num_decoder_layers=2, num_heads=4, num_experts=8, expert_capacity=64, num_sparse_encoder_layers=1,
              num_sparse_decoder_layers=1)
VARIANTS = ("paper", "code")
OUTLIERS, WIDER = (2, 5), 2.5  # experts, and how many times wider their first matrix is: 6 times the variance
# Counts from the lowest width to the highest, by the tables of the paper's description.
EXPECTED = {("mixtral", "paper"): {1: 6, 2: 8, 3: 2}, ("mixtral", "code"): {1: 8, 2: 4, 3: 4},
            ("switch", "paper"): {2: 4, 3: 4}, ("switch", "code"): {2: 4, 3: 4}}


def get_config() -> ml_collections.ConfigDict:
  """The config."""
  config = ml_collections.ConfigDict()
  config.file = "configs/paper/smoke.py"
  config.task = "experiment"
  config.seed = 0
  config.checkpoint = "experiments/models/moeq-small"
  config.dry_run = False
  return config


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Quantizes both models in both variants and compares every plan with the rule.

  Args:
    config: see `get_config`.
    workdir: where the models and a folder for each run go.

  Raises:
    ValueError: a plan is not what the rule says; names model, variant and layer.
  """
  make_switch(workdir, config.seed)
  table = rich_table.Table("model", "variant", "experts of a layer by bits", "bits", "loss before", "after", "moved up")
  for (kind, variant), counts in EXPECTED.items():
    own = runs.load_config("configs/quantize.py:smoke", settings(config, workdir, kind, variant))
    place = workdir / f"{kind}-{variant}"
    runs.execute(own, place)
    if config.dry_run:
      continue
    bits = np.array(json.loads((place / "plan.json").read_bytes())["bits"])
    moved = check(f"{kind}, {variant}", own, bits, counts, variant)
    full, quantized = results.read(place / "rows.jsonl")
    table.add_row(kind, variant, ", ".join(f"{n} at {b}" for b, n in counts.items()),
                  f"{quantized['nominal_bits']:.3f}", f"{full['loss']:.4f}", f"{quantized['loss']:.4f}", str(moved))
  if not config.dry_run:
    rich_console.Console(width=120).print(table)


def settings(config: ml_collections.ConfigDict, workdir: Path, kind: str, variant: str) -> list[str]:
  """What a run says on top of configs/quantize.py."""
  code = ", variant=code" * (variant == "code")
  if kind == "mixtral":
    fields = [f"checkpoint={config.checkpoint}", "budget=1.75", "widths=(1, 2, 3)", "codec=gptq(group=128)",
              f"method=tiers(router_norm_change, levels=3{code})"]
  else:
    fields = [f"checkpoint={workdir / 'finetuned'}", f"pretrained={workdir / 'pretrained'}", "budget=2.5",
              "widths=(2, 3)", "codec=hqq(group=0)", f"method=tiers(router_norm_change{code})", "length=32",
              f"calibration.tokens={workdir / 'calibration.npy'}", f"evaluation.tokens={workdir / 'evaluation.npy'}"]
  return [f"--config.{field}" for field in (*fields, f"seed={config.seed}", f"dry_run={config.dry_run}")]


# ---------------------------------------------------------------------------------------------------------------------
# The rule, once more
# ---------------------------------------------------------------------------------------------------------------------


def check(name: str, config: ml_collections.ConfigDict, bits: np.ndarray, counts: dict[int, int], variant: str) -> int:
  """Compares a plan with the rule, worked out here from the checkpoint's weights in plain numpy.

  Args:
    name: of the run.
    config: that it had.
    bits: `[L, E]`.
    counts: experts of a layer by width.
    variant: of the rule.

  Returns:
    How many experts stand higher by MaxVar than by the norm change.

  Raises:
    ValueError: a layer differs; names it.
  """
  source, moved = convert.open_checkpoint(runs.find_config(f"{config.checkpoint}/config.json").parent), 0
  norms = [np.linalg.norm(source.router(layer).astype(np.float64), axis=1) for layer in source.sparse_layers]
  if config.pretrained:
    before = convert.open_checkpoint(config.pretrained)
    initial = [before.router(layer) for layer in before.sparse_layers]
  else:
    shape = (len(norms), source.experts, source.router(source.sparse_layers[0]).shape[1])
    initial = convert.load_routers(source.directory / "router_init.safetensors", shape)
  for place, layer in enumerate(source.sparse_layers):
    change = norms[place] - np.linalg.norm(initial[place].astype(np.float64), axis=1)
    order = np.argsort(change, kind="stable").tolist()
    first = [np.asarray(source.projection(layer, e, source.projections[0]), np.float64) for e in range(source.experts)]
    if variant == "paper":
      ranked = until_stable(order, [w.var(axis=0).max() for w in first])
    else:
      ranked = one_pass(order, [w[:, np.square(w).sum(0).argmax()].var(ddof=1) for w in first])
    expected, given = np.empty(source.experts, int), 0
    for width in sorted(counts, reverse=True):
      expected[ranked[given:given + counts[width]]] = width
      given += counts[width]
    if bits[place].reshape(source.experts, -1).tolist() != expected[:, None].tolist():
      raise ValueError(f"{name}, layer {layer}: the plan gives {bits[place].tolist()} bits, the rule"
                       f" {expected.tolist()}")
    moved += sum(ranked.index(e) < order.index(e) for e in order)
  return moved


def until_stable(order: Sequence[int], maxvar: Sequence[float], zeta: float = 3.0) -> list[int]:
  """The paper's text: an expert of at least zeta times the MaxVar of a higher one goes above it, until none is left."""
  ranked = list(order)
  while True:
    moves = [(i, j) for i in range(len(ranked)) for j in range(i) if maxvar[ranked[i]] >= zeta * maxvar[ranked[j]]]
    if not moves:
      return ranked
    below, above = moves[0]
    ranked.insert(above, ranked.pop(below))


def one_pass(order: Sequence[int], maxvar: Sequence[float], zeta: float = 3.0) -> list[int]:
  """The code: from the bottom of the list up, each expert goes to the first place that it has more than zeta times."""
  ranked = list(order)
  for expert in reversed(order):
    above = [p for p in range(ranked.index(expert)) if maxvar[expert] > zeta * maxvar[ranked[p]]]
    if above:
      ranked.remove(expert)
      ranked.insert(above[0], expert)
  return ranked


# ---------------------------------------------------------------------------------------------------------------------
# The small Switch Transformer
# ---------------------------------------------------------------------------------------------------------------------


def make_switch(workdir: Path, seed: int) -> None:
  """Writes the two checkpoints and the token ids, those that are not there yet."""
  sizes = hf_config.read(SWITCH)
  for number, name in enumerate(("pretrained", "finetuned")):
    if not (workdir / name / "model.safetensors").is_file():
      convert.save(workdir / name, random_switch(sizes, [seed, number], outliers=name == "finetuned"), sizes)
  tokens = np.random.default_rng(seed).integers(2, sizes.vocab_size - 30, (16, 32))  # the last are sentinels
  for name, rows in (("calibration", tokens[:8]), ("evaluation", tokens[8:])):
    with io.BytesIO() as file:
      np.save(file, rows)
      artifacts.write_bytes(workdir / f"{name}.npy", file.getvalue())


def random_switch(sizes: hf_config.Config, seed: Sequence[int], *, outliers: bool) -> object:
  """A model of random weights; with `outliers`, some experts have a wider first matrix."""
  rng, abstract = np.random.default_rng(seed), families.abstract(sizes)

  def value(name: str, shape: tuple[int, ...]) -> jax.Array:
    if "norm" in name:
      return jnp.ones(shape, jnp.float32)
    drawn = rng.normal(0, shape[-2] ** -0.5, shape) if "router" not in name else rng.normal(0, 0.3, shape)
    if outliers and name.endswith("moe/up"):
      drawn[list(OUTLIERS)] *= WIDER
    return jnp.asarray(drawn, jnp.float32)

  leaves = [value(name, leaf.shape) for name, leaf in convert.named_leaves(abstract).items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
