"""The command line: `python -m moeq_jax.main COMMAND [options]`, or `./launch.sh COMMAND [options]`."""

import ast
import dataclasses
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moeq_jax import artifacts, registry, runs

USER_ERRORS = (ValueError, OSError, FloatingPointError, artifacts.StaleProductError, flags.Error)
HELP = ("--help", "-help", "-h", "help")
BENCHES = Path(__file__).parent / "bench"


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str], *names: str) -> tuple[dict[str, str | None], list[str]]:
  """Takes the options `--name=value` out of the arguments: `(values, what is left)`."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  flags.DEFINE_boolean("traceback", False, "", flag_values=values)
  for name in names:
    flags.DEFINE_string(name, None, "", flag_values=values)
  rest = values(["", *arguments], known_only=True)[1:]
  return {name: values[name].value for name in names}, rest


def _run_options(arguments: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
  """`(config, workdir, overrides)` of the commands that run configs."""
  values, rest = _options(arguments, "config", "workdir")
  for argument in rest:
    name = argument.lstrip("-").split("=", 1)[0]
    if argument.startswith("-") and not name.removeprefix("no").startswith("config."):
      near = registry.did_you_mean(name, ("config", "workdir", "traceback"))
      raise runs.UsageError(f"unknown option {argument}{near} (fields are set by --config.field=value)")
  return values["config"], values["workdir"], rest


def _needed(value: str | None, usage: str) -> str:
  if not value:
    raise runs.UsageError(f"usage: {usage}")
  return value


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def _quickstart(arguments: Sequence[str]) -> None:
  config, workdir, overrides = _run_options(arguments)
  config = runs.load_config(config or str(runs.ROOT / "configs" / "quickstart.py"), overrides)
  runs.execute(config, Path(workdir or runs.ROOT / "runs" / "quickstart"))


def _run(arguments: Sequence[str]) -> None:
  config, workdir, overrides = _run_options(arguments)
  config = _needed(config, COMMANDS["run"].usage)
  runs.execute(runs.load_config(config, overrides), Path(workdir or _own_place(config)))


def _sweep(arguments: Sequence[str]) -> None:
  config, workdir, overrides = _run_options(arguments)
  config = _needed(config, COMMANDS["sweep"].usage)
  runs.sweep(config, overrides, Path(workdir or _own_place(config)))


def _own_place(config: str) -> Path:
  """Where the runs of a config go that are given no place."""
  return runs.ROOT / "runs" / Path(config.split(":", 1)[0]).stem


def _report(arguments: Sequence[str]) -> None:
  _, places = _options(arguments)
  if len(places) != 1 or places[0].startswith("-"):
    raise runs.UsageError(f"usage: {COMMANDS['report'].usage}")
  workdir = Path(places[0])
  if not (workdir / "config.json").is_file():
    raise runs.UsageError(f"{workdir} is not the work directory of a run: it holds no config.json")
  from moeq_jax import report  # imported here, so that --help does not wait for it

  report.write(workdir)


def _bench(arguments: Sequence[str]) -> None:
  _, rest = _options(arguments)
  names = bench_names()
  listed = f"(benchmarks: {', '.join(names)})"
  if not rest or rest[0].startswith("-"):
    raise runs.UsageError(f"usage: {COMMANDS['bench'].usage} {listed}")
  name, settings = rest[0], dict(_setting(argument) for argument in rest[1:])
  if name not in names:
    raise runs.UsageError(f"unknown benchmark {name!r}{registry.did_you_mean(name, names)} {listed}")
  table = registry.Registry("benchmark", {name: importlib.import_module(f"moeq_jax.bench.{name}").run})
  result = table.get(registry.Spec(name, (), settings))()
  print(json.dumps(result, default=float), flush=True)


def _late(module: str, function: str) -> Callable[[Sequence[str]], None]:
  """A command whose module is imported when it runs, so that --help does not wait for it."""
  return lambda arguments: getattr(importlib.import_module(f"moeq_jax.{module}"), function)(arguments)


def bench_names() -> list[str]:
  """The benchmarks: the modules of `moeq_jax/bench`."""
  return sorted(path.stem for path in BENCHES.glob("*.py") if not path.stem.startswith("_"))


def _setting(argument: str) -> tuple[str, Any]:
  name, equals, text = argument.removeprefix("--").partition("=")
  if not (argument.startswith("--") and equals):
    raise runs.UsageError(f"unexpected argument {argument!r}; options of a benchmark are written --name=value")
  try:
    return name.replace("-", "_"), ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return name.replace("-", "_"), text


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
  """A command: what it runs, one line about it, its usage, and the rest of its help."""

  run: Callable[[Sequence[str]], None]
  about: str
  usage: str
  details: str
  resumes: bool = False


_RUN_OPTIONS = """\
  --config=FILE.py[:ARG]    a file with get_config(arg); ARG chooses a variant, for example smoke
  --config.field=value      sets one field of the config; may be given many times
  --workdir=DIR             where the files of the run go; the same command, given again, goes on from there
  --traceback               shows where an error came from"""

_MODEL_OPTIONS = """\
  --dtype=float32           that the model computes in; or bfloat16
  --capacity=sequence       of a Switch Transformer: tokens that an expert takes are counted over the sequence; call:
                            anew in every step of decoding, as transformers does with a cache; off: none is dropped"""

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        _quickstart, "quantizes the model that comes with the project by every method and reports what it cost",
        "quickstart [--config=FILE.py[:ARG]] [--config.field=value ...] [--workdir=DIR]",
        f"options (config: configs/quickstart.py, workdir: runs/quickstart):\n{_RUN_OPTIONS}\n\n"
        "examples:\n  ./launch.sh quickstart\n"
        "  ./launch.sh quickstart --config=configs/quickstart.py:smoke --workdir=runs/smoke", resumes=True),
    "run": Command(
        _run, "runs one config in a work directory",
        "run --config=FILE.py[:ARG] [--workdir=DIR] [--config.field=value ...]",
        f"options (workdir: runs/NAME-OF-FILE):\n{_RUN_OPTIONS}\n\n"
        "examples:\n  ./launch.sh run --config=configs/paper/smoke.py\n"
        "  ./launch.sh run --config=configs/pretrain_small.py --workdir=runs/seed1 --config.seed=1", resumes=True),
    "sweep": Command(
        _sweep, "runs every point of a config's sweep(add), each in its own folder",
        "sweep --config=FILE.py[:ARG] [--workdir=DIR] [--config.field=value ...]",
        f"options (workdir: runs/NAME-OF-FILE):\n{_RUN_OPTIONS}\n\n"
        "Finished points are not run again.\n\n"
        "examples:\n  ./launch.sh sweep --config=experiments/FILE.py --workdir=runs/sweep", resumes=True),
    "report": Command(
        _report, "writes report.html, figures and tables of a run again",
        "report WORKDIR", "examples:\n  ./launch.sh report runs/quickstart"),
    "inspect": Command(
        _late("inspection", "command"), "says what a checkpoint holds, what a budget gives and what fits",
        "inspect CHECKPOINT [--budget=BITS] [--memory=SIZE] [--group=64]",
        "Reads headers only; CHECKPOINT is a directory in Hugging Face format or a quantized one.\n\n"
        "options:\n"
        "  --budget=2.5              average nominal bits per expert weight: how large the model becomes\n"
        "  --memory=20GiB            what the whole model may take: how many bits that leaves an expert weight\n"
        "  --group=64                weights that share a scale\n\n"
        "examples:\n  ./launch.sh inspect experiments/models/moeq-small\n"
        "  ./launch.sh inspect DIR --memory=20GiB"),
    "generate": Command(
        _late("language_model", "command_generate"), "continues a prompt with a full-precision or quantized model",
        "generate --checkpoint=DIR --prompt=TEXT [--max_new_tokens=64] [--temperature=0] [--seed=0] [--file=PROMPTS]",
        "options:\n"
        "  --checkpoint=DIR          a directory in Hugging Face format, or a quantized one\n"
        "  --prompt=TEXT             what to continue (an encoder-decoder reads it as its input)\n"
        "  --file=PROMPTS            a text file, one prompt a line, in place of --prompt\n"
        "  --max_new_tokens=64       tokens at most\n"
        "  --temperature=0           0 takes the likeliest token; 1 samples from the model's distribution\n"
        f"  --seed=0                  of the sampling\n{_MODEL_OPTIONS}\n\n"
        "examples:\n  ./launch.sh generate --checkpoint=experiments/models/moeq-small --prompt='def main('"),
    "evaluate": Command(
        _late("evaluation", "command_evaluate"), "multiple-choice tasks by log-likelihood, paired with another model",
        "evaluate --checkpoint=DIR --tasks=NAME[,NAME] [--against=DIR] [--limit=N] [--output=FILE.jsonl]",
        "options:\n"
        "  --checkpoint=DIR          a directory in Hugging Face format, or a quantized one\n"
        "  --against=DIR             another one (full precision): differences are paired, with 95% intervals\n"
        "  --tasks=piqa,boolq        which sets; an unknown one lists them\n"
        "  --limit=200               the first rows of each set only\n"
        f"  --output=FILE.jsonl       every row's answer\n{_MODEL_OPTIONS}\n\n"
        "examples:\n  ./launch.sh evaluate --checkpoint=experiments/models/moeq-small --tasks=piqa --limit=100"),
    "serve": Command(
        _late("evaluation", "command_serve"), "answers requests of an evaluation harness, JSON lines in and out",
        "serve --checkpoint=DIR",
        "Requests on standard input, one JSON object a line; moeq_jax/evaluate/lm_eval.py is the other side.\n\n"
        "options:\n"
        f"  --checkpoint=DIR          a directory in Hugging Face format, or a quantized one\n{_MODEL_OPTIONS}\n\n"
        "examples:\n  ./launch.sh serve --checkpoint=experiments/models/moeq-small"),
    "upcycle": Command(
        _late("upcycling", "command"), "makes a Mixture-of-Experts checkpoint of a dense one",
        "upcycle SOURCE DIR [--experts=8] [--top_k=2] [--method=copy]",
        "SOURCE is a dense checkpoint directory or a GGUF file; DIR gets a Mixtral-format checkpoint.\n\n"
        "options:\n"
        "  --experts=8               experts of every layer\n"
        "  --top_k=2                 experts that a token uses\n"
        "  --method=copy             copy: every expert is the dense one; split: its neurons are divided among them\n"
        "  --seed=0                  of the routers\n\n"
        "examples:\n  ./launch.sh upcycle DENSE MOE --experts=8 --method=split"),
    "bench": Command(
        _bench, "measures speed; the last line printed is one JSON object",
        "bench NAME [--option=value ...]",
        "benchmarks: {benches}\n./launch.sh bench NAME --help shows the options of one.\n\n"
        "examples:\n  ./launch.sh bench allocate\n  ./launch.sh bench allocate --units=4096"),
}


def overview() -> str:
  """What `--help` prints."""
  lines = [f"  {name:<11} {command.about}" for name, command in COMMANDS.items()]
  return "\n".join([
      "moeq_jax compresses Mixture-of-Experts models to 1-4 bits per expert weight.", "",
      "usage: ./launch.sh COMMAND [options]      (in an environment: python -m moeq_jax.main COMMAND [options])", "",
      "commands:", *lines, f"  {'test':<11} runs the tests (launch.sh only)", "",
      "examples:", "  ./launch.sh                               the quickstart",
      "  ./launch.sh COMMAND --help                options and examples of a command"])


def command_help(name: str, arguments: Sequence[str]) -> str:
  """What `COMMAND --help` prints; `bench NAME --help` describes one benchmark."""
  command = COMMANDS[name]
  if name == "bench" and arguments and arguments[0] in bench_names():
    run = importlib.import_module(f"moeq_jax.bench.{arguments[0]}").run
    parameters = inspect.signature(run).parameters.values()
    options = [f"  --{p.name}={p.default!r}" for p in parameters if p.default is not p.empty]
    return "\n".join([f"usage: ./launch.sh bench {arguments[0]} [--option=value ...]", "",
                      inspect.getdoc(run) or "", "", "options, with what they are by default:", *options])
  details = command.details.replace("{benches}", ", ".join(bench_names()))
  return f"usage: ./launch.sh {command.usage}\n\n{command.about[0].upper()}{command.about[1:]}.\n\n{details}"


# ---------------------------------------------------------------------------------------------------------------------
# Entry
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
  """Runs a command line (`argv[0]` is the program) and returns the exit status: 0, 2 for a user's error, 130."""
  arguments = list(argv[1:])
  if not arguments or arguments[0] in HELP:
    print(overview())
    return 0 if arguments else 2
  name, rest = arguments[0], arguments[1:]
  if name not in COMMANDS:
    return _fail(f"unknown command {name!r}{registry.did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
  if any(argument in HELP[:3] for argument in rest):
    print(command_help(name, rest))
    return 0
  try:
    COMMANDS[name].run(rest)
  except KeyboardInterrupt:
    print("interrupted" + ("; the same command goes on from here" if COMMANDS[name].resumes else ""), file=sys.stderr)
    return 130
  except USER_ERRORS as error:
    if "--traceback" in rest:
      traceback.print_exc()
    return _fail(str(error), hint=not isinstance(error, runs.UsageError | flags.Error) and "--traceback" not in rest)
  return 0


def _fail(message: str, hint: bool = False) -> int:
  print(f"error: {message}" + ("\n(--traceback shows where)" if hint else ""), file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv))
