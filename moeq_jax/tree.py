"""Names of parameters, and rules on them: lists of `(regular expression, value)` where the first match wins.

A rule list says which parameters are quantized, decayed, frozen or sharded, and how. Nothing falls through: a name
that no rule covers is an error, and the result holds every name with its value, ready for the log.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax

Value = TypeVar("Value")


class RuleError(ValueError):
  """A rule list that does not cover the names, or a rule that is not a regular expression."""


def names(tree: Any) -> list[str]:
  """The path of every leaf, for example `layers/0/moe/gate`, in the order of `jax.tree.leaves`.

  flax.nnx puts an attribute `value` between a parameter and its array, which goes when the leaf is replaced; such a
  last step is left out, so that a name does not depend on it. A dictionary key `value` stays.

  Raises:
    ValueError: two leaves end up with one name.
  """
  found = [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
  twice = [name for name, count in Counter(found).items() if count > 1]
  if twice:
    raise ValueError(f"several leaves have the name {twice[0]!r}; rename one of them")
  return found


def match(rules: Sequence[tuple[str, Value]], names: Iterable[str]) -> dict[str, Value]:
  """Gives each name the value of the first rule whose expression matches the whole name.

  Args:
    rules: `(regular expression, value)`, tried in order with `re.fullmatch`.
    names: parameter names, as from `names`.

  Returns:
    Every name with its value, in the order of `names`: the full record of what the rules did.

  Raises:
    RuleError: names that no rule covers (all are listed), or an expression that does not compile.
  """
  compiled = [(_compile(pattern), value) for pattern, value in rules]
  result: dict[str, Value] = {}
  uncovered = []
  for name in names:
    for pattern, value in compiled:
      if pattern.fullmatch(name):
        result[name] = value
        break
    else:
      uncovered.append(name)
  if uncovered:
    listed = ", ".join(pattern for pattern, _ in rules) or "none"
    raise RuleError(f"no rule covers {', '.join(uncovered)} (rules: {listed}); add a rule, last of all ('.*', ...)")
  return result


def _name(path: tuple[Any, ...]) -> str:
  if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _compile(pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise RuleError(f"rule {pattern!r} is not a regular expression: {error}") from None
