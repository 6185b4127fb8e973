import json
import logging
import os
import shlex
from pathlib import Path

import pytest
from ml_collections import config_dict

from moeq_jax import runs

CONFIG = '''
from ml_collections import config_dict

def get_config(arg=None):
  if arg not in (None, "smoke"):
    raise ValueError(f"unknown variant {arg}")
  return config_dict.ConfigDict(dict(
      task="compare", seed=0, lr=0.1, steps=5 if arg else 100, bits=(1, 2, 3), name="x", quiet=False,
      model=dict(hidden=64, rules=[[".*", 4]]), limit=config_dict.placeholder(int)))
'''
SWEEP = CONFIG + '''
def sweep(add):
  add({})
  for hidden in (32, 64):
    for name in ("rtn(group=64)", "gptq"):
      add({"model.hidden": hidden, "name": name})
  add({"bits": (1, 2), "lr": 1e-3, "quiet": True})
'''


@pytest.fixture
def config_file(tmp_path: Path) -> str:
  path = tmp_path / "small.py"
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
  path = tmp_path / "grid.py"
  path.write_text(SWEEP)
  return str(path)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[config_dict.ConfigDict, Path]]:
  """Stands in for the tasks; every run is noted."""
  calls = []
  monkeypatch.setattr(runs, "TASKS", {"compare": lambda config, workdir: calls.append((config, workdir))})
  return calls


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def test_overrides_and_variants(config_file: str):
  config = runs.load_config(config_file + ":smoke", [
      "--config.lr=0.5", "--config.model.hidden=128", "--config.bits=(4, 8)", "--config.quiet", "--config.limit", "3"])
  assert (config.lr, config.model.hidden, config.bits, config.quiet, config.limit) == (0.5, 128, (4, 8), True, 3)
  assert (config.steps, config.seed) == (5, 0)
  assert runs.load_config(config_file).steps == 100
  with pytest.raises(AttributeError):
    config.new = 1  # locked


@pytest.mark.parametrize(("override", "said"), [
    ("--config.lrr=1", 'no field.*Did you mean "lr"'),
    ("--config.model.hiden=1", 'no field.*Did you mean "hidden"'),
    ("--config.zzzz=1", r"no field 'zzzz' \(fields: .*seed"),
    ("--config.lr.x=1", "no field.*lr.x"),
    ("--config.model.rules=3", "not supported for overriding"),
    ("--config.seed=many", "--config.seed=many"),
    ("--config=other.py", "--config=other.py"),
    ("stray", "unexpected argument 'stray'"),
])
def test_a_wrong_override_is_explained(config_file: str, override: str, said: str):
  with pytest.raises(runs.UsageError, match=said) as caught:
    runs.load_config(config_file, [override])
  assert "Traceback" not in str(caught.value)


def test_a_wrong_path_lists_the_configs_that_are_near(config_file: str):
  with pytest.raises(runs.UsageError, match=r"smal\.py not found; did you mean 'small\.py'\? \(configs: .*small\.py"):
    runs.load_config(config_file.replace("small", "smal"))


def test_paths_are_found_from_the_current_directory_then_from_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: str):
  monkeypatch.chdir(tmp_path)
  assert runs.find_config("small.py") == Path(config_file).resolve()
  assert runs.find_config("configs/common.py") == runs.ROOT / "configs" / "common.py"


@pytest.mark.parametrize(("source", "text", "said"), [
    ("x = 1", "", "defines get_config"),
    (CONFIG.replace("compare", "comparre"), "", "task is 'comparre'; did you mean 'compare'"),
    (CONFIG.replace("task=", "job="), "", "task is None"),
    (CONFIG.replace("arg=None", "").replace("arg", "None"), ":smoke", "takes no :smoke"),
    (CONFIG, ":huge", "unknown variant huge"),
])
def test_a_config_that_cannot_run_is_explained(tmp_path: Path, source: str, text: str, said: str):
  (tmp_path / "odd.py").write_text(source)
  with pytest.raises(ValueError, match=said):
    runs.load_config(f"{tmp_path / 'odd.py'}{text}")


