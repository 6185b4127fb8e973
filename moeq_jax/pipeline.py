"""The way of the data, stage by stage: checkpoint, calibrate, encode, score, allocate, assemble, evaluate, report.

This file alone knows the order of the stages. Each stage's product is kept in the work directory under a key made of
the stage's version, its spec and the digests of its inputs; it is used again only if the key matches. A run that was
killed goes on from its last product and ends with the same bytes as an undisturbed one.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from rich import console as rich_console

from moeq_jax import artifacts, block_plans, channels, codecs, conditions, progress, registry, report, results, runs
from moeq_jax import scores, steps, workspace
from moeq_jax.allocate import methods
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.evaluate import perplexity
from moeq_jax.export import native
from moeq_jax.models import names
from moeq_jax.scores import damage as damage_lib

# Raised when a stage computes something else from the same inputs; older products are then made again.
VERSIONS = {"stats": 1, "codes": 1, "damage": 1, "plans": 1, "rows": 2}

Candidate = methods.Candidate

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Stages, each kept under its key
# ---------------------------------------------------------------------------------------------------------------------


def calibrate(run: workspace.Workdir, subject: workspace.Subject, text: workspace.Text) -> artifacts.Stats:
  """Statistics of the calibration batches, kept in `stats/stats.npz`."""

  def make() -> artifacts.Stats:
    with progress.bar("calibrate", len(text.calibration)) as advance:
      return statistics.collect(subject.functions, subject.top, subject.blocks, text.calibration, advance=advance)

  inputs = {"model": subject.digest, "text": text.digest}
  key = artifacts.key("stats", VERSIONS["stats"], {"dtype": subject.dtype}, inputs)
  return run.product("stats/stats.npz", key, artifacts.Stats.load, make)


def encode(run: workspace.Workdir, subject: workspace.Subject, stats: artifacts.Stats, codec: codecs.Codec,
           widths: Sequence[int]) -> tuple[list[artifacts.LayerCodes], artifacts.ErrorTable, str]:
  """Codes of every expert at every width (`codes/`), their errors (`errors.npz`), and the key of both."""
  inputs = {"model": subject.digest, "stats": artifacts.digest_of(stats)}
  key = artifacts.key("codes", VERSIONS["codes"], {"codec": str(codec), "widths": list(widths)}, inputs)
  ready = candidates.shrink_unrouted(stats)
  for layer, expert in stats.unrouted():
    log.warning("layer %d, expert %d saw no calibration token: its layer's mean second moments are used", layer, expert)
  layers = []
  with progress.bar("encode", subject.shape[0]) as advance:
    for layer, block in enumerate(subject.sparse_blocks()):
      make = functools.partial(candidates.encode_layer, subject.functions.experts(block), ready, layer, codec=codec,
                               widths=widths)
      layers.append(run.product(f"codes/layer-{layer:03d}.npz", key, artifacts.LayerCodes.load, make))
      advance()
  errors = candidates.error_table(layers, widths=widths, codec=codec)
  errors.save(run.path / "errors.npz", key)
  return layers, errors, key


def measure_damage(run: workspace.Workdir, subject: workspace.Subject, text: workspace.Text,
                   layers: Sequence[artifacts.LayerCodes], errors: artifacts.ErrorTable, bits: int,
                   codes_key: str) -> damage_lib.Damage | None:
  """Damage of each expert alone at `bits`, kept in `damage.npz`; `None` where the config asks for none."""
  if not text.damage:
    return None
  index = errors.widths.index(bits)

  def dequantized(layer: int, expert: int) -> dict[str, np.ndarray]:
    weights = {}
    for name, codes in layers[layer].codes.items():
      encoded = codecs.Encoded(*(field[index, expert] for field in codes))
      weights[name] = np.asarray(codecs.decode(encoded, errors.group, codes.codes.shape[2]))
    return weights

  def make() -> damage_lib.Damage:
    with progress.bar("measure damage", subject.shape[0] * subject.shape[1]) as advance:
      return damage_lib.measure(subject.functions, subject.top, subject.blocks, text.damage, bits=bits,
                                dequantized=dequantized, advance=advance)

  inputs = {"codes": codes_key, "text": text.digest}
  key = artifacts.key("damage", VERSIONS["damage"], {"bits": bits, "dtype": subject.dtype}, inputs)
  return run.product("damage.npz", key, damage_lib.Damage.load, make)


def allocate(run: workspace.Workdir, subject: workspace.Subject, evidence: scores.Evidence,
             config: ml_collections.ConfigDict, neurons: block_plans.Blocks | None = None) -> list[Candidate]:
  """Every method at every budget, kept as `costs-*.npz` and `plan-*.json`; uniform plans, with which rows are compared,
  come first.

  Plans take no time worth saving, so they are always made and written again.
  """
  inputs = methods.Inputs(
      widths=tuple(config.widths),
      shape=subject.shape,
      cost=functools.cache(lambda spec: scores.as_cost(spec, evidence)),
      sensitivity=functools.cache(lambda spec: scores.sensitivity(spec, evidence)),
      draws=config.draws,
      seed=config.seed,
      block_cost=functools.cache(neurons.cost) if neurons else None,
  )
  found = [c for spec in config.methods for budget in config.budgets for c in methods.candidates(spec, budget, inputs)]
  found.sort(key=lambda candidate: candidate.family != "uniform")
  made = {(name, methods.block_of(c.plan.method)) for c in found if (name := methods.score_of(c.plan.method))}
  for spec, block in sorted(made):
    table, suffix = (inputs.block_cost(spec, block), f"-block-{block}") if block else (inputs.cost(spec), "")
    table.save(run.path / f"costs-{registry.filename(spec)}{suffix}.npz")
  for candidate in found:
    artifacts.write_json(run.path / f"plan-{candidate.file_name()}.json", candidate.plan.as_json())
  return found


def evaluate(subject: workspace.Subject, text: workspace.Text, layers: Sequence[Any],
             codec: codecs.Codec, candidate: Candidate, against: perplexity.Reference,
             widths: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
  """The row of one plan, and its loss of every sequence `[n]`: the model runs from its packed buffers. `layers` are
  codes at `widths`, or what is packed already for a plan by blocks of neurons."""
  packed, order = layers, getattr(candidate.plan, "order", None)
  if not isinstance(candidate.plan, channels.BlockPlan):
    packed = [apply.pack_layer(codes, bits, widths=widths, group=codec.group, sized=True)
              for codes, bits in zip(layers, candidate.plan.bits, strict=True)]
  blocks = apply.quantized_blocks(subject.functions, subject.blocks, packed)
  measured = perplexity.measure(subject.functions, subject.top, blocks, text.evaluation, against)
  delta, stderr = perplexity.paired(measured.loss, against.loss)
  order_bits = 0 if order is None else channels.order_bits(order)
  row = candidate.as_row() | native.sizes(packed, subject.others, order_bits) | losses(measured.loss, text) | {
      "codec": str(codec), "group": codec.group, "loss_delta": delta, "loss_delta_ci95": 1.96 * stderr,
      "kl": float(measured.kl.mean()), "router_agreement": measured.router_agreement,
  }
  return row, measured.loss


def losses(loss: np.ndarray, text: workspace.Text) -> dict[str, float]:
  """Loss over all sequences and per domain, from one loss per sequence."""
  row = {"loss": float(loss.mean()), "perplexity": float(np.exp(loss.mean()))}
  for domain, ratio in text.tokens_per_byte.items():
    mean = float(loss[text.domains == domain].mean())
    row |= {f"loss_{domain}": mean, f"nats_per_byte_{domain}": mean * ratio}
  return row


def against_uniform(loss: np.ndarray, uniform: Sequence[np.ndarray]) -> dict[str, float | None]:
  """How much more a plan loses than uniform widths at its budget: the mean difference, paired over sequences, and half
  of its 95% interval, in nats per token.

  Args:
    loss: `[n]`, of each sequence.
    uniform: the same of each uniform plan, whose mean is taken; none leave the fields empty.
  """
  if not uniform:
    return {"vs_uniform": None, "vs_uniform_ci95": None}
  delta, stderr = perplexity.paired(loss, np.mean(uniform, axis=0))
  return {"vs_uniform": delta, "vs_uniform_ci95": 1.96 * stderr}


def full_row(subject: workspace.Subject, text: workspace.Text, loss: np.ndarray) -> dict[str, Any]:
  """The row of the full-precision model (experts in bfloat16)."""
  megabytes = (2 * subject.expert_weights() + sum(a.nbytes for a in subject.others.values())) / 1e6
  return losses(loss, text) | {
      "id": "full", "method": "full precision", "family": "full", "codec": None, "group": None, "budget": None,
      "nominal_bits": 16.0, "effective_bits": 16.0, "stored_bits": 16.0, "file_mb": megabytes, "loss_delta": 0.0,
      "loss_delta_ci95": 0.0, "kl": 0.0, "router_agreement": 1.0, "predicted": None, "lower_bound": None, "gap": None,
      "draw": None, "constraint": None, "cost": None, "vs_uniform": None, "vs_uniform_ci95": None,
  }


def measure(run: workspace.Workdir, subject: workspace.Subject, text: workspace.Text,
            layers: Sequence[artifacts.LayerCodes], codec: codecs.Codec, found: Sequence[Candidate],
            config: ml_collections.ConfigDict, codes_key: str,
            neurons: block_plans.Blocks | None = None) -> list[results.Row]:
  """Evaluates full precision and every plan into `rows.jsonl`, and the loss of every sequence into `losses.jsonl`.

  Rows that are there are kept if they are the first of those that this run would write, from the same inputs and plans;
  otherwise all are measured again, so that the file does not depend on what was in it.
  """
  path, losses_path = run.path / "rows.jsonl", run.path / "losses.jsonl"
  key = artifacts.key("rows", VERSIONS["rows"], {"dtype": subject.dtype, "plans": VERSIONS["plans"]},
                      {"codes": codes_key, "text": text.digest})
  stamp = {"seed": config.seed, "config_hash": config_hash(config), "key": key}
  plans = {"full": None} | {candidate.file_name(): candidate.as_row()["plan"] for candidate in found}
  wanted = [{"id": name, "plan": plan} | stamp for name, plan in plans.items()]
  done, seen = _kept(path, wanted), _kept(losses_path, wanted)
  against = perplexity.reference(subject.functions, subject.top, subject.blocks, text.evaluation)
  results.append(losses_path, _losses_row(wanted[0], against.loss))
  results.append(path, full_row(subject, text, against.loss) | stamp)
  uniform: dict[float, list[np.ndarray]] = {}
  served = conditions.served(subject, config)
  with progress.bar("evaluate plans", len(found)) as advance:
    for candidate, row_stamp in zip(found, wanted[1:], strict=True):
      plan, name = candidate.plan, candidate.file_name()
      row, loss = done.get(name), results.numbered(seen.get(name, {}), "sequence_")
      if row is None or name not in seen:
        if isinstance(plan, channels.BlockPlan):
          own, widths = neurons.packed(plan), ()
        else:
          own, widths = conditions.codes(served, text.calibration, codec, plan.bits, layers, config)
        row, loss = evaluate(served, text, own, codec, candidate, against, widths)
        baseline = [] if candidate.family == "uniform" else uniform.get(plan.budget, [])
        results.append(losses_path, _losses_row(row_stamp, loss))
        results.append(path, row | against_uniform(loss, baseline) | stamp)
      if candidate.family == "uniform":
        uniform.setdefault(plan.budget, []).append(loss)
      advance(note=f"{plan.method} at {plan.budget}: loss {row['loss']:.4f}")
  return results.read(path)


def _kept(path: Path, wanted: Sequence[Mapping[str, Any]]) -> dict[str, results.Row]:
  """The rows of a file by id, if they are the first of those wanted; else none, and the file is removed."""
  rows = results.read(path)
  if [{field: row.get(field) for field in wanted[0]} for row in rows] == list(wanted[: len(rows)]):
    return {row["id"]: row for row in rows}
  log.warning("%s was made from something else: measuring again", path.name)
  path.unlink()
  return {}


def _losses_row(stamp: Mapping[str, Any], loss: np.ndarray) -> results.Row:
  """The loss of every sequence as a row."""
  return dict(stamp) | {f"sequence_{i:06d}": float(value) for i, value in enumerate(loss)}


def export(run: workspace.Workdir, subject: workspace.Subject, layers: Sequence[artifacts.LayerCodes],
           codec: codecs.Codec, found: Sequence[Candidate], config: ml_collections.ConfigDict) -> None:
  """Writes the models of the plans that `config.export` names, as `(method, budget)`, to `quantized-*/`."""
  wanted = [(registry.canonical(method), budget) for method, budget in config.export]
  for method, budget in wanted:
    if not any((c.plan.method, c.plan.budget) == (method, budget) for c in found):
      log.warning("config.export: this run has no plan %s at %s bits; nothing is written for it", method, budget)
  for candidate in found:
    if (candidate.plan.method, candidate.plan.budget) not in wanted:
      continue
    packed = [apply.pack_layer(codes, bits, widths=tuple(config.widths), group=codec.group)
              for codes, bits in zip(layers, candidate.plan.bits, strict=True)]
    manifest = {"plan": candidate.plan.as_json(), "codec": str(codec), "source": subject.digest}
    native.save(run.path / f"quantized-{candidate.file_name()}", *_by_block(subject, packed), subject.files(), manifest)


def _by_block(subject: workspace.Subject, packed: Sequence[native.Packed]) -> tuple[Any, Any, Any]:
  """Packed experts of every block (none of dense ones), other tensors of every block, and tensors of no block."""
  experts = [{} for _ in subject.blocks]
  for place, layer in zip(steps.sparse(subject.functions, subject.blocks), packed, strict=True):
    experts[place] = layer
  others, top = [{} for _ in subject.blocks], {}
  for name, tensor in subject.others.items():
    part, _, rest = names.place(subject.config, name).parameter.partition("/")
    (others[int(rest.partition("/")[0])] if part == "blocks" else top)[name] = tensor
  return experts, others, top


def describe(config: ml_collections.ConfigDict, subject: workspace.Subject, text: workspace.Text,
             stats: artifacts.Stats, damage: damage_lib.Damage | None, shown: Mapping[str, Sequence[Any]],
             found: Sequence[Candidate]) -> dict[str, Any]:
  """What the report needs beside the rows: `report.json` (see `report/page.py`)."""
  unrouted = stats.unrouted()
  load = stats.tokens / stats.tokens.mean(axis=1, keepdims=True)
  return {
      "title": f"{subject.directory.name}: {codecs.get(config.codec)}",
      "command": runs.command(config),
      "versions": runs.versions(),
      "config_hash": config_hash(config),
      "model": {
          "name": subject.directory.name, "layers": subject.shape[0], "experts": subject.shape[1],
          "top_k": subject.config.num_experts_per_tok, "hidden size": subject.config.hidden_size,
          "expert ffn size": subject.config.intermediate_size, "sha256": subject.digest[:16],
      },
      "stages": [
          f"Calibration: {stats.total_tokens} tokens of training text in {stats.batches} batches, one forward and one"
          " backward pass.",
          f"Encoding: {codecs.get(config.codec)} at {', '.join(map(str, config.widths))} bits, every expert at every"
          " width once.",
          f"Evaluation: {sum(b.size for b in text.evaluation)} held-out tokens"
          f" ({', '.join(sorted(text.tokens_per_byte))}, equal shares), from the packed buffers, in"
          f" {config.compute_dtype}.",
          *([f"Damage: every expert alone at {damage.bits} bits on {damage.tokens} other held-out tokens."]
            if damage else []),
      ],
      "policies": [
          "Routers, norms, attention, embeddings, dense blocks and shared experts stay in bfloat16; every weight of a"
          " routed expert is quantized (100%).",
          "An expert without calibration tokens gets its layer's mean second moments; its weights are never zeroed.",
          f"Coefficient of variation of expert load: {', '.join(f'{c:.2f}' for c in load.std(axis=1))} by layer.",
      ],
      "warnings": [f"layer {l}, expert {e} saw no calibration token" for l, e in unrouted],
      "widths": list(config.widths),
      "plans": [{"method": c.plan.method, "budget": c.plan.budget, "bits": c.plan.bits.tolist()} for c in found
                if not c.draw],
      "scores": dict(shown),
      "damage": None if damage is None else {"mean": damage.mean.tolist(), "stderr": damage.stderr.tolist(),
                                             "bits": damage.bits, "tokens": damage.tokens},
  }


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def config_hash(config: ml_collections.ConfigDict) -> str:
  """The digest of a config, as rows and report carry it."""
  return artifacts.digest(runs.plain(config))


def score_names(config: ml_collections.ConfigDict) -> list[str]:
  """The specs of all scores of whole experts that a config asks for, by themselves or in a method."""
  whole = (spec for spec in config.methods if not methods.block_of(spec))
  return [*config.scores, *filter(None, map(methods.score_of, whole))]


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in the config, so that they are not found after minutes of work.

  Raises:
    ValueError: names the field and the remedy.
  """
  if config.compute_dtype not in ("float32", "bfloat16"):
    raise ValueError(f"config.compute_dtype={config.compute_dtype!r}: it is 'float32' or 'bfloat16'")
  if config.draws < 1 or config.seed < 0:
    raise ValueError(f"config.draws={config.draws}, config.seed={config.seed}: draws are at least 1, a seed at least 0")
  if not all(isinstance(entry, tuple | list) and len(entry) == 2 for entry in config.export):
    raise ValueError(f"config.export={config.export}: pairs of a method and a budget, for example (('uniform', 2.0),)")
  codecs.get(config.codec).check_widths(config.widths)
  conditions.check(config)
  methods.check(config.methods, config.budgets, tuple(config.widths))
  block_plans.check(config)
  named = score_names(config)
  scores.check(named)
  workspace.check_text(config)
  if config.damage.sequences and config.damage.bits not in config.widths:
    raise ValueError(f"config.damage.bits={config.damage.bits} is not one of config.widths={tuple(config.widths)}")
  if not config.damage.sequences and any(registry.parse(spec).name == "damage" for spec in named):
    raise ValueError("score damage: config.damage.sequences is 0; ask for some, or leave the methods with damage out")


