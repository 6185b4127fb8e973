"""The README is true: its section "Add a score" works as written, and what it names exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import moeq_jax
from moeq_jax import codecs, main, registry, results, runs
from moeq_jax.assemble import apply
from moeq_jax.export import native
from tests import tiny

README = (runs.ROOT / "README.md").read_text(encoding="utf-8")
NEW_FILE, TABLE_FILE = "moeq_jax/scores/kurtosis.py", "moeq_jax/scores/__init__.py"
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({match.split("#")[0].strip() for match in re.findall(r"\./launch\.sh[^`\n|]*", README)})


def block(first: str) -> str:
  """The one Python block of the README that begins with the comment `# first`."""
  found = [b for b in BLOCKS if b.startswith(f"# {first}\n")]
  assert len(found) == 1, first
  return found[0].partition("\n")[2]


def section(title: str) -> str:
  return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Add a score
# ---------------------------------------------------------------------------------------------------------------------


def entered(source: str, lines: str) -> str:
  """The table of scores with the import and the entry of the README put where they belong."""
  imported, entry = lines.rstrip().split("\n")
  assert imported.startswith("from moeq_jax.scores import ")
  out = source.split("\n")
  out.insert(next(i for i, line in enumerate(out) if line.startswith("SCORES")) + 1, entry)
  out.insert(max(i for i, line in enumerate(out) if line.startswith("from moeq_jax")) + 1, imported)
  return "\n".join(out)


def follow_the_section(project: Path, checkpoint: Path) -> Path:
  """Does in a copy of the project what the section says, on a tiny checkpoint; returns the work directory."""
  for name in ("moeq_jax", "configs"):
    shutil.copytree(runs.ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(runs.ROOT / "pyproject.toml", project)
  (project / NEW_FILE).write_text(block(NEW_FILE), encoding="utf-8")
  table = project / TABLE_FILE
  table.write_text(entered(table.read_text(encoding="utf-8"), block(TABLE_FILE)), encoding="utf-8")
  command = re.findall(r"^\./launch\.sh (run .*:score=kurtosis .*)$", section("Add a score"), re.MULTILINE)
  assert len(command) == 1
  arguments = shlex.split(command[0].replace(":score", ":smoke,score"))
  smaller = {"checkpoint": checkpoint, "length": tiny.LENGTH, "codec": "rtn(group=32)", "damage.sequences": 8}
  arguments += [f"--config.{field}={value}" for field, value in smaller.items()]
  done = subprocess.run([sys.executable, "-P", "-m", "moeq_jax.main", *arguments], cwd=project, check=False, text=True,
                        env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True)
  assert done.returncode == 0, done.stderr
  return project / next(a for a in arguments if a.startswith("--workdir=")).partition("=")[2]


def test_the_section_that_adds_a_score_works_as_written(tmp_path: Path):
  workdir = follow_the_section(tmp_path / "project", tiny.checkpoint(tmp_path / "checkpoint"))
  flat = [[np.asarray(w, np.float64).reshape(len(w), -1) for w in tiny.functions().experts(block).values()]
          for block in tiny.model().blocks]
  expected = np.array([np.mean([scipy.stats.kurtosis(w, axis=1, fisher=False) for w in layer], 0) for layer in flat])
  report = json.loads((workdir / "report.json").read_text())
  np.testing.assert_allclose(report["scores"]["kurtosis"], expected, rtol=1e-4)
  assert np.ptp(expected) > 0.1

  rows = [row for row in results.read(workdir / "rows.jsonl") if row["method"] == "knapsack(kurtosis)"]
  assert [row["budget"] for row in rows] == [2.5]
  page = (workdir / "report.html").read_text(encoding="utf-8")
  assert re.search(rf"knapsack\(kurtosis\)</th>.*<td>{rows[0]['loss']:.4f}</td>", page)
  rho = scipy.stats.spearmanr(expected.ravel(), np.ravel(report["damage"]["mean"])).statistic
  assert re.search(rf'<tr><th scope="row">kurtosis</th>.*<td>{re.escape(f"{rho:+.2f}")}</td>', page)
  assert re.search(r"<text[^>]*>kurtosis</text>", page)


def test_a_score_takes_at_most_fifteen_lines_and_one_entry():
  assert len([line for line in block(NEW_FILE).splitlines() if line.strip()]) <= 15
  assert len(block(TABLE_FILE).splitlines()) == 2
  assert not (runs.ROOT / NEW_FILE).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def test_every_path_exists():
  paths = set(re.findall(r"(?<![\w./-])(?:configs|docs|experiments|moeq_jax|tests)/[\w./-]*\w", README)) - {NEW_FILE}
  links = {link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link}
  assert {"configs/quickstart.py", "docs/design.md"} <= paths
  assert [path for path in sorted(paths | links) if not (runs.ROOT / path).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str):
  name, *arguments = [*shlex.split(command)[1:], ""] if " " in command else ["quickstart"]
  assert name in (*main.COMMANDS, "test", "interop", "aot")
  if name == "bench":
    assert arguments[0] in main.bench_names()
  configs = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=configs/")]
  if configs:
    runs.load_config(configs[0], [a for a in arguments if a.startswith("--config.")])


def test_every_bench_and_every_override_exists():
  assert set(re.findall(r"`(?:\./launch\.sh )?bench (\w+)", README)) == set(main.bench_names())
  own = section("Quantize your own checkpoint")
  for config, text in (("configs/quantize.py", own), ("configs/quickstart.py", README.replace(own, ""))):
    overrides = [" ".join(shlex.split(found)) for found in re.findall(r"`(--config\.[^`]*)`", text)]
    assert overrides
    runs.load_config(config, overrides)


def test_every_codec_and_every_public_name_exists():
  for spec in re.findall(r"codec='([^']*)'", README):
    codecs.get(spec)
  names = set(re.findall(r"\bmoeq_jax\.(\w+)\(", README))
  assert names and names <= set(moeq_jax.__all__)


def test_the_snippet_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  snippet = next(b for b in BLOCKS if "native.open(" in b)
  config = runs.load_config("configs/quickstart.py")
  method, budget = config.export[0]
  directory = Path("runs/quickstart") / f"quantized-{registry.filename(method)}-{budget:g}"
  assert f'native.open("{directory}")' in snippet

  layers, _ = tiny.encoded()
  bits = np.array([1, 2, 3, 4, 1, 2])
  packed = [apply.pack_layer(layer, bits, widths=tiny.WIDTHS, group=32) for layer in layers]
  monkeypatch.chdir(tmp_path)
  native.save(directory, packed, [{}] * len(packed), {}, {"config.json": b"{}"}, {"codec": "rtn(group=32)"})
  names: dict[str, Any] = {
      "cost": np.array([[4.0, 1.0], [3.0, 0.0]]), "weight": np.array([[1, 2], [1, 2]]), "budget": 3,
      "x": np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32), "group_sizes": np.ones(6, np.int32)}
  exec(snippet, names)
  solution = names["solution"]
  assert (solution.value, solution.bound) == (4.0, pytest.approx(4.0))
  assert solution.choice.sum() == 1
  expected = np.einsum("ek,ekn->en", names["x"], tiny.decoded(layers[0], bits)["gate"])
  np.testing.assert_allclose(names["y"], expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_to_fill_in():
  assert re.findall(r"@@\w*", README) == []
