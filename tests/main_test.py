import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from moeq_jax import artifacts, main, runs

CONFIG = '''
from ml_collections import config_dict

def get_config(arg=None):
  return config_dict.ConfigDict(dict(task="compare", seed=0, lr=0.1, steps=5 if arg == "smoke" else 100))

def sweep(add):
  add({"lr": 0.2})
  add({"lr": 0.3})
'''


@pytest.fixture
def config_file(tmp_path: Path) -> str:
  (tmp_path / "small.py").write_text(CONFIG)
  return str(tmp_path / "small.py")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list:
  calls = []
  monkeypatch.setattr(runs, "TASKS", {"compare": lambda config, workdir: calls.append((config, workdir))})
  return calls


@pytest.fixture
def benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Benchmarks named `adding` and `failing` in place of the project's."""

  def adding(units: int = 2, scale: float = 1.0, name: str = "x") -> dict:
    """Adds up."""
    print("working")
    return {"total": units * scale, "name": name}

  def failing() -> dict:
    raise ValueError("no such thing")

  monkeypatch.setattr(main, "BENCHES", tmp_path / "bench")
  (tmp_path / "bench").mkdir()
  for name, run in (("adding", adding), ("failing", failing)):
    (tmp_path / "bench" / f"{name}.py").touch()
    module = types.ModuleType(name)
    module.run = run
    monkeypatch.setitem(sys.modules, f"moeq_jax.bench.{name}", module)


def call(*arguments: str) -> int:
  return main.main(["main", *arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
  """What a failing command line says, which is one message, no traceback, and status 2."""
  assert call(*arguments) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert "Traceback" not in captured.err
  return captured.err


def fresh_python(*arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
  return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_command(capsys: pytest.CaptureFixture, flag: str):
  assert call(flag) == 0
  text = capsys.readouterr().out
  for name, command in main.COMMANDS.items():
    assert f"  {name} " in text
    assert command.about in text


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture):
  assert call() == 2
  assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture, name: str):
  assert call(name, "--help") == 0
  text = capsys.readouterr().out
  assert f"usage: ./launch.sh {main.COMMANDS[name].usage}" in text
  assert f"./launch.sh {name}" in text.partition("examples:")[2]
  assert "{" not in text


def test_examples_are_of_commands_that_exist():
  text = main.overview() + "".join(main.command_help(name, []) for name in main.COMMANDS)
  used = {line.split()[1] for line in text.splitlines() if line.startswith("  ./launch.sh ") and len(line.split()) > 1}
  assert used <= {*main.COMMANDS, "COMMAND", "the"}


def test_help_imports_neither_jax_nor_flax():
  code = ("import sys\nfrom moeq_jax import main\nstatus = main.main(['main', '--help'])\n"
          "print(status, [m for m in ('jax', 'flax', 'scipy', 'matplotlib') if m in sys.modules])")
  assert fresh_python("-c", code).stdout.splitlines()[-1] == "0 []"


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_run(config_file: str, tmp_path: Path, ran: list):
  assert call("run", f"--config={config_file}:smoke", "--config.lr=0.5", f"--workdir={tmp_path / 'out'}") == 0
  assert call("run", "--workdir", str(tmp_path / "out2"), "--config.lr", "0.5", "--config", config_file) == 0
  assert [(c.lr, c.steps, w) for c, w in ran] == [(0.5, 5, tmp_path / "out"), (0.5, 100, tmp_path / "out2")]
  assert json.loads((tmp_path / "out" / "config.json").read_text())["lr"] == 0.5


def test_sweep(config_file: str, tmp_path: Path, ran: list):
  assert call("sweep", f"--config={config_file}", f"--workdir={tmp_path}/out", "--config.seed=1") == 0
  assert [(c.lr, c.seed, w.name) for c, w in ran] == [(0.2, 1, "lr=0.2"), (0.3, 1, "lr=0.3")]


def test_quickstart_and_sweep_have_places_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text(CONFIG)
  (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0"\n')
  monkeypatch.setattr(runs, "ROOT", tmp_path)
  monkeypatch.chdir(tmp_path)
  assert call("quickstart", "--config.lr=0.7") == 0
  assert call("quickstart", "--config=configs/quickstart.py:smoke", f"--workdir={tmp_path / 'elsewhere'}") == 0
  assert call("run", "--config=configs/quickstart.py:smoke", "--config.lr=0.6") == 0
  assert call("sweep", "--config=configs/quickstart.py:smoke") == 0
  assert [(c.lr, c.steps, str(w.relative_to(tmp_path))) for c, w in ran] == [
      (0.7, 100, "runs/quickstart"), (0.1, 5, "elsewhere"), (0.6, 5, "runs/quickstart"),
      (0.2, 5, "runs/quickstart/lr=0.2"), (0.3, 5, "runs/quickstart/lr=0.3")]


@pytest.mark.parametrize(("arguments", "said"), [
    (["quikstart"], "unknown command 'quikstart'; did you mean 'quickstart'?"),
    (["run"], "usage: run --config="),
    (["run", "--config=CONFIG", "--wrkdir=x"], "unknown option --wrkdir=x; did you mean 'workdir'?"),
    (["run", "--config=CONFIG", "--workdir"], "Missing value for flag --workdir"),
    (["run", "--config=CONFIG", "--workdir=OUT", "--config.lrr=1"], 'Did you mean "lr"'),
    (["run", "--config=CONFIG", "--workdir=OUT", "--config.lr=x"], "--config.lr=x"),
    (["run", "--config=nowhere.py", "--workdir=OUT"], "config file nowhere.py not found"),
    (["sweep"], "usage: sweep --config="),
    (["report"], "usage: report WORKDIR"),
    (["report", "OUT"], "holds no config.json"),
])
def test_a_wrong_command_line_is_explained_in_one_message(
    capsys: pytest.CaptureFixture, config_file: str, tmp_path: Path, arguments: list[str], said: str):
  out = tmp_path / "out"
  arguments = [a.replace("CONFIG", config_file).replace("OUT", str(out)) for a in arguments]
  assert said in error_of(capsys, *arguments)
  assert not out.exists()


@pytest.mark.parametrize("error", [
    ValueError("budget 9 is outside [1, 4]"), FileNotFoundError("model.safetensors is missing"),
    artifacts.StaleProductError("errors.npz was made from other inputs")])
def test_an_error_of_the_user_is_one_message(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, config_file: str, tmp_path: Path, error: Exception):
  def task(config, workdir):
    raise error

  monkeypatch.setattr(runs, "TASKS", {"compare": task})
  arguments = ["run", f"--config={config_file}", f"--workdir={tmp_path / 'out'}"]
  message = error_of(capsys, *arguments)
  assert str(error) in message
  assert "--traceback" in message
  assert call(*arguments, "--traceback") == 2
  assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch, config_file: str, tmp_path: Path):
  def task(config, workdir):
    raise RuntimeError("a bug")

  monkeypatch.setattr(runs, "TASKS", {"compare": task})
  with pytest.raises(RuntimeError, match="a bug"):
    call("run", f"--config={config_file}", f"--workdir={tmp_path / 'out'}")


def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, config_file: str, tmp_path: Path):
  def task(config, workdir):
    raise KeyboardInterrupt

  monkeypatch.setattr(runs, "TASKS", {"compare": task})
  assert call("run", f"--config={config_file}", f"--workdir={tmp_path / 'out'}") == 130
  assert "the same command goes on from here" in capsys.readouterr().err


