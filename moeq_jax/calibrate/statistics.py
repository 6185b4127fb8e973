"""What calibration measures, layer by layer.

The forward pass keeps the input of every block; the backward pass goes through the blocks from the last to the first,
running each block once more to differentiate it. Only one block's weights and gradients are needed at a time.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts, steps
from moeq_jax.calibrate import taps
from moeq_jax.kernels import ragged

TAPPED = {name: f"grad_sq_{name}" for name in artifacts.PROJECTIONS}


def init(functions: Any, block: Any) -> dict[str, jax.Array]:
  """Zero sums for one MoE layer."""
  weights = functions.experts(block)
  experts, hidden, ffn = weights["up"].shape
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  return {
      "tokens": jnp.zeros(experts, jnp.int32),
      "gate_weight": zeros(experts),
      "router_grad_sq": zeros(experts),
      "moment_in": zeros(experts, hidden, hidden),
      "moment_mid": zeros(experts, ffn, ffn),
  } | {TAPPED[name]: zeros(experts, weight.shape[2]) for name, weight in weights.items()}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(functions: Any, block: Any, sums: dict[str, jax.Array], state: Any, d_state: Any, scale: jax.Array):
  """Adds one batch to the sums of one MoE layer.

  Args:
    functions: the model's functions.
    block: the block's parameters.
    sums: what `init` gave; donated.
    state: input of the block.
    d_state: derivative of the summed token loss with respect to the block's output.
    scale: one over the number of predicted tokens of the batch.

  Returns:
    The new sums and the derivative with respect to `state`.
  """
  captured = {}

  def tap(totals, name, rows, group_sizes):
    if name in ("input", "mid"):
      captured[name] = rows
    return taps.square_sum(rows, totals[name], group_sizes) if name in totals else rows

  def forward(router, state, totals):
    out, routing = functions.block(functions.with_router(block, router), state, functools.partial(tap, totals))
    return out, (routing, dict(captured))

  totals = {name: jnp.zeros_like(sums[field]) for name, field in TAPPED.items() if field in sums}
  _, backward, (routing, rows) = jax.vjp(forward, functions.router(block), state, totals, has_aux=True)
  d_router, d_input, grad_sq = backward(d_state)
  batch = _forward_sums(rows, routing) | {TAPPED[name]: total for name, total in grad_sq.items()}
  batch["router_grad_sq"] = jnp.sum(jnp.square(d_router.astype(jnp.float32) * scale), axis=-1)
  return jax.tree.map(jnp.add, sums, batch), d_input


def _forward_sums(rows: dict[str, jax.Array], routing: Any) -> dict[str, jax.Array]:
  """What a batch adds to the sums that need no gradient, from the tapped rows `input` and `mid`."""
  chosen = jax.nn.one_hot(routing.experts, routing.logits.shape[-1])
  moment = lambda x: ragged.outer(x.astype(jnp.float32), x.astype(jnp.float32), routing.group_sizes)
  return {
      "tokens": routing.group_sizes,
      "gate_weight": jnp.einsum("tk,tke->e", routing.weights, chosen),
      "moment_in": moment(rows["input"]),
      "moment_mid": moment(rows["mid"]),
  }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def observe(functions: Any, block: Any, sums: dict[str, jax.Array], state: Any) -> dict[str, jax.Array]:
  """Adds one batch to the sums of one MoE layer, as `update`, but forward only: no sum that needs gradients grows."""
  captured = {}

  def tap(name, rows, group_sizes):
    del group_sizes
    captured[name] = rows
    return rows

  _, routing = functions.block(block, state, tap)
  return sums | {name: sums[name] + value for name, value in _forward_sums(captured, routing).items()}


@functools.partial(jax.jit, static_argnums=0)
def through(functions: Any, block: Any, state: Any, d_state: Any) -> Any:
  """The derivative with respect to the input of a dense block."""
  return jax.vjp(lambda state: functions.block(block, state)[0], state)[1](d_state)[0]


@functools.partial(jax.jit, static_argnums=0)
def head(functions: Any, top: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, int]:
  """The summed token loss, its derivative with respect to the last block's output, and the number of tokens."""

  def loss(state):
    losses = functions.losses(functions.head(top, state), batch)
    return jnp.sum(losses), losses.size

  (total, predicted), d_state = jax.value_and_grad(loss, has_aux=True)(state)
  return total, d_state, predicted


def finish(functions: Any, blocks: Sequence[Any], sums: Sequence[dict[str, jax.Array]], batches: int,
           total_tokens: int) -> artifacts.Stats:
  """Puts the layers' sums together.

  Args:
    functions: the model's functions.
    blocks: those of the MoE layers.
    sums: of the same layers.
    batches: how many were added.
    total_tokens: in all batches.

  Raises:
    ValueError: a sum is not finite; names it, its layer and its expert.
  """
  stacked = {name: np.stack([np.asarray(s[name]) for s in sums]) for name in sums[0]}
  check_finite(stacked)
  routers = np.stack([np.asarray(functions.router(block), np.float64) for block in blocks])
  stacked["tokens"] = stacked["tokens"].astype(np.int64)
  stacked["gate_weight"] = stacked["gate_weight"].astype(np.float64)
  mean_square = stacked.pop("router_grad_sq").astype(np.float64) / batches
  absent = {field: None for field in TAPPED.values() if field not in stacked}
  return artifacts.Stats(
      router_norm=np.linalg.norm(routers, axis=-1),
      router_grad=np.sqrt(mean_square),
      total_tokens=total_tokens,
      batches=batches,
      **stacked,
      **absent,
  )


def check_finite(stacked: Mapping[str, np.ndarray]) -> None:
  """Raises `ValueError` for a sum `[L, E, ...]` that is not finite; names it, its layer and its expert."""
  for name, values in stacked.items():
    for layer, expert, *_ in np.argwhere(~np.isfinite(values))[:1]:
      raise ValueError(f"calibration: {name} of layer {layer}, expert {expert} is not finite; the model overflows"
                       " in this compute dtype, or the checkpoint is damaged")


def collect(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[Any], *,
            advance: Callable[..., None] = lambda **_: None) -> artifacts.Stats:
  """Runs forward and backward over calibration batches.

  Args:
    functions: the model's functions (`models.decoder.Functions`).
    top, blocks: the model's parameters; dense blocks are passed through.
    batches: token arrays `[B, S]` int32 (or what else the functions embed), all of one shape.
    advance: called after each batch.

  Returns:
    The sums over all batches; see `artifacts.Stats` for what each is a derivative of.

  Raises:
    ValueError: no batches, or a sum that is not finite (see `finish`).
  """
  if not batches:
    raise ValueError("calibration needs at least one batch of tokens")
  sums = {place: init(functions, blocks[place]) for place in steps.sparse(functions, blocks)}
  for batch in batches:
    batch = jax.tree.map(jnp.asarray, batch)
    inputs = [steps.embed(functions, top, batch)]
    for block in blocks:
      inputs.append(steps.block(functions, block, inputs[-1])[0])
    loss, d_state, predicted = head(functions, top, inputs.pop(), batch)
    for place in reversed(range(len(blocks))):
      state, block = inputs.pop(), blocks[place]
      if place in sums:
        sums[place], d_state = update(functions, block, sums[place], state, d_state, jnp.float32(1 / int(predicted)))
      else:
        d_state = through(functions, block, state, d_state)
    advance(note=f"loss {float(loss) / int(predicted):.3f}")
  total = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(list(batches)))
  return finish(functions, [blocks[place] for place in sums], list(sums.values()), len(batches), total)