# ---------------------------------------------------------------------------------------------------------------------
# Work directories
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_config_and_versions(config_file: str, tmp_path: Path, ran: list):
  config = runs.load_config(config_file, ["--config.seed=7"])
  runs.execute(config, tmp_path / "out")
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  assert saved == runs.plain(config)
  assert (saved["seed"], saved["bits"], saved["limit"]) == (7, [1, 2, 3], None)
  versions = json.loads((tmp_path / "out" / "versions.json").read_text())
  assert set(versions) == {"python", "jax", "jaxlib", "numpy", "flax", "moeq_jax", "commit"}
  assert (versions["jax"], versions["moeq_jax"]) == ("0.11.2", "0.1.0")
  assert [workdir for _, workdir in ran] == [tmp_path / "out"]
  assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "log.txt", "versions.json"]


def test_the_same_config_goes_on_and_another_is_refused(config_file: str, tmp_path: Path, ran: list):
  out = tmp_path / "out"
  runs.execute(runs.load_config(config_file), out)
  runs.execute(runs.load_config(config_file), out)
  (out / "rows.jsonl").write_text("precious")
  before = (out / "config.json").read_bytes()
  other = runs.load_config(config_file, ["--config.seed=1", "--config.model.hidden=128"])
  with pytest.raises(runs.UsageError) as caught:
    runs.execute(other, out)
  message = str(caught.value)
  assert "config.seed: 0 there, 1 asked for" in message
  assert "config.model.hidden: 64 there, 128 asked for" in message
  assert "config.lr" not in message
  assert "--workdir" in message
  assert ((out / "rows.jsonl").read_text(), (out / "config.json").read_bytes()) == ("precious", before)
  assert len(ran) == 2


def test_differences_of_missing_fields():
  assert runs.differences({"a": {"b": 1}, "c": 2}, {"a": {}, "c": 2, "d": [1]}) == [
      "config.a.b: 1 there, '(none)' asked for", "config.d: '(none)' there, [1] asked for"]
  assert runs.differences({"a": [1, 2]}, {"a": [1, 2]}) == []


@pytest.mark.parametrize(("value", "said"), [
    (float("nan"), "config.part.bad=nan: a finite number"), ((1.0, float("inf")), "a config holds"),
    ({1, 2}, "a config holds"), (print, "a config holds")])
