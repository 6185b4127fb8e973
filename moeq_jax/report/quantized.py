"""The page of one quantized model: `report.html`, `report.md` and `figures/*.png` from its `report.json`.

`report.json` is written by `quantize/summary.py`:

  title, command, config_hash, versions, model, sweeps, policies      as in `page.py` (sweeps are its stages)
  bytes         {"before": {"experts", "other"}, "after", "experts_after"}: tensors before, all files after
  bits          {"asked", "nominal", "effective", "stored"}: average bits per expert weight
  widths        candidate bits
  plan          `Plan.as_json()` with `projections`, `units` and `draw`; or `BlockPlan.as_json()` with the same
  constraints   [{"constraint", "predicted", "ratio", "bits"}]: the least cost under each; empty for plans without costs
  evaluation    None, or {"full", "loss", "loss_delta", "loss_delta_ci95", "perplexity", "sequences", "about"}
  unrouted      [[block, expert]] without calibration tokens
  exports       [{"name", "bytes"}]
  tools         [{"what", "opens"}]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import artifacts
from moeq_jax.report import maps, page, tables

Line, Group, Table = tables.Line, tables.Group, tables.Table
MOST_NAMED = 40  # experts named one by one


def write(workdir: Path, data: Mapping[str, Any]) -> Path:
  """Writes the page into `workdir`; returns its path.

  Raises `ValueError`, naming the entry, if `report.json` holds arrays that do not fit together.
  """
  context = contents(data)
  for picture in context["pictures"]:
    artifacts.write_bytes(workdir / "figures" / f"{picture.name}.png", picture.png)
  environment = page.environment()
  for name in ("quantized.md.j2", "quantized.html.j2"):
    text = environment.get_template(name).render(context)
    artifacts.write_bytes(workdir / f"report.{name.split('.')[1]}", text.encode())
  return workdir / "report.html"


def contents(data: Mapping[str, Any]) -> dict[str, Any]:
  """Everything the templates show."""
  plan = data["plan"]
  return {
      "title": str(data["title"]),
      "headline": _headline(data),
      "sizes": _sizes(data),
      "shares": _shares(data),
      "constraints": _constraints(data),
      "pictures": [maps.bit_maps(_maps(plan), data["widths"], float(plan["budget"]), **_rows_of(plan))],
      "unrouted": _unrouted(data["unrouted"]),
      "facts": [(name, [(str(k), tables.plain(v)) for k, v in data[key].items()])
                for name, key in (("Model", "model"), ("Versions", "versions"))],
      "sweeps": [str(line) for line in data["sweeps"]],
      "policies": [str(line) for line in data["policies"]],
      "tools": [(str(tool["what"] or "not written"), str(tool["opens"])) for tool in data["tools"]],
      "command": str(data["command"]),
      "config_hash": str(data["config_hash"]),
  }


def _headline(data: Mapping[str, Any]) -> list[str]:
  """What became of the model, in sentences."""
  before, after, bits = sum(data["bytes"]["before"].values()), data["bytes"]["after"], data["bits"]
  said = [f"{gigabytes(before)} became {gigabytes(after)}: {before / after:.1f} times smaller. An expert weight takes"
          f" {bits['nominal']:.3f} bits in codes ({bits['asked']:g} were allowed), {bits['effective']:.3f} with its"
          f" share of scales and zeros, {bits['stored']:.3f} in the files."]
  said += _of_blocks(data["plan"])
  loss = data["evaluation"]
  if loss is None:
    return [*said, "What that costs in loss was not measured: no evaluation was asked for."]
  clear = abs(loss["loss_delta"]) > loss["loss_delta_ci95"]
  noise = "" if clear else ", which is within its noise"
  change = f"{loss['loss_delta']:+.4f} ± {loss['loss_delta_ci95']:.4f}{noise}"
  return [*said, f"Loss: {loss['full']:.4f} nats per token before, {loss['loss']:.4f} after, {change} (half a 95%"
                 f" interval, paired over {loss['sequences']} sequences). Text: {loss['about']}."]


def _of_blocks(plan: Mapping[str, Any]) -> list[str]:
  """What is to be said of a plan by blocks of neurons."""
  if "block" not in plan:
    return []
  rows = "" if plan["down_block"] == plan["block"] else f" ({plan['down_block']} in down)"
  averages = ", ".join(f"{name} {plan['average_bits'][name]:.3f}" for name in plan["projections"])
  return [f"Each block of {plan['block']} neurons of a projection{rows} has a width of its own; on average {averages}"
          " bits. The neurons of every expert were put in order, which changes nothing in what it computes; the"
          f" {plan['permutation_bits']:.4f} bits that this order takes are counted with the scales, and not stored."]


def gigabytes(size: float) -> str:
  """Bytes in units of 10^9 or 10^6."""
  return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _sizes(data: Mapping[str, Any]) -> Table:
  size, copies = data["bytes"], data["exports"]
  before, rest = size["before"], size["after"] - size["experts_after"]
  lines = [
      Line("experts", "", (gigabytes(before["experts"]), gigabytes(size["experts_after"]))),
      Line("all else", "", (gigabytes(before["other"]), gigabytes(rest))),
      Line("together", "", (gigabytes(sum(before.values())), gigabytes(size["after"])), best=True),
      *(Line(f"copy: {copy['name']}", "", ("", gigabytes(copy["bytes"]))) for copy in copies),
  ]
  return Table(("part", "checkpoint", "quantized"), (Group("", tuple(lines)),))


def _bits(plan: Mapping[str, Any]) -> np.ndarray:
  """`[L, E, P]`, or `[L, E, 1]` where an expert has one width."""
  bits = np.asarray(plan["bits"])
  if bits.ndim not in (2, 3) or not bits.size:
    raise ValueError(f"report.json: the bits of the plan have shape {bits.shape}, not (layers, experts[, projections])")
  return bits if bits.ndim == 3 else bits[..., None]


def _maps(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The plan as `maps.bit_maps` takes it: one map, or one for each projection."""
  bits = _bits(plan)
  if "block" in plan:
    own = {name: bits[..., np.equal(plan["projection"], place)] for place, name in enumerate(plan["projections"])}
    return [{"method": name, "budget": plan["budget"], "bits": part} for name, part in own.items()]
  names = plan["projections"] if bits.shape[2] > 1 else [plan["method"]]
  return [{"method": name, "budget": plan["budget"], "bits": bits[..., place]} for place, name in enumerate(names)]


