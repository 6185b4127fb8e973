"""Blocks of neurons: sorting changes nothing, and every block is stored and run at its own width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import artifacts, codecs, kernels, qtensor
from moeq_jax.encode import neurons

E, D, F = 3, 64, 128


def _layer(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  random = np.random.default_rng(seed)
  experts = {name: random.standard_normal((E, *size)).astype(np.float32)
             for name, size in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))}
  moments = {}
  for name, w in experts.items():
    x = random.standard_normal((E, 300, w.shape[1])) @ random.standard_normal((w.shape[1], w.shape[1]))
    moments[name] = np.einsum("etk,etl->ekl", x, x).astype(np.float32)
  return experts, moments


def _expert(weights: dict[str, np.ndarray], e: int, x: np.ndarray) -> np.ndarray:
  h = np.asarray(jax.nn.silu(x @ weights["gate"][e])) * (x @ weights["up"][e])
  return h @ weights["down"][e]


def test_sorted_experts_compute_the_same():
  experts, _ = _layer()
  random = np.random.default_rng(1)
  orders = random.permuted(np.tile(np.arange(F), (E, 1)), axis=1)
  found, x = neurons.sort_experts(experts, orders), random.standard_normal((7, D)).astype(np.float32)
  for e in range(E):
    assert not np.array_equal(found["up"][e], experts["up"][e])
    np.testing.assert_allclose(_expert(found, e, x), _expert(experts, e, x), rtol=1e-4, atol=1e-3)


def test_sorted_statistics_are_those_of_the_sorted_experts():
  random = np.random.default_rng(2)
  h, grads = random.standard_normal((E, 50, F)), random.standard_normal((2, E, 50, F))
  orders = random.permuted(np.tile(np.arange(F), (E, 1)), axis=1)
  moment = lambda h: np.einsum("etk,etl->ekl", h, h)[None]
  plain = dict(tokens=np.full((1, E), 50), gate_weight=np.ones((1, E)), router_norm=np.ones((1, E)),
               router_grad=np.ones((1, E)), moment_in=None, grad_sq_down=np.ones((1, E, D)), total_tokens=50, batches=1)
  stats = artifacts.Stats(**plain, moment_mid=moment(h), grad_sq_gate=(grads[0] ** 2).sum(1)[None],
                          grad_sq_up=(grads[1] ** 2).sum(1)[None])
  found = neurons.sort_stats(stats, orders[None])
  take = lambda values: np.take_along_axis(values, orders[:, None], axis=2)
  np.testing.assert_allclose(found.moment_mid, moment(take(h)))
  np.testing.assert_allclose(found.grad_sq_gate, (take(grads[0]) ** 2).sum(1)[None])
  np.testing.assert_allclose(found.grad_sq_up, (take(grads[1]) ** 2).sum(1)[None])
  assert found.grad_sq_down is stats.grad_sq_down


@pytest.mark.parametrize("text", ["rtn(group=32)", "gptq(group=32)"])
def test_every_block_is_encoded_stored_and_run_at_its_width(text: str):
  experts, moments = _layer()
  codec, random = codecs.get(text), np.random.default_rng(3)
  bits = {name: random.choice([1, 2, 3, 4], (E, 4)) for name in experts}
  encoded = neurons.encode_layer(experts, bits, moments, codec=codec)
  packed = neurons.pack_layer(encoded, codec.group)
  assert packed["gate"].bits.shape == packed["up"].bits.shape == (E, 1, 4)
  assert packed["down"].bits.shape == (E, 4, 1)
  assert qtensor.nominal_bits(*packed.values()) == np.mean([*bits.values()])
  assert qtensor.used_rows(packed["down"]) * D == F * D * bits["down"].sum() // 4 // 8  # no byte is wasted
  sizes = np.array([3, 0, 6])
  for name, q in packed.items():
    codes, _ = encoded[name]
    values = np.asarray(codecs.decode(codes, codec.group, q.K))
    x = random.standard_normal((9, q.K)).astype(np.float32)
    wanted = np.concatenate([x[:3] @ values[0], x[3:] @ values[2]])
    y = kernels.grouped_matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, q), jnp.asarray(sizes))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-4, atol=1e-4)
    top = codes.codes.reshape(E, *((4, -1, q.N) if name == "down" else (q.K, 4, -1))).max((2, 3) if name == "down"
                                                                                          else (1, 3))
    assert (top < 2 ** bits[name]).all() and (top >= 2 ** (bits[name] - 1)).all()


@pytest.mark.parametrize("text", ["rtn(group=32)", "gptq(group=32)"])
def test_equal_blocks_are_the_whole_expert(text: str):
  experts, moments = _layer(4)
  codec = codecs.get(text)
  bits = np.array([2, 4, 3])
  widths = {name: np.repeat(bits[:, None], 4, axis=1) for name in experts}
  found = neurons.encode_layer(experts, widths, moments, codec=codec)
  for name, w in experts.items():
    for e in range(E):
      wanted = codec.encode(jnp.asarray(w[e]), int(bits[e]), jnp.asarray(moments[name][e]))
      assert np.mean(found[name][0].codes[e] != np.asarray(wanted.codes)) < 1e-3  # sums in another order


def test_blocks_that_do_not_fit_are_named():
  experts, moments = _layer()
  for blocks, group, said in ((3, 32, "do not divide 128"), (4, 64, "cut a scale group of 64")):
    with pytest.raises(ValueError, match=said):
      neurons.encode_layer(experts, {name: np.full((E, blocks), 2) for name in experts}, moments,
                           codec=codecs.get(f"rtn(group={group})"))
  assert neurons.down_block(16, 64) == 64 and neurons.down_block(128, 64) == 128
  for block, group in ((48, 64), (64, 0)):
    with pytest.raises(ValueError, match="block=48|group=0"):
      neurons.down_block(block, group)
