"""The layers of docs/design.md, section "The house", read from the imports; and what no file may hold.

A module imports what stands below it and its own folder, nothing else: stages never meet but in the values of layer 0
and the services of layer 1, and a model reaches a stage as functions and a pytree.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moeq_jax"
MOST_LINES = 400

LAYERS = {
    0: ("artifacts", "channels", "qtensor", "planar", "unpacking", "shards", "container", "registry", "tensor_files"),
    1: ("codecs", "kernels", "sharding", "checkpoint", "data", "results", "progress", "steps", "span_corruption"),
    2: ("models",),
    3: ("train", "calibrate", "encode", "scores", "allocate", "assemble", "evaluate", "export", "theory"),
    4: ("pipeline", "workspace", "report", "pretrain", "runs", "main", "bench", "quantize", "language_model",
        "inspection", "evaluation", "upcycling", "user_text", "options", "conditions", "block_plans",
        "theory_run", "pairs", "switch_training", "switch_track"),
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
MEET_EACH_OTHER = (0, 4)  # the values, and the spine
VALUES_MAY_IMPORT = {"jax", "numpy", "ml_dtypes", "safetensors"}

# Written so that this file does not hold what it looks for.
_FOLDERS = "|".join(("home", "Users", "root", "tmp", "work", "mnt", "farm"))
MACHINE_PATH = re.compile(rf"(?<![\w.}}~)*/-])/(?:{_FOLDERS})/[A-Za-z]")
NOT_SOURCE = {"__pycache__", "runs", "workdir", "build"}


def imports(source: str, module: str) -> Iterator[str]:
  """Every module that `source`, the text of `module`, may import: full names, with the names taken from them."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
      yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        yield str(node.args[0].value)


def violations(source: str, module: str) -> list[str]:
  """What is wrong with `source` as the text of `module` (`moeq_jax.train.loop`, `moeq_jax.train.__init__`)."""
  found = []
  names = list(imports(source, module))
  dotted = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
  if any(name.endswith("nnx.jit") for name in dotted + names):
    found.append(f"{module} uses nnx.jit; use jax.jit")
  for name in names:
    top = name.split(".")[0]
    if top == "torch":
      found.append(f"{module} imports torch")
    if module.startswith("moeq_jax.") and module != "moeq_jax.__init__":
      found += _edge(module, name) if top == "moeq_jax" else _outside(module, top)
  return found


def allowed(source: str, target: str) -> bool:
  """Whether a module of `source` may import `target`, both names in the package."""
  above, below = LAYER[source], LAYER[target]
  if (above, below) == (3, 2):  # a stage is handed functions and a pytree; only the spine knows models
    return False
  return source == target or below < above or (below == above and above in MEET_EACH_OTHER)


def _edge(module: str, name: str) -> list[str]:
  source, target = module.split(".")[1], (name.split(".") + ["moeq_jax itself"])[1]
  for part in (source, target):
    if part not in LAYER:
      return [f"{module} imports {name}: {part} has no layer; say in docs/design.md and in LAYERS where it stands"]
  if allowed(source, target):
    return []
  return [f"{module} (layer {LAYER[source]}) imports {name} (layer {LAYER[target]})"]


def _outside(module: str, top: str) -> list[str]:
  own = module.split(".")[1]
  if top == "flax" and own != "models":
    return [f"{module} imports flax; only moeq_jax/models does"]
  if LAYER.get(own) == 0 and top not in VALUES_MAY_IMPORT | set(sys.stdlib_module_names):
    return [f"{module} (layer 0) imports {top}; it may import {', '.join(sorted(VALUES_MAY_IMPORT))}, nothing else"]
  return []


def _files(suffix: str = "") -> list[Path]:
  """The files of the project whose names end in `suffix`, without environments, caches and what runs leave."""
  found = []
  for folder, inner, names in os.walk(ROOT):
    inner[:] = [name for name in inner if name == ".ci" or not (name.startswith(".") or name in NOT_SOURCE)]
    found += [Path(folder) / name for name in names if name.endswith(suffix) and name != ".git"]  # of a worktree
  return sorted(found)


def _text(path: Path) -> str | None:
  """The text of a file, None for a binary one."""
  with path.open("rb") as file:
    if b"\0" in file.read(8192):
      return None
  return path.read_text(encoding="utf-8", errors="replace")


def _module(path: Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts)


# ---------------------------------------------------------------------------------------------------------------------
# The project
# ---------------------------------------------------------------------------------------------------------------------


def test_imports_follow_the_layers():
  wrong = [line for folder in ("moeq_jax", "configs", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))
           for line in violations(path.read_text(encoding="utf-8"), _module(path))]
  assert not wrong, "\n".join(wrong)


