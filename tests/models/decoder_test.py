"""The decoder: what a position may see, rotary positions, losses, and configs as Hugging Face writes them."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moeq_jax.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2)
GOLDEN = Path(__file__).parents[1] / "golden" / "mixtral_tied" / "config.json"
BATCH, LENGTH = 2, 9


@functools.cache
def model() -> decoder.Decoder:
  return jax.tree.map(lambda a: a * (20 if a.ndim > 1 else 1), decoder.init(CONFIG, 0))


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
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------------


def test_rotation_is_that_of_complex_numbers():
  x, theta = np.random.default_rng(0).normal(size=(1, 7, 2, 8)).astype(np.float32), 100.0
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(7)[:, None, None] * theta ** (-np.arange(4) / 4))
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(decoder.rotate(jnp.asarray(x), theta), expected, atol=1e-5)


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = (np.broadcast_to(rng.normal(size=10).astype(np.float32), (1, 12, 1, 10)) for _ in range(2))
  turn = lambda a: np.asarray(decoder.rotate(jnp.asarray(a), 50.0), np.float64)[0, :, 0]
  scores = turn(q) @ turn(k).T
  np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4)
  assert np.std(scores[0]) > 0.1
  np.testing.assert_allclose(turn(q)[0], q[0, 0, 0], atol=1e-7)


def test_rotation_keeps_the_dtype():
  x = jnp.ones((1, 300, 1, 4), jnp.bfloat16)
  turned = decoder.rotate(x, 1e4)
  assert turned.dtype == jnp.bfloat16
  angle = np.arange(300)  # angles in bfloat16 would be wrong from 256 on
  np.testing.assert_allclose(np.float32(turned[0, :, 0, 0]), np.cos(angle) - np.sin(angle), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def test_dense_and_its_gradients():
  rng = np.random.default_rng(0)
  x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 4), (2, 3, 4)))
  y, pull = jax.vjp(decoder.dense, jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(y, np.float64(x) @ w, rtol=1e-5, atol=1e-5)
  dx, dw = pull(jnp.asarray(dy))
  np.testing.assert_allclose(dx, np.float64(dy) @ w.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, np.einsum("bsk,bsn->kn", np.float64(x), dy), rtol=1e-5, atol=1e-5)


def test_dense_sums_the_gradient_of_the_weight_in_float32():
  """2049 is no bfloat16; the weight keeps its own dtype, the rows theirs."""
  x, w = jnp.ones((3, 683, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.float32)
  y, pull = jax.vjp(decoder.dense, x, w)
  dx, dw = pull(jnp.ones_like(y))
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(dw, np.full((3, 2), 2049.0))


def test_rms_norm():
  rng = np.random.default_rng(0)
  x, weight = 100 * rng.normal(size=(2, 3, 8)), rng.normal(size=8)
  expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.5) * weight
  found = decoder.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 0.5)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert decoder.rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), 0.5).dtype == jnp.bfloat16


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
  untied = decoder.init(decoder.DecoderConfig(**{**vars(CONFIG), "tie_word_embeddings": False}), 0)
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


def test_all_blocks_have_one_structure():
  assert len({jax.tree.structure(block) for block in model().blocks}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def values(**changes) -> dict:
  """The golden config with fields replaced; those set to `...` are left out."""
  merged = json.loads(GOLDEN.read_text()) | changes
  return {name: value for name, value in merged.items() if value is not ...}


def test_a_config_of_transformers_5():
  config = decoder.from_config(values(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))
  assert config.rope_theta == 5e5
  assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (32, 16, 2)
  assert config.tie_word_embeddings


def test_a_config_of_transformers_4():
  assert decoder.from_config(values(rope_parameters=..., rope_theta=2e4)).rope_theta == 2e4


@pytest.mark.parametrize("head_dim", [None, ...])
def test_the_head_size_follows_from_the_hidden_size(head_dim):
  assert decoder.from_config(values(head_dim=head_dim)).head_dim == 8


def test_what_a_config_leaves_out_is_what_transformers_takes():
  config = decoder.from_config(values(rope_parameters=..., tie_word_embeddings=..., rms_norm_eps=...))
  assert (config.rope_theta, config.tie_word_embeddings, config.rms_norm_eps) == (1e6, False, 1e-5)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model_type": "llama"}, "model_type is 'llama'; supported: 'mixtral'"),
    ({"model_type": ...}, "model_type is None"),
    ({"sliding_window": 4096}, "sliding_window is set"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn' is not supported"),
    ({"vocab_size": ...}, "vocab_size is None; a whole number is needed"),
    ({"hidden_size": ..., "head_dim": None}, "hidden_size is None; a whole number is needed"),
    ({"num_local_experts": "8"}, "num_local_experts is '8'; a whole number is needed"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is not between 1 and num_local_experts 4"),
])
def test_what_is_wrong_with_a_config_is_named(changes: dict, said: str):
  with pytest.raises(ValueError, match=f"config.json: .*{said}"):
    decoder.from_config(values(**changes))