def _rows_of(plan: Mapping[str, Any]) -> dict[str, str]:
  """What the rows of a layer are in the maps, where it is not projections."""
  return {"rows_are": "blocks differ a layer has a row for each, the dearest first"} if "block" in plan else {}


def _shares(data: Mapping[str, Any]) -> Table:
  """How many experts (or projections, or blocks) have each width, and their share of the weights."""
  plan, bits = data["plan"], _bits(data["plan"])
  sizes = plan["sizes"] if "block" in plan else [1] * bits.shape[2]
  share = lambda width: 100 * np.average((bits == width).mean(axis=(0, 1)), weights=sizes)
  lines = [Line(f"{width}", "", (f"{np.sum(bits == width)}", f"{share(width):.1f}%")) for width in data["widths"]]
  kind = "experts" if bits.shape[2] == 1 else "projections of experts"
  return Table(("bits", "blocks of neurons" if "block" in plan else kind, "share"), (Group("", tuple(lines)),))


def _constraints(data: Mapping[str, Any]) -> Table | None:
  """What other constraints would cost, by the method's own prediction."""
  if not data["constraints"]:
    return None
  lines = [Line(row["constraint"], "", (tables.number(row["predicted"], ".5g"), tables.number(row["ratio"], ".3f"),
                                        f"{row['bits']:.3f}"), best=row["constraint"] == data["plan"]["constraint"])
           for row in data["constraints"]]
  units = "nats per token" if data["plan"]["units"] == "nats" else "arbitrary units"
  return Table(("one width for", f"predicted cost, {units}", "relative to this plan", "bits used"),
               (Group("", tuple(lines)),))


def _unrouted(unrouted: Any) -> list[str]:
  if not unrouted:
    return []
  named = [f"block {layer}, expert {expert}" for layer, expert in unrouted[:MOST_NAMED]]
  more = [f"and {len(unrouted) - MOST_NAMED} more"] if len(unrouted) > MOST_NAMED else []
  count = "1 expert" if len(unrouted) == 1 else f"{len(unrouted)} experts"
  return [f"{count} saw no calibration token: {'; '.join(named + more)}."]