def test_every_module_has_a_layer():
  names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()
           if path.suffix == ".py" or any(path.glob("*.py"))}
  assert names - set(LAYER) == {"__init__"}


def test_no_file_holds_a_path_of_a_machine():
  wrong = [f"{path.relative_to(ROOT)}: {hit[0]}" for path in _files() if (text := _text(path))
           for hit in [MACHINE_PATH.search(text)] if hit]
  assert not wrong, "\n".join(wrong)


def test_no_module_is_too_long():
  lengths = {_module(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _files(".py")}
  assert len(lengths) > 10
  assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_design_names_every_folder():
  design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
  folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
  assert {name for name in folders if not re.search(rf"\b{name}/", design)} == set()


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "source", "said"), [
    ("moeq_jax.encode.stream", "from moeq_jax import allocate", "layer 3"),
    ("moeq_jax.encode.stream", "from moeq_jax.scores import weight", "layer 3"),
    ("moeq_jax.encode.stream", "import moeq_jax.pipeline", "layer 4"),
    ("moeq_jax.encode.stream", "from ..scores import weight", "layer 3"),
    ("moeq_jax.encode.__init__", "from .. import scores", "layer 3"),
    ("moeq_jax.calibrate.taps", "from moeq_jax.models import moe", "layer 2"),
    ("moeq_jax.calibrate.taps", "def f():\n  from moeq_jax import models", "layer 2"),
    ("moeq_jax.calibrate.taps", "import_module('moeq_jax.models.moe')", "layer 2"),
    ("moeq_jax.codecs.rtn", "from moeq_jax import kernels", "layer 1"),
    ("moeq_jax.qtensor", "from moeq_jax import data", "layer 1"),
    ("moeq_jax.qtensor", "import scipy", "layer 0"),
    ("moeq_jax.models.moe", "from moeq_jax import train", "layer 3"),
    ("moeq_jax.train.loop", "import flax", "flax"),
    ("moeq_jax.pipeline", "from flax import nnx", "flax"),
    ("moeq_jax.train.loop", "if True:\n  import torch.nn as nn", "torch"),
    ("configs.quickstart", "from torch import Tensor", "torch"),
    ("moeq_jax.models.moe", "from flax import nnx\n@nnx.jit\ndef f(): pass", "nnx.jit"),
    ("moeq_jax.models.moe", "import flax\nf = flax.nnx.jit(g)", "nnx.jit"),
    ("moeq_jax.models.moe", "from flax.nnx import jit", "nnx.jit"),
    ("moeq_jax.pipeline", "from moeq_jax import drawer", "no layer"),
    ("moeq_jax.drawer", "from moeq_jax import artifacts", "no layer"),
    ("moeq_jax.pipeline", "import moeq_jax", "no layer"),
])
def test_a_violation_is_found(module: str, source: str, said: str):
  found = violations(source, module)
  assert any(said in line for line in found), found


@pytest.mark.parametrize(("module", "source"), [
    ("moeq_jax.encode.stream", "from moeq_jax import artifacts\nfrom moeq_jax.codecs import rtn\nimport scipy"),
    ("moeq_jax.encode.stream", "from moeq_jax.encode import candidates\nfrom . import candidates"),
    ("moeq_jax.qtensor", "import json\nimport jax.numpy as jnp\nimport numpy as np\nfrom moeq_jax import artifacts"),
    ("moeq_jax.models.moe", "from flax import nnx\nimport jax\nf = jax.jit(g)\nfrom moeq_jax import kernels"),
    ("moeq_jax.pipeline", "from moeq_jax import report\nfrom moeq_jax.models import moe\nimport moeq_jax.train.loop"),
    ("moeq_jax.__init__", "from moeq_jax.artifacts import Plan"),
    ("configs.quickstart", "from configs import common\nfrom moeq_jax import artifacts"),
])
def test_what_the_layers_allow_passes(module: str, source: str):
  assert violations(source, module) == []


def test_paths_of_machines_are_recognised():
  slash = "/"
  for text in (f"open('{slash}home{slash}me{slash}x')", f"see {slash}tmp{slash}a", f"={slash}Users{slash}me"):
    assert MACHINE_PATH.search(text), text
  for text in ("https://host.org/home/page", "$HOME/work/x", "~/work/x", "a/tmp/b", "${x}/tmp/y", "/usr/bin/env bash"):
    assert not MACHINE_PATH.search(text), text


def test_a_binary_file_is_not_read_as_text(tmp_path: Path):
  (tmp_path / "b").write_bytes(b"ab\0cd")
  (tmp_path / "t").write_text("ab")
  assert _text(tmp_path / "b") is None
  assert _text(tmp_path / "t") == "ab"
