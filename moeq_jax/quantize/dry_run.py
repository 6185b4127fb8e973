"""`config.dry_run`: what a run of the task `quantize` would do and take, without reading a weight.

With a checkpoint its headers are read and verified; without one the config's `model` (the values of a config.json)
stands for it. Every parameter's shape is compared between the table of names and the model, every kind of block is
traced with the run's batches, and the bits that the method gives are counted. Printed are sizes, memory and hours
(`estimates.py` says where they come from); the last line is JSON. Nothing is written.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import codecs, inspection, registry, user_text, workspace
from moeq_jax.allocate import accounting, methods
from moeq_jax.models import families, hf_config, names, switch
from moeq_jax.quantize import blocks, estimates, initial, measure, room, settings, sizes
from moeq_jax.quantize import needs as needs_lib
from moeq_jax.quantize import subject as subject_lib
from moeq_jax.quantize.subject import Subject


@dataclasses.dataclass(frozen=True)
class Outlook:
  """What a run would do.

  Attributes:
    checked: what was looked at, in sentences.
    budget: average nominal bits per expert weight.
    counts: experts of a layer by width, where the method gives every layer the same; else None.
    parameters: all, those of experts, and those that a token uses.
    file_bytes: of the quantized model's files.
    paper_gib: the same as the paper's tables count (see `accounting`), for Mixtral where counts are known.
    disk: bytes on disk at once, by purpose.
    stages: memory and hours.
  """

  checked: list[str]
  budget: float
  counts: dict[int, float] | None
  parameters: tuple[int, int, int]
  file_bytes: int
  paper_gib: float | None
  disk: dict[str, int]
  stages: list[estimates.Stage]


def run(config: ml_collections.ConfigDict, workdir: Path) -> Outlook:
  """Checks a config and prints what it would take.

  Args:
    config: of the task `quantize`; see `configs/quantize.py`.
    workdir: where the run would go.

  Raises:
    ValueError: a mistake in the config or the checkpoint, or a shape that does not fit; names it and the remedy.
  """
  found = outlook(config, workspace.Workdir(workdir))
  _show(config, found, rich_console.Console())
  print(json.dumps(as_json(config, found)), flush=True)
  return found


def outlook(config: ml_collections.ConfigDict, run: workspace.Workdir) -> Outlook:
  """What a run of `config` would do."""
  config = blocks.resolved(config)
  settings.check(config)
  subject, checked = _subject(config, run)
  source, codec, shapes = subject.source, codecs.get(config.codec), measure.projection_shapes(subject)
  blocks.check_source(config.method, codec, shapes)
  method, known = initial.expected(config, source)
  if config.method != method:
    checked.append(f"initial routers are not known: {config.method} becomes {method} (config.missing_routers)")
  for name, (k, _) in shapes.items():
    if codec.group and k % codec.group:
      checked.append(f"{name}: its {k} rows do not fill groups of {codec.group}; the last one is short")
  bits = room.budget(config, subject, codec.group)
  needs = needs_lib.of(method, bits, tuple(config.widths), codec, source.projections, known,
                       text=bool(config.calibration.sequences))
  texts = {purpose: _text(config, purpose, source.config) for purpose in user_text.PURPOSES}
  calibration = texts["calibration"] if needs.text else None
  if needs.text and calibration is None:
    raise ValueError(f"config.calibration.sequences=0: {config.method} with {config.codec} needs text")
  amounts = _amounts(config, subject, calibration, texts["evaluation"], bits)
  counts = layer_counts(method, bits, tuple(config.widths), source.experts)
  if counts is not None:
    checked.append(f"experts of a layer by width: {_counted(counts)}, {_average(counts):g} bits on average")
  parts = _parts(source.config)
  return Outlook(
      checked, bits, counts, inspection.counts(source.config), room.quantized_bytes(subject, bits, codec.group, method),
      None if counts is None or source.config.family != "mixtral" else accounting.memory(parts, counts),
      room.disk_needed(subject, config, needs, bits, codec.group, calibration, texts["evaluation"]),
      estimates.stages(amounts, needs, codec, len(config.widths), sequential=config.sequential))


def _subject(config: ml_collections.ConfigDict, run: workspace.Workdir) -> tuple[Subject, list[str]]:
  """What is quantized, by its headers or by its config alone, and what was compared."""
  wanted = sizes.read(config.model.to_dict()) if config.model else None
  if not config.checkpoint:
    if wanted is None:
      raise ValueError("config.checkpoint: none is given, and config.model holds no config.json values; give either")
    subject = Subject(run, wanted, families.functions(wanted.config, config.compute_dtype), config.compute_dtype)
    return subject, [f"config.model: {sizes.check(wanted.config)} parameters have equal shapes in model and files"]
  subject = subject_lib.open_source(run, config.checkpoint, config.compute_dtype)
  found = subject.source.config
  if wanted and (wrong := sizes.differences(wanted.config, found)):
    raise ValueError(f"{subject.source.directory}: is not the model of config.model ({len(wrong)} parameters differ):"
                     f" {wrong[0]}; take its checkpoint, or configs/quantize.py for another model")
  return subject, [f"{subject.source.directory}: headers of {len(subject.source.files)} tensors verified",
                   f"{sizes.check(found)} parameters have equal shapes in model and files"]


def _text(config: ml_collections.ConfigDict, purpose: str, model: hf_config.Config) -> user_text.Text | None:
  """Batches of the shape that a run would read; their tokens mean nothing."""
  count = config[purpose].sequences
  if not count:
    return None
  rows = np.zeros((config.batch, config.length), np.int32)
  batch: Any = rows
  if isinstance(model, switch.SwitchConfig):
    batch = user_text.corrupted(rows, model, None, [0])
  return user_text.Text([batch] * (count // config.batch), "", "")


def _amounts(config: ml_collections.ConfigDict, subject: Subject, calibration: user_text.Text | None,
             evaluation: user_text.Text | None, bits: float) -> estimates.Amounts:
  source, model = subject.source, subject.source.config
  shapes, itemsize = measure.projection_shapes(subject), np.dtype(config.compute_dtype).itemsize
  batch = (calibration or evaluation or _text(config, "calibration", model) or user_text.Text([], "", "")).batches[:1]
  flowing = sizes.states(model, subject.functions, subject.dtype, batch[0]) if batch else (None, None, None)
  state, halfway, logits = map(sizes.nbytes, flowing)
  hidden, inner = shapes["down"][1], shapes["down"][0]
  y = 4 * hidden * user_text.batch_inputs(batch[0]).size if batch else 0
  batches = len(calibration.batches) if calibration else 0
  group = codecs.get(config.codec).group
  largest = max(source.nbytes(layer, experts=False) for layer in subject.layers) // sizes.STORED * itemsize
  embedding = sum(math.prod(shape) for name, shape in names.top_shapes(model).items() if len(shape) > 1)
  return estimates.Amounts(
      projections=shapes, experts=source.experts, layers=len(subject.sparse),
      active=inspection.counts(model)[2] - embedding, checkpoint=sum(room.tensor_bytes(subject).values()),
      block=2 * largest, state=state * batches, halfway=(halfway + y) * batches,
      logits=logits // (1 if isinstance(model, switch.SwitchConfig) else config.batch),
      rows=hidden * itemsize + inner * itemsize + 4 * hidden, tokens=calibration.tokens if calibration else 0,
      per_token=getattr(model, "num_experts_per_tok", 1), evaluation=evaluation.tokens if evaluation else 0,
      bits=bits + 32 / (group or min(k for k, _ in shapes.values())))


def layer_counts(method: str, bits: float, widths: tuple[int, ...], experts: int) -> dict[int, float] | None:
  """Experts of a layer by width, for methods that give every layer the same: tiers, random tiers and uniform."""
  spec = registry.parse(method)
  if spec.name == "uniform":
    below, above = max(w for w in widths if w <= bits), min(w for w in widths if w >= bits)
    share = (bits - below) / (above - below) if above > below else 0.0
    return {width: count for width, count in ((above, experts * share), (below, experts * (1 - share))) if count}
  if spec.name not in ("tiers", "random"):
    return None
  variant = str(spec.kwargs.get("variant", "paper"))
  counts = methods.tier_counts(bits, widths, experts, spec.kwargs.get("levels", 2), variant)
  return {width: count for width, count in counts.items() if count}


def _parts(config: hf_config.Config) -> accounting.Parts:
  """Parameters by what the paper's tables make of them."""
  blocks = {name: math.prod(shape) for l in range(names.block_count(config))
            for name, shape in names.block_shapes(config, l).items()}
  matrices = {f"{kind}/{name}" for kind in ("attention", "cross") for name in "qkvo"}
  top = names.top_shapes(config)
  return accounting.Parts(
      experts=sum(size for name, size in blocks.items() if names.is_expert(name)),
      attention=sum(size for name, size in blocks.items() if name.split("/", 2)[2] in matrices),
      embedding=sum(math.prod(top[name]) for name in ("top/embedding", "top/output") if name in top))


