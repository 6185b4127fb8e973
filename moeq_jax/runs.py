"""A run is a config and a work directory; a sweep is many of them.

Before anything else a run writes its full config and the versions of what it runs on into the work directory, and
refuses one that holds another config. Started again with the same config, it goes on from where it was.

A config is a Python file with `get_config(arg=None)` that returns a `ConfigDict`, read as `FILE.py` or `FILE.py:ARG`.
Its field `task` says what runs. A file that also defines `sweep(add)` describes many runs: one call
`add({"field.name": value})` per point. A point is nothing but overrides, so it can be remade from the command line.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import platform
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from moeq_jax import artifacts, registry

ROOT = Path(__file__).resolve().parents[1]
NOTES = {"config.json", "versions.json", "log.txt", "timings.jsonl"}  # what a run writes beside its products
PACKAGES = ("jax", "jaxlib", "numpy", "flax")


class UsageError(ValueError):
  """A command line, a config or a work directory that cannot be run."""


def _late(module: str, function: str) -> Callable[[config_dict.ConfigDict, Path], None]:
  """A task whose module is imported when it runs, so that --help does not wait for it."""
  return lambda config, workdir: getattr(importlib.import_module(f"moeq_jax.{module}"), function)(config, workdir)


def _experiment(config: config_dict.ConfigDict, workdir: Path) -> None:
  """What no other task does: the config's own file, `config.file`, defines `run(config, workdir)`."""
  module = load_module(find_config(config.file))
  if not hasattr(module, "run"):
    raise UsageError(f"{config.file}: its task is 'experiment', so it must define run(config, workdir)")
  module.run(config, workdir)


