"""The experts of Switch Transformer: against the dense formula in float64, and capacity against counting one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax import qtensor
from moeq_jax.models import switch_moe
from tests import tiny_switch

B, S, D, F, E = 2, 9, 6, 8, 3
NAMES = ("router", "up", "down")


@functools.cache
def module(capacity: int = 2) -> switch_moe.SwitchMoE:
  built = switch_moe.SwitchMoE(D, F, E, capacity, dtype=jnp.float32, rngs=nnx.Rngs(0))
  return jax.tree.map(lambda a: a * 2, built)


def values(moe: switch_moe.SwitchMoE) -> dict[str, np.ndarray]:
  return {name: np.asarray(getattr(moe, name).get_value(), np.float64) for name in NAMES}


def rows(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)


def taken(experts: np.ndarray, real: np.ndarray, capacity: int) -> np.ndarray:
  """`[B, S]`: whether each token gets into its expert, counted one after the other."""
  kept = np.zeros(experts.shape, bool)
  for row, choice in enumerate(experts):
    room = dict.fromkeys(range(E), capacity)
    for place, expert in enumerate(choice):
      if real[row, place]:
        kept[row, place] = room[expert] > 0
        room[expert] -= 1
  return kept


def dense(p: dict, x, kept, chosen, xp=np):
  """`[B, S, D]`: all experts on all tokens, of which the chosen one counts."""
  scores = xp.exp(x @ p["router"].T)
  weights = scores / scores.sum(-1, keepdims=True) * chosen * kept[..., None]
  return xp.einsum("bse,bsef,efd->bsd", weights, xp.maximum(xp.einsum("bsd,edf->bsef", x, p["up"]), 0), p["down"])


def apply(moe: switch_moe.SwitchMoE, x, real, **options):
  routing = moe.route(x, real, **options)
  return moe(switch_moe.masked(x, routing), routing).reshape(x.shape), routing


@functools.cache
def padding() -> np.ndarray:
  return np.arange(S)[None] < np.array([[S], [6]])


@pytest.mark.parametrize("dropping", [True, False])
def test_the_block_and_its_gradients_are_those_of_the_dense_formula(dropping: bool):
  x, real, p = rows(), padding(), values(module())
  experts = np.argmax(np.float64(x) @ p["router"].T, axis=-1)
  kept = taken(experts, real, 2) if dropping else real
  chosen = np.eye(E)[experts]
  assert 0 < kept.sum() < real.sum() if dropping else kept.sum() == real.sum()
  pull = np.random.default_rng(9).normal(size=x.shape)

  @functools.partial(jax.jit, static_argnums=2)
  def run(moe, x, dropping):
    def loss(moe, x):
      out = apply(moe, x, jnp.asarray(real), dropping=dropping)
      return jnp.sum(out[0] * jnp.float32(pull)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(moe, x)

  (_, (found, routing)), (ours, dx) = run(module(), x, dropping)
  np.testing.assert_allclose(found, dense(p, np.float64(x), kept, chosen), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(routing.weights > 0).reshape(B, S), kept)
  np.testing.assert_array_equal(routing.group_sizes, np.bincount(experts.ravel(), minlength=E))
  with jax.enable_x64():
    theirs, dx64 = jax.grad(lambda p, x: jnp.sum(dense(p, x, kept, chosen, jnp) * pull), argnums=(0, 1))(
        p, np.float64(x))
  np.testing.assert_allclose(dx, dx64, rtol=1e-4, atol=1e-4)
  for name in NAMES:
    assert np.abs(theirs[name]).max() > 0.1
    np.testing.assert_allclose(getattr(ours, name).get_value(), theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


@functools.partial(jax.jit, static_argnums=(2, 3))
def weights_of(logits: jax.Array, real: jax.Array, capacity: int, split: int) -> jax.Array:
  """`[B, S]`, routed at once, or (`split > 0`) in two parts of which the second is told of the first."""
  moe = switch_moe.SwitchMoE(E, F, E, capacity, dtype=jnp.float32, rngs=nnx.Rngs(0))
  moe.router = nnx.Param(jnp.eye(E))
  if not split:
    return moe.route(logits, real).weights.reshape(real.shape)
  parts = (slice(None), slice(0, split)), (slice(None), slice(split, None))
  first = moe.route(logits[parts[0]], real[parts[0]])
  wanted = jax.nn.one_hot(first.experts.reshape(B, split), E, dtype=jnp.int32) * real[parts[0]][..., None]
  second = moe.route(logits[parts[1]], real[parts[1]], seen=jnp.sum(wanted, axis=1))
  return jnp.concatenate([r.weights.reshape(B, -1) for r in (first, second)], axis=1)


@given(st.lists(st.integers(0, 2), min_size=B * S, max_size=B * S),
       st.lists(st.booleans(), min_size=B * S, max_size=B * S), st.sampled_from([1, 3]), st.sampled_from([0, 4]))
def test_an_expert_takes_the_first_tokens_of_each_sequence(experts: list, real: list, capacity: int, split: int):
  """Padding, wherever it stands, is not counted; other sequences do not matter; counting can be continued."""
  experts, real = np.reshape(experts, (B, S)), np.reshape(real, (B, S))
  found = weights_of(jnp.asarray(3.0 * np.eye(E)[experts], jnp.float32), jnp.asarray(real), capacity, split)
  expected = taken(experts, real, capacity) * np.exp(3) / (np.exp(3) + 2)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rows_in_bfloat16_are_routed_in_float32():
  """Two logits that bfloat16 cannot tell apart: the router must."""
  moe = jax.tree.map(lambda a: a, module())
  router = np.zeros((E, D), np.float32)
  router[:, 0] = [1.0, 1.0 + 2**-12, 0.5]
  moe.router = nnx.Param(jnp.asarray(router))
  out, routing = apply(moe, jnp.ones((1, 2, D), jnp.bfloat16), jnp.ones((1, 2), bool))
  assert out.dtype == jnp.bfloat16
  assert routing.logits.dtype == routing.weights.dtype == jnp.float32
  np.testing.assert_array_equal(routing.experts, [[1], [1]])


def test_taps_see_the_rows_of_each_expert_in_order_and_zeros_for_what_it_does_not_take():
  x, p, seen = rows(), values(module()), {}
  routing = module().route(jnp.asarray(x), jnp.asarray(padding()))

  def tap(name, value, sizes):
    seen[name] = np.asarray(value), np.asarray(sizes)
    return value

  masked = switch_moe.masked(jnp.asarray(x), routing)
  out = module()(masked, routing, tap)
  assert list(seen) == ["input", "up", "mid", "down"]
  order = np.argsort(np.asarray(routing.experts)[:, 0], kind="stable")
  kept = np.asarray(routing.weights)[order] > 0
  rows_ = np.where(kept, x.reshape(-1, D)[order], 0)
  expert = np.asarray(routing.experts)[order, 0]
  up = np.einsum("td,tdf->tf", np.float64(rows_), p["up"][expert])
  down = np.einsum("tf,tfd->td", np.maximum(up, 0), p["down"][expert])
  for name, value in (("input", rows_), ("up", up), ("mid", np.maximum(up, 0)), ("down", down)):
    np.testing.assert_allclose(seen[name][0], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(seen[name][1], routing.group_sizes)
    assert not seen[name][0][~kept[:, 0]].any()
  np.testing.assert_array_equal(out, module()(masked, routing))


def test_packed_experts_give_what_their_values_give():
  packed = tiny_switch.packed(1)
  moe = tiny_switch.model().blocks[1].moe
  x = np.random.default_rng(0).normal(size=(2, 8, tiny_switch.CONFIG.d_model)).astype(np.float32)
  outs = []
  for convert in (lambda q: q, qtensor.dequantize):
    copy = jax.tree.map(lambda leaf: leaf, moe)
    copy.up, copy.down = (nnx.Param(convert(packed[name])) for name in ("up", "down"))
    outs.append(np.asarray(apply(copy, jnp.asarray(x), jnp.ones((2, 8), bool))[0]))
  np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-4)
  assert np.abs(outs[0] - np.asarray(apply(moe, jnp.asarray(x), jnp.ones((2, 8), bool))[0])).max() > 0.05
