"""The run: calibrate, encode, plan and measure a fine-tuned Switch Transformer; stages and products are `pipeline`'s.

`workdir/` then holds, beside what `pipeline` leaves there: `rows.jsonl` (fields below), `examples/` (loss and ROUGE of
every evaluation pair for every plan, for paired comparisons), `written.json` (what the full-precision model writes)
and `summary.json` (rank correlations, routing, and what it costs to be given another pair's text).

A row has the fields of `results` that describe a plan, and: loss in nats per target token, over all pairs and per
domain; rouge1, rouge2, rougeLsum in points of 100; `*_delta`, the difference to full precision, and `*_delta_ci95`,
half of its 95% interval, paired over pairs; `empty`, generations without a word, which score 0.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from moeq_jax import artifacts, codecs, pipeline, progress, registry, results, scores, steps, workspace
from moeq_jax.allocate import methods
from moeq_jax.switch_track import correlations, measure
from moeq_jax.switch_track import subject as subjects

VERSION = 2

log = logging.getLogger(__name__)


def calibrate(run: workspace.Workdir, subject: workspace.Subject, text: subjects.Pairs) -> artifacts.Stats:
  """The statistics of calibration, with tokens and gate weights counted over real tokens only.

  The stage counts every row of a batch, and a row of padding has an expert, too, though it never reaches it.
  """
  stats = pipeline.calibrate(run, subject, text.as_text())
  tokens, gates = (np.zeros(stats.tokens.shape) for _ in range(2))
  for batch in text.calibration:
    state = steps.embed(subject.functions, subject.top, jax.tree.map(jnp.asarray, batch))
    layer = 0
    for block in subject.blocks:
      state, routing = steps.block(subject.functions, block, state)
      if routing is not None:
        weights, experts = np.asarray(routing.weights)[:, 0], np.asarray(routing.experts)[:, 0]
        np.add.at(tokens[layer], experts[weights > 0], 1)
        np.add.at(gates[layer], experts, weights)
        layer += 1
  return dataclasses.replace(stats, tokens=tokens.astype(np.int64), gate_weight=gates)


def plans(config: ml_collections.ConfigDict, subject: workspace.Subject,
          evidence: scores.Evidence) -> list[methods.Candidate]:
  """The plans of every method at every budget. Rules with two levels have nothing to choose where the budget is itself
  a width, and uniform widths are only taken there."""
  inputs = methods.Inputs(
      widths=tuple(config.widths), shape=subject.shape, draws=config.draws, seed=config.seed,
      cost=functools.cache(lambda spec: scores.as_cost(spec, evidence)),
      sensitivity=functools.cache(lambda spec: scores.sensitivity(spec, evidence)))
  found = []
  for budget in config.budgets:
    for spec in subjects.methods_for(config, subject):
      if (registry.parse(spec).name == "uniform") == (budget in config.widths) or _free(spec):
        found += methods.candidates(spec, budget, inputs)
  return found


def _free(spec: str) -> bool:
  """Whether a method may take any width, so that it has a choice at every budget."""
  parsed = registry.parse(spec)
  return parsed.name == "knapsack" and "widths" not in parsed.kwargs


def _measure(run: workspace.Workdir, subject: workspace.Subject, text: subjects.Pairs,
             layers: Sequence[artifacts.LayerCodes], codec: codecs.Codec, found: Sequence[methods.Candidate],
             config: ml_collections.ConfigDict, codes_key: str) -> None:
  """Full precision and every plan: `examples/`, where those under the same key stay, and `rows.jsonl` made of them."""
  spec = {"most": config.most, "dtype": config.compute_dtype, "capacity": config.capacity}
  inputs = {"codes": codes_key, "pairs": text.digest}
  bank = measure.Bank(layers, config.widths, codec.group)
  full, routes, texts = measure.examples(subject, subject.blocks, text, most=config.most, write=True)
  full.save(run.path / "examples" / "full.npz", artifacts.key("examples", VERSION, spec, inputs))
  written = [{"pair": p.name, "summary": p.summary, "written": t}
             for p, t in zip(text.found_written, texts, strict=True)]
  artifacts.write_json(run.path / "written.json", written)

  def examples(bits: np.ndarray, write: bool, name: str) -> measure.Examples:
    make = lambda: measure.examples(subject, bank.blocks(subject, bits), text, most=config.most, write=write,
                                    reference=routes)[0]
    key = artifacts.key("examples", VERSION, spec | {"write": write}, inputs | {"bits": artifacts.digest(bits)})
    return run.product(f"examples/{name}.npz", key, measure.Examples.load, make)

  rows = [{"id": "full", "method": "full precision", "family": "full", "budget": None, "nominal_bits": 32.0,
           "effective_bits": 32.0, "draw": None} | measure.row(full, full, text)]
  with progress.bar("evaluate plans", len(found)) as advance:
    for candidate in found:
      bits, write = candidate.plan.bits, candidate.draw is None or candidate.draw < config.draws_written
      sizes = {"nominal_bits": float(np.mean(bits)), "effective_bits": measure.effective_bits(layers, bits)}
      measured = measure.row(examples(bits, write, candidate.file_name()), full, text)
      rows.append(candidate.as_row() | {"codec": str(codec)} | sizes | measured)
      advance(note=f"{candidate.plan.method} at {candidate.plan.budget:g}: loss {measured['loss']:.4f}")
  stamp = {"seed": config.seed, "model": subject.directory.parent.name, "config_hash": pipeline.config_hash(config)}
  (run.path / "rows.jsonl").unlink(missing_ok=True)
  for row in rows:
    results.append(run.path / "rows.jsonl", row | stamp)


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in the config, so that they are not found after minutes of work.

  Raises:
    ValueError: names the field and the remedy.
  """
  codecs.get(config.codec).check_widths(config.widths)
  methods.check(config.methods, [b for b in config.budgets if b not in config.widths] or config.budgets,
                tuple(config.widths))
  scores.check(pipeline.score_names(config))
  if config.damage_bits not in config.widths:
    raise ValueError(f"config.damage_bits={config.damage_bits} is not one of config.widths={tuple(config.widths)}")
  if not 0 <= config.draws_written <= config.draws:
    raise ValueError(f"config.draws_written={config.draws_written}: between 0 and config.draws={config.draws}")


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Quantizes one fine-tuned Switch Transformer by every order at every budget and measures loss and ROUGE.

  Args:
    config: see `experiments/switch_track.py`.
    workdir: where everything goes.

  Raises:
    ValueError: a mistake in the config or the checkpoint; names field, file or tensor and the remedy.
  """
  check(config)
  place, codec = workspace.Workdir(workdir), codecs.get(config.codec)
  with place.timed("open"):
    subject = subjects.open_checkpoint(config)
    subjects.methods_for(config, subject)  # before minutes of work
    text = subjects.read_pairs(config, subject)
  with place.timed("calibrate"):
    stats = calibrate(place, subject, text)
  with place.timed("encode"):
    layers, errors, codes_key = pipeline.encode(place, subject, stats, codec, config.widths)
  with place.timed("damage"):
    damage = pipeline.measure_damage(place, subject, text.as_text(), layers, errors, config.damage_bits, codes_key)
  experts = [subject.functions.experts(block) for block in subject.sparse_blocks()]
  evidence = scores.Evidence(stats, errors, subject.routers, subject.routers_init, experts,
                             damage.mean if damage else None, damage.stderr if damage else None, config.damage_bits)
  summary: dict[str, Any] = correlations.summary(config.scores, evidence, skip=() if subject.routers_init is not None
                                                 else (subjects.NORM_CHANGE,))
  artifacts.write_json(workdir / "summary.json", summary | {
      "unrouted": stats.unrouted(), "other_texts": measure.other_texts(subject, text)})
  found = plans(config, subject, evidence)
  with place.timed("evaluate"):
    _measure(place, subject, text, layers, codec, found, config, codes_key)
