"""A toy training problem for the tests of the loop: token t is followed by t + 1. Run as a script it trains, and dies.

`python toy.py WORKDIR MOMENT COUNT` kills itself (SIGKILL) when MOMENT comes for the COUNT-th time:

  write    a file of the workdir is complete beside its place, not yet renamed to it
  inner    orbax has written all arrays, not yet renamed the folder that holds them
  commit   orbax has written a checkpoint's temporary folder, not yet renamed it
  delete   a newer checkpoint is committed, an old one about to be deleted
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moeq_jax.train import loop

VOCABULARY, HIDDEN = 7, 5
STEPS, LOG_EVERY, SAVE_EVERY = 20, 2, 4


def params() -> dict[str, jax.Array]:
  """New parameters, as `fit` gives up the ones it is handed."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)
  return {"in": normal(VOCABULARY, HIDDEN), "norm": jnp.ones(HIDDEN), "out": normal(HIDDEN, VOCABULARY)}


def loss_fn(params: dict[str, jax.Array], tokens: jax.Array) -> tuple[jax.Array, dict]:
  """Cross-entropy of the next token."""
  logits = (params["in"][tokens[:, :-1]] * params["norm"][None, None]) @ params["out"]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
  return loss, {"loss": loss, "load": jnp.mean(logits, (0, 1))}


def batch(step: int) -> np.ndarray:
  """Eight sequences of counting."""
  start = np.random.default_rng([0, step]).integers(0, VOCABULARY, (8, 1))
  return ((start + np.arange(6)) % VOCABULARY).astype(np.int32)


def fit(workdir: Path, batch: Callable[[int], np.ndarray] = batch, **changes: Any) -> dict[str, jax.Array]:
  """Trains in `workdir`; `changes` go to `loop.fit`."""
  schedule = loop.Schedule(steps=STEPS, warmup=3, peak=0.1, end=0.01)
  arguments = dict(schedule=schedule, watch=lambda p: {"norm": float(jnp.linalg.norm(p["out"]))}, log_every=LOG_EVERY,
                   save_every=SAVE_EVERY)
  return loop.fit(params(), loss_fn, batch, workdir=workdir, **arguments | changes)


def die_at(workdir: Path, moment: str, count: int) -> None:
  """From now on, the `count`-th `moment` of this process is its last."""
  left = count

  def watched(name: str, is_moment: Callable[[Path, Path | None], bool]) -> None:
    original = getattr(os, name)

    def call(source: Any, target: Any = None, *args: Any, **named: Any) -> Any:
      nonlocal left
      if is_moment(Path(source), target and Path(target)):
        left -= 1
        if not left:
          os.kill(os.getpid(), signal.SIGKILL)
      return original(*[a for a in (source, target) if a is not None], *args, **named)

    setattr(os, name, call)

  checkpoints = workdir / "checkpoints"
  name, is_moment = {
      "write": ("replace", lambda source, target: target and target.parent == workdir),
      "inner": ("rename", lambda source, target: source.parent.parent == checkpoints),
      "commit": ("rename", lambda source, target: target and target.parent == checkpoints),
      "delete": ("rmdir", lambda source, target: source.name.isdigit() or source.parent.name.isdigit()),
  }[moment]
  watched(name, is_moment)


if __name__ == "__main__":
  place = Path(sys.argv[1])
  die_at(place, sys.argv[2], int(sys.argv[3]))
  fit(place)