def test_a_config_that_json_cannot_hold_is_refused(tmp_path: Path, value: object, said: str):
  with pytest.raises(runs.UsageError, match=said):
    runs.prepare(config_dict.ConfigDict({"task": "compare", "part": {"bad": value}}), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_work_directory_that_is_a_file_is_refused(tmp_path: Path):
  (tmp_path / "out").write_text("x")
  with pytest.raises(runs.UsageError, match="is a file"):
    runs.prepare(config_dict.ConfigDict({"task": "compare"}), tmp_path / "out")


def test_warnings_of_a_run_go_to_its_log_and_to_the_terminal(config_file: str, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture):
  logger = logging.getLogger("moeq_jax.somewhere")
  monkeypatch.setattr(runs, "TASKS", {"compare": lambda config, workdir: logger.warning("a field is not known")})
  config, before = runs.load_config(config_file), list(logging.getLogger("moeq_jax").handlers)
  for name in ("a", "b"):
    runs.execute(config, tmp_path / name)
    assert (tmp_path / name / "log.txt").read_text().endswith(" WARNING a field is not known\n")
    assert capsys.readouterr().err == "a field is not known\n"
  assert logging.getLogger("moeq_jax").handlers == before


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_point_in_its_folder(sweep_file: str, tmp_path: Path, ran: list):
  runs.sweep(sweep_file + ":smoke", ["--config.seed=3"], tmp_path / "out")
  assert len(ran) == 6
  assert len({workdir for _, workdir in ran}) == 6
  assert all(workdir.parent == tmp_path / "out" and config.seed == 3 and config.steps == 5 for config, workdir in ran)
  assert [(c.model.hidden, c.name) for c, _ in ran[1:5]] == [
      (32, "rtn(group=64)"), (32, "gptq"), (64, "rtn(group=64)"), (64, "gptq")]
  assert (ran[5][0].bits, ran[5][0].lr, ran[5][0].quiet) == ((1, 2), 1e-3, True)
  assert [workdir.name for _, workdir in ran[:1]] == ["base"]
  assert ran[2][1].name == "model.hidden=32,name=gptq"


def test_a_point_is_remade_from_its_overrides_alone(sweep_file: str, tmp_path: Path, ran: list):
  runs.sweep(sweep_file, [], tmp_path / "out")
  points = runs.sweep_points(Path(sweep_file))
  assert [runs.plain(runs.load_config(sweep_file, p)) for p in points.values()] == [runs.plain(c) for c, _ in ran]


def test_an_interrupted_sweep_goes_on_with_what_is_not_finished(
    sweep_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  started = []

  def task(config, workdir):
    started.append(workdir.name)
    if len(started) == 3:
      raise KeyboardInterrupt

  monkeypatch.setattr(runs, "TASKS", {"compare": task})
  with pytest.raises(KeyboardInterrupt):
    runs.sweep(sweep_file, [], tmp_path / "out")
  runs.sweep(sweep_file, [], tmp_path / "out")
  names = list(runs.sweep_points(Path(sweep_file)))
  assert started == [*names[:3], *names[2:]]
  assert capsys.readouterr().out.count("finished before") == 2


def test_a_finished_point_of_another_config_is_not_taken_for_this_one(sweep_file: str, tmp_path: Path, ran: list):
  runs.sweep(sweep_file, [], tmp_path / "out")
  with pytest.raises(runs.UsageError, match="config.seed: 0 there, 1 asked for"):
    runs.sweep(sweep_file, ["--config.seed=1"], tmp_path / "out")


@pytest.mark.parametrize(("body", "said"), [
    ("", "defines no sweep"),
    ("def sweep(add): pass", "adds no point"),
    ("def sweep(add): add({'seed': 1}); add({'seed': 1})", "point seed=1 twice"),
    ("def sweep(add): add({'seed': 1}); add({'sead': 1})", 'Did you mean "seed"'),
    ("def sweep(add): add({'lr': 1})", "config.lr is what the sweep varies"),
])
def test_a_sweep_that_cannot_run_is_refused_before_anything_runs(
    tmp_path: Path, ran: list, body: str, said: str):
  (tmp_path / "odd.py").write_text(CONFIG + body)
  with pytest.raises(runs.UsageError, match=said):
    runs.sweep(str(tmp_path / "odd.py"), ["--config.lr", "2"], tmp_path / "out")
  assert not ran


def test_the_command_is_one_that_a_shell_reads_back():
  for text in ("--config.export=('hf',)", "--config.codec=rtn(group=64)", "--config.checkpoint=a b'c$d", "--c='\"`"):
    assert shlex.split(runs._quoted(text)) == [text]
  assert runs._quoted("--config.export=('hf',)") == "\"--config.export=('hf',)\""


def made(folder: Path, **fields) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  config = {"task": "experiment", "file": "experiments/a.py", "seed": 0} | fields
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_points_of_one_experiment_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(runs, "ROOT", tmp_path)
  one, two = made(tmp_path / "runs/set/one"), made(tmp_path / "runs/set/two", seed=1)
  assert runs.points(one) == runs.points(two, free=("seed",)) == (tmp_path / "runs/set", [one, two])
  assert runs.points(one, free=("length",)) == (one, [one])  # they differ in what may not differ
  assert runs.hash_of([one]) != runs.hash_of([two]) and runs.hash_of([one, two]) == runs.hash_of([two, one])
  made(tmp_path / "runs/set/three", file="experiments/b.py")
  assert runs.points(one) == (one, [one])  # another experiment's rows are no points of this one
  alone = made(tmp_path / "runs/a")
  assert runs.points(alone) == (alone, [alone])  # what stands in runs/ by default leaves nothing beside it
