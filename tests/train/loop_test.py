"""The training loop: what it learns, what it decays, and that no kill, wherever it falls, changes the outcome."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.train import loop
from tests.train import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, bytes]:
  """Parameters and log of a run that nothing befell."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  params = toy.fit(workdir)
  return jax.tree.map(np.asarray, params), (workdir / "log.jsonl").read_bytes()


def same(workdir: Path, params: dict, undisturbed: tuple[dict, bytes]) -> None:
  for name, value in undisturbed[0].items():
    assert np.asarray(params[name]).tobytes() == value.tobytes(), name
  assert (workdir / "log.jsonl").read_bytes() == undisturbed[1]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_a_problem_that_can_be_learned(undisturbed: tuple[dict, bytes]):
  rows = [json.loads(line) for line in undisturbed[1].splitlines()]
  assert rows[0]["loss"] > 1.5  # log(7) = 1.95 for a guess
  assert rows[-1]["loss"] < 0.5


def test_the_log(undisturbed: tuple[dict, bytes]):
  params, log = undisturbed
  rows = [json.loads(line) for line in log.splitlines()]
  assert [row["step"] for row in rows] == list(range(toy.LOG_EVERY, toy.STEPS + 1, toy.LOG_EVERY))
  assert [row["tokens"] for row in rows] == [row["step"] * 8 * 6 for row in rows]
  assert all(len(row["load"]) == toy.VOCABULARY for row in rows)
  assert rows[-1]["norm"] == float(jnp.linalg.norm(params["out"]))
  rates = [row["rate"] for row in rows]
  assert max(rates) == rates[1] < 0.1 and rates[-1] == pytest.approx(0.01)


def test_rows_are_means_over_their_steps(tmp_path: Path, undisturbed: tuple[dict, bytes]):
  toy.fit(tmp_path, log_every=1)
  single = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  rows = [json.loads(line)["loss"] for line in undisturbed[1].splitlines()]
  np.testing.assert_allclose(rows, np.reshape(single, (-1, toy.LOG_EVERY)).mean(1), rtol=1e-6)


def test_weight_decay_shrinks_matrices_alone():
  """With a gradient of zero, Adam stands still, and what moves is the decay."""
  schedule = loop.Schedule(steps=10, warmup=1, peak=0.5, end=0.5, weight_decay=0.2)
  optimizer = schedule.optimizer()
  params = {"stack": jnp.ones((2, 3, 4)), "matrix": jnp.ones((3, 4)), "norm": jnp.ones(4)}
  state, zero = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
  moved = []
  for _ in range(2):  # the first step of the warm-up has rate zero
    updates, state = optimizer.update(zero, state, params)
    moved.append(updates)
  np.testing.assert_allclose(moved[1]["stack"], -0.5 * 0.2, rtol=1e-6)
  np.testing.assert_allclose(moved[1]["matrix"], -0.5 * 0.2, rtol=1e-6)
  np.testing.assert_array_equal(moved[1]["norm"], 0)


def test_large_gradients_are_clipped_to_a_global_norm():
  """Adam forgets a common scale, so the second moment tells: it is that of a gradient of norm `clip`."""
  optimizer = loop.Schedule(steps=10, warmup=1, peak=0.5, end=0.5, clip=0.25).optimizer()
  params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}
  _, state = optimizer.update(jax.tree.map(lambda p: 1e6 * p, params), optimizer.init(params), params)
  second = next(leaf.nu for leaf in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(leaf, "nu"))
  np.testing.assert_allclose(sum(v.sum() for v in jax.tree.leaves(second)), (1 - 0.98) * 0.25**2, rtol=1e-4)


def test_the_rate_rises_and_falls():
  rate = loop.Schedule(steps=100, warmup=10, peak=3e-3, end=1e-4).rate()
  values = np.array([float(rate(step)) for step in range(101)])
  assert values[0] == 0 and values.argmax() == 10
  np.testing.assert_allclose(values[[5, 10, 55, 100]], [1.5e-3, 3e-3, 1.55e-3, 1e-4], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 4, 11])
