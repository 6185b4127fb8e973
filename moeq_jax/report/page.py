"""`report.html`, `report.md` and `figures/*.png` from what a run left in its workdir.

Three files are read. `rows.jsonl` holds the rows (`results.py`), `losses.jsonl` the loss of every sequence, and
`report.json` the rest; every key may be absent, and the page then says what is missing:

  title         of the page
  command       that remakes the run
  config_hash   of the config
  versions      {name: version}
  model         {name: value}; `name`, `layers`, `experts` and `top_k` are used in the opening sentence
  baseline      {name: value} of the model in full precision
  stages        a list of sentences, or of objects with equal keys
  policies      a list of sentences, or {name: value}: what was done about experts without tokens, unmatched names, ...
  warnings      a list of sentences
  widths        candidate bits
  plans         [{"method", "budget", "bits": [L][E] or [L][E][P]}]
  scores        {name: [L][E]}, higher = more sensitive
  damage        {"mean": [L][E], "stderr": [L][E], "bits", "tokens"}, nats per token

The page needs no network and no script. Equal input gives equal bytes (with equal versions of matplotlib).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from moeq_jax import artifacts, results
from moeq_jax.report import damage as damage_lib
from moeq_jax.report import deployability, figures, maps, tables
from moeq_jax.report import points as points_lib

Row = results.Row


def write(workdir: Path) -> Path:
  """Writes `report.html`, `report.md` and `figures/*.png` into `workdir`; returns the path of the page.

  Raises `ValueError`, naming the entry, if `report.json` holds arrays that do not fit together, and `results.RowError`
  for a broken `rows.jsonl`.
  """
  workdir = Path(workdir)
  rows, losses = (results.read(workdir / name) for name in ("rows.jsonl", "losses.jsonl"))
  context = contents(rows, load(workdir / "report.json"), losses)
  for picture in context["pictures"]:
    artifacts.write_bytes(workdir / "figures" / f"{picture.name}.png", picture.png)
  templates = environment()
  artifacts.write_bytes(workdir / "report.md", templates.get_template("page.md.j2").render(context).encode())
  artifacts.write_bytes(workdir / "report.html", templates.get_template("page.html.j2").render(context).encode())
  return workdir / "report.html"


def load(path: Path) -> dict[str, Any]:
  """`report.json`, or an object that only says that it is missing."""
  if not path.exists():
    return {"warnings": ["report.json is missing: the page shows only what the rows say."]}
  try:
    data = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error}); delete it and run the pipeline again") from None
  if not isinstance(data, dict):
    raise ValueError(f"{path}: holds a {type(data).__name__}, not an object; delete it and run the pipeline again")
  return data


def environment() -> jinja2.Environment:
  """The templates, undefined names refused."""
  made = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  made.filters |= {"svg": lambda picture: markupsafe.Markup(picture.svg), "md": _md, "code": _md_code}
  return made


def _md(text: str) -> str:
  """Text for a cell of a markdown table."""
  for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
    text = text.replace(old, new)
  return text


def _md_code(text: str) -> str:
  """A name as code for a cell of a markdown table."""
  return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"


def contents(rows: Sequence[Row], data: Mapping[str, Any], losses: Sequence[Row] = ()) -> dict[str, Any]:
  """Everything the templates show, from the rows, from `report.json` and from the losses of every sequence."""
  points, full = points_lib.aggregate(rows), points_lib.full_precision(rows)
  sequences = {row["id"]: results.numbered(row, "sequence_") for row in losses}
  context = {
    "title": str(data.get("title") or "Quantized Mixture-of-Experts model"),
    "lede": _lede(points, full, data),
    "headline": points_lib.headline(points),
    "seeds": sorted({str(row["seed"]) for row in rows if row.get("seed") is not None}),
    "results": tables.result_table(points, full),
    "domains": tables.domain_table(points, full),
    "accounting": tables.accounting(points, full),
    "deployability": deployability.table(points, sequences),
    "predictions": tables.predictions(points),
    "every_row": tables.every_row(rows) if rows else None,
    "warnings": [*map(tables.plain, data.get("warnings") or []), *_noted(rows, data)],
    "policies": _listed(data.get("policies")),
    "stages": _listed(data.get("stages")),
    "facts": [(n, _pairs(data.get(key))) for n, key in (("Model", "model"), ("Full precision", "baseline"))],
    "command": str(data.get("command") or ""),
    "config_hash": str(data.get("config_hash") or ""),
    "versions": _pairs(data.get("versions")),
    **_loss_pictures(points, full),
    **_map_pictures(data),
    **_damage_pictures(data),
  }
  losses = [picture for _, pictures in context["loss"] for picture in pictures]
  return context | {"pictures": [*losses, *context["maps"], *context["more_maps"], *context["damage"]]}


def _lede(points: Sequence[points_lib.Point], full: Row | None, data: Mapping[str, Any]) -> str:
  """The opening: which model, quantized how, by how many methods, and where it started."""
  model = data.get("model") or {}
  words = {"layers": "{} MoE layers", "experts": "{} experts each", "top_k": "top-{} routing"}
  sizes = [phrase.format(model[key]) for key, phrase in words.items() if key in model]
  subject = str(model.get("name") or "The model") + (f" ({', '.join(sizes)})" if sizes else "")
  if not points:
    return f"{subject}: no quantized plan has been evaluated."
  how = " and ".join(dict.fromkeys(s.label for s in points_lib.settings(points)))
  methods, budgets = len({p.method for p in points}), len({p.budget for p in points})
  plans = sum(len(p.rows) for p in points)
  text = (
    f"{subject}, its experts quantized with {how}: {methods} method{'s' * (methods > 1)} at {budgets} "
    f"budget{'s' * (budgets > 1)}, {plans} plan{'s' * (plans > 1)} evaluated."
  )
  if full is not None and full.get("loss") is not None:
    text += f" In full precision the held-out loss is {full['loss']:.4f} nats per token"
    text += f" and the file takes {full['file_mb']:.1f} MB." if full.get("file_mb") is not None else "."
  return text


def _noted(rows: Sequence[Row], data: Mapping[str, Any]) -> list[str]:
  """What the rows themselves give cause to warn of."""
  notes = []
  hashes = sorted({str(row["config_hash"]) for row in rows if row.get("config_hash")})
  if len(hashes) > 1:
    notes.append(f"The rows come from {len(hashes)} configs ({', '.join(hashes)}): compare with care.")
  elif hashes and data.get("config_hash") and hashes != [str(data["config_hash"])]:
    notes.append(f"The rows come from config {hashes[0]}, report.json from {data['config_hash']}.")
  bare = sum(row.get("family") != "full" and row.get("loss_delta_ci95") is None for row in rows)
  if bare:
    notes.append(f"{bare} row{'s have' if bare > 1 else ' has'} no confidence interval.")
  if rows and points_lib.full_precision(rows) is None:
    notes.append("There is no row in full precision.")
  return notes


def _pairs(data: Mapping[str, Any] | None) -> list[tuple[str, str]]:
  return [(str(name), tables.plain(value)) for name, value in (data or {}).items()]


def _listed(data: Sequence[Any] | Mapping[str, Any] | None) -> list[str]:
  """A list of sentences from a list of anything, or from an object."""
  if isinstance(data, Mapping):
    return [f"{name}: {value}" for name, value in _pairs(data)]
  return [tables.plain(item) for item in data or []]


def _loss_pictures(points: Sequence[points_lib.Point], full: Row | None) -> dict[str, list]:
  """A heading and two figures for each setting: loss against size, and the increase at each budget."""
  found = points_lib.settings(points)
  sections = []
  for i, setting in enumerate(found):
    group = [p for p in points if p.setting == setting and p.mean("loss") is not None]
    suffix = f"-{i + 1}" if len(found) > 1 else ""
    pictures = []
    if group:
      pictures.append(figures.loss(group, full.get("loss") if full else None, f"loss{suffix}"))
    if any(p.mean("loss_delta") is not None for p in group):
      pictures.append(figures.increases(group, f"increase{suffix}"))
    if pictures:
      sections.append((setting.label if len(found) > 1 else "", pictures))
  return {"loss": sections}


def _map_pictures(data: Mapping[str, Any]) -> dict[str, list[figures.Picture]]:
  plans = data.get("plans") or []
  shown = maps.shown_budgets(plans)
  others = [budget for budget in maps.budgets_of(plans) if budget not in shown]
  widths = data.get("widths") or ()
  return {
    "maps": [maps.bit_maps(plans, widths, budget) for budget in shown],
    "more_maps": [maps.bit_maps(plans, widths, budget) for budget in others],
  }


def _damage_pictures(data: Mapping[str, Any]) -> dict[str, Any]:
  """The scatter, the table of rank correlations and the facts about damage, as far as there are scores and damage."""
  empty = {"damage": [], "agreement": None, "damage_facts": []}
  scores = data.get("scores") or {}
  if not data.get("damage"):
    return empty | {"damage_missing": "Measured damage is missing, so scores cannot be compared with it."}
  damage = damage_lib.Damage.parse(data["damage"])
  facts = _damage_facts(damage)
  if not scores:
    return empty | {"damage_facts": facts, "damage_missing": "Damage was measured, but report.json holds no scores."}
  return {
    "damage": [damage_lib.scatter(scores, damage)],
    "agreement": tables.agreement_table(damage_lib.agreements(scores, damage)),
    "damage_facts": facts,
    "damage_missing": "",
  }


def _damage_facts(damage: damage_lib.Damage) -> list[str]:
  ratio = damage.worst_to_median()
  worst = "is not comparable: the median is not positive" if ratio is None else f"is {ratio:.1f} times the median"
  share, chance = 100 * min(damage.noise_share(), 1.0), damage_lib.chance(damage)
  return [
    f"The worst expert's damage {worst}.",
    f"Measurement noise explains {share:.1f}% of the variance of damage between experts.",
    f"A score without any relation to damage has a mean ρ over layers inside ±{chance:.2f} in 95% of cases.",
  ]
