"""Training state on disk, by orbax: commits are atomic, and an interrupted one is ignored at the next start."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """Checkpoints of a pytree of arrays in one directory, the newest `keep` of them."""

  def __init__(self, directory: Path, *, keep: int = 2):
    self._directory = directory
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
    self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

  def save(self, step: int, state: Any) -> None:
    """Commits `state` as of the end of `step` steps; returns when it is on disk."""
    self._manager.save(step, args=ocp.args.StandardSave(jax.tree.leaves(state)))
    self._manager.wait_until_finished()

  def restore(self, like: Any) -> tuple[int, Any]:
    """The newest committed `(step, state)`, in the structure, shapes and dtypes of `like`; `(0, like)` if none is.

    Raises:
      ValueError: the state is damaged, or has another structure or other shapes than `like`; names its directory.
    """
    step = self._manager.latest_step()
    if step is None:
      return 0, like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, jax.tree.leaves(like))
    try:
      leaves = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, OSError) as error:
      raise ValueError(f"{self._directory / str(step)}: damaged, or of another model or optimizer; delete it to go "
                       f"on from the one before, or choose another work directory ({str(error)[:300]})") from error
    return step, jax.tree.unflatten(jax.tree.structure(like), leaves)

  def close(self) -> None:
    """Releases the directory."""
    self._manager.close()