def test_a_run_that_failed_at_a_step_ends_as_if_it_had_not(tmp_path: Path, undisturbed: tuple[dict, bytes], last: int):
  def failing(step: int) -> np.ndarray:
    if step > last:
      raise OSError("the disk is gone")
    return toy.batch(step)

  with pytest.raises(OSError, match="disk is gone"):
    toy.fit(tmp_path, failing)
  asked = []
  params = toy.fit(tmp_path, lambda step: asked.append(step) or toy.batch(step))
  assert asked == list(range(last // toy.SAVE_EVERY * toy.SAVE_EVERY + 1, toy.STEPS + 1))
  same(tmp_path, params, undisturbed)


def test_a_finished_run_is_not_run_again(tmp_path: Path, undisturbed: tuple[dict, bytes]):
  toy.fit(tmp_path)
  same(tmp_path, toy.fit(tmp_path, lambda step: pytest.fail("a batch was asked for")), undisturbed)


def test_a_run_killed_in_the_middle_of_writes_and_commits_ends_as_if_it_had_not(
    tmp_path: Path, undisturbed: tuple[dict, bytes]):
  """One run after the other goes on from what the one before it left when it died."""
  checkpoints = tmp_path / "checkpoints"
  script = functools.partial(subprocess.run, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)

  def names() -> set[str]:
    return {path.name for path in checkpoints.iterdir()}

  for moment, count, left in [
      ("commit", 1, lambda: names() == {"4.orbax-checkpoint-tmp"}),
      ("inner", 2, lambda: names() == {"4", "8.orbax-checkpoint-tmp"}),
      ("write", 3, lambda: names() == {"4", "8"} and any(tmp_path.glob(".log.jsonl.*.partial"))),
      ("delete", 1, lambda: {"8", "12"} <= names()),
      ("commit", 1, lambda: {"8", "12", "16.orbax-checkpoint-tmp"} <= names()),
  ]:
    died = script([sys.executable, "-m", "tests.train.toy", str(tmp_path), moment, str(count)])
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert left(), (moment, names())
  same(tmp_path, toy.fit(tmp_path), undisturbed)
  assert {"16", "20"} <= names()
  assert not any(name.endswith("-tmp") for name in names())


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def spoiled(when: Callable[[jax.Array], jax.Array], forward: bool):
  """The toy's loss whose value (or only whose gradient) is NaN where the first token of the batch says so."""

  def loss_fn(params, tokens):
    loss, metrics = toy.loss_fn(params, tokens)
    bad = when(tokens)
    if forward:
      loss = jnp.where(bad, jnp.nan, loss)
      return loss, metrics | {"loss": loss}
    poison = jnp.where(bad, 0.0, 1.0)
    return loss + 0 * jnp.sqrt(poison * jnp.sum(params["out"] ** 2)), metrics

  return loss_fn


@pytest.mark.parametrize(("forward", "said"), [(True, "loss is nan in steps 9 to 10"),
                                               (False, "grad_norm is nan in steps 9 to 10|loss is nan in steps 9 to")])
def test_a_loss_or_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, forward: bool, said: str):
  marked = lambda step: np.zeros_like(toy.batch(step)) if step == 10 else toy.batch(step)
  loss_fn = spoiled(lambda tokens: jnp.all(tokens == 0), forward)
  with pytest.raises(FloatingPointError, match=f"({said}).*lower learning rate"):
    loop.fit(toy.params(), loss_fn, marked, loop.Schedule(steps=20, warmup=3, peak=0.1, end=0.01), tmp_path,
             watch=lambda params: {}, log_every=2, save_every=2)
  rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 8
  assert "10" not in {path.name for path in (tmp_path / "checkpoints").iterdir()}  # nothing that is not finite is kept


def test_checkpoints_between_rows_are_refused(tmp_path: Path):
  with pytest.raises(ValueError, match="save_every 5 is not a multiple of log_every 2"):
    toy.fit(tmp_path, save_every=5)
