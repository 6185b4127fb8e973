"""What configs share."""

import ast
from typing import Any

from ml_collections import config_dict

from moeq_jax import registry


def parse_arg(arg: str | None, **defaults: Any) -> config_dict.ConfigDict:
  """Reads the text after the colon of `--config=FILE.py:TEXT`: `"smoke,budget=2.5"`.

  Args:
    arg: comma-separated `name=value` or, for a boolean, `name`; None or empty for none.
    defaults: every option with its default, whose type the value must have (an integer passes for a float; a default of
      None takes any literal).

  Returns:
    A locked ConfigDict of all options.

  Raises:
    ValueError: an unknown option, one given twice, or a value of the wrong type.
  """
  given: dict[str, Any] = {}
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      near = registry.did_you_mean(name, defaults)
      raise ValueError(f"unknown config option {name!r}{near} (options: {', '.join(defaults)})")
    if name in given:
      raise ValueError(f"config option {name!r} is given twice")
    if not equals and not isinstance(defaults[name], bool):
      raise ValueError(f"config option {name!r} needs a value: {name}={defaults[name]!r}")
    given[name] = _value(name, text if equals else "True", defaults[name])
  return config_dict.ConfigDict({**defaults, **given}).lock()


def _value(name: str, text: str, default: Any) -> Any:
  if isinstance(default, str):
    return text
  try:
    value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(default, float) and type(value) is int:
    value = float(value)
  if default is not None and type(value) is not type(default):
    raise ValueError(f"config option {name}={text}: {type(default).__name__} expected, like {default!r}")
  return value
