"""What flows through the model between its blocks, kept on disk, so that a run holds one layer at a time.

State l is what block l reads (from the last block's output backwards: its derivative). Every state is one file,
written atomically and stamped with a key; a state that is not there is computed from the nearest one before it, so a
run that was killed goes on where it was, whatever is missing.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moeq_jax import artifacts

State = Any  # an array, or a dictionary of arrays


class States:
  """The states of all batches at every place 0, 1, 2, ... of a sweep through the blocks.

  Args:
    folder: holds the files; made when the first is written.
    key: what the states are made from.
    first: gives the states at place 0.
    advance: `(place, states) -> states` at the next place.
    keep: whether all places stay on disk; else only the last one written.
  """

  def __init__(self, folder: Path, key: str, first: Callable[[], Sequence[State]],
               advance: Callable[[int, Sequence[State]], Sequence[State]], *, keep: bool):
    self.folder, self.key, self.first, self.advance, self.keep = folder, key, first, advance, keep

  def at(self, place: int) -> Sequence[State]:
    """The states at `place`, each read when it is asked for."""
    begin = next((p for p in range(place, -1, -1) if self.has(p)), None)
    states = self.put(0, self.first()) if begin is None else Stored(self._path(begin))
    for p in range(begin or 0, place):
      states = self.put(p + 1, self.advance(p, states))
    return states

  def put(self, place: int, states: Sequence[State]) -> Sequence[State]:
    """Keeps the states at `place`, and without `keep` no earlier ones; returns them as `at` does."""
    _save(self._path(place), states, self.key)
    if not self.keep:
      for path in self.folder.glob("state-*.npz"):
        if path != self._path(place):
          path.unlink()
    return Stored(self._path(place))

  def has(self, place: int) -> bool:
    """Whether the states at `place` are on disk, made from what this run reads."""
    return _key_of(self._path(place)) == self.key

  def remove(self) -> None:
    """Deletes what is on disk."""
    shutil.rmtree(self.folder, ignore_errors=True)

  def _path(self, place: int) -> Path:
    return self.folder / f"state-{place:05d}.npz"


def leaves(state: State) -> dict[str, Any]:
  """The arrays of a state by name."""
  return dict(state) if isinstance(state, Mapping) else {"": state}


def _save(path: Path, states: Sequence[State], key: str) -> None:
  arrays, dtypes = {}, {}
  for index, state in enumerate(states):
    for name, leaf in leaves(state).items():
      array, entry = np.asarray(leaf), f"{index:05d}/{name}"
      dtypes[entry] = array.dtype.name
      arrays[entry] = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
  artifacts.save_arrays(path, arrays, {"key": key, "dtypes": dtypes})


class Stored(Sequence):
  """The states in one file, each read when it is asked for and not kept."""

  def __init__(self, path: Path):
    self._path = path
    self._dtypes = _meta(path)["dtypes"]
    self._indices = sorted({entry.partition("/")[0] for entry in self._dtypes})

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> State:
    """The state of one batch, numpy.

    Raises:
      ValueError: the file is damaged; names it.
    """
    prefix = self._indices[index] + "/"
    try:
      with self._path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        found = {entry.removeprefix(prefix): archive[entry] for entry in self._dtypes if entry.startswith(prefix)}
    except Exception as error:  # zipfile, zlib and numpy each have their own
      raise ValueError(f"{self._path}: is damaged ({error}); delete it and give the command again") from None
    state = {name: array.view(ml_dtypes.bfloat16) if self._dtypes[prefix + name] == "bfloat16" else array
             for name, array in found.items()}
    return state[""] if list(state) == [""] else state


def _meta(path: Path) -> dict[str, Any]:
  with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
    return json.loads(archive["__meta__"].tobytes())


def _key_of(path: Path) -> str | None:
  """The key that a file of states is stamped with; none if it cannot be read."""
  try:
    return _meta(path)["key"]
  except Exception:  # a damaged file is as good as none
    return None