def check_routers(config: ml_collections.ConfigDict, subject: workspace.Subject) -> None:
  """Raises `ValueError` where a score needs the routers before training and the checkpoint lacks them."""
  if subject.routers_init is None and any(registry.parse(s).name == "router_norm_change" for s in score_names(config)):
    raise ValueError(f"{subject.directory}: score router_norm_change needs router_init.safetensors (the routers before"
                     " training) there; without it take router_norm, in the quickstart by"
                     " --config=configs/quickstart.py:norm=router_norm, or leave the score out")


def compare(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Quantizes one checkpoint by every method at every budget, measures what each plan costs, and writes the report.

  Args:
    config: see `configs/quickstart.py`.
    workdir: where everything goes (docs/design.md, section 4).

  Raises:
    ValueError: a mistake in the config or the checkpoint; names field, file or tensor and the remedy.
  """
  check(config)
  run, codec, widths = workspace.Workdir(workdir), codecs.get(config.codec), tuple(config.widths)
  with run.timed("open"), progress.bar("read model and text", 2) as advance:
    subject = workspace.open_checkpoint(config.checkpoint, config.compute_dtype)
    advance(note=f"{subject.shape[0]} layers of {subject.shape[1]} experts")
    check_routers(config, subject)
    text = workspace.read_text(config, subject.tokenizer)
    advance()
  with run.timed("calibrate"):
    stats = calibrate(run, subject, text)
  with run.timed("encode"):
    layers, errors, codes_key = encode(run, subject, stats, codec, widths)
  with run.timed("damage"):
    damage = measure_damage(run, subject, text, layers, errors, config.damage.bits, codes_key)
  experts = [subject.functions.experts(block) for block in subject.sparse_blocks()]
  evidence = scores.Evidence(stats, errors, subject.routers, subject.routers_init, experts,
                             damage.mean if damage else None, damage.stderr if damage else None, config.damage.bits)
  with run.timed("neurons"):
    neurons = block_plans.prepare(run, subject, text, stats, codec, config)
  with run.timed("allocate"):
    shown = {spec: scores.sensitivity(spec, evidence).tolist() for spec in config.scores}
    found = allocate(run, subject, evidence, config, neurons)
  with run.timed("evaluate"):
    rows = measure(run, subject, text, layers, codec, found, config, codes_key, neurons)
  with run.timed("export"):
    export(run, subject, layers, codec, found, config)
  with run.timed("report"), progress.bar("write report", 1) as advance:
    summary = describe(config, subject, text, stats, damage, shown, found)
    artifacts.write_json(workdir / "report.json", summary)
    page = report.write(workdir)
    advance()
  console = rich_console.Console()
  report.terminal(rows, console)
  console.print(f"report: {page}")
