"""`rows.jsonl`: what a run measured, one row per line, one row per evaluated plan.

A line is a JSON object with sorted keys; NaN and infinity are refused. Rows carry an `id` that says what was evaluated,
so a run that was killed skips what is already there and ends with the same bytes as an undisturbed one, provided that
rows are appended in a deterministic order. Every append rewrites the file atomically (it has hundreds of rows, not
millions), so a kill leaves the old file or the new one; a last line that is torn all the same (power lost, a file
copied while it was written) is dropped and gone after the next append. One process writes, any number may read.

A row is flat. Its fields:

  id                        what was evaluated, unique in the file
  method                    the method's spec string, for example `knapsack(router_grad_error)`
  family                    one of `FAMILIES`
  codec, group              the codec's spec string; rows of K that share a scale (0 = all of K)
  sequential                of the task quantize: whether the codec saw the inputs that the quantized layers before
                            give; None where it sees none
  budget                    average nominal bits per expert weight asked for; None for full precision
  nominal_bits              average bits per expert weight, codes only
  effective_bits            the same with scales, zeros and permutations
  block, permutation_bits   of plans by blocks of neurons only: neurons of a block; the part of `effective_bits` that
                            the order of the neurons takes, which is not stored
  stored_bits               the same from the payload bytes in the file (padding included)
  file_mb                   the whole file in units of 1e6 bytes
  loss, perplexity          held out, over all domains; loss in nats per token
  loss_<domain>             nats per token
  nats_per_byte_<domain>    loss of a domain divided by its bytes of text, so that tokenizers can be compared
  loss_delta                loss minus the loss in full precision, nats per token
  loss_delta_ci95           half width of its 95% confidence interval, paired over sequences
  vs_uniform                loss minus that of uniform widths at the same budget (the mean of their draws), or None
  vs_uniform_ci95           half width of its 95% confidence interval, paired over sequences
  kl                        mean over tokens of KL(full precision || quantized) of the next-token distribution, nats
  router_agreement          share of (token, layer) whose set of top-k experts is that of full precision
  constraint                which cells of the plan share one width (`allocate/constraints.py`, of blocks
                            `allocate/blocks.py`), None in full precision
  cost                      cost of the plan in its score's own units, or None
  predicted                 predicted loss increase in nats per token (None where costs are arbitrary or absent)
  lower_bound, gap          certified lower bound on the least cost, and how far the plan may be from it (or None)
  draw                      number of the draw of a random method, else None
  seed, config_hash         of the run

`losses.jsonl` is a file of the same form: for each row of `rows.jsonl` the loss of every evaluated sequence, in nats
per token, as `sequence_000000` and so on.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from moeq_jax import artifacts

FAMILIES = ("full", "uniform", "random", "tiers", "knapsack", "measured")

Row = dict[str, Any]


class RowError(ValueError):
  """A row, or the file of rows, is not what this module writes."""


def read(path: str | os.PathLike) -> list[Row]:
  """The rows of `path` in the order they were appended; `[]` if there is no such file.

  A torn last line is dropped, and equal rows are returned once. Raises `RowError`, naming the line, for anything else
  that is not a row, and for two rows with the same id and other content.
  """
  path = Path(path)
  if not path.exists():
    return []
  rows: dict[str, Row] = {}
  lines = path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, start=1):
    row = _parse(line, f"{path}, line {number}", torn_allowed=number == len(lines))
    if row is not None:
      _check_same(rows.setdefault(row["id"], row), row, path)
  return list(rows.values())


def numbered(row: Row, prefix: str) -> np.ndarray:
  """The values of the fields that begin with `prefix`, in the order of their names: a series that a row holds."""
  return np.array([row[name] for name in sorted(row) if name.startswith(prefix)], np.float64)


def append(path: str | os.PathLike, row: Row) -> bool:
  """Adds `row` to `path` (made if missing) and says whether it was new.

  A row with the same id and the same content is left as it is: the file keeps its bytes. Raises `RowError` if the id
  is there with other content, and for a value that is not finite, not flat or not JSON; the file is then unchanged.
  """
  row = _checked(row)
  rows = {known["id"]: known for known in read(path)}
  if row["id"] in rows:
    _check_same(rows[row["id"]], row, path)
    return False
  artifacts.write_bytes(path, b"".join(_line(r) for r in (*rows.values(), row)))
  return True


def _parse(line: bytes, where: str, torn_allowed: bool) -> Row | None:
  """One line as a row; None if it is blank or torn. A line can only be torn where its newline is missing."""
  if not line.strip():
    return None
  try:
    row = json.loads(line)
  except ValueError as error:  # also what is not UTF-8
    if not torn_allowed:
      raise RowError(f"{where}: not JSON ({error}); delete the line, and the run makes the row again") from None
    logging.getLogger(__name__).warning("%s: dropped a torn line of %d bytes", where, len(line))
    return None
  try:
    return _checked(row)
  except RowError as error:
    raise RowError(f"{where}: {error}") from None


def _checked(row: Row) -> Row:
  """The row with numpy scalars made plain; raises `RowError` for what a row cannot hold."""
  if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
    raise RowError(f"a row is an object with a non-empty string `id`, not {str(row)[:80]}")
  plain = {}
  for name, value in row.items():
    value = value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value
    if isinstance(value, float) and not math.isfinite(value):
      raise RowError(f"row {row['id']!r}: {name} is {value}; a row holds finite numbers, or None where there is none")
    if not isinstance(value, (str, int, float, type(None))):
      raise RowError(f"row {row['id']!r}: {name} is a {type(value).__name__}; a row holds numbers, strings and None")
    plain[name] = value
  return plain


def _line(row: Row) -> bytes:
  return (json.dumps(row, sort_keys=True, allow_nan=False) + "\n").encode()


def _check_same(old: Row, new: Row, path: str | os.PathLike) -> None:
  """Raises `RowError`, naming the fields that differ with both values, unless the rows are written alike."""
  if _line(old) == _line(new):
    return
  names = [n for n in sorted(old | new) if (n in old, n in new, repr(old.get(n))) != (True, True, repr(new.get(n)))]
  differences = "; ".join(f"{n}: {old.get(n, 'nothing')!r} there, {new.get(n, 'nothing')!r} now" for n in names)
  raise RowError(
    f"{path}: row {old['id']!r} is there with other content ({differences}); "
    "it was made by another config or another version: use another workdir, or delete the file"
  )
