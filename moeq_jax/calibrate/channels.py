"""Statistics of channels: one pass of forward and backward, vectors per expert, no moments.

As `statistics`, but nothing of the size of a moment or of a weight is kept or made: per expert and channel the sums of
squared inputs and of squared output gradients, and per expert a sketch of either input's Gram matrix (`spectrum`), 32
vectors. Expert weights are not differentiated: the derivatives are those with respect to the router, to the state, and
to the taps' zeros. With `tapped=False` the pass is the same one without taps; then only the routers' sums are made.

Sums are float32 whatever the model computes in. One that overflows is an error that names it, its layer and its expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import channels, steps
from moeq_jax.calibrate import layerwise, spectrum, statistics, taps
from moeq_jax.kernels.chunks import chunks, fill

_INPUTS = {"input": "input_sq", "mid": "mid_sq"}
_SKETCHES = {"input": "sketch_input", "mid": "sketch_mid"}


def init(functions: Any, block: Any, *, tapped: bool = True, rank: int = spectrum.RANK) -> dict[str, jax.Array]:
  """Zero sums for one MoE layer."""
  weights = functions.experts(block)
  experts, *_ = weights["up"].shape
  zeros = lambda *shape: jnp.zeros((experts, *shape), jnp.float32)
  sums = {"tokens": jnp.zeros(experts, jnp.int32), "gate_weight": zeros(), "router_grad_sq": zeros()}
  if not tapped:
    return sums
  for name, source in (("input", "up"), ("mid", "down")):
    width = weights[source].shape[1]
    sums |= {_INPUTS[name]: zeros(width), _SKETCHES[name]: zeros(width, min(width, rank))}
  return sums | {statistics.TAPPED[name]: zeros(weight.shape[2]) for name, weight in weights.items()}


def tap(totals: dict[str, jax.Array], name: str, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """The identity on the rows of one place in an expert; the "gradients" of `totals` are its sums (see `init`).

  Args:
    totals: zeros as `init` makes them; places without any are left alone.
    name: as `models.moe.MoE.experts` calls them.
    rows: `[T, N]`, sorted by expert.
    group_sizes: `[E]` int32.
  """
  if (field := statistics.TAPPED.get(name)) in totals:
    return taps.square_sum(rows, totals[field], group_sizes)
  if (field := _INPUTS.get(name)) not in totals:
    return rows
  own = {key: totals[key] for key in (field, _SKETCHES[name])}
  test = jnp.asarray(spectrum.test_vectors(*totals[_SKETCHES[name]].shape[1:]))
  found = taps.group_sums(jax.lax.stop_gradient(rows), group_sizes, test)
  return taps.carry(rows, own, dict(zip(own, found, strict=True)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(functions: Any, block: Any, sums: dict[str, jax.Array], state: Any, d_state: Any,
           scale: jax.Array) -> tuple[dict[str, jax.Array], Any]:
  """Adds one batch to the sums of one MoE layer; arguments and results as those of `statistics.update`."""
  always = ("tokens", "gate_weight", "router_grad_sq")
  totals = {name: jnp.zeros_like(total) for name, total in sums.items() if name not in always}

  def forward(router, state, totals):
    return functions.block(functions.with_router(block, router), state, functools.partial(tap, totals))

  _, backward, routing = jax.vjp(forward, functions.router(block), state, totals, has_aux=True)
  d_router, d_input, tapped = backward(d_state)
  chosen = jax.nn.one_hot(routing.experts, routing.logits.shape[-1])
  batch = tapped | {
      "tokens": routing.group_sizes,
      "gate_weight": jnp.einsum("tk,tke->e", routing.weights, chosen),
      "router_grad_sq": jnp.sum(jnp.square(d_router.astype(jnp.float32) * scale), axis=-1),
  }
  return jax.tree.map(jnp.add, sums, batch), d_input


def of_rows(rows: np.ndarray, mids: np.ndarray, expert: int | None = None, *, rank: int = spectrum.RANK,
            damping: float = spectrum.DAMPING) -> dict[str, np.ndarray]:
  """The fields of `ChannelStats` that the inputs of one expert decide, from its rows: for callers that hold one expert
  at a time.

  Args:
    rows, mids: `[R, D]` and `[R, F]`, inputs of gate and up, and of down; R may be 0.
    expert: its number, for errors.
    rank, damping: as for `collect`.

  Returns:
    `input_sq` `[D]` and `mid_sq` `[F]` float32, `condition` and `log_am_gm` `[2, 3]` float64.

  Raises:
    layerwise.NotFiniteError: a sum over the rows is not finite; names it.
  """
  found, sides = {}, []
  for side, values in zip(channels.SIDES, (rows, mids), strict=True):
    test = spectrum.test_vectors(values.shape[1], rank)
    squares, sketch = np.zeros(values.shape[1], np.float32), np.zeros(test.shape, np.float32)
    for place, size in chunks(len(values)):
      own, gram = _row_sums(fill(values[place], size), test)
      squares, sketch = squares + np.asarray(own), sketch + np.asarray(gram)
    for name, values in ((_INPUTS[side], squares), (_SKETCHES[side], sketch)):
      layerwise.check_finite(values, name, expert)
    found[_INPUTS[side]] = squares
    sides.append(spectrum.summarise(sketch, squares, damping))
  return found | {field: np.stack([getattr(side, field) for side in sides]) for field in ("condition", "log_am_gm")}


@jax.jit
def _row_sums(rows: jax.Array, test: jax.Array) -> tuple[jax.Array, jax.Array]:
  rows = rows.astype(jnp.float32)
  seen = jnp.matmul(rows, test, precision="highest")
  return jnp.sum(jnp.square(rows), axis=0), jnp.matmul(rows.T, seen, precision="highest")


def sweep(functions: Any, top: Any, blocks: Sequence[Any], sums: dict[int, dict[str, jax.Array]],
          batch: Any) -> tuple[dict[int, dict[str, jax.Array]], float]:
  """One batch forward and backward: the new sums of every MoE layer, by its place, and the mean loss."""
  batch = jax.tree.map(jnp.asarray, batch)
  inputs = [steps.embed(functions, top, batch)]
  for block in blocks:
    inputs.append(steps.block(functions, block, inputs[-1])[0])
  loss, d_state, predicted = statistics.head(functions, top, inputs.pop(), batch)
  scale, found = jnp.float32(1 / int(predicted)), {}
  for place in reversed(range(len(blocks))):
    state, block = inputs.pop(), blocks[place]
    if place in sums:
      found[place], d_state = update(functions, block, sums[place], state, d_state, scale)
    else:
      d_state = statistics.through(functions, block, state, d_state)
  return {place: found[place] for place in sums}, float(loss) / int(predicted)


def collect(functions: Any, top: Any, blocks: Sequence[Any], batches: Sequence[Any], *, rank: int = spectrum.RANK,
            damping: float = spectrum.DAMPING,
            advance: Callable[..., None] = lambda **_: None) -> channels.ChannelStats:
  """Runs forward and backward over calibration batches.

  Args:
    functions, top, blocks, batches, advance: as for `statistics.collect`.
    rank: test vectors of the sketches; an input of at most so many channels is summarised exactly.
    damping: share of the mean eigenvalue that is added to all before they are summarised.

  Raises:
    ValueError: no batches, or a sum that is not finite; names it, its layer and its expert.
  """
  if not batches:
    raise ValueError("calibration needs at least one batch of tokens")
  sums = {place: init(functions, blocks[place], rank=rank) for place in steps.sparse(functions, blocks)}
  for batch in batches:
    sums, loss = sweep(functions, top, blocks, sums, batch)
    advance(note=f"loss {loss:.3f}")
  total = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(list(batches)))
  return finish(functions, [blocks[place] for place in sums], list(sums.values()), len(batches), total, damping)


def finish(functions: Any, blocks: Sequence[Any], sums: Sequence[dict[str, jax.Array]], batches: int, total_tokens: int,
           damping: float = spectrum.DAMPING) -> channels.ChannelStats:
  """Puts the layers' sums together; arguments as those of `statistics.finish`.

  Raises:
    ValueError: a sum is not finite; names it, its layer and its expert.
  """
  stacked = {name: np.stack([np.asarray(layer[name]) for layer in sums]) for name in sums[0]}
  statistics.check_finite(stacked)
  routers = np.stack([np.asarray(functions.router(block), np.float64) for block in blocks])
  sides = [spectrum.summarise(stacked.pop(_SKETCHES[name]), stacked[_INPUTS[name]], damping)
           for name in channels.SIDES]
  summaries = {field: np.stack([getattr(side, field) for side in sides], axis=2)
               for field in ("condition", "log_am_gm")}
  statistics.check_finite(summaries)
  mean_square = stacked.pop("router_grad_sq").astype(np.float64) / batches
  absent = {field: None for field in statistics.TAPPED.values() if field not in stacked}
  stacked |= {"tokens": stacked["tokens"].astype(np.int64), "gate_weight": stacked["gate_weight"].astype(np.float64)}
  return channels.ChannelStats(
      router_norm=np.linalg.norm(routers, axis=-1),
      router_grad=np.sqrt(mean_square),
      damping=damping,
      total_tokens=total_tokens,
      batches=batches,
      **summaries,
      **stacked,
      **absent,
  )
