"""Training state on disk: exact, the newest kept, an interrupted commit ignored, what does not fit refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moeq_jax import checkpoint


def state(scale: float = 1.0):
  params = {"w": scale * jnp.arange(6.0).reshape(2, 3), "low": jnp.asarray([0.1, scale], jnp.bfloat16)}
  return params, optax.adam(1e-3).init(params), jnp.int32(7)


def equal(ours, theirs) -> None:
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def names(directory: Path) -> set[str]:
  return {path.name for path in directory.iterdir()}


def test_without_a_checkpoint_the_state_is_the_one_given(tmp_path: Path):
  like = state()
  step, found = checkpoint.Checkpoints(tmp_path / "new").restore(like)
  assert step == 0
  assert found is like


def test_the_newest_comes_back_exactly_in_the_structure_asked_for(tmp_path: Path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (3, 10, 20):
    checkpoints.save(step, state(float(step)))
  checkpoints.close()
  assert names(tmp_path) == {"10", "20"}
  step, found = checkpoint.Checkpoints(tmp_path).restore(state(0.0))
  assert step == 20
  equal(found, state(20.0))


def test_what_is_saved_is_on_disk_when_save_returns(tmp_path: Path):
  checkpoint.Checkpoints(tmp_path / "a").save(5, state(5.0))
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  step, found = checkpoint.Checkpoints(tmp_path / "b").restore(state(0.0))
  assert step == 5
  equal(found, state(5.0))


def test_an_interrupted_commit_is_ignored_and_can_be_made_again(tmp_path: Path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, state(1.0))
  checkpoints.save(2, state(2.0))
  checkpoints.close()
  (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
  checkpoints = checkpoint.Checkpoints(tmp_path)
  step, found = checkpoints.restore(state(0.0))
  assert step == 1
  equal(found, state(1.0))
  checkpoints.save(2, state(4.0))
  step, found = checkpoint.Checkpoints(tmp_path).restore(state(0.0))
  assert step == 2
  equal(found, state(4.0))


@pytest.mark.parametrize("like", [
    {"w": jnp.zeros((2, 4))},
    {"w": jnp.zeros((2, 3)), "more": jnp.zeros(2)},
], ids=["another shape", "another structure"])
def test_the_state_of_another_model_is_refused_with_a_remedy(tmp_path: Path, like: dict):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(6, {"w": jnp.ones((2, 3))})
  with pytest.raises(ValueError, match=f"{tmp_path / '6'}: .*of another model.*choose another work directory"):
    checkpoints.restore(like)


@pytest.mark.parametrize("pattern", ["default/**/d/*", "default/_METADATA"])
def test_a_damaged_checkpoint_is_named_with_a_remedy(tmp_path: Path, pattern: str):
  checkpoints, like = checkpoint.Checkpoints(tmp_path), {"w": jnp.zeros(300)}
  for step in (5, 6):
    checkpoints.save(step, {"w": jnp.arange(300.0)})
  checkpoints.close()
  for file in (tmp_path / "6").glob(pattern):
    file.write_bytes(file.read_bytes()[:3])
  with pytest.raises(ValueError, match=f"{tmp_path / '6'}: damaged.*delete it to go on"):
    checkpoint.Checkpoints(tmp_path).restore(like)
  shutil.rmtree(tmp_path / "6")
  assert checkpoint.Checkpoints(tmp_path).restore(like)[0] == 5
