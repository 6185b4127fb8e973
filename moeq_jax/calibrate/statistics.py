"""What calibration measures, layer by layer.

The forward pass keeps the input of every block; the backward pass goes through the blocks from the last to the first,
running each block once more to differentiate it. Only one block's weights and gradients are needed at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import artifacts
from moeq_jax.calibrate import taps
from moeq_jax.kernels import ragged

TAPPED = {"gate": "grad_sq_gate", "up": "grad_sq_up", "down": "grad_sq_down"}


def init(functions: Any, block: Any) -> dict[str, jax.Array]:
  """Zero sums for one block."""
  shapes = {name: w.shape for name, w in functions.experts(block).items()}
  experts, hidden, ffn = shapes["gate"]
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  return {
      "tokens": jnp.zeros(experts, jnp.int32),
      "gate_weight": zeros(experts),
      "router_grad_sq": zeros(experts),
      "moment_in": zeros(experts, hidden, hidden),
      "moment_mid": zeros(experts, ffn, ffn),
      "grad_sq_gate": zeros(experts, ffn),
      "grad_sq_up": zeros(experts, ffn),
      "grad_sq_down": zeros(experts, hidden),
  }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(functions: Any, block: Any, sums: dict[str, jax.Array], h: jax.Array, dh: jax.Array, scale: jax.Array):
  """Adds one batch to the sums of one block.

  Args:
    functions: the model's functions.
    block: the block's parameters.
    sums: what `init` gave; donated.
    h: `[B, S, D]` input of the block.
    dh: `[B, S, D]` derivative of the summed token loss with respect to the block's output.
    scale: one over the number of predicted tokens of the batch.

  Returns:
    The new sums and the derivative with respect to `h`.
  """
  captured = {}

  def tap(totals, name, rows, group_sizes):
    if name in ("input", "mid"):
      captured[name] = rows
    return taps.square_sum(rows, totals[name], group_sizes) if name in TAPPED else rows

  def forward(router, h, totals):
    out, routing = functions.block(functions.with_router(block, router), h, functools.partial(tap, totals))
    return out, (routing, dict(captured))

  totals = {name: jnp.zeros_like(sums[field]) for name, field in TAPPED.items()}
  _, backward, (routing, rows) = jax.vjp(forward, functions.router(block), h, totals, has_aux=True)
  d_router, d_h, grad_sq = backward(dh)
  chosen = jax.nn.one_hot(routing.experts, routing.logits.shape[-1])
  moment = lambda x: ragged.outer(x.astype(jnp.float32), x.astype(jnp.float32), routing.group_sizes)
  batch = {
      "tokens": routing.group_sizes,
      "gate_weight": jnp.einsum("tk,tke->e", routing.weights, chosen),
      "router_grad_sq": jnp.sum(jnp.square(d_router.astype(jnp.float32) * scale), axis=-1),
      "moment_in": moment(rows["input"]),
      "moment_mid": moment(rows["mid"]),
  } | {field: grad_sq[name] for name, field in TAPPED.items()}
  return jax.tree.map(jnp.add, sums, batch), d_h


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: Any, top: Any, tokens: jax.Array) -> jax.Array:
  return functions.embed(top, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _block(functions: Any, block: Any, h: jax.Array) -> jax.Array:
  return functions.block(block, h)[0]


@functools.partial(jax.jit, static_argnums=0)
def _head(functions: Any, top: Any, h: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The summed token loss and its derivative with respect to the last block's output."""
  return jax.value_and_grad(lambda h: jnp.sum(functions.losses(functions.head(top, h), tokens)))(h)


def finish(functions: Any, blocks: Sequence[Any], sums: Sequence[dict[str, jax.Array]], batches: int,
           total_tokens: int) -> artifacts.Stats:
  """Puts the layers' sums together.

  Raises:
    ValueError: a sum is not finite; names it, its layer and its expert.
  """
  stacked = {name: np.stack([np.asarray(s[name]) for s in sums]) for name in sums[0]}
  for name, values in stacked.items():
    for layer, expert, *_ in np.argwhere(~np.isfinite(values))[:1]:
      raise ValueError(f"calibration: {name} of layer {layer}, expert {expert} is not finite; the model overflows"
                               " in this compute dtype, or the checkpoint is damaged")
  routers = np.stack([np.asarray(functions.router(block), np.float64) for block in blocks])
  stacked["tokens"] = stacked["tokens"].astype(np.int64)
  stacked["gate_weight"] = stacked["gate_weight"].astype(np.float64)
  mean_square = stacked.pop("router_grad_sq").astype(np.float64) / batches
  return artifacts.Stats(
      router_norm=np.linalg.norm(routers, axis=-1),
      router_grad=np.sqrt(mean_square),
      total_tokens=total_tokens,
      batches=batches,
      **stacked,
  )


def collect(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[np.ndarray], *,
            advance: Callable[..., None] = lambda **_: None) -> artifacts.Stats:
  """Runs forward and backward over calibration batches.

  Args:
    functions: the model's functions (`models.decoder.Functions`).
    top, blocks: the model's parameters.
    batches: token arrays `[B, S]` int32, all of one shape.
    advance: called after each batch.

  Returns:
    The sums over all batches; see `artifacts.Stats` for what each is a derivative of.

  Raises:
    ValueError: no batches, or a sum that is not finite (see `finish`).
  """
  if not batches:
    raise ValueError("calibration needs at least one batch of tokens")
  sums = [init(functions, block) for block in blocks]
  for tokens in batches:
    inputs = [_embed(functions, top, jnp.asarray(tokens))]
    for block in blocks:
      inputs.append(_block(functions, block, inputs[-1]))
    loss, dh = _head(functions, top, inputs.pop(), jnp.asarray(tokens))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    for layer in reversed(range(len(blocks))):
      sums[layer], dh = update(functions, blocks[layer], sums[layer], inputs.pop(), dh, jnp.float32(1 / predicted))
    advance(note=f"loss {float(loss) / predicted:.3f}")
  return finish(functions, blocks, sums, len(batches), sum(int(t.size) for t in batches))
