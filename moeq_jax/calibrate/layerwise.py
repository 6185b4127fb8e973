"""Forward and backward through one block, with the weights of one expert in memory at a time.

A sparse block is `after(before(state), sum_k weights[t, k] * expert(e_tk)(rows[t]))` (`models.decoder.Functions`). All
batches go through `before` first; then each expert is loaded once and sees its rows of all of them; then all go through
`after`. Per calibration token, that holds what `before` gave and a float32 sum: some 10 to 30 bytes times D.

Backward, with y the sum and d_x the derivative of the loss with respect to x: `after` gives d_pending and d_y, expert e

  d_weights[t, k] = <d_y[t], expert(e)(rows[t])>,  d_out[t] = weights[t, k] d_y[t],  d_rows[t] += d_out[t] d out / d row

and `before`, run once more, turns d_pending, d_rows and d_weights into the derivatives of router and state.

Tokens of weight 0 (dropped where an expert was full) reach no expert and count nowhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import steps
from moeq_jax.calibrate import statistics, taps
from moeq_jax.kernels.chunks import chunks, fill

Weights = Mapping[str, np.ndarray]  # {projection: [K, N]}
Experts = Callable[[int], Weights]
Visit = Callable[[int, Weights, np.ndarray, np.ndarray], Any]


class NotFiniteError(ValueError):
  """A value is NaN or infinite; the message says which, and of which expert."""


@dataclasses.dataclass(frozen=True)
class LayerStats:
  """What the forward pass saw of one MoE layer.

  Attributes:
    tokens: `[E]` int64, rows of each expert.
    gate_weight: `[E]` float64, sum of their routing weights.
  """

  tokens: np.ndarray
  gate_weight: np.ndarray


@dataclasses.dataclass(frozen=True)
class LayerGradients:
  """What the backward pass saw of one MoE layer; see `artifacts.Stats` for what each is a derivative of.

  Attributes:
    router_grad_sq: `[E]` float64, sum over batches of the squared norm of d loss / d router row (nats per token).
    grad_sq: `{projection: [E, N]}` float32, sum over rows of the squared derivative of the summed token loss with
      respect to the projection's output.
  """

  router_grad_sq: np.ndarray
  grad_sq: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Batch:
  """A batch between `before` and the experts.

  Attributes:
    pending: what `after` takes.
    rows: `[T, D]`, inputs of the experts.
    experts: `[T, k]`, who sees them.
    weights: `[T, k]` float32.
  """

  pending: Any
  rows: np.ndarray
  experts: np.ndarray
  weights: np.ndarray


class _Seats(list):
  """The rows of one expert: per batch, their places `(token, slot)`."""

  @classmethod
  def of(cls, batches: Sequence[_Batch], expert: int) -> "_Seats":
    return cls(np.nonzero((batch.experts == expert) & (batch.weights > 0)) for batch in batches)

  def tokens(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of `values` (per batch `[T, ...]`), those of the first batch first."""
    return np.concatenate([value[token] for value, (token, _) in zip(values, self, strict=True)])

  def slots(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """The entries of `values` (per batch `[T, k]`)."""
    return np.concatenate([value[place] for value, place in zip(values, self, strict=True)])

  def split(self, rows: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Cuts rows as `tokens` gives them into those of each batch: their places, and they."""
    parts = np.split(rows, np.cumsum([len(token) for token, _ in self])[:-1])
    return zip(self, parts, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def forward_layer(functions: Any, block: Any, experts: Experts, states: Sequence[Any],
                  visit: Visit | None = None) -> tuple[list[Any], LayerStats | None]:
  """Sends the states of all batches through one block.

  Args:
    functions: the model's functions.
    block: the block's parameters; of its experts' weights only the shapes are read (`jax.ShapeDtypeStruct`).
    experts: loads one expert, in the dtype that it is stored in.
    states: inputs of the block, one per batch; may load them as they are asked for.
    visit: called as `visit(expert, weights, rows [R, D], mids [R, F])`, for experts without rows too, with what each
      saw in all batches together, in the compute dtype, while its weights are loaded.

  Returns:
    The states after the block, and what was seen (None for a dense block).

  Raises:
    NotFiniteError: a routing weight or an expert's output is not finite; names the expert.
  """
  if not functions.sparse(block):
    return [_on_host(steps.block(functions, block, state)[0]) for state in states], None
  block = _without_experts(functions, block)
  batches = [_halfway(functions, block, state) for state in states]
  y, stats = _through_experts(functions, experts, batches, len(functions.router(block)), visit)
  after = []
  for total in y:
    batch = batches.pop(0)
    after.append(_on_host(_after(functions, block, batch.pending, total.astype(batch.rows.dtype))))
  return after, stats


def _through_experts(functions: Any, experts: Experts, batches: Sequence[_Batch], count: int,
                     visit: Visit | None = None) -> tuple[list[np.ndarray], LayerStats]:
  """The weighted sum of the experts' outputs, per batch `[T, D]` float32, and what they saw."""
  y = [np.zeros(batch.rows.shape, np.float32) for batch in batches]
  stats = LayerStats(np.zeros(count, np.int64), np.zeros(count))

  def see(expert: int) -> None:
    seats = _Seats.of(batches, expert)
    weights = seats.slots([batch.weights for batch in batches])
    stats.tokens[expert], stats.gate_weight[expert] = len(weights), weights.sum(dtype=np.float64)
    if not len(weights) and visit is None:
      return
    loaded, rows = experts(expert), seats.tokens([batch.rows for batch in batches])
    out, mids = _run(functions, loaded, rows)
    check_finite(out, "output", expert)
    for total, ((token, _), part) in zip(y, seats.split(out * weights[:, None])):
      total[token] += part
    del out
    if visit is not None:
      visit(expert, loaded, rows, mids)

  for expert in range(count):  # a function, so that nothing of one expert outlives it
    see(expert)
  return y, stats


def _run(functions: Any, loaded: Weights, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """One expert's outputs, `[R, D]` float32, and the inputs of its down projection, `[R, F]` in the dtype of `rows`."""
  ffn, hidden = loaded["down"].shape
  out, mids = np.empty((len(rows), hidden), np.float32), np.empty((len(rows), ffn), rows.dtype)
  weights = _cast(loaded, rows.dtype) if len(rows) else {}
  for place, size in chunks(len(rows)):
    held = place.stop - place.start
    out[place], mids[place] = (np.asarray(part)[:held] for part in _expert(functions, weights, fill(rows[place], size)))
  return out, mids


@functools.partial(jax.jit, static_argnums=0)
def _before(functions: Any, block: Any, state: Any) -> Any:
  return functions.before(block, state)


@functools.partial(jax.jit, static_argnums=0)
def _expert(functions: Any, weights: Mapping[str, jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One expert's outputs and the inputs of its down projection."""
  captured = {}
  out = functions.expert(weights, rows, lambda name, value: captured.setdefault(name, value))
  return out, captured["mid"]


@functools.partial(jax.jit, static_argnums=0)
def _after(functions: Any, block: Any, pending: Any, y: jax.Array) -> Any:
  return functions.after(block, pending, y)


def _halfway(functions: Any, block: Any, state: Any) -> _Batch:
  pending, rows, routing = _on_host(_before(functions, block, state))
  check_finite(routing.weights, "a routing weight")  # a row whose weight is NaN would reach no expert
  return _Batch(pending, rows, routing.experts, routing.weights)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def head_gradients(functions: Any, top: Any, state: Any, batch: Any) -> tuple[np.ndarray, Any]:
  """The summed token loss of a batch and its derivative with respect to the state after the last block, on the host;
  one of `sequences` after the other."""
  found = [_on_host(statistics.head(functions, top, *one)[:2]) for one in sequences(state, batch)]
  losses, gradients = zip(*found, strict=True)
  return np.sum(losses), jax.tree.map(lambda *parts: np.concatenate(parts), *gradients)


def sequences(state: Any, batch: Any) -> list[tuple[Any, Any]]:
  """A state after the last block and its batch, cut into sequences, so that logits are `[1, S, V]` at a time: in
  float32, four sequences of 512 tokens and a vocabulary of 152,000 take 1.2 GB, and their derivatives as much again.

  A state of several arrays (Switch Transformer, whose vocabulary is small) stays whole: sequences share some of them.
  """
  if isinstance(state, Mapping):
    return [(state, batch)]
  return [(state[i:i + 1], batch[i:i + 1]) for i in range(len(batch))]


def backward_layer(functions: Any, block: Any, experts: Experts, states: Sequence[Any], d_states: Sequence[Any],
                   scale: float | Sequence[float]) -> tuple[list[Any], LayerGradients | None]:
  """Sends derivatives of the summed token loss back through one block.

  Args:
    functions, block, experts, states: as for `forward_layer`.
    d_states: derivatives with respect to the states after the block, one per batch.
    scale: one over the number of predicted tokens of a batch: one number for all batches, or one for each.

  Returns:
    The derivatives with respect to `states`, and the sums over batches (None for a dense block).

  Raises:
    NotFiniteError: a routing weight or a gradient is not finite; names the expert.
  """
  if not functions.sparse(block):
    return [_on_host(statistics.through(functions, block, s, d)) for s, d in zip(states, d_states, strict=True)], None
  grad_sq = {name: np.zeros((weight.shape[0], weight.shape[2]), np.float32)
             for name, weight in functions.experts(block).items()}
  block = _without_experts(functions, block)
  batches = [_halfway(functions, block, state) for state in states]
  y = _sums_for_after(functions, block, experts, batches)
  arriving = [_on_host(_after_backward(functions, block, batch.pending, total, d_state))
              for batch, total, d_state in zip(batches, y, d_states, strict=True)]
  del y
  d_pending, d_y = (list(parts) for parts in zip(*arriving))
  del arriving
  d_rows, d_weights = _back_through_experts(functions, experts, batches, d_y, grad_sq)
  del d_y
  router_grad_sq, before = np.zeros(len(functions.router(block))), []
  for index, each in enumerate(np.broadcast_to(np.float32(scale), len(batches))):
    leaving = d_pending[index], d_rows[index].astype(batches[index].rows.dtype), d_weights[index]
    squares, d_state = _before_backward(functions, block, states[index], *leaving, each)
    router_grad_sq += np.asarray(squares, np.float64)
    before.append(_on_host(d_state))
  for expert in range(len(router_grad_sq)):
    check_finite(router_grad_sq[expert], "router's gradient", expert)
  return before, LayerGradients(router_grad_sq, grad_sq)


def _sums_for_after(functions: Any, block: Any, experts: Experts, batches: Sequence[_Batch]) -> list[np.ndarray]:
  """What `after` takes as y, as far as its derivative depends on it: zeros where `after` only adds."""
  first = batches[0]
  derivative = jax.eval_shape(lambda *args: jax.vjp(functools.partial(functions.after, block), *args)[1],
                              first.pending, first.rows)
  if not jax.tree.leaves(derivative):  # it keeps nothing of its arguments: it is linear
    return [np.zeros_like(batch.rows) for batch in batches]
  y, _ = _through_experts(functions, experts, batches, len(functions.router(block)))
  return [total.astype(batch.rows.dtype) for total, batch in zip(y, batches)]


def _back_through_experts(functions: Any, experts: Experts, batches: Sequence[_Batch], d_y: Sequence[np.ndarray],
                          grad_sq: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """`d_rows` and `d_weights`, float32, per batch; `grad_sq` is filled in."""
  d_rows = [np.zeros(batch.rows.shape, np.float32) for batch in batches]
  d_weights = [np.zeros(batch.weights.shape, np.float32) for batch in batches]

  def see(expert: int) -> None:
    seats = _Seats.of(batches, expert)
    gates = seats.slots([batch.weights for batch in batches])
    if not len(gates):
      return
    rows = seats.tokens([batch.rows for batch in batches])
    own_rows, own_weights, squares = _run_backward(functions, experts(expert), rows, seats.tokens(d_y), gates)
    for name, square in squares.items():
      check_finite(square, f"gradient of {name}", expert)
      grad_sq[name][expert] = square
    for total, ((token, _), part) in zip(d_rows, seats.split(own_rows)):
      total[token] += part
    for total, (place, part) in zip(d_weights, seats.split(own_weights)):
      total[place] = part

  for expert in range(len(next(iter(grad_sq.values())))):  # a function, as in `_through_experts`
    see(expert)
  return d_rows, d_weights


def _run_backward(functions: Any, loaded: Weights, rows: np.ndarray, d_y: np.ndarray,
                  gates: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """One expert's d_rows `[R, D]` float32, d_weights `[R]`, and the sums of squares of its projections."""
  d_rows, d_weights = np.empty(rows.shape, np.float32), np.empty(len(rows), np.float32)
  weights, total = _cast(loaded, rows.dtype), {}
  for place, size in chunks(len(rows)):
    held = place.stop - place.start
    padded = (fill(values[place], size) for values in (rows, d_y, gates))
    d_row, d_weight, squares = _expert_backward(functions, weights, *padded)
    d_rows[place], d_weights[place] = np.asarray(d_row)[:held], np.asarray(d_weight)[:held]
    total = {name: total.get(name, 0) + np.asarray(square) for name, square in squares.items()}
  return d_rows, d_weights, total


@functools.partial(jax.jit, static_argnums=0)
def _expert_backward(functions: Any, weights: Mapping[str, jax.Array], rows: jax.Array, d_y: jax.Array,
                     gates: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """As `_run_backward`, for one chunk; rows of weight 0 give zeros."""
  sizes = jnp.full(1, rows.shape[0], jnp.int32)

  def forward(rows: jax.Array, totals: dict[str, jax.Array]) -> jax.Array:
    tap = lambda name, value: taps.square_sum(value, totals[name], sizes) if name in totals else value
    return functions.expert(weights, rows, tap)

  totals = {name: jnp.zeros((1, weight.shape[1]), jnp.float32) for name, weight in weights.items()}
  out, backward = jax.vjp(forward, rows, totals)
  wide = d_y.astype(jnp.float32)
  d_rows, squares = backward((gates[:, None] * wide).astype(out.dtype))
  return d_rows, jnp.sum(wide * out.astype(jnp.float32), axis=-1), {name: square[0] for name, square in squares.items()}


@functools.partial(jax.jit, static_argnums=0)
def _after_backward(functions: Any, block: Any, pending: Any, y: jax.Array, d_state: Any) -> tuple[Any, jax.Array]:
  """`d_pending` and `d_y`."""
  return jax.vjp(functools.partial(functions.after, block), pending, y)[1](d_state)


@functools.partial(jax.jit, static_argnums=0)
def _before_backward(functions: Any, block: Any, state: Any, d_pending: Any, d_rows: jax.Array, d_weights: jax.Array,
                     scale: jax.Array) -> tuple[jax.Array, Any]:
  """Squared norms of the gradients of the router's rows, `[E]`, and the derivative with respect to the state."""

  def forward(router: jax.Array, state: Any) -> tuple[Any, jax.Array, jax.Array]:
    pending, rows, routing = functions.before(functions.with_router(block, router), state)
    return pending, rows, routing.weights

  _, backward = jax.vjp(forward, functions.router(block).astype(jnp.float32), state)
  d_router, d_state = backward((d_pending, d_rows, d_weights))
  return jnp.sum(jnp.square(d_router * scale), axis=-1), d_state


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def _without_experts(functions: Any, block: Any) -> Any:
  """The block with nothing in the place of its experts' weights, as arguments of compiled functions must be."""
  return jax.device_put(functions.with_experts(block, dict.fromkeys(functions.experts(block))))


def _on_host(tree: Any) -> Any:
  return jax.tree.map(np.asarray, tree)


def _cast(weights: Weights, dtype: np.dtype) -> dict[str, jax.Array]:
  """The working copy of one expert, in the compute dtype."""
  return {name: jnp.asarray(weight).astype(dtype) for name, weight in weights.items()}


def check_finite(values: np.ndarray, what: str, expert: int | None = None) -> None:
  """Raises `NotFiniteError` unless all values are finite; names what they are, and of which expert."""
  if not np.isfinite(values).all():
    whose = "" if expert is None else f" of expert {expert}"
    raise NotFiniteError(f"{what}{whose} is not finite; the model overflows in this compute dtype, or the checkpoint is"
                         " damaged")