# What `config.task` may name.
TASKS: dict[str, Callable[[config_dict.ConfigDict, Path], None]] = {
    "pretrain": _late("pretrain", "run"),
    "compare": _late("pipeline", "compare"),
    "quantize": _late("quantize.task", "run"),
    "theory": _late("theory_run", "run"),
    "experiment": _experiment,
    "switch_pretrain": _late("switch_training", "pretrain_run"),
    "switch_finetune": _late("switch_training", "finetune_run"),
    "switch_track": _late("switch_track.task", "run"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
  """The config file `name`, looked for from the current directory and then from the project's.

  Raises:
    UsageError: no such file; the message lists the configs there are.
  """
  path = next((p for p in (Path(name), ROOT / name) if p.is_file()), None)
  if path is None:
    folders = (ROOT / "configs", Path(name).parent)
    known = sorted({p.name for folder in folders for p in folder.glob("*.py")} - {"common.py"})
    near = registry.did_you_mean(Path(name).name, known)
    raise UsageError(f"config file {name} not found{near} (configs: {', '.join(known) or 'none'})")
  return path.resolve()


def load_module(path: Path) -> ModuleType:
  """Runs a config file and returns it as a module."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UsageError(f"{path}: a config file defines get_config(arg=None)")
  return module


def load_config(text: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
  """The locked config of `FILE.py[:ARG]` with overrides.

  Args:
    text: path of the config file; `get_config` is given what follows a colon.
    overrides: `--config.field=value`, as on the command line.

  Raises:
    UsageError: no such file, field or task, or a value of the wrong type.
  """
  name, *arg = text.split(":", 1)
  path = find_config(name)
  get_config = load_module(path).get_config
  try:
    inspect.signature(get_config).bind(*arg)
  except TypeError:
    raise UsageError(f"{path.name}: its get_config takes no {':' + arg[0] if arg else 'empty argument'}") from None
  config = _override(get_config(*arg), overrides)
  task = config.get("task")
  if task not in TASKS:
    near = registry.did_you_mean(str(task), TASKS)
    raise UsageError(f"{path.name}: config.task is {task!r}{near} (tasks: {', '.join(TASKS)})")
  return config


def _override(config: config_dict.ConfigDict, overrides: Sequence[str]) -> config_dict.ConfigDict:
  values, argv = flags.FlagValues(), ["", *overrides]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
  except (AttributeError, KeyError) as error:  # no such field; what was meant stands in the KeyError inside
    reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
    raise UsageError(f"config has no field {'; '.join(reason.splitlines())} (fields: {', '.join(config)})") from None
  except flags.Error as error:  # a value of the wrong type, or a field of a type that has no text form
    raise UsageError(str(error).partition(" Currently")[0]) from None
  if rest:
    raise UsageError(f"unexpected argument {rest[0]!r}; fields are set by --config.field=value")
  return values.config


# ---------------------------------------------------------------------------------------------------------------------
# Work directories
# ---------------------------------------------------------------------------------------------------------------------


def plain(config: config_dict.ConfigDict) -> dict[str, Any]:
  """The config as JSON holds it (tuples become lists).

  Raises:
    UsageError: a field that JSON cannot hold.
  """
  if wrong := next((f"config.{name}={value}" for name, value in _leaves(config.to_dict()).items()
                    if isinstance(value, float) and not math.isfinite(value)), None):
    raise UsageError(f"{wrong}: a finite number is needed")
  try:
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))
  except (TypeError, ValueError) as error:
    raise UsageError(f"a config holds finite numbers, strings, booleans, None, and lists and dicts: {error}") from None


def differences(old: Any, new: Any, field: str = "config") -> list[str]:
  """The fields in which two plain configs differ, a line of text for each."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [line for name in sorted(old.keys() | new.keys())
            for line in differences(old.get(name, "(none)"), new.get(name, "(none)"), f"{field}.{name}")]
  return [] if old == new else [f"{field}: {old!r} there, {new!r} asked for"]


def command(config: config_dict.ConfigDict) -> str:
  """The command that makes a run of `config` again: its file and every field that differs from the file's default."""
  default = _leaves(load_config(config.file).to_dict())
  changed = {name: value for name, value in _leaves(config.to_dict()).items() if default.get(name, ...) != value}
  overrides = [_quoted(f"--config.{name}={value}") for name, value in changed.items()]
  return " ".join(["./launch.sh run", f"--config={config.file}", *overrides, "--workdir=DIR"])


def _quoted(argument: str) -> str:
  """An argument for a shell; in double quotes if it has single ones and nothing that a shell reads inside them."""
  plain = "'" in argument and not set(argument) & set('"$`\\!')
  return f'"{argument}"' if plain else shlex.quote(argument)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  found = {}
  for name, value in values.items():
    found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return found


def versions() -> dict[str, str | None]:
  """What a run runs on: versions of Python, of the numerical packages and of this project, and its git commit."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  packages = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"python": platform.python_version(), **packages, "moeq_jax": project["version"], "commit": _commit()}


def _commit() -> str | None:
  """The commit of the checkout, with `+changes` where tracked files differ from it; None outside a checkout."""
  git = ["git", "-C", str(ROOT)]
  if (ROOT / ".git").exists():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
      clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode == 0
      return commit if clean else commit + "+changes"
  return None


def prepare(config: config_dict.ConfigDict, workdir: Path) -> None:
  """Makes `workdir` the place of this config: `config.json` and `versions.json`, both written atomically; what a killed
  run left half written is removed.

  Raises:
    UsageError: the directory holds products of another config (nothing in it is touched), or is no directory.
  """
  if workdir.exists() and not workdir.is_dir():
    raise UsageError(f"{workdir} is a file; choose another --workdir")
  saved, new = workdir / "config.json", plain(config)
  if saved.exists() and not _has_made_nothing(workdir):
    changed = differences(_read(saved), new)
    if changed:
      raise UsageError(f"{workdir} holds a run of another config:\n  " + "\n  ".join(changed) +
                       f"\nchoose another --workdir, or delete {workdir} to begin anew")
  else:
    artifacts.write_json(saved, new)
  artifacts.remove_partial(workdir)
  artifacts.write_json(workdir / "versions.json", versions())


def _has_made_nothing(workdir: Path) -> bool:
  """Whether a run failed there before its first product, as one with a mistake in its config does."""
  found = {path.name for path in workdir.iterdir()}
  return found.issuperset({"config.json", "versions.json"}) and found.issubset(NOTES)


def _read(path: Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise UsageError(f"{path}: not JSON ({error}); choose another --workdir, or delete the file") from None
  if not isinstance(config, dict) or "task" not in config:
    raise UsageError(f"{path} was not written by a run; choose another --workdir")
  return config


def execute(config: config_dict.ConfigDict, workdir: Path) -> None:
  """Runs the config's task in `workdir`, from where an earlier call left it; warnings go to log.txt and to stderr."""
  prepare(config, workdir)
  file = logging.FileHandler(workdir / "log.txt")
  file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  logger, handlers = logging.getLogger("moeq_jax"), (file, logging.lastResort)
  for handler in handlers:
    logger.addHandler(handler)
  try:
    TASKS[config.task](config, workdir)
  finally:
    for handler in handlers:
      logger.removeHandler(handler)
    file.close()


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------------


def sweep_points(path: Path) -> dict[str, list[str]]:
  """The points of a config file's `sweep(add)`: name of the subfolder -> overrides as on the command line.

  Raises:
    UsageError: the file has no `sweep`, or adds no point or one point twice.
  """
  module = load_module(path)
  if not hasattr(module, "sweep"):
    raise UsageError(f"{path.name} defines no sweep(add); use the run command")
  points: dict[str, list[str]] = {}

  def add(overrides: Mapping[str, Any]) -> None:
    settings = [f"{field}={value if isinstance(value, str) else repr(value)}" for field, value in overrides.items()]
    name = registry.safe_name(",".join(sorted(settings)) or "base")
    if name in points:
      raise UsageError(f"{path.name}: sweep adds the point {name} twice")
    points[name] = [f"--config.{setting}" for setting in settings]

  module.sweep(add)
  if not points:
    raise UsageError(f"{path.name}: sweep adds no point")
  return points


def sweep(text: str, overrides: Sequence[str], workdir: Path) -> None:
  """Runs every point of a config's sweep in its own folder of `workdir`; a finished point is not run again.

  Args:
    text: `FILE.py[:ARG]`.
    overrides: `--config.field=value`, for all points.
    workdir: parent of the folders.

  Raises:
    UsageError: as in `load_config` (before anything runs), or an override of a field that the sweep varies.
  """
  points = sweep_points(find_config(text.split(":", 1)[0]))
  swept = {_field(override) for settings in points.values() for override in settings}
  fixed = sorted(swept & {_field(override) for override in overrides})
  if fixed:
    raise UsageError(f"config.{fixed[0]} is what the sweep varies; use the run command for one value")
  configs = {name: load_config(text, [*overrides, *settings]) for name, settings in points.items()}
  for number, (name, config) in enumerate(configs.items(), 1):
    marker, mark = workdir / name / "finished.json", {"config": artifacts.digest(plain(config))}
    finished = marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == mark
    print(f"[{number}/{len(configs)}] {name}{': finished before' if finished else ''}", flush=True)
    if not finished:
      execute(config, workdir / name)
      artifacts.write_json(marker, mark)


def points(workdir: Path, free: Sequence[str] | None = None) -> tuple[Path, list[Path]]:
  """The points of one experiment, and the folder for what is said of all of them.

  In a sweep, or with `--workdir=SET/NAME`, these are the runs in SET, which is the folder. A run that stands where
  others do not belong to it (in `runs/`, beside runs of other files or settings) is a point alone, in its own folder.

  Args:
    workdir: of a run; it and all others have been made by `prepare`.
    free: fields of the config in which points may differ, all below them included; None: in any.
  """
  folders = sorted(path.parent for path in workdir.parent.glob("*/config.json"))
  own = _read(workdir / "config.json")

  def belongs(folder: Path) -> bool:
    other = _read(folder / "config.json")
    kept = lambda config: {name: value for name, value in config.items() if name not in (free or ())}
    return own.get("file") == other.get("file") and (free is None or kept(own) == kept(other))

  together = workdir.resolve().parent != ROOT / "runs" and all(map(belongs, folders))
  return (workdir.parent, folders) if together else (workdir, [workdir])


def hash_of(points: Sequence[Path]) -> str:
  """The `config_hash` of a row that was made of several points; of one point, its own."""
  hashes = [artifacts.digest(_read(point / "config.json")) for point in points]
  return hashes[0] if len(hashes) == 1 else artifacts.digest(sorted(hashes))


def _field(override: str) -> str:
  return re.sub(r"^--?(no)?config\.", "", override.split("=", 1)[0])
