"""rows.jsonl: round trips, torn lines, duplicates, values that are refused, and kills inside a write."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_jax import results, runs

VALUES = st.one_of(
  st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)

# Appends the rows 0..19; kills itself with SIGKILL at the call number COUNT of the function WHERE of `os`.
CHILD = """
import os, signal, sys
from moeq_jax import results
path, where, count, after = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "after"
original, calls = getattr(os, where), 0
def deadly(*args):
  global calls
  calls += 1
  if calls == count and not after:
    os.kill(os.getpid(), signal.SIGKILL)
  value = original(*args)
  if calls == count:
    os.kill(os.getpid(), signal.SIGKILL)
  return value
setattr(os, where, deadly)
for i in range(20):
  results.append(path, {"id": f"row-{i}", "loss": i / 7, "budget": None})
"""


def _row(i: int, **more) -> dict:
  return {"id": f"row-{i}", "method": "knapsack(a)", "loss": 3.0 + i / 7, "budget": 2.0, "draw": None} | more


def _file(folder: Path, count: int = 4) -> Path:
  path = folder / "rows.jsonl"
  for i in range(count):
    assert results.append(path, _row(i))
  return path


def test_one_line_per_row_with_sorted_keys(tmp_path):
  lines = _file(tmp_path).read_text().splitlines()
  assert [json.loads(line)["id"] for line in lines] == ["row-0", "row-1", "row-2", "row-3"]
  assert all(list(json.loads(line)) == sorted(json.loads(line)) for line in lines)


def test_missing_file_has_no_rows(tmp_path):
  assert results.read(tmp_path / "rows.jsonl") == []


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=5), max_size=6))
def test_what_is_read_is_what_was_appended(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
  rows = [row | {"id": f"{i}"} for i, row in enumerate(rows)]
  for row in rows:
    results.append(path, row)
  assert results.read(path) == rows


def test_a_line_torn_anywhere_is_dropped_and_made_again(tmp_path):
  path = _file(tmp_path)
  whole = path.read_bytes()
  start = whole[:-1].rindex(b"\n") + 1
  for cut in range(start, len(whole)):
    path.write_bytes(whole[:cut])
    kept = 4 if cut == len(whole) - 1 else 3  # only the newline is missing: the row is whole
    assert results.read(path) == [_row(i) for i in range(kept)], cut
    results.append(path, _row(3))
    results.append(path, _row(4))
    assert path.read_bytes() == whole + (json.dumps(_row(4), sort_keys=True) + "\n").encode(), cut


def test_zero_bytes_of_a_lost_write_are_dropped(tmp_path):
  path = _file(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole + b"\0" * 300)
  assert len(results.read(path)) == 4
  results.append(path, _row(4))
  assert path.read_bytes().startswith(whole)
  assert b"\0" not in path.read_bytes()


def test_a_broken_line_inside_the_file_is_an_error_that_names_it(tmp_path):
  path = _file(tmp_path)
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + lines[1][:20] + b"\n" + b"".join(lines[2:]))
  with pytest.raises(results.RowError, match=r"rows\.jsonl, line 2: not JSON"):
    results.read(path)


def test_the_same_row_again_changes_nothing(tmp_path):
  path = _file(tmp_path)
  before, stat = path.read_bytes(), path.stat()
  assert not results.append(path, dict(reversed(_row(2).items())))
  assert not results.append(path, _row(2, loss=np.float64(_row(2)["loss"])))
  assert path.read_bytes() == before
  assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)


def test_equal_lines_are_one_row_and_other_content_is_an_error(tmp_path):
  path = _file(tmp_path)
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines + lines[:2]))
  assert results.read(path) == [_row(i) for i in range(4)]
  path.write_bytes(b"".join(lines) + lines[1].replace(b"2.0", b"2.5"))
  with pytest.raises(results.RowError, match=r"'row-1' is there with other content \(budget: 2\.0 there, 2\.5 now\)"):
    results.read(path)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"loss": 9.5}, r"loss: 3\.14\d+ there, 9\.5 now"),
    ({"kl": 0.25}, r"kl: 'nothing' there, 0\.25 now"),
    ({"budget": 2}, r"budget: 2\.0 there, 2 now"),
  ],
)
def test_the_same_id_with_other_content_names_both_and_keeps_the_file(tmp_path, change, words):
  path = _file(tmp_path)
  before = path.read_bytes()
  with pytest.raises(results.RowError, match=words) as error:
    results.append(path, _row(1, **change))
  assert "row-1" in str(error.value)
  assert path.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_is_not_finite_is_refused(tmp_path, value):
  path = tmp_path / "rows.jsonl"
  with pytest.raises(results.RowError, match=r"'row-0': loss is -?(nan|inf); a row holds finite numbers"):
    results.append(path, _row(0, loss=value))
  assert not path.exists()


def test_nan_in_the_file_is_refused(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": "a", "loss": NaN}\n')
  with pytest.raises(results.RowError, match="line 1: row 'a': loss is nan"):
    results.read(path)


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"id": ""}, {"id": 3}, {"id": "a", "b": [1]}, {"id": "a", "b": {}}, []])
def test_rows_without_id_or_not_flat_are_refused(tmp_path, row):
  with pytest.raises(results.RowError):
    results.append(tmp_path / "rows.jsonl", row)
  assert list(tmp_path.iterdir()) == []


def test_numpy_scalars_become_plain(tmp_path):
  path = tmp_path / "rows.jsonl"
  results.append(path, {"id": "a", "loss": np.float32(0.5), "draw": np.int64(3)})
  assert path.read_text() == '{"draw": 3, "id": "a", "loss": 0.5}\n'


@pytest.mark.parametrize("where", [("fsync", 7, "before"), ("replace", 12, "before"), ("replace", 12, "after")])
def test_a_run_killed_inside_a_write_ends_with_the_same_bytes(tmp_path, where):
  def run(folder: str, name: str, count: int, when: str) -> int:
    (tmp_path / folder).mkdir(exist_ok=True)
    argv = [sys.executable, "-c", CHILD, str(tmp_path / folder / "rows.jsonl"), name, str(count), when]
    return subprocess.run(argv, cwd=Path(results.__file__).parents[1], env=os.environ, check=False).returncode

  assert run("quiet", "replace", 0, "before") == 0
  assert run("killed", *where) == -signal.SIGKILL
  there = results.read(tmp_path / "killed" / "rows.jsonl")
  assert [row["id"] for row in there] == [f"row-{i}" for i in range(where[1] - (where[2] == "before"))]
  assert run("killed", "replace", 0, "before") == 0
  assert (tmp_path / "killed" / "rows.jsonl").read_bytes() == (tmp_path / "quiet" / "rows.jsonl").read_bytes()


@pytest.mark.parametrize("path", sorted((runs.ROOT / "experiments" / "results").glob("*.jsonl")), ids=lambda p: p.name)
def test_every_committed_row_says_of_which_config_it_is(path: Path):
  rows = results.read(path)
  assert rows and all(len(row["config_hash"]) == 64 for row in rows)
  assert len({row["id"] for row in rows}) == len(rows)
