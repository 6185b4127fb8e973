"""States on disk are computed once, from the nearest ones there are, and survive whatever is missing."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moeq_jax.quantize import states as states_lib


def chain(folder: Path, key: str = "k", keep: bool = True) -> tuple[states_lib.States, list[int]]:
  """States that count up, and the places from which they were advanced (-1: made anew)."""
  calls: list[int] = []

  def first() -> list[np.ndarray]:
    calls.append(-1)
    return [np.full(2, float(batch)) for batch in range(3)]

  def advance(place: int, states) -> list[np.ndarray]:
    calls.append(place)
    return [10 * state + place + 1 for state in states]

  return states_lib.States(folder, key, first, advance, keep=keep), calls


def test_states_are_what_the_steps_give(tmp_path: Path):
  states, calls = chain(tmp_path)
  found = states.at(3)
  assert [state.tolist() for state in found] == [[123.0] * 2, [1123.0] * 2, [2123.0] * 2]
  assert calls == [-1, 0, 1, 2] and len(list(tmp_path.iterdir())) == 4
  assert states.at(1)[2].tolist() == [21.0, 21.0] and len(states.at(1)) == 3
  assert calls == [-1, 0, 1, 2]


def test_only_the_last_place_stays_without_keep(tmp_path: Path):
  states, calls = chain(tmp_path, keep=False)
  states.at(2)
  assert [path.name for path in tmp_path.iterdir()] == ["state-00002.npz"]
  states.put(3, states.at(2))
  assert [path.name for path in tmp_path.iterdir()] == ["state-00003.npz"]
  assert states.at(1)[0].tolist() == [1.0, 1.0] and calls == [-1, 0, 1, -1, 0]


@pytest.mark.parametrize("missing", [{3}, {2, 3}, {0, 1}, {0, 1, 2, 3}, {1, 3}])
def test_what_is_missing_is_made_from_the_nearest_before_it(tmp_path: Path, missing: set[int]):
  before, _ = chain(tmp_path)
  expected = [state.tolist() for state in before.at(3)]
  bytes_before = {place: before._path(place).read_bytes() for place in range(4)}
  for place in missing:
    before._path(place).unlink()
  states, calls = chain(tmp_path)
  assert [state.tolist() for state in states.at(3)] == expected
  nearest = max(set(range(4)) - missing, default=-1)
  assert calls == ([-1] if nearest < 0 else []) + list(range(max(nearest, 0), 3))
  assert all(states._path(place).read_bytes() == bytes_before[place] for place in range(max(nearest, 0), 4))


def test_states_of_something_else_and_torn_files_do_not_count(tmp_path: Path):
  chain(tmp_path, key="other")[0].at(2)
  states, calls = chain(tmp_path)
  assert not states.has(2)
  states.at(2)
  states._path(2).write_bytes(states._path(2).read_bytes()[:100])
  assert not states.has(2) and states.at(2)[0].tolist() == [12.0, 12.0]
  assert calls == [-1, 0, 1, 1]


def test_a_damaged_state_is_named(tmp_path: Path):
  states, _ = chain(tmp_path)
  found = states.at(1)
  content = bytearray(states._path(1).read_bytes())
  place = content.index(np.full(2, 11.0).tobytes())
  content[place] ^= 1
  states._path(1).write_bytes(content)
  assert found[0].tolist() == [1.0, 1.0]
  with pytest.raises(ValueError, match=r"state-00001.npz: is damaged .*delete it"):
    found[1]


def test_dictionaries_and_bfloat16_come_back_as_they_were(tmp_path: Path):
  rng = np.random.default_rng(0)
  kept = [{"encoder": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16), "mask": np.ones((2, 1), np.float32)}
          for _ in range(2)]
  states = states_lib.States(tmp_path, "k", lambda: kept, lambda place, s: s, keep=True)
  for found, expected in zip(states.at(0), kept, strict=True):
    assert list(found) == list(expected)
    for name, array in expected.items():
      assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
  assert states.at(1)[1]["encoder"].tobytes() == kept[1]["encoder"].tobytes()
