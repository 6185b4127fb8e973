"""The decoder: what a position may see, its parts, losses, and how stages see it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moeq_jax.models import convert, decoder, families

CONFIG = decoder.DecoderConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2)
MIXED = dataclasses.replace(  # Qwen's options: every kind of block and of parameter
    CONFIG, num_hidden_layers=4, norm_topk_prob=False, qkv_bias=True, o_bias=True, qk_norm="head", shared_size=10,
    dense_size=20, dense_layers=(0, 2), sliding_windows=(None, None, 3, None), tie_word_embeddings=False)
BATCH, LENGTH = 2, 9


@functools.cache
def model(config: decoder.DecoderConfig = CONFIG) -> decoder.Decoder:
  """Random weights of a size at which attention, routing and biases matter."""
  rng = np.random.default_rng(0)
  draw = lambda a: jnp.asarray(rng.normal(a.ndim == 1, 0.4 if a.ndim > 1 else 0.1, a.shape), jnp.float32)
  return jax.tree.map(draw, families.abstract(config))


def tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)


@functools.cache
def run() -> decoder.Functions:
  return decoder.functions(jnp.float32)


@jax.jit
def block_fn(block, h):
  return run().block(block, h)[0]


head_fn = jax.jit(lambda top, h: run().head(top, h))


def logits_of(model, h):
  for block in model.blocks:
    h = block_fn(block, h)
  return head_fn(model.top, h)


# ---------------------------------------------------------------------------------------------------------------------
# What a position sees
# ---------------------------------------------------------------------------------------------------------------------


def test_no_position_sees_a_later_one_or_another_sequence():
  h = run().embed(model().top, jnp.asarray(tokens()))
  _, pull = jax.vjp(functools.partial(logits_of, model()), h)
  weight = np.random.default_rng(1).normal(size=CONFIG.vocab_size).astype(np.float32)
  for position in (0, 4, LENGTH - 1):
    chosen = np.zeros((BATCH, LENGTH, CONFIG.vocab_size), np.float32)
    chosen[1, position] = weight
    seen = np.abs(pull(chosen)[0]).max(-1)
    assert (seen[1, : position + 1] > 1e-4).all()
    assert not seen[1, position + 1 :].any()
    assert not seen[0].any()


def test_a_prefix_has_the_same_logits_as_in_the_whole():
  h = run().embed(model().top, jnp.asarray(tokens()))
  np.testing.assert_allclose(logits_of(model(), h[:, :5]), logits_of(model(), h)[:, :5], rtol=1e-4, atol=1e-4)


def test_the_order_of_earlier_tokens_matters():
  batch = tokens()
  swapped = batch.copy()
  swapped[:, [1, 4]] = batch[:, [4, 1]]
  last = [logits_of(model(), run().embed(model().top, jnp.asarray(b)))[:, -1] for b in (batch, swapped)]
  assert np.abs(last[0] - last[1]).max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def test_token_losses_are_the_cross_entropy_of_the_next_token():
  logits = (30 * np.random.default_rng(0).normal(size=(BATCH, LENGTH, 40))).astype(np.float32)
  found = decoder.token_losses(jnp.asarray(logits), jnp.asarray(tokens()))
  assert found.shape == (BATCH, LENGTH - 1)
  reference = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits)[:, :-1], jnp.asarray(tokens())[:, 1:])
  np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)
  wide = np.float64(logits)
  top = wide.max(-1, keepdims=True)
  log = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
  exact = -np.take_along_axis(log[:, :-1], tokens()[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_the_training_loss_adds_what_it_says():
  batch = jnp.asarray(tokens())
  loss = jax.jit(functools.partial(decoder.training_loss, dtype=jnp.float32), static_argnames="balance")
  total, metrics = loss(model(), batch, balance=0.5)
  logits = logits_of(model(), run().embed(model().top, batch))
  np.testing.assert_allclose(metrics["loss"], decoder.token_losses(logits, batch).mean(), rtol=1e-5)
  np.testing.assert_allclose(total, metrics["loss"] + 0.5 * metrics["balance"], rtol=1e-6)
  assert metrics["load"].shape == (CONFIG.num_hidden_layers, CONFIG.num_local_experts)
  np.testing.assert_allclose(metrics["load"].sum(-1), 1, rtol=1e-6)
  per_sequence = jax.jit(functools.partial(decoder.sequence_losses, dtype=jnp.float32))(model(), batch)
  assert per_sequence.shape == (BATCH,)
  np.testing.assert_allclose(per_sequence.mean(), metrics["loss"], rtol=1e-5)


def test_a_new_model_knows_nothing_and_is_made_from_its_seed():
  fresh, again, other = decoder.init(CONFIG, 3), decoder.init(CONFIG, 3), decoder.init(CONFIG, 4)
  losses = decoder.token_losses(logits_of(fresh, run().embed(fresh.top, jnp.asarray(tokens()))), jnp.asarray(tokens()))
  np.testing.assert_allclose(losses.mean(), np.log(CONFIG.vocab_size), atol=0.05)
  matrices = [leaf for leaf in jax.tree.leaves(fresh) if leaf.ndim > 1]
  np.testing.assert_allclose(np.concatenate([m.ravel() for m in matrices]).std(), 0.02, rtol=0.05)
  assert all(map(np.array_equal, jax.tree.leaves(fresh), jax.tree.leaves(again)))
  assert not np.array_equal(fresh.top.embedding[...], other.top.embedding[...])
  assert not np.array_equal(fresh.blocks[0].moe.router[...], fresh.blocks[1].moe.router[...])


def test_an_untied_model_has_an_output_matrix_of_its_own():
  untied = decoder.init(dataclasses.replace(CONFIG, tie_word_embeddings=False), 0)
  h = jnp.ones((1, 1, CONFIG.hidden_size))
  expected = np.asarray(h)[0] @ np.asarray(untied.top.output[...]).T  # the norm of ones is ones
  np.testing.assert_allclose(untied.top.logits(h)[0], expected, rtol=1e-4, atol=1e-6)
  assert not np.array_equal(untied.top.output[...], untied.top.embedding[...])


# ---------------------------------------------------------------------------------------------------------------------
# As stages see it
# ---------------------------------------------------------------------------------------------------------------------


def test_parameters_are_replaced_in_a_copy():
  block = model().blocks[0]
  before = jax.tree.map(np.asarray, block)
  other = run().with_router(block, 2 * run().router(block))
  changed = run().with_experts(other, {name: -value for name, value in run().experts(block).items()})
  assert all(map(np.array_equal, jax.tree.leaves(block), jax.tree.leaves(before)))
  np.testing.assert_array_equal(run().router(changed), 2 * run().router(block))
  assert sorted(run().experts(changed)) == ["down", "gate", "up"]
  for name, value in run().experts(block).items():
    np.testing.assert_array_equal(run().experts(changed)[name], -value)
  assert jax.tree.structure(changed) == jax.tree.structure(block)  # one compiled program for both
  h = run().embed(model().top, jnp.asarray(tokens()))
  np.testing.assert_array_equal(block_fn(run().with_router(block, run().router(block)), h), block_fn(block, h))


def test_blocks_of_a_kind_have_one_structure():
  assert len({jax.tree.structure(block) for block in model().blocks}) == 1
  first, sparse, windowed, last = (jax.tree.structure(block) for block in model(MIXED).blocks)
  assert sparse == last and len({first, sparse, windowed}) == 3


def test_which_blocks_are_sparse():
  assert [run().sparse(block) for block in model(MIXED).blocks] == [False, True, False, True]
  assert [MIXED.sparse(layer) for layer in range(4)] == [False, True, False, True]
  dense = dataclasses.replace(CONFIG, family="llama", num_local_experts=0)
  assert not any(dense.sparse(layer) for layer in range(2))
  assert families.abstract(dense).blocks[1].mlp.down.shape == (CONFIG.intermediate_size, CONFIG.hidden_size)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_is_its_parts(layer: int):
  """A sparse block is before, the experts one at a time, and after; a dense one has no routing."""
  block, h = model(MIXED).blocks[layer], jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
  whole, routing = jax.jit(lambda block, h: run().block(block, h))(block, h)
  if layer == 0:
    assert routing is None
    return
  pending, rows, ours = jax.jit(run().before)(block, h)
  assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(routing)))
  experts, y = run().experts(block), np.zeros(rows.shape, np.float32)
  for expert in range(MIXED.num_local_experts):
    token, place = np.nonzero(np.asarray(ours.experts) == expert)
    one = run().expert({name: w[expert] for name, w in experts.items()}, rows[token])
    y[token] += np.asarray(ours.weights)[token, place][:, None] * np.asarray(one)
  assert np.abs(y).max() > 0.1
  np.testing.assert_allclose(run().after(block, pending, y), whole, rtol=1e-4, atol=1e-4)


def test_parameters_have_the_names_that_are_agreed():
  attention = {f"attention/{n}{part}" for n in "qkv" for part in ("", "_bias")}
  attention |= {"attention/o", "attention/o_bias", "attention/q_norm", "attention/k_norm", "attention_norm", "ffn_norm"}
  dense = attention | {f"mlp/{n}" for n in ("gate", "up", "down")}
  sparse = attention | {f"moe/{n}" for n in ("router", "gate", "up", "down", "shared_gate", "shared/gate", "shared/up",
                                              "shared/down")}
  expected = {f"blocks/{l}/{n}" for l in range(4) for n in (sparse if l % 2 else dense)}
  shapes = {name: leaf.shape for name, leaf in convert.named_leaves(families.abstract(MIXED)).items()}
  assert shapes.keys() == expected | {"top/embedding", "top/norm", "top/output"}
  assert shapes["blocks/0/mlp/up"] == (16, 20) and shapes["blocks/1/moe/shared/down"] == (10, 16)
  assert shapes["blocks/1/moe/shared_gate"] == (1, 16) and shapes["blocks/1/moe/down"] == (4, 24, 16)


def test_functions_of_a_family_are_made_once():
  assert families.functions(CONFIG, "float32") is families.functions(MIXED, jnp.float32) is run()
  assert families.functions(CONFIG, "bfloat16").embed(model().top, jnp.asarray(tokens())).dtype == jnp.bfloat16
