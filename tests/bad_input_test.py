"""What is wrong in a command line, a checkpoint, a config or a work directory is one clear message and status 2."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from moeq_jax import artifacts, container, data, main, runs
from tests import tiny

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def refused(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
            capsys: pytest.CaptureFixture) -> Callable[..., str]:
  """Runs a small comparison with the options given, which must fail, and returns its one message."""
  documents = tiny.documents(6, 1)
  monkeypatch.setattr(data, "calibration", lambda: documents)
  monkeypatch.setattr(data, "held_out", lambda: documents)

  def run(*options: str, checkpoint: Path = pristine, workdir: Path = tmp_path / "run", arg: str = ":smoke") -> str:
    status = main.main([
        "main", "run", f"--config=configs/quickstart.py{arg}", f"--workdir={workdir}",
        f"--config.checkpoint={checkpoint}", "--config.length=24", "--config.batch=4", "--config.codec=rtn(group=32)",
        *options])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), captured.err
    assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    return captured.err

  return run


def made(workdir: Path) -> set[str]:
  """What a run made beside the notes that every run writes."""
  return {path.name for path in workdir.iterdir()} - runs.NOTES if workdir.is_dir() else set()


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    (["budgets=(4.5,)"], "budget of 4.5 bits per weight is out of the possible range [1, 4]"),
    (["budgets=(0.5,)"], "no solution at 0.5 bits per weight"),
    (["budgets=('two',)"], "budget 'two' is no number"),
    (["budgets=()"], "at least one of each"),
    (["methods=()"], "at least one of each"),
    (["methods=(3,)"], "3 is not a spec"),
    (["methods=('knapsak(weight_mse)',)"], "did you mean 'knapsack'"),
    (["methods=('knapsack(wieght_mse)',)"], "did you mean 'weight_mse'"),
    (["methods=('tiers(frequency,variant=papre)',)"], "unknown variant 'papre'"),
    (["methods=('tiers(frequency,zeta=high)',)"], "zeta='high' is no number"),
    (["methods=('tiers(frequency,zeta=0.5)',)"], "zeta is 0.5"),
    (["scores=('frequancy',)"], "did you mean 'frequency'"),
    (["scores=('damage',)"], "damage.sequences is 0"),
    (["codec=rtm"], "did you mean 'rtn'"),
    (["codec=rtn(grup=32)"], "did you mean 'group'"),
    (["damage.sequences=8", "damage.bits=8"], "config.damage.bits=8 is not one of config.widths=(1, 2, 3, 4)"),
    (["widths=(2,5)"], "no codec encodes [5] bits"),
    (["compute_dtype=float16"], "it is 'float32' or 'bfloat16'"),
    (["draws=0"], "draws are at least 1"),
    (["seed=-1"], "a seed at least 0"),
    (["export=('uniform',)"], "pairs of a method and a budget"),
    (["domains=('wikki',)"], "did you mean 'wiki'"),
    (["domains=(3,)"], "unknown domain 3"),
    (["batch=7"], "do not fill batches of 7"),
    (["calibration=1000"], "1000 sequences of 24 are asked for"),
    (["evaluation=1000"], "1000 sequences of 24 are asked for"),
    (["damage.sequences=1000"], "1008 sequences of 24 are asked for"),
])
def test_a_mistake_in_a_config_is_found_before_any_work(
    refused: Callable[..., str], tmp_path: Path, options: list[str], said: str):
  assert said in refused(*(f"--config.{option}" for option in options))
  assert not made(tmp_path / "run")


@pytest.mark.parametrize(("arg", "said"), [
    (":smok", "did you mean 'smoke'"), (":smoke,score=kurtosys", "unknown score 'kurtosys'")])
def test_a_wrong_variant_of_a_config_is_refused(refused: Callable[..., str], arg: str, said: str):
  assert said in refused(arg=arg)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _cut(directory: Path) -> None:
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _poison(directory: Path) -> None:
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  tensors[EXPERT] = np.full_like(tensors[EXPERT], np.nan)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(("damage", "said"), [
    (shutil.rmtree, "config.json: not found"),
    (lambda d: (d / "model.safetensors").unlink(), "no model*.safetensors"),
    (_cut, "model.safetensors: cannot be read"),
    (_poison, f"tensor {EXPERT} holds NaN"),
    (lambda d: (d / "router_init.safetensors").unlink(), "router_norm_change needs router_init.safetensors"),
])
def test_a_damaged_checkpoint_is_refused_before_any_work(
    refused: Callable[..., str], pristine: Path, tmp_path: Path, damage: Callable[[Path], None], said: str):
  checkpoint = Path(shutil.copytree(pristine, tmp_path / "checkpoint"))
  damage(checkpoint)
  message = refused(checkpoint=checkpoint)
  assert said in message and str(checkpoint) in message
  assert not made(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Work directories
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mistake_does_not_claim_the_work_directory(refused: Callable[..., str], tmp_path: Path):
  first = refused("--config.calibration=1000")
  assert "1000 sequences" in first
  assert "1004 sequences" in refused("--config.evaluation=1004")
  (tmp_path / "run" / "stats").mkdir()
  message = refused("--config.seed=3", "--config.evaluation=1004")
  assert "config.seed: 0 there, 3 asked for" in message and "evaluation" not in message


@pytest.mark.parametrize(("content", "said"), [
    ("{", "config.json: not JSON"), ("[1]", "was not written by a run"),
    ('{"model_type": "mixtral"}', "was not written by a run")])
def test_a_directory_that_is_not_of_a_run_is_left_alone(
    refused: Callable[..., str], tmp_path: Path, content: str, said: str):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(content)
  message = refused()
  assert said in message and str(workdir) in message and "begin anew" not in message
  assert (workdir / "config.json").read_text() == content and len(list(workdir.iterdir())) == 1


def test_a_file_is_no_work_directory(refused: Callable[..., str], tmp_path: Path):
  (tmp_path / "file").write_text("precious")
  assert f"{tmp_path / 'file'} is a file" in refused(workdir=tmp_path / "file")
  assert f"{tmp_path / 'file' / 'run' / 'config.json'}: cannot be written" in refused(workdir=tmp_path / "file" / "run")
  assert (tmp_path / "file").read_text() == "precious"


def test_a_work_directory_that_cannot_be_written(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  def denied(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(tempfile, "mkstemp", denied)
  assert f"{tmp_path / 'run' / 'config.json'}: cannot be written (Permission denied)" in refused()


def test_a_full_disk(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  assert f"{tmp_path / 'run' / 'config.json'}: cannot be written (No space left on device); make room" in refused()
  assert list((tmp_path / "run").iterdir()) == []


def test_a_container_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  def full(*_, **__):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="a.safetensors: cannot be written .*No space left"):
    container.save(tmp_path / "a.safetensors", {"x": np.ones(3)}, {})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FloatingPointError("loss is nan in steps 1 to 20"), OSError("a: cannot be written")])
def test_what_the_outside_does_is_no_error_of_the_program(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception):
  def task(config, workdir):
    raise error

  monkeypatch.setitem(runs.TASKS, "compare", task)
  assert str(error) in refused()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path):
  config = runs.load_config("configs/quickstart.py")
  runs.prepare(config, tmp_path)
  others = [tmp_path / ".hidden", tmp_path / "x.partial", tmp_path / "codes" / ".download.partial"]
  with artifacts.atomic_path(tmp_path / "codes" / "layer.npz") as left:
    pass
  for path in (left, *others):
    path.write_text("part of it")
  before = set(tmp_path.rglob("*"))
  with pytest.raises(runs.UsageError):
    runs.prepare(runs.load_config("configs/quickstart.py", ["--config.seed=1"]), tmp_path)
  assert set(tmp_path.rglob("*")) == before
  runs.prepare(config, tmp_path)
  assert set(tmp_path.rglob("*")) == before - {left}