def _counted(counts: dict[int, float]) -> str:
  return ", ".join(f"{count:g} at {width}" for width, count in counts.items())


def _average(counts: dict[int, float]) -> float:
  return sum(width * count for width, count in counts.items()) / sum(counts.values())


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def as_json(config: ml_collections.ConfigDict, found: Outlook) -> dict[str, Any]:
  """What is printed as the last line."""
  total, experts, active = found.parameters
  return {
      "dry_run": True, "method": config.method, "codec": config.codec, "budget": found.budget,
      "counts": found.counts, "parameters": total, "expert_parameters": experts, "active_parameters": active,
      "file_bytes": found.file_bytes, "paper_gib": found.paper_gib and round(found.paper_gib, 2),
      "published": config.published.to_dict() if config.published else None, "disk_bytes": sum(found.disk.values()),
      "peak_gib": round(max(stage.memory for stage in found.stages) / estimates.GIB, 2),
      "hours": round(sum(stage.hours for stage in found.stages), 2), "stages": estimates.as_json(found.stages)}


def _show(config: ml_collections.ConfigDict, found: Outlook, console: rich_console.Console) -> None:
  for line in found.checked:
    console.print(line, highlight=False)
  console.print(f"{config.method}, {config.codec}, on 2 CPU cores:", highlight=False)
  table = rich_table.Table("stage", "peak memory", "hours")
  for stage in found.stages:
    table.add_row(stage.name, inspection.size(stage.memory), f"{stage.hours:.2f}")
  table.add_row("all", inspection.size(max(s.memory for s in found.stages)),
                f"{sum(s.hours for s in found.stages):.2f}")
  console.print(table)
  lines = [f"quantized files: {inspection.size(found.file_bytes)}"]
  if found.paper_gib is not None:
    lines[0] += f"; as the paper's tables count, with attention at 4 bits: {found.paper_gib:.2f} GiB"
  lines.append(f"disk at once: {', '.join(f'{name} {inspection.size(size)}' for name, size in found.disk.items())}")
  if config.published:
    lines.append(f"published: {', '.join(f'{name} {value}' for name, value in config.published.to_dict().items())}")
  for line in lines:
    console.print(line, highlight=False)
  console.print("Memory and hours are estimates (moeq_jax/quantize/estimates.py says from which measurements); no"
                " weight was read.", highlight=False)
