"""Stages on models whose blocks are not all alike: dense blocks between sparse ones, a shared expert, no gate, two
streams. Against gradients of the whole model and against the model with weights replaced."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import artifacts, codecs, qtensor, scores, steps
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates
from moeq_jax.evaluate import perplexity
from moeq_jax.models import decoder, families, switch
from moeq_jax.scores import damage

WIDTHS = (2, 4)
EXPERTS = 4


class Subject(NamedTuple):
  """A model with its functions, batches, MoE layers and projections."""

  model: Any
  functions: Any
  batches: list[Any]
  sparse: tuple[int, ...]
  projections: tuple[str, ...]


@functools.cache
def subject(family: str) -> Subject:
  """A small model with sharpened weights, so that routing and quantization matter."""
  rng = np.random.default_rng(0)
  if family == "switch_transformers":
    config = switch.SwitchConfig(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2,
                                 num_heads=4, num_experts=EXPERTS, expert_capacity=64, encoder_sparse=(0,),
                                 decoder_sparse=(1,))
    batches = [{name: rng.integers(2, 64, (3, length)).astype(np.int32) for name, length in (("inputs", 10),
                ("targets", 6))} for _ in range(2)]
  else:
    config = decoder.DecoderConfig(
        family=family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False,
        qk_norm="head", dense_size=40, dense_layers=(1,), shared_size=24)
    batches = [rng.integers(0, 64, (3, 12)).astype(np.int32) for _ in range(2)]
  model = jax.tree.map(lambda leaf: 12 * leaf if leaf.ndim > 1 else leaf, families.MODULES[family].build(
      config, jnp.float32))
  projections = ("up", "down") if family == "switch_transformers" else artifacts.PROJECTIONS
  places = tuple(place for place in range(3) if config.sparse(place))
  return Subject(model, families.functions(config, "float32"), batches, places, projections)


@functools.cache
def stats(family: str) -> artifacts.Stats:
  s = subject(family)
  return statistics.collect(s.functions, s.model.top, list(s.model.blocks), s.batches)


@functools.cache
def encoded(family: str) -> list[artifacts.LayerCodes]:
  s, ready = subject(family), candidates.shrink_unrouted(stats(family))
  return [candidates.encode_layer(s.functions.experts(s.model.blocks[place]), ready, layer,
                                  codec=codecs.get("rtn(group=32)"), widths=WIDTHS)
          for layer, place in enumerate(s.sparse)]


FAMILIES = ("qwen3_moe", "switch_transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_router_gradients_of_the_moe_layers_equal_those_of_the_whole_model(family: str):
  s, found = subject(family), stats(family)
  assert found.tokens.shape == (2, EXPERTS) and tuple(steps.sparse(s.functions, s.model.blocks)) == s.sparse

  @jax.jit
  def squared(batch: Any) -> jax.Array:

    def loss(routers: list[jax.Array]) -> jax.Array:
      state, blocks = s.functions.embed(s.model.top, batch), list(s.model.blocks)
      for router, place in zip(routers, s.sparse):
        blocks[place] = s.functions.with_router(blocks[place], router)
      for block in blocks:
        state, _ = s.functions.block(block, state)
      return jnp.mean(s.functions.losses(s.functions.head(s.model.top, state), batch))

    gradient = jax.grad(loss)([s.functions.router(s.model.blocks[place]) for place in s.sparse])
    return jnp.stack([jnp.sum(jnp.square(g), -1) for g in gradient])

  expected = np.sqrt(np.mean([squared(batch) for batch in s.batches], axis=0))
  np.testing.assert_allclose(found.router_grad, expected, rtol=2e-3, atol=1e-6)
  assert (expected.max(1) > 1e-4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_the_experts_equal_those_of_their_rows(family: str):
  s, found = subject(family), stats(family)
  tokens, moments = np.zeros((2, EXPERTS)), np.zeros((2, EXPERTS, 32, 32))
  before = jax.jit(s.functions.before)
  for batch in s.batches:
    state = steps.embed(s.functions, s.model.top, batch)
    for place, block in enumerate(s.model.blocks):
      if place in s.sparse:
        rows, routing = jax.device_get(before(block, state)[1:])
        for token, expert in np.argwhere(np.ones(routing.experts.shape)).tolist():
          cell = s.sparse.index(place), int(routing.experts[token, expert])
          tokens[cell] += 1
          moments[cell] += np.outer(rows[token], rows[token])
      state, _ = steps.block(s.functions, block, state)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_allclose(found.moment_in, moments, rtol=1e-3, atol=1e-3 * np.abs(moments).max())
  assert (found.grad_sq_gate is None) == ("gate" not in s.projections)
  assert found.grad_sq_up.shape == (2, EXPERTS, 48) and found.grad_sq_down.shape == (2, EXPERTS, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_errors_are_of_the_projections_that_there_are(family: str):
  s = subject(family)
  table = candidates.error_table(encoded(family), widths=WIDTHS, codec=codecs.get("rtn(group=32)"))
  assert table.projections == s.projections and table.sizes == (32 * 48,) * len(s.projections)
  assert table.weight.shape == (2, EXPERTS, len(s.projections), 2)
  used = stats(family).tokens > 0
  assert (table.output[used] > 0).all() and (table.fisher[used] > 0).all()
  evidence = scores.Evidence(stats(family), table, np.stack([s.functions.router(s.model.blocks[p]) for p in s.sparse]),
                             None, [s.functions.experts(s.model.blocks[place]) for place in s.sparse])
  for spec in set(scores.SCORES) - {"damage", "router_norm_change"}:
    assert scores.as_cost(spec, evidence).cost.shape == table.weight.shape


def test_dense_blocks_stay_and_every_projection_gets_its_bits():
  s = subject("qwen3_moe")
  bits = np.random.default_rng(0).choice(WIDTHS, (2, EXPERTS, 3))
  packed = [apply.pack_layer(codes, own, widths=WIDTHS, group=32) for codes, own in zip(encoded("qwen3_moe"), bits)]
  for layer, own in zip(packed, bits):
    for place, q in enumerate(layer.values()):
      np.testing.assert_array_equal(q.bits.ravel(), own[:, place])
  blocks = apply.quantized_blocks(s.functions, s.model.blocks, packed)
  assert all((blocks[place] is s.model.blocks[place]) == (place not in s.sparse) for place in range(3))
  reference = perplexity.reference(s.functions, s.model.top, list(s.model.blocks), s.batches)
  measured = perplexity.measure(s.functions, s.model.top, blocks, s.batches, reference)
  assert all(len(chosen) == 2 for chosen in reference.chosen) and measured.kl.min() > 0
  restored = [{name: np.asarray(qtensor.dequantize(q)) for name, q in layer.items()} for layer in packed]
  plain = perplexity.measure(s.functions, s.model.top, apply.quantized_blocks(s.functions, s.model.blocks, restored),
                             s.batches, reference)
  np.testing.assert_allclose(measured.loss, plain.loss, rtol=1e-4)
  with pytest.raises(ValueError, match=r"bits of shape \(4, 2\) for 4 experts of 3 projections"):
    apply.pack_layer(encoded("qwen3_moe")[0], bits[0, :, :2], widths=WIDTHS, group=32)


def test_damage_of_an_expert_before_and_behind_a_dense_block():
  s = subject("qwen3_moe")
  zero = lambda layer, expert: {name: np.zeros(w.shape[1:]) for name, w in
                                s.functions.experts(s.model.blocks[s.sparse[layer]]).items()}
  found = damage.measure(s.functions, s.model.top, list(s.model.blocks), s.batches, bits=2, dequantized=zero)
  reference = perplexity.reference(s.functions, s.model.top, list(s.model.blocks), s.batches)
  for layer, expert in np.ndindex(2, EXPERTS):
    blocks = list(s.model.blocks)
    place = s.sparse[layer]
    without = {name: np.array(w) for name, w in s.functions.experts(blocks[place]).items()}
    for w in without.values():
      w[expert] = 0
    blocks[place] = s.functions.with_experts(blocks[place], jax.tree.map(jnp.asarray, without))
    loss = perplexity.measure(s.functions, s.model.top, blocks, s.batches, reference).loss
    assert found.mean[layer, expert] == pytest.approx((loss - reference.loss).mean(), abs=1e-4)
  assert np.abs(found.mean).min() > 1e-4
