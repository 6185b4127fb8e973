"""launch.sh with interpreters that only note what they are asked to do: nothing is installed here."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# An interpreter of a given version. `-c` runs the code for true, with that version; `-m venv` makes a copy of itself.
INTERPRETER = """\
#!/usr/bin/env bash
case "$1" in
  -c) exec {real} -c 'import sys; sys.version_info = ({version}, 0); sys._base_executable = "{base}"
exec(sys.argv[1])' "$2" ;;
  -V) echo "Python {version}" ;;
  -m)
    case "$2" in
      venv)
        mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/python3.12"
        echo "venv {version}" >> "$LOG" ;;
      pip) sleep "${{PIP_SECONDS:-0}}"; echo "${{@:2}}" >> "$LOG"; exit "${{PIP_STATUS:-0}}" ;;
      *) echo "$PWD|$PYTHONPATH|$*"; exit "${{STATUS:-0}}" ;;
    esac ;;
  *) echo "$PWD|$PYTHONPATH|$*"; exit "${{STATUS:-0}}" ;;
esac
"""


class Project:
  """A project of nothing but launch.sh and its requirements, and a machine with chosen interpreters."""

  def __init__(self, folder: Path):
    self.root, self.tools, self.log = folder / "a project", folder / "tools", folder / "log"
    self.root.mkdir()
    self.tools.mkdir()
    shutil.copy(ROOT / "launch.sh", self.root)
    (self.root / "requirements.txt").write_text("one==1\n")
    (self.root / "requirements-assets.txt").write_text("two==2\n")
    (self.root / "requirements-interop.txt").write_text("torch==1\n")
    (self.root / "requirements-interop-assets.txt").write_text("model==1\n")
    (self.root / "requirements-aot.txt").write_text("compiler==1\n")
    self.environment = {"PATH": f"{self.tools}:/usr/bin:/bin", "HOME": str(folder), "LOG": str(self.log),
                        "PYTHONPATH": "elsewhere"}
    for name in ("python3.13", "python3.12", "python3.11", "python3"):  # none of the machine's own is found
      self.add(name, "exit 127")

  def add(self, name: str, text: str = "", version: str = "3, 12") -> None:
    path = self.tools / name
    path.write_text(text or INTERPRETER.format(real=sys.executable, version=version, base=path))
    path.chmod(0o755)

  def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([self.root / "launch.sh", *arguments], cwd=cwd or self.root, text=True,
                            env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)

  def launch(self, *arguments: str, cwd: Path | None = None, **environment: str) -> tuple[int, str, str]:
    process = self.start(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err.strip()

  def made(self) -> list[str]:
    """What was installed so far, line by line."""
    return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
  return Project(tmp_path)


def installed(project: Project, version: str = "3, 12", name: str = "requirements") -> list[str]:
  return [f"venv {version}", f"pip install --quiet -r {project.root}/{name}.txt",
          f"pip install --quiet --no-deps -r {project.root}/{name}-assets.txt"]


def test_the_environment_is_made_once(project: Project):
  project.add("python3.12")
  status, out, err = project.launch("run", "--config=a b.py", "")
  assert (status, out) == (0, f"{project.root}|{project.root}|-P -m moeq_jax.main run --config=a b.py")
  assert "making the environment" in err
  assert project.made() == installed(project)
  assert project.launch("bench", "x")[2] == ""
  assert project.made() == installed(project)


def test_no_argument_is_the_quickstart_and_statuses_are_handed_on(project: Project):
  project.add("python3.12")
  assert project.launch()[1].endswith("-m moeq_jax.main quickstart")
  assert project.launch("run", STATUS="130")[0] == 130


def test_test_runs_pytest_in_the_project(project: Project, tmp_path: Path):
  project.add("python3.12")
  assert project.launch("test", "-k", "a or b", cwd=tmp_path)[1] == f"{project.root}|{project.root}|-m pytest -k a or b"


def test_all_tests_run_on_several_cores_file_by_file(project: Project):
  project.add("python3.12")
  options = "--numprocesses=auto --maxprocesses=4 --dist=loadfile"
  assert project.launch("test")[1] == f"{project.root}|{project.root}|-m pytest {options}"


def test_commands_run_where_they_are_given(project: Project, tmp_path: Path):
  project.add("python3.12")
  assert project.launch("run", cwd=tmp_path)[1].startswith(f"{tmp_path}|{project.root}|")


def test_an_interpreter_counts_only_if_it_runs_and_is_of_a_right_version(project: Project):
  project.add("python3.12", version="3, 11")
  project.add("python3", version="3, 14")
  status, _, err = project.launch()
  assert status == 1
  assert "no Python 3.12 or 3.13 found. Install one" in err
  assert project.made() == []
  project.add("python3", version="3, 13")
  assert project.launch()[0] == 0
  assert project.made() == installed(project, "3, 13")


def test_interpreters_of_pyenv_are_found(project: Project):
  folder = Path(project.environment["HOME"]) / ".pyenv" / "versions" / "3.12.9" / "bin"
  folder.mkdir(parents=True)
  project.add("python")
  text = (project.tools / "python").read_text().replace(str(project.tools), str(folder))
  (project.tools / "python").unlink()
  (folder / "python").write_text(text)
  (folder / "python").chmod(0o755)
  assert project.launch()[0] == 0
  assert project.made() == installed(project)


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-assets.txt"])
def test_changed_requirements_make_it_anew(project: Project, file: str):
  project.add("python3.12")
  project.launch()
  (project.root / ".venv" / "old").touch()
  (project.root / file).write_text("three==3\n")
  assert project.launch()[0] == 0
  assert project.made() == installed(project) * 2
  assert not (project.root / ".venv" / "old").exists()


def test_it_is_not_made_anew_by_its_own_interpreter(project: Project):
  project.add("python3.12")
  project.launch()
  (project.root / "requirements.txt").write_text("three==3\n")
  activated = f"{project.root}/.venv/bin:{project.environment['PATH']}"
  assert project.launch(PATH=activated)[0] == 0
  assert project.made() == installed(project) * 2


def test_another_interpreter_in_the_environment_makes_it_anew(project: Project):
  project.add("python3.12")
  project.launch()
  project.add("python3.12", version="3, 13")
  shutil.copy(project.tools / "python3.12", project.root / ".venv" / "bin" / "python")
  project.launch()
  assert project.made() == installed(project) + installed(project, "3, 13")
  (project.root / ".venv" / "bin" / "python").unlink()
  assert project.launch()[0] == 0
  assert len(project.made()) == 9


def test_a_failed_installation_does_not_count(project: Project):
  project.add("python3.12")
  status, out, _ = project.launch(PIP_STATUS="1")
  assert (status != 0, out) == (True, "")
  assert project.made() == installed(project)[:2]
  assert project.launch()[0] == 0
  assert project.made()[2:] == installed(project)


def test_a_killed_installation_does_not_count(project: Project):
  project.add("python3.12")
  process = project.start(PIP_SECONDS="30")
  while project.made() == []:
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  assert project.launch()[0] == 0
  assert project.made()[-3:] == installed(project)


def test_two_launches_at_once_make_one_environment(project: Project):
  project.add("python3.12")
  first = [project.start("run", PIP_SECONDS="0.3") for _ in range(3)]
  assert [process.wait(timeout=60) for process in first] == [0, 0, 0]
  for process in first:
    process.communicate()
  assert project.made() == installed(project) or not shutil.which("flock")


# ---------------------------------------------------------------------------------------------------------------------
# The second environment
# ---------------------------------------------------------------------------------------------------------------------


def interop(project: Project, version: str = "3, 11") -> list[str]:
  return installed(project, version, "requirements-interop")


def test_interop_runs_its_checks_in_an_environment_of_its_own(project: Project, tmp_path: Path):
  project.add("python3.12")
  project.add("python3.11", version="3, 11")
  status, out, _ = project.launch("interop", "-k", "a or b", cwd=tmp_path)
  ours = f"--project-python={project.root}/.venv/bin/python"
  run = f"{project.root}|{project.root}|-m pytest -c tests/interop/pytest.ini {ours}"
  assert (status, out) == (0, f"{run} -k a or b tests/interop")
  (project.root / "tests" / "interop").mkdir(parents=True)
  (project.root / "tests" / "interop" / "x_check.py").touch()
  assert project.launch("interop", "tests/interop/x_check.py::test_a")[1] == f"{run} tests/interop/x_check.py::test_a"
  assert project.launch("interop")[1] == f"{run} tests/interop"
  assert project.made() == installed(project) + interop(project)
  assert project.launch("interop", STATUS="1")[0] == 1
  assert project.made() == installed(project) + interop(project)
  (project.root / "requirements-interop.txt").write_text("torch==2\n")
  assert project.launch("test")[0] == 0
  assert project.launch("interop")[0] == 0
  assert project.made() == installed(project) + interop(project) * 2


def test_the_ordinary_commands_do_not_make_it(project: Project):
  project.add("python3.12")
  for command in ("quickstart", "test", "run"):
    assert project.launch(command)[0] == 0
  assert project.made() == installed(project)


def test_the_interpreter_of_interop_can_be_named(project: Project):
  for name, version in (("python3.12", "3, 12"), ("python3.11", "3, 11"), ("mine", "3, 13")):
    project.add(name, version=version)
  project.launch("interop", MOEQ_INTEROP_PYTHON=str(project.tools / "mine"))
  assert project.made() == installed(project) + interop(project, "3, 13")
  assert project.launch("interop")[0] == 0  # whatever made it, it is there
  assert len(project.made()) == 6
  project.launch("interop", MOEQ_INTEROP_PYTHON="python3.11")
  assert project.made()[6:] == interop(project, "3, 11")


@pytest.mark.parametrize("named", ["mine", ""])
def test_without_an_interpreter_interop_says_what_to_do_and_makes_nothing(project: Project, named: str):
  project.add("python3.12")
  project.launch("test")
  project.add("mine", version="3, 14")
  for name in ("python3.13", "python3.12", "python3"):
    project.add(name, version="3, 10")
  status, out, err = project.launch("interop", MOEQ_INTEROP_PYTHON=named)
  assert (status, out) == (1, "")
  assert "no Python 3.11, 3.12 or 3.13" in err and "set MOEQ_INTEROP_PYTHON" in err
  assert ("MOEQ_INTEROP_PYTHON=mine is no Python" in err) == bool(named)
  assert project.made() == installed(project) and not (project.root / ".venv-interop").exists()


def test_a_killed_installation_of_interop_does_not_count(project: Project):
  project.add("python3.12")
  project.add("python3.11", version="3, 11")
  project.launch("test")
  process = project.start("interop", PIP_SECONDS="30")
  while len(project.made()) < 4:
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  assert project.launch("interop")[0] == 0
  assert project.made()[4:] == interop(project)
  assert project.launch("test")[0] == 0
  assert len(project.made()) == 7


def test_no_check_of_interop_is_an_ordinary_test():
  checks = [path.name for path in (ROOT / "tests" / "interop").glob("*.py")]
  assert any(name.endswith("_check.py") for name in checks)
  assert not [name for name in checks if name.endswith("_test.py")]


# ---------------------------------------------------------------------------------------------------------------------
# The TPU compiler
# ---------------------------------------------------------------------------------------------------------------------


def compiler(project: Project, version: str = "3, 12") -> list[str]:
  return installed(project, version, "requirements-aot")[:2]


def test_aot_runs_the_projects_own_interpreter_which_finds_the_compiler(project: Project, tmp_path: Path):
  project.add("python3.12")
  found = f"{project.root}:{project.root}/.venv-aot/lib/python3.*/site-packages"  # nothing is installed: it stays a *
  status, out, _ = project.launch("aot", "-k", "a or b", cwd=tmp_path)
  assert (status, out) == (0, f"{project.root}|{found}|-m pytest tests/aot -k a or b")
  assert project.made() == installed(project) + compiler(project)
  status, out, _ = project.launch("bench", "kernels_tpu_static", "--rows=8", cwd=tmp_path)
  assert (status, out) == (0, f"{tmp_path}|{found}|-P -m moeq_jax.main bench kernels_tpu_static --rows=8")
  assert project.launch("bench", "allocate")[1].split("|")[1] == str(project.root)
  assert len(project.made()) == 5
  (project.root / "requirements-aot.txt").write_text("compiler==2\n")
  assert project.launch("aot")[0] == 0
  assert project.made()[5:] == compiler(project)


def test_the_compiler_is_installed_for_the_version_of_the_project(project: Project):
  project.add("python3.12")
  project.launch("aot")
  project.add("python3.12", version="3, 13")
  shutil.copy(project.tools / "python3.12", project.root / ".venv" / "bin" / "python")
  assert project.launch("aot")[0] == 0
  assert project.made()[5:] == installed(project, "3, 13") + compiler(project, "3, 13")
