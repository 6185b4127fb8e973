"""Options of commands: `--name=value` or `--name value`, checked against what the command knows."""

import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from moeq_jax import registry, runs


def parse(arguments: Sequence[str], usage: str, options: Mapping[str, Any], places: int = 0) -> tuple[Any, list[str]]:
  """Reads the arguments of a command.

  Args:
    arguments: what follows the command's name.
    usage: the command's usage, shown where something needed is missing.
    options: names and defaults; the type is that of the default (`None`: text).
    places: how many arguments without a name are needed.

  Returns:
    The options as attributes, and the arguments without a name.

  Raises:
    runs.UsageError: an unknown option, a value of the wrong type, or too few or too many arguments.
  """
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  flags.DEFINE_boolean("traceback", False, "", flag_values=values)
  for name, default in options.items():
    define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define.get(type(default), flags.DEFINE_string)(name, default, "", flag_values=values)
  try:
    rest = values(["", *arguments])[1:]
  except flags.UnrecognizedFlagError as error:
    known = ", ".join(f"--{name}" for name in options)
    near = registry.did_you_mean(error.flagname, options)
    raise runs.UsageError(f"unknown option --{error.flagname}{near} (options: {known})") from None
  except flags.Error as error:
    raise runs.UsageError(str(error)) from None
  if len(rest) != places:
    raise runs.UsageError(f"usage: ./launch.sh {usage}")
  return types.SimpleNamespace(**{name: values[name].value for name in options}), rest


def needed(value: str | None, usage: str) -> str:
  """The value of an option that a command cannot do without.

  Raises:
    runs.UsageError: it was not given.
  """
  if not value:
    raise runs.UsageError(f"usage: ./launch.sh {usage}")
  return value
