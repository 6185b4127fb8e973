"""Spec strings: how a config names a codec, a score or an allocator, with its options, in one line of text.

A spec is a name with optional arguments, `rtn`, `gptq(group=64)`, `knapsack(fisher_error, alpha=0.5)`. Values are
Python literals; a bare name or a call as an argument is a nested spec and is handed over as its source text, so that
`knapsack(fisher_error)` gives its entry the string `"fisher_error"`. Nothing is ever evaluated.

Entries stand in one explicit table per kind, where they are used: `Registry("score", {"frequency": frequency, ...})`.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+,-]{0,119}")
_FLAT_SPEC = re.compile(r"([A-Za-z0-9_]+)\(([A-Za-z0-9_.=+, -]*)\)")


class SpecError(ValueError):
  """A spec string that cannot be read."""


class UnknownNameError(SpecError):
  """A name that no table holds."""


class ArgumentError(SpecError, TypeError):
  """Arguments that the named entry does not take."""


@dataclasses.dataclass(frozen=True)
class Spec:
  """A parsed spec string.

  Attributes:
    name: the entry.
    args: positional values; nested specs are strings in canonical form.
    kwargs: keyword values.
  """

  name: str
  args: tuple[Any, ...] = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    values = [_text(v) for v in self.args] + [f"{k}={_text(v)}" for k, v in sorted(self.kwargs.items())]
    return f"{self.name}({', '.join(values)})" if values else self.name


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> Spec:
  """Reads a spec string.

  Raises:
    SpecError: not of the form `name` or `name(arguments)`, or an argument that is neither a literal nor a spec.
  """
  try:
    node = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, AttributeError):
    raise SpecError(f"{text!r} is not a spec; write name or name(option=value), for example rtn(group=64)") from None
  return _spec(node, text)


def canonical(spec: str | Spec) -> str:
  """The normal form: options in alphabetical order, one way to write each value, no empty parentheses."""
  return str(parse(spec) if isinstance(spec, str) else spec)


def filename(spec: str | Spec) -> str:
  """A file name for a spec, without a suffix; different specs (by normal form) have different names."""
  text = canonical(spec)
  flat = _FLAT_SPEC.fullmatch(text)
  return safe_name(f"{flat[1]}-{flat[2].replace(', ', ',')}" if flat else text)


def safe_name(text: str) -> str:
  """`text` if it is fit for a file name, else its fit part with eight digits of its hash."""
  if _FILE_NAME.fullmatch(text):
    return text
  fit = re.sub(r"[^A-Za-z0-9_.=+,-]+", "_", text).strip("_.-")[:100]
  return f"{fit or '_'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _spec(node: ast.expr, text: str) -> Spec:
  if isinstance(node, ast.Name):
    return Spec(node.id)
  if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
    raise SpecError(f"{text!r} is not a spec: {ast.unparse(node)!r} stands where a name is needed")
  args = tuple(_value(arg, text) for arg in node.args)
  kwargs: dict[str, Any] = {}
  for keyword in node.keywords:
    if keyword.arg is None:
      raise SpecError(f"{text!r}: options are written out, ** is not read")
    if keyword.arg in kwargs:
      raise SpecError(f"{text!r}: option {keyword.arg!r} is given twice")
    kwargs[keyword.arg] = _value(keyword.value, text)
  return Spec(node.func.id, args, kwargs)


def _value(node: ast.expr, text: str) -> Any:
  if isinstance(node, ast.Name | ast.Call):
    return str(_spec(node, text))
  try:
    value = ast.literal_eval(node)
  except (ValueError, TypeError, SyntaxError):
    raise SpecError(f"{text!r}: {ast.unparse(node)!r} is neither a literal nor a spec") from None
  if not _plain(value):
    raise SpecError(f"{text!r}: {ast.unparse(node)!r} is not a finite number, string, boolean, None or tuple of these")
  return value


def _plain(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return all(_plain(v) for v in value)
  if isinstance(value, float):
    return math.isfinite(value)
  return value is None or isinstance(value, bool | int | str)


def _text(value: Any) -> str:
  """A value as it is written in a spec: strings bare if they are specs in normal form, all else as Python literals."""
  if isinstance(value, str):
    try:
      return value if canonical(value) == value else repr(value)
    except SpecError:
      return repr(value)
  return repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """`"; did you mean 'x'?"` where a known name is near, else an empty string."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


class Registry:
  """One table of named functions (or classes) of one kind.

  The options of an entry are its keyword-only parameters and those with a default; its other parameters are what the
  pipeline hands over, and positional arguments of a spec fill the first of them.
  """

  def __init__(self, kind: str, entries: Mapping[str, Callable[..., Any]]):
    """Args: kind: what the entries are, in messages. entries: name -> function."""
    self.kind = kind
    self._entries = dict(entries)

  def names(self) -> list[str]:
    """The names of the entries, in alphabetical order."""
    return sorted(self._entries)

  def get(self, spec: str | Spec) -> functools.partial:
    """The entry that `spec` names, bound to the arguments of `spec`.

    Raises:
      SpecError: the text is not a spec.
      UnknownNameError: no such entry; the message lists all and the nearest.
      ArgumentError: arguments that the entry does not take; the message lists its options.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    if spec.name not in self._entries:
      raise UnknownNameError(f"unknown {self.kind} {spec.name!r}{did_you_mean(spec.name, self._entries)} "
                             f"({self.kind}s: {', '.join(self.names())})")
    entry = self._entries[spec.name]
    self._check(spec, inspect.signature(entry).parameters.values())
    return functools.partial(entry, *spec.args, **spec.kwargs)

  def _check(self, spec: Spec, parameters: Iterable[inspect.Parameter]) -> None:
    parameters = list(parameters)
    kinds = {p.kind for p in parameters}
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    options = [p.name for p in parameters
               if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)]
    listed = f"options of {self.kind} {spec.name!r}: {', '.join(options) or 'none'}"
    if len(spec.args) > len(places) and inspect.Parameter.VAR_POSITIONAL not in kinds:
      raise ArgumentError(f"{spec}: at most {len(places)} positional arguments ({listed})")
    for name in spec.kwargs:
      if name in places[: len(spec.args)]:
        raise ArgumentError(f"{spec}: {name!r} is given twice, by place and by name")
      if name not in options and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ArgumentError(f"{spec}: unknown option {name!r}{did_you_mean(name, options)} ({listed})")
