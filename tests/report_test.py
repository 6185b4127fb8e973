"""The report has the rows' numbers, is self-contained, escaped and deterministic, and says what is missing."""

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from moeq_jax import artifacts, report, results

FULL_LOSS = 3.0571
METHODS = (
  ("uniform", "uniform", 1.0),
  ("random", "random", 1.05),
  ("tiers(router_norm_change, levels=2)", "tiers", 1.2),
  ("tiers(router_norm_change, levels=3)", "tiers", 1.3),
  *((f"knapsack({score})", "knapsack", scale) for score, scale in zip(
    ("weight_mse", "frequency", "router_grad", "router_grad_error", "fisher_error"), (0.9, 0.85, 0.7, 0.62, 0.6))),
  ("knapsack(damage)", "measured", 0.5),
)
UNIFORM_INCREASE = {1.5: 0.62, 2.0: 0.16, 2.5: 0.08, 3.0: 0.02}
SECTIONS = ("headline", "loss", "maps", "damage", "results", "accounting", "warnings", "remake")


class Page(html.parser.HTMLParser):
  """What is on a page: ids, tags, attributes, text, and the cells of each table by its id."""

  VOID = ("meta", "link", "br", "img", "input", "hr")

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.ids, self.tags, self.attributes, self.stack = [], [], [], []
    self.tables, self.best, self.codes, self.words = {}, [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append(tag)
    self.attributes += [(tag, name, value or "") for name, value in attrs.items()]
    self.ids += [attrs["id"]] if "id" in attrs else []
    if tag not in self.VOID:
      self.stack.append(tag)
    if tag == "table":
      self.table = self.tables.setdefault(attrs["id"], [])
    elif tag == "tr":
      self.table.append([])
      self.best += [self.table[-1]] if attrs.get("class") == "best" else []
    elif tag in ("td", "th"):
      self.table[-1].append("")
    elif tag == "code":
      self.codes.append("")

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.stack.pop()

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag, f"</{tag}> closes another tag"

  def handle_data(self, data):
    if "style" in self.stack:
      return
    self.words.append(data)
    if "td" in self.stack or "th" in self.stack:
      self.table[-1][-1] += data
    if "code" in self.stack:
      self.codes[-1] += data

  @property
  def text(self) -> str:
    return re.sub(r"\s+", " ", " ".join(self.words))


def _row(method: str, family: str, budget: float | None, increase: float, **more) -> dict:
  bits = 16.0 if budget is None else budget
  loss = FULL_LOSS + increase
  row = {
    "id": f"{method}-{budget}-{more.get('draw')}", "method": method, "family": family, "codec": "rtn(group=64)",
    "group": 64, "budget": budget, "nominal_bits": bits, "effective_bits": bits + 0.5,
    "stored_bits": (bits + 0.5) * 1.01, "file_mb": 6.5 + 2 * bits, "loss": loss,
    "perplexity": float(np.exp(loss)), "loss_code": loss - 0.4,
    "loss_wiki": loss + 1.1, "nats_per_byte_code": loss / 4, "nats_per_byte_wiki": loss / 3.5, "loss_delta": increase,
    "loss_delta_ci95": 0.002 + 0.04 * increase, "kl": 1.1 * increase, "router_agreement": 1 - increase,
    "predicted": None, "lower_bound": None, "gap": None, "draw": None, "seed": 0, "config_hash": "9f31c27a",
    "vs_uniform": None, "vs_uniform_ci95": None,
  }  # fmt: skip
  return row | more


def _full() -> dict:
  return _row("full", "full", None, 0.0, codec="none", group=0, loss_delta_ci95=None, effective_bits=16.0)


def _rows() -> list[dict]:
  """Full precision and 10 methods at 4 budgets, the random ones with 5 draws."""
  rng = np.random.default_rng(0)
  rows = [_full()]
  for budget, uniform in UNIFORM_INCREASE.items():
    for method, family, factor in METHODS:
      drawn = family == "random" or (family == "uniform" and budget % 1)
      for draw in range(5) if drawn else (None,):
        increase = float(uniform * factor * (1 + 0.03 * rng.standard_normal()))
        predicted = 0.8 * increase if family == "knapsack" else None
        rows.append(_row(method, family, budget, increase, draw=draw, predicted=predicted, vs_uniform_ci95=0.01,
                         vs_uniform=None if family == "uniform" else increase - uniform))
  return rows


def _data(layers: int = 5, experts: int = 16) -> dict:
  """What a pipeline writes into report.json."""
  rng = np.random.default_rng(1)
  truth = np.exp(rng.normal(-6.6, 0.9, (layers, experts)))
  noise = np.full((layers, experts), 2e-4)
  return {
    "title": "moeq-small, quantized", "command": "./launch.sh quickstart", "config_hash": "9f31c27a",
    "versions": {"jax": "0.11.2", "python": "3.12.1"}, "widths": [1, 2, 3, 4],
    "model": {"name": "moeq-small", "layers": layers, "experts": experts, "top_k": 2, "parameters": 19_000_000},
    "baseline": {"loss": FULL_LOSS}, "stages": [{"stage": "encode", "widths": [1, 2, 3, 4]}],
    "warnings": ["2 of 80 experts saw no calibration token."], "policies": {"unrouted experts": "the layer's mean"},
    "plans": [
      {"method": method, "budget": budget, "bits": rng.integers(1, 5, (layers, experts)).tolist()}
      for budget in UNIFORM_INCREASE
      for method, _, _ in METHODS
    ],
    "scores": {
      name: np.exp(np.log(truth) + spread * rng.standard_normal(truth.shape)).tolist()
      for name, spread in (("router_grad_error", 0.3), ("frequency", 1.5), ("max_var", 5.0))
    },
    "damage": {"mean": (truth + noise * rng.standard_normal(truth.shape)).tolist(), "stderr": noise.tolist(), "bits": 2,
               "tokens": 8192},
  }  # fmt: skip


def _write(folder: Path, rows: list[dict], data: dict | None) -> Page:
  for row in rows:
    results.append(folder / "rows.jsonl", row)
  if data is not None:
    artifacts.write_json(folder / "report.json", data)
  path = report.write(folder)
  assert path == folder / "report.html"
  return Page(path.read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("workdir")
  _write(folder, _rows(), _data())
  return folder


@pytest.fixture(scope="module")
def page(workdir) -> Page:
  return Page((workdir / "report.html").read_text())


def _groups(table: list[list[str]]) -> dict[str, list[list[str]]]:
  """The lines of a table under the title of their group."""
  groups = {}
  for line in table[1:]:
    if len(line) == 1:
      group = groups.setdefault(line[0], [])
    else:
      group.append(line)
  return groups


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_every_section_is_there_once_and_the_navigation_reaches_it(page):
  assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
  targets = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
  assert targets == [f"#{name}" for name in SECTIONS[1:]]
  assert page.stack == []


def test_ids_are_unique_and_every_reference_has_its_target(page, workdir):
  assert len(page.ids) == len(set(page.ids))
  text = (workdir / "report.html").read_text()
  referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
  assert {a or b for a, b in referred} <= set(page.ids)


def test_nothing_is_loaded_from_elsewhere(page, workdir):
  assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
  for tag, name, value in page.attributes:
    if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
      assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert not name.startswith("on"), (tag, name)
  text = (workdir / "report.html").read_text()
  assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
  assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_numbers_of_the_rows_are_in_the_table(page):
  groups = _groups(page.tables["results-table"])
  for budget in UNIFORM_INCREASE:
    lines = {line[0]: line for line in groups[f"{budget} bits asked"]}
    assert len(lines) == len(METHODS)
    for method, _, _ in METHODS:
      rows = [row for row in _rows() if (row["method"], row["budget"]) == (method, budget)]
      mean = {name: np.mean([row[name] for row in rows]) for name in rows[0] if isinstance(rows[0][name], float)}
      increases = [row["loss_delta"] for row in rows]
      ranged = f"{min(increases):.4f} to {max(increases):.4f} (5)"
      against = f"{np.mean(increases) - UNIFORM_INCREASE[budget]:+.4f}" + (" ± 0.0100" if len(rows) == 1 else "")
      assert lines[method][1:] == [
        f"{mean['nominal_bits']:.3f}", f"{mean['effective_bits']:.3f}", f"{mean['file_mb']:.2f}", f"{mean['loss']:.4f}",
        f"{mean['loss_delta']:+.4f}", ranged if len(rows) == 5 else f"± {mean['loss_delta_ci95']:.4f}",
        "–" if method == "uniform" else against,
        f"{mean['perplexity']:.3f}", f"{mean['kl']:.4f}", f"{100 * mean['router_agreement']:.1f}%",
      ]  # fmt: skip
  assert groups["full precision"][0][:5] == ["full", "16.000", "16.000", "38.50", "3.0571"]


def test_lines_are_ordered_by_loss_and_only_the_best_is_marked(page):
  groups = _groups(page.tables["results-table"])
  for budget in UNIFORM_INCREASE:
    losses = [float(line[4]) for line in groups[f"{budget} bits asked"]]
    assert losses == sorted(losses)
  assert page.best == [groups[f"{budget} bits asked"][0] for budget in UNIFORM_INCREASE]


def test_every_row_is_listed_with_all_its_fields(page):
  header, *lines = page.tables["every-row"]
  assert len(lines) == len(_rows())
  for row, line in zip(_rows(), lines, strict=True):
    shown = dict(zip(header, line, strict=True))
    assert set(shown) == set(row)
    assert shown["loss"] == f"{row['loss']:.6g}" and shown["nats_per_byte_wiki"] == f"{row['nats_per_byte_wiki']:.6g}"
    assert shown["draw"] == ("–" if row["draw"] is None else str(row["draw"]))


def test_losses_by_domain(page):
  groups = _groups(page.tables["domains-table"])
  kinds = ["loss, code", "loss, wiki", "nats per byte, code", "nats per byte, wiki"]
  assert page.tables["domains-table"][0] == ["method", *kinds]
  row = next(r for r in _rows() if r["method"] == "knapsack(fisher_error)" and r["budget"] == 2.5)
  line = next(line for line in groups["2.5 bits asked"] if line[0] == row["method"])
  names = ("loss_code", "loss_wiki", "nats_per_byte_code", "nats_per_byte_wiki")
  assert line[1:] == [f"{row[name]:.4f}" for name in names]


def test_accounting(page):
  lines = {line[0]: line[1:] for line in page.tables["accounting-table"][1:]}
  assert lines["full precision"][-2:] == ["38.50", "1.00×"]
  assert lines["2.5 bits asked"] == ["2.500", "3.000", "3.030", "+1.00%", "11.50", "3.35× smaller"]


def test_rank_correlations_in_the_table(page):
  data = _data()
  damage = np.array(data["damage"]["mean"])
  lines = {line[0]: line[1:] for line in page.tables["agreement-table"][1:]}
  for name, score in data["scores"].items():
    inside = [stats.spearmanr(s, d).statistic for s, d in zip(np.array(score), damage, strict=True)]
    whole = stats.spearmanr(np.ravel(score), damage.ravel()).statistic
    assert lines[name] == [f"{value:+.2f}" for value in (np.mean(inside), whole, *inside)]
    assert f"ρ {np.mean(inside):+.2f} inside layers, {whole:+.2f} over all" in page.text
  ratio = damage.max() / np.median(damage)
  assert f"The worst expert's damage is {ratio:.1f} times the median." in page.text


def test_what_the_run_says_is_on_the_page(page):
  for words in (
    "moeq-small (5 MoE layers, 16 experts each, top-2 routing)", "10 methods at 4 budgets",
    "In full precision the held-out loss is 3.0571", "2 of 80 experts saw no calibration token.",
    "unrouted experts: the layer's mean", "./launch.sh quickstart", "9f31c27a", "0.11.2",
    "stage: encode; widths: 1, 2, 3, 4", "There is one seed (0)",
  ):  # fmt: skip
    assert words in page.text, words


def test_figures_are_on_the_page_and_beside_it(page, workdir):
  names = {"loss", "increase", "bits-1_5", "bits-2", "bits-2_5", "bits-3", "damage"}
  assert {name.removeprefix("figure-") for name in page.ids if name.startswith("figure-")} == names
  assert page.tags.count("svg") == len(names)
  for name in names:
    with Image.open(workdir / "figures" / f"{name}.png") as image:
      assert image.width > 800, name
      assert f"figures/{name}.png" in (workdir / "report.md").read_text()
  assert page.text.count("knapsack(router_grad_error)") > 4 * 3  # in figures as text, besides tables


def test_markdown_has_the_same_table(page, workdir):
  lines = [line for line in (workdir / "report.md").read_text().splitlines() if line.startswith("|")]
  cells = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines[2:]]
  assert {line[0]: line[1:11] for line in cells if line[0] == "full"}["full"] == page.tables["results-table"][2][1:]
  wanted = [line for line in page.tables["results-table"][1:] if len(line) > 1]
  assert [line[:11] for line in cells if any(line[1:])] == wanted


# ---------------------------------------------------------------------------------------------------------------------
# What can be missing, hostile, or different
# ---------------------------------------------------------------------------------------------------------------------


def test_a_workdir_with_nothing_makes_a_page_that_says_so(tmp_path):
  page = _write(tmp_path, [], None)
  assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
  for words in (
    "report.json is missing", "No quantized plan has been evaluated", "No rows with a loss", "No plans",
    "Measured damage is missing", "No rows: rows.jsonl is missing or empty", "No rows, so no sizes",
    "The command is not recorded", "The versions are not recorded",
  ):  # fmt: skip
    assert words in page.text, words
  assert "nothing to compare" in (tmp_path / "report.md").read_text()


def test_a_single_row_without_intervals_makes_a_page(tmp_path):
  row = _row("uniform", "uniform", 2.0, 0.16, loss_delta_ci95=None, kl=None)
  page = _write(tmp_path, [row], {"scores": {"a": [[1.0]]}})
  assert "At 2.0 bits only uniform was tried, which adds 0.1600 nats per token." in page.text.replace(" ,", ",")
  assert "There is no row in full precision." in page.text and "1 row has no confidence interval." in page.text
  line = _groups(page.tables["results-table"])["2.0 bits asked"][0]
  assert line[5:] == ["+0.1600", "–", "–", f"{row['perplexity']:.3f}", "–", "84.0%"]


def test_damage_without_scores_and_rows_of_two_configs_are_pointed_out(tmp_path):
  rows = [_full(), _row("uniform", "uniform", 2.0, 0.16, config_hash="other")]
  page = _write(tmp_path, rows, {"damage": _data()["damage"]})
  assert "report.json holds no scores" in page.text
  assert "The worst expert's damage is" in page.text
  assert "The rows come from 2 configs (9f31c27a, other)" in page.text


def test_only_full_precision_is_not_called_a_result(tmp_path):
  page = _write(tmp_path, [_full()], {})
  assert "no quantized plan has been evaluated" in page.text
  assert page.tables["results-table"][2][4] == "3.0571"


SCRIPT, IMAGE = "<script>alert(1)</script>", '"><img src=x onerror=y>'
HOSTILE = (SCRIPT, "a$\\frac{$ & \"b\" 'c'", "_hidden", "x|y`z\n{{ 7*7 }}", IMAGE, "n\x00ul")


def test_hostile_names_stay_text(tmp_path):
  rows = [_full()] + [_row(name, "knapsack", 2.0, 0.1 + 0.01 * i) for i, name in enumerate(HOSTILE)]
  data = _data(2, 4) | {
    "title": SCRIPT, "warnings": [IMAGE], "command": SCRIPT, "model": {"name": IMAGE}, "versions": {SCRIPT: IMAGE},
    "plans": [{"method": name, "budget": 2.0, "bits": [[1, 2], [3, 4]]} for name in HOSTILE],
  }  # fmt: skip
  data["scores"] = dict.fromkeys(HOSTILE, data["scores"]["frequency"])
  page = _write(tmp_path, rows, data)
  assert not {"script", "img"} & set(page.tags)
  names = [line[0] for line in _groups(page.tables["results-table"])["2.0 bits asked"]]
  assert [name.replace("\r", "\n") for name in names][:5] == list(HOSTILE[:5])
  text = (tmp_path / "report.html").read_text()
  assert "49" not in [word for name in names for word in name.split()]
  assert "onerror" not in {name for _, name, _ in page.attributes} and "<img" not in text
  assert text.count(">_hidden<") >= 3  # legend, map and scatter show it
  markdown = (tmp_path / "report.md").read_text()
  assert len([line for line in markdown.splitlines() if line.startswith("| `")]) == 1 + len(HOSTILE)
  assert "<script>" not in markdown.replace(f"`{SCRIPT}`", "").replace(f"    {SCRIPT}", "")  # but as code


def test_equal_input_gives_equal_bytes_also_in_another_process(tmp_path):
  data = _data(2, 4)
  data["plans"] = [plan for plan in data["plans"] if plan["budget"] == 2.0][:2]
  here, there = tmp_path / "here", tmp_path / "there"
  here.mkdir()
  there.mkdir()
  _write(here, [row for row in _rows() if row["budget"] in (None, 2.5)], data)
  first = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
  assert len(first) == 2 + 2 + 4  # what was read, the two pages, loss, increase, bits and damage
  for name in ("rows.jsonl", "report.json"):
    (there / name).write_bytes(first[here / name])
  report.write(here)
  code = "import sys; from moeq_jax import report; report.write(sys.argv[1])"
  subprocess.run(
    [sys.executable, "-c", code, str(there)], cwd=Path(report.__file__).parents[2], check=True,
    env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
  for path, content in first.items():
    assert path.read_bytes() == content, path
    assert (there / path.relative_to(here)).read_bytes() == content, path


@pytest.mark.parametrize(("change", "words"), [
    ({"scores": {"bad_one": [[1.0, 2.0]]}}, r"score 'bad_one' has shape \(1, 2\), damage \(2, 4\)"),
    ({"damage": {"mean": [[1.0]], "stderr": [[1.0, 2.0]], "bits": 2, "tokens": 1}}, r"damage\.mean has shape \(1, 1\)"),
    ({"plans": [{"method": "flat", "budget": 2.0, "bits": [1, 2]}]}, r"bits of 'flat' have shape \(2,\)"),
])
def test_arrays_that_do_not_fit_are_named(tmp_path, change, words):
  artifacts.write_json(tmp_path / "report.json", _data(2, 4) | {"plans": []} | change)
  with pytest.raises(ValueError, match=words):
    report.write(tmp_path)


def test_a_broken_report_json_is_named(tmp_path):
  (tmp_path / "report.json").write_text("{")
  with pytest.raises(ValueError, match=r"report\.json: not JSON"):
    report.write(tmp_path)
