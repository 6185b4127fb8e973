"""One training loop: optax steps, orbax checkpoints, a log that continues where a killed run stopped."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moeq_jax import artifacts, checkpoint, progress

LossFn = Callable[[Any, Any], tuple[jax.Array, dict]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """AdamW with linear warm-up and cosine decay.

  Attributes:
    steps: optimizer steps.
    warmup: steps of the warm-up.
    peak, end: learning rates.
    weight_decay: decoupled, on matrices only (one-dimensional parameters are norms).
    clip: largest global gradient norm.
    decay: steps until the rate reaches `end`; None: all of them. With a longer decay, training ends early.
  """

  steps: int
  warmup: int
  peak: float
  end: float
  weight_decay: float = 0.1
  b2: float = 0.98
  clip: float = 1.0
  decay: int | None = None

  def rate(self) -> optax.Schedule:
    """The learning rate as a function of the step."""
    return optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, self.decay or self.steps, self.end)

  def optimizer(self) -> optax.GradientTransformation:
    """The optax transformation."""
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    adam = optax.adamw(self.rate(), b1=0.9, b2=self.b2, weight_decay=self.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(self.clip), adam)


def _train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Callable:
  def step(params, opt_state, batch):
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics | {"grad_norm": optax.tree.norm(grads)}

  return jax.jit(step, donate_argnums=(0, 1))


def _read_log(path: Path, until: int) -> list[dict]:
  """The log's rows up to step `until`; rows of steps that a killed run had not yet committed are dropped."""
  if not path.exists():
    return []
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [row for row in rows if row["step"] <= until]


def fit(params: Any, loss_fn: LossFn, batch: Callable[[int], Any], schedule: Schedule, workdir: Path, *,
        watch: Callable[[Any], dict[str, Any]], log_every: int = 20, save_every: int = 100) -> Any:
  """Trains `params` and returns them; started again with the same arguments, continues after the last checkpoint.

  Args:
    params: initial parameters (a pytree of float arrays); given up, as their memory is used for the next ones.
    loss_fn: `(params, batch) -> (loss, metrics)`; metrics hold `loss` in nats per token.
    batch: step -> tokens `[B, S]` int32, or a dictionary of such arrays; a pure function, so that a resumed run sees
      the same batches.
    schedule: optimizer and length.
    workdir: receives `checkpoints/` and `log.jsonl` (one row each `log_every` steps).
    watch: JSON-able values of the parameters to log (router norms).
    log_every, save_every: steps between rows and between checkpoints; `save_every` is a multiple of `log_every`.

  Raises:
    FloatingPointError: the loss or its gradient is not finite; names the steps.
    ValueError: `save_every` is no multiple of `log_every`: a resumed run would log other means.
  """
  if save_every % log_every:
    raise ValueError(f"save_every {save_every} is not a multiple of log_every {log_every}; choose one that is")
  optimizer = schedule.optimizer()
  with contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints")) as checkpoints:
    start, (params, opt_state) = checkpoints.restore((params, optimizer.init(params)))
    step_fn, rate = _train_step(loss_fn, optimizer), schedule.rate()
    log = _read_log(workdir / "log.jsonl", start)
    window, began, tokens = [], time.monotonic(), 0
    with progress.bar("train", schedule.steps, start) as advance:
      for step in range(start + 1, schedule.steps + 1):
        arrays = batch(step)
        params, opt_state, metrics = step_fn(params, opt_state, jax.tree.map(jnp.asarray, arrays))
        window.append(metrics)
        tokens_now = sum(array.size for array in jax.tree.leaves(arrays))
        tokens += tokens_now
        if step % log_every == 0 or step == schedule.steps:
          row = {"step": step, "tokens": step * tokens_now, "rate": float(rate(step))}
          row |= _mean(window) | watch(params)
          _check(row, step - len(window) + 1)
          log.append(row)
          window = []
          artifacts.write_bytes(workdir / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log).encode())
        if step % save_every == 0 or step == schedule.steps:
          checkpoints.save(step, (params, opt_state))
        loss = log[-1]["loss"] if log else float("nan")
        advance(note=f"loss {loss:.3f}, {tokens / (time.monotonic() - began):.0f} tokens/s")
  return params


def _check(row: dict[str, Any], first: int) -> None:
  """Raises a FloatingPointError if the means over the steps from `first` on are not finite."""
  for name in ("loss", "grad_norm"):
    if not np.isfinite(row[name]):
      raise FloatingPointError(f"{name} is {row[name]} in steps {first} to {row['step']}; a lower learning rate or a "
                               "longer warm-up may help, in another work directory")


def _mean(window: list[dict]) -> dict[str, Any]:
  mean = jax.tree.map(lambda *values: np.mean(np.stack(values), axis=0), *window)
  return {k: float(v) if np.ndim(v) == 0 else np.round(v, 5).tolist() for k, v in sorted(mean.items())}