def test_every_task_reaches_its_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  called = []
  for name, module, function in (("pretrain", "moeq_jax.pretrain", "run"), ("compare", "moeq_jax.pipeline", "compare"),
                                 ("quantize", "moeq_jax.quantize.task", "run"), ("theory", "moeq_jax.theory_run", "run"),
                                 ("switch_pretrain", "moeq_jax.switch_training", "pretrain_run"),
                                 ("switch_finetune", "moeq_jax.switch_training", "finetune_run"),
                                 ("switch_track", "moeq_jax.switch_track.task", "run")):
    monkeypatch.setattr(importlib.import_module(module), function,
                        lambda *given, name=name: called.append((name, *given)))
  tasks = {name: task for name, task in runs.TASKS.items() if name != "experiment"}  # its function is the config's own
  for name, task in tasks.items():
    task(name, tmp_path)
  assert called == [(name, name, tmp_path) for name in tasks]


def test_report_writes_the_report_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  written = []
  monkeypatch.setitem(sys.modules, "moeq_jax.report", types.SimpleNamespace(write=written.append))
  monkeypatch.setattr("moeq_jax.report", sys.modules["moeq_jax.report"], raising=False)
  (tmp_path / "config.json").write_text("{}")
  assert call("report", str(tmp_path)) == 0
  assert written == [tmp_path]


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ---------------------------------------------------------------------------------------------------------------------


def test_the_last_line_of_a_benchmark_is_its_result(benches: None, capsys: pytest.CaptureFixture):
  assert call("bench", "adding", "--units=3", "--scale=0.5", "--name=some text") == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "working"
  assert json.loads(lines[-1]) == {"total": 1.5, "name": "some text"}


def test_benchmark_results_may_be_of_numpy(benches: None, capsys: pytest.CaptureFixture):
  sys.modules["moeq_jax.bench.adding"].run = lambda: {"a": np.float32(1.5), "b": np.int64(2)}
  assert call("bench", "adding") == 0
  assert json.loads(capsys.readouterr().out) == {"a": 1.5, "b": 2}


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "usage: bench NAME [--option=value ...] (benchmarks: adding, failing)"),
    (["ading"], "unknown benchmark 'ading'; did you mean 'adding'? (benchmarks: adding, failing)"),
    (["adding", "--unit=3"], "unknown option 'unit'; did you mean 'units'?"),
    (["adding", "3"], "options of a benchmark are written --name=value"),
    (["adding", "--units"], "options of a benchmark are written --name=value"),
    (["failing"], "no such thing"),
])
def test_a_wrong_benchmark_is_explained(
    benches: None, capsys: pytest.CaptureFixture, arguments: list[str], said: str):
  assert said in error_of(capsys, "bench", *arguments)


def test_the_help_of_a_benchmark_shows_its_options(benches: None, capsys: pytest.CaptureFixture):
  assert call("bench", "adding", "--help") == 0
  text = capsys.readouterr().out
  assert "Adds up." in text
  assert "--units=2" in text
  assert "--scale=1.0" in text


def test_the_benchmarks_are_the_modules_of_the_folder():
  assert {"allocate", "quantize"} <= set(main.bench_names())
