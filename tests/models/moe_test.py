"""The sparse block against the dense formula: every expert on every token, in float64, with masked weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.kernels import ffn
from moeq_jax.models import moe

T, D, F, E, TOP_K = 23, 8, 12, 6, 2
NAMES = ("router", "gate", "up", "down")


@functools.cache
def layer(seed: int = 0) -> moe.MoE:
  built = moe.MoE(D, F, E, TOP_K, dtype=jnp.float32, rngs=nnx.Rngs(seed))
  return jax.tree.map(lambda a: a * 25, built)  # standard deviation 0.5: routing and the non-linearity matter


def run(module: moe.MoE, x, tap: moe.Tap = moe.no_tap):
  """`(what the experts make of x, routing)`."""
  routing = module.route(x)
  return module.experts(x, routing, tap), routing


def rows(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)


def values(module: moe.MoE) -> dict[str, np.ndarray]:
  return {name: np.asarray(getattr(module, name).get_value(), np.float64) for name in NAMES}


def choices(logits: np.ndarray, top_k: int = TOP_K) -> np.ndarray:
  """`[T, k]`, best first, ties to the lower index."""
  return np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]


def dense(p: dict, x, mask, xp=np):
  """`[T, D]`: the softmax over the experts of `mask` weighs what all experts make of all tokens."""
  scores = xp.exp(x @ p["router"].T) * mask
  weights = scores / scores.sum(-1, keepdims=True)
  gate, up = xp.einsum("td,edf->tef", x, p["gate"]), xp.einsum("td,edf->tef", x, p["up"])
  return xp.einsum("te,tef,efd->td", weights, gate / (1 + xp.exp(-gate)) * up, p["down"])


def mask_of(p: dict, x: np.ndarray) -> np.ndarray:
  return np.eye(E)[choices(np.float64(x) @ p["router"].T)].sum(1)


def test_the_block_is_the_dense_formula():
  x, p = rows(), values(layer())
  out, routing = jax.jit(run)(layer(), x)
  mask = mask_of(p, x)
  np.testing.assert_allclose(out, dense(p, np.float64(x), mask), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(routing.group_sizes, mask.sum(0))
  np.testing.assert_array_equal(routing.experts, choices(np.float64(x) @ p["router"].T))


def test_shares_of_all_experts_are_not_renormalised():
  x, p = rows(), values(layer())
  module = jax.tree.map(lambda a: a, layer())
  module.normalize = False
  out, routing = jax.jit(run)(module, x)
  logits, mask = np.float64(x) @ p["router"].T, mask_of(p, x)
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(routing.weights, np.take_along_axis(share, choices(logits), 1), rtol=1e-4)
  assert routing.weights.sum(-1).max() < 0.999
  kept = (share * mask).sum(-1, keepdims=True)
  np.testing.assert_allclose(out, kept * dense(p, np.float64(x), mask), rtol=1e-4, atol=1e-4)


def test_the_shared_expert_sees_every_row_behind_its_gate():
  module = moe.MoE(D, F, E, TOP_K, shared_size=5, dtype=jnp.float32, rngs=nnx.Rngs(1))
  module, x = jax.tree.map(lambda a: a * 25, module), rows()
  p = {name: np.float64(getattr(module.shared, name)[...]) for name in ("gate", "up", "down")}
  a = np.float64(x) @ p["gate"]
  expected = a / (1 + np.exp(-a)) * (x @ p["up"]) @ p["down"]
  expected /= 1 + np.exp(-np.float64(x) @ np.float64(module.shared_gate[...]).T)
  np.testing.assert_allclose(module.always(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
  assert p["gate"].shape == (D, 5) and layer().always(x) is None


def test_the_gradients_are_those_of_the_dense_formula():
  x, p = rows(), values(layer())
  pull = np.random.default_rng(9).normal(size=(T, D)).astype(np.float32)
  ours, dx = jax.jit(jax.grad(lambda m, x: jnp.sum(run(m, x)[0] * pull), argnums=(0, 1)))(layer(), x)
  mask = mask_of(p, x)
  with jax.enable_x64():
    theirs, dx64 = jax.grad(lambda p, x: jnp.sum(dense(p, x, mask, jnp) * pull), argnums=(0, 1))(p, np.float64(x))
  np.testing.assert_allclose(dx, dx64, rtol=1e-4, atol=1e-4)
  for name in NAMES:
    assert np.abs(theirs[name]).max() > 0.1
    np.testing.assert_allclose(getattr(ours, name).get_value(), theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_no_token_is_dropped_when_all_go_to_the_same_experts():
  x = np.abs(rows())
  p = values(layer()) | {"router": np.zeros((E, D))}
  p["router"][[2, 4]] = [[1.0], [0.9]]  # all rows are positive, so all choose 2, then 4
  module = jax.tree.map(lambda a: a, layer())
  module.router = nnx.Param(jnp.asarray(p["router"], jnp.float32))
  out, routing = jax.jit(run)(module, x)
  np.testing.assert_array_equal(routing.group_sizes, [0, 0, T, 0, T, 0])
  np.testing.assert_allclose(out, dense(p, np.float64(x), mask_of(p, x)), rtol=1e-4, atol=1e-4)
  assert (np.abs(out).max(-1) > 0).all()


def test_bfloat16_rows_come_back_in_bfloat16_and_are_routed_in_float32():
  """Two logits that bfloat16 cannot tell apart: the router must."""
  module = jax.tree.map(lambda a: a, layer())
  router = np.zeros((E, D), np.float32)
  router[:, 0] = [0.5, 1.0, 1.0 + 2**-12, 0.25, 0.0, -1.0]
  module.router = nnx.Param(jnp.asarray(router))
  out, routing = run(module, jnp.ones((3, D), jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  assert routing.logits.dtype == routing.weights.dtype == jnp.float32
  np.testing.assert_array_equal(routing.experts, [[2, 1]] * 3)


def test_taps_see_the_rows_of_each_expert_in_order():
  x, p = rows(), values(layer())
  seen = {}

  def tap(name, value, sizes):
    seen[name] = np.asarray(value), np.asarray(sizes)
    return value

  out, routing = run(layer(), x, tap)
  assert list(seen) == ["input", "gate", "up", "mid", "down"]
  expert = np.repeat(np.arange(E), routing.group_sizes)
  token = np.concatenate([np.flatnonzero((np.asarray(routing.experts) == e).any(1)) for e in range(E)])
  np.testing.assert_array_equal(seen["input"][0], x[token])
  gate = np.einsum("td,tdf->tf", np.float64(x)[token], p["gate"][expert])
  up = np.einsum("td,tdf->tf", np.float64(x)[token], p["up"][expert])
  mid = gate / (1 + np.exp(-gate)) * up
  down = np.einsum("tf,tfd->td", mid, p["down"][expert])
  for name, value in (("gate", gate), ("up", up), ("mid", mid), ("down", down)):
    np.testing.assert_allclose(seen[name][0], value, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(seen[name][1], routing.group_sizes)
  np.testing.assert_array_equal(out, run(layer(), x)[0])


@given(st.lists(st.lists(st.integers(-3, 3), min_size=E, max_size=E), min_size=4, max_size=4), st.integers(1, 3))
def test_routing_takes_the_largest_logits_and_ties_go_to_the_lower_index(logits: list[list[int]], top_k: int):
  logits = np.asarray(logits, np.float32)
  routing = moe.route(jnp.asarray(logits), top_k)
  chosen = choices(logits, top_k)
  np.testing.assert_array_equal(routing.experts, chosen)
  np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  picked = np.take_along_axis(probability, chosen, 1)
  np.testing.assert_allclose(routing.weights, picked / picked.sum(-1, keepdims=True), rtol=1e-5)
  np.testing.assert_array_equal(routing.group_sizes, np.bincount(chosen.ravel(), minlength=E))


def test_huge_logits_do_not_overflow():
  routing = moe.route(jnp.asarray([[1e4, -1e4, 0.0], [500.0, 500.0, -500.0]]), 2)
  np.testing.assert_allclose(routing.weights, [[1, 0], [0.5, 0.5]])


def test_balance_is_one_when_even_and_experts_over_k_when_collapsed():
  cyclic = np.stack([np.roll([1.0, 0.5, 0, 0, 0, 0], i) for i in range(E)]).astype(np.float32)
  np.testing.assert_allclose(moe.load_balance_loss(moe.route(jnp.asarray(cyclic), TOP_K)), 1, rtol=1e-6)
  collapsed = np.tile(np.asarray([40.0, 40, 0, 0, 0, 0], np.float32), (T, 1))
  np.testing.assert_allclose(moe.load_balance_loss(moe.route(jnp.asarray(collapsed), TOP_K)), E / TOP_K, rtol=1e-5)


def test_balance_is_the_formula_of_switch_and_its_gradient_takes_from_the_crowded():
  logits = np.random.default_rng(1).normal(size=(T, E)).astype(np.float32)
  logits[:, 3] += 2
  probability = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
  share = np.bincount(choices(logits).ravel(), minlength=E) / (T * TOP_K)
  loss = lambda logits: moe.load_balance_loss(moe.route(logits, TOP_K))
  np.testing.assert_allclose(loss(jnp.asarray(logits)), E * share @ probability.mean(0), rtol=1e-5)
  exact = E / T * probability * (share - probability @ share[:, None])
  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), exact, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_permute_and_its_gradient(shape: tuple[int, ...]):
  rng = np.random.default_rng(0)
  x, dy, order = rng.normal(size=shape), rng.normal(size=shape), rng.permutation(7)
  x, dy = np.float32(x), np.float32(dy)
  y, pull = jax.vjp(lambda x: ffn.permute(x, jnp.asarray(order), jnp.asarray(np.argsort(order))), x)
  np.testing.assert_array_equal(y, x[order])
  matrix = np.eye(7, dtype=np.float32)[order]
  np.testing.assert_array_equal(pull(dy)[0], matrix.T @ dy)
