"""What a run says at its end: rows, the content of the report page, and a few lines on the terminal."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from moeq_jax import artifacts, registry, results, runs, scores
from moeq_jax.allocate import methods
from moeq_jax.export import native
from moeq_jax.quantize import evaluation, exports, room

FULL = {"id": "full", "method": "full precision", "family": "full", "codec": None, "group": None, "sequential": None,
        "budget": None, "nominal_bits": 16.0, "effective_bits": 16.0, "stored_bits": 16.0, "loss_delta": 0.0,
        "loss_delta_ci95": 0.0, "predicted": None, "lower_bound": None, "gap": None, "draw": None}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a run has at its end.

  Attributes:
    opened: `task.Opened`.
    found: the evidence of the plan.
    chosen: the plan.
    constraints: what other constraints would cost, see `planning.constraint_costs`.
    model: the quantized model.
    metas: of its layers' files.
    losses: before and after, if measured.
    copies: directories in other formats.
  """

  opened: Any
  found: scores.Evidence
  chosen: methods.Candidate
  constraints: Sequence[Mapping[str, Any]]
  model: native.Quantized
  metas: Mapping[int, Mapping[str, Any]]
  losses: evaluation.Losses | None
  copies: Sequence[Path]


def write(config: ml_collections.ConfigDict, out: Outcome) -> None:
  """Writes `rows.jsonl` and `report.json` (see `report/quantized.py`)."""
  opened, chosen, model = out.opened, out.chosen, out.model
  run, source = opened.subject.run, opened.subject.source
  before, sizes = room.tensor_bytes(opened.subject), model.manifest["sizes"]
  after = sum(path.stat().st_size for path in model.directory.iterdir())
  weights = sum(math.prod(shape) for shape in room.shapes(opened.subject))
  _write_rows(run.path / "rows.jsonl", config, out, sum(before.values()))
  unrouted = _unrouted(out)
  artifacts.write_json(run.path / "report.json", {
      "page": "quantized",
      "title": f"{source.directory.resolve().name}: {sizes['nominal_bits']:.2f} bits per expert weight",
      "command": runs.command(config),
      "config_hash": artifacts.digest(runs.plain(config)),
      "versions": runs.versions(),
      "model": _model(opened),
      "bytes": {"before": before, "after": after,
                "experts_after": round(sizes["stored_bits"] * weights / 8)},
      "bits": {"asked": opened.budget, **{n: sizes[f"{n}_bits"] for n in ("nominal", "effective", "stored")}},
      "widths": list(config.widths),
      "plan": chosen.plan.as_json() | {"projections": list(source.projections), "units": chosen.units,
                                       "draw": chosen.draw},
      "constraints": list(out.constraints),
      "evaluation": _evaluation(opened, out.losses),
      "unrouted": unrouted,
      "sweeps": _sweeps(config, opened),
      "policies": _policies(opened, unrouted, chosen.plan),
      "exports": [{"name": path.name, "bytes": sum(f.stat().st_size for f in path.iterdir())} for path in out.copies],
      "tools": _tools(config, chosen.plan, source.config.family),
  })


def _write_rows(path: Path, config: ml_collections.ConfigDict, out: Outcome, bytes_before: int) -> None:
  chosen, model, losses = out.chosen, out.model, out.losses
  stamp = {"seed": config.seed, "config_hash": artifacts.digest(runs.plain(config))}
  nothing = {"loss": None, "perplexity": None, "loss_delta": None, "loss_delta_ci95": None}
  full = losses and {"loss": float(losses.full.mean()), "perplexity": float(np.exp(losses.full.mean()))}
  group = registry.parse(config.codec).kwargs.get("group", 64)
  encoded = {"codec": model.manifest["codec"], "group": group,
             "sequential": config.sequential if out.opened.codec.needs_moment else None}
  path.unlink(missing_ok=True)
  results.append(path, FULL | (full or nothing) | {"file_mb": bytes_before / 1e6} | stamp)
  results.append(path, chosen.as_row() | model.manifest["sizes"] | encoded | (losses.row() if losses else nothing)
                 | stamp)


def _model(opened: Any) -> dict[str, Any]:
  subject, config = opened.subject, opened.subject.source.config
  return {
      "name": subject.source.directory.resolve().name, "family": config.family, "blocks": len(subject.layers),
      "MoE layers": len(subject.sparse), "experts": subject.source.experts,
      "experts per token": getattr(config, "num_experts_per_tok", 1),
      "expert weights": sum(math.prod(shape) for shape in room.shapes(subject)), "sha256": subject.digest[:16],
  }


def _unrouted(out: Outcome) -> list[list[int]]:
  """`[block, expert]` of those that saw no calibration token, as far as tokens were counted."""
  stats, sparse = out.found.stats, out.opened.subject.sparse
  counted = None if stats is None else stats.tokens
  if counted is None and all(out.metas[layer]["tokens"] is not None for layer in sparse):
    counted = np.array([out.metas[layer]["tokens"] for layer in sparse])
  if counted is None:
    return []
  return [[sparse[l], int(e)] for l, e in np.argwhere(np.asarray(counted) == 0)]


def _evaluation(opened: Any, losses: evaluation.Losses | None) -> dict[str, Any] | None:
  if losses is None:
    return None
  return losses.row() | {"full": float(losses.full.mean()), "sequences": len(losses.full),
                         "about": opened.evaluation.about}


def _sweeps(config: ml_collections.ConfigDict, opened: Any) -> list[str]:
  """What was done, in sentences."""
  needs, text, widths = opened.needs, opened.calibration, ", ".join(map(str, config.widths))
  said = [f"Calibration: {text.about}." if text else "No calibration text: neither the codec nor the plan needs it."]
  if needs.forward:
    said.append("Forward sweep: tokens and routing weights of every expert"
                + (f", and its errors at {widths} bits." if needs.fused else "."))
  if needs.backward:
    said.append("Backward sweep: gradients of the routers, squared gradients of the experts' outputs.")
  if needs.errors and not needs.fused:
    said.append(f"Errors sweep: every expert encoded at {widths} bits.")
  rows = ""
  if needs.rows:
    rows = ", on the inputs that the quantized layers before it give" if config.sequential else ""
  return [*said, f"Encoding sweep: {opened.codec}{rows}."]


def _policies(opened: Any, unrouted: Sequence[Sequence[int]], plan: Any) -> list[str]:
  said = ["Routers, norms, attention, embeddings and dense layers stay as they are stored; every expert weight is"
          " quantized (100%)."]
  if unrouted:
    bits = [plan.bits[opened.subject.sparse.index(layer), expert].ravel() for layer, expert in unrouted]
    widths = ", ".join(str(width) for width in np.unique(np.concatenate(bits)))
    said.append(f"Experts that saw no calibration token are stored at {widths} bits: a score that weighs experts by"
                " what calibration saw gives them the least. Their weights are never zeroed; text that uses them may"
                " lose more than is measured here.")
  if unrouted and opened.needs.rows:
    said.append("Such an expert is rounded to nearest, for want of inputs.")
  return said


def _tools(config: ml_collections.ConfigDict, plan: artifacts.Plan, family: str) -> list[dict[str, str | None]]:
  """Which tool opens what this run wrote, as far as it was tried."""
  formats, joint = exports.kinds(config.export), family != "switch_transformers"
  one = len(np.unique(plan.bits)) == 1 or any("width" in str(spec) for spec in config.export)
  said = [("quantized", "moeq_jax: ./launch.sh generate, evaluate and inspect")]
  if "hf" in formats:
    said.append(("hf", "transformers, and all that reads Hugging Face checkpoints; as large as the original"))
  if "compressed_tensors" in formats and one and joint:
    said.append(("compressed-tensors", "transformers with compressed-tensors: all experts have one scheme"))
  elif "compressed_tensors" in formats:
    why = ("one scheme for all experts: --config.export=\"('compressed-tensors(width=4)',)\"" if joint else
           "the copy hf of a Switch Transformer")
    said.append(("compressed-tensors", f"compressed-tensors' own decompressor; transformers wants {why}"))
  elif joint:
    said.append((None, "for transformers and packed experts: one symmetric scheme, configs/quantize.py:deploy"))
  return [{"what": what, "opens": opens} for what, opens in said]


def outlook(opened: Any, disk: Mapping[str, int], evaluate: bool) -> str:
  """What a run is about to do, in a line."""
  needs, source = opened.needs, opened.subject.source
  sweeps = [name for name, made in (
      ("forward", needs.forward), ("backward", needs.backward), ("errors", needs.errors and not needs.fused),
      ("encode", True), ("evaluate", evaluate)) if made]
  return (f"{len(source.sparse_layers)} layers of {source.experts} experts, {opened.budget:g} bits; sweeps:"
          f" {', '.join(sweeps)}; at most {room.human(sum(disk.values()))} of disk")


def terminal(workdir: Path, page: Path, console: rich_console.Console) -> None:
  """Prints what `report.json` says, in a few lines."""
  data = json.loads((workdir / "report.json").read_bytes())
  table = rich_table.Table(title=data["title"], show_header=False, title_justify="left")
  sizes, bits, loss = data["bytes"], data["bits"], data["evaluation"]
  before = sum(sizes["before"].values())
  table.add_row("size", f"{room.human(before)} → {room.human(sizes['after'])}")
  counted = "scales and the order of neurons" if "block" in data["plan"] else "scales"
  table.add_row("bits per expert weight", f"{bits['nominal']:.3f} nominal, {bits['effective']:.3f} with {counted},"
                                          f" {bits['stored']:.3f} stored")
  table.add_row("loss, nats per token", "not measured (config.evaluation.sequences=0)" if loss is None else
                f"{loss['full']:.4f} → {loss['loss']:.4f}: {loss['loss_delta']:+.4f} ± {loss['loss_delta_ci95']:.4f}")
  if data["unrouted"]:
    table.add_row("experts without tokens", f"{len(data['unrouted'])}")
  for tool in data["tools"]:
    table.add_row(str(workdir / tool["what"]) if tool["what"] else "", tool["opens"])
  console.print(table)
  console.print(f"report: {page}")
