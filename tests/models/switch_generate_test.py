"""Decoding of Switch Transformers with a cache, one token at a time: against full forward passes over the same tokens.

Parity with transformers is in switch_golden_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.models import generate, switch, switch_generate
from tests import tiny_switch

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [30, 2], [17]]
TARGETS = np.random.default_rng(0).integers(1, tiny_switch.CONFIG.vocab_size, (len(PROMPTS), 9)).astype(np.int32)
ROOM = 64  # more than there are tokens in a row: no expert overflows


@functools.cache
def model(capacity: int) -> switch.Switch:
  """`tiny_switch.model()` whose experts take so many tokens of a sequence."""
  copy = jax.tree.map(lambda leaf: leaf, tiny_switch.model())
  for block in copy.blocks:
    if hasattr(block, "moe"):
      block.moe.capacity = capacity
  return copy


@functools.partial(jax.jit, static_argnums=0)
def run(functions: switch.Functions, tree: switch.Switch, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Logits `[B, T, V]` of one pass, and how many tokens of the decoder's stream experts did not take."""
  state, dropped = functions.embed(tree.top, batch), jnp.int32(0)
  for block in tree.blocks:
    state, routing = functions.block(block, state)
    if routing is not None and block.stack == "decoder":
      dropped += jnp.sum(routing.weights == 0)
  return functions.head(tree.top, state), dropped


def forward(mode: str, capacity: int) -> tuple[np.ndarray, int]:
  batch = switch.batch(PROMPTS, TARGETS.tolist(), tiny_switch.CONFIG)
  logits, dropped = run(switch.functions(jnp.float32, mode), model(capacity), batch)
  return np.asarray(logits), int(dropped)


def decoded(mode: str, capacity: int) -> np.ndarray:
  """The same logits, a token of each row at a time."""
  functions, decoding = switch.functions(jnp.float32, mode), switch_generate.CachedSwitch()
  parts = functions, model(capacity).top, list(model(capacity).blocks)
  logits, state = decoding.prefill(*parts, PROMPTS, TARGETS.shape[1])
  found = [logits]
  for tokens in TARGETS.T[:-1]:
    logits, state = decoding.step(*parts, jnp.asarray(tokens), state)
    found.append(logits)
  return np.stack(found, axis=1)


@pytest.mark.parametrize("mode", switch.CAPACITY)
def test_where_no_expert_overflows_decoding_agrees_with_a_full_forward_in_every_mode(mode: str):
  full, dropped = forward("sequence", ROOM)
  assert dropped == 0 and full.std() > 0.3
  np.testing.assert_allclose(decoded(mode, ROOM), full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", switch.CAPACITY)
def test_where_experts_overflow_decoding_agrees_with_a_full_forward_in_its_own_mode(mode: str):
  (full, dropped), (sequence, _) = forward(mode, 2), forward("sequence", 2)
  assert (dropped > 5) == (mode == "sequence")
  np.testing.assert_allclose(decoded(mode, 2), full, rtol=0, atol=2e-5)
  assert (np.abs(full - sequence).max() > 0.1) == (mode != "sequence")


def test_greedy_texts_are_those_of_full_forwards_over_the_growing_text():
  functions, config = switch.functions(jnp.float32, "sequence"), tiny_switch.CONFIG
  texts = generate.generate(config, functions, model(2).top, list(model(2).blocks), PROMPTS, max_new_tokens=9)
  logits, dropped = run(functions, model(2), switch.batch(PROMPTS, texts, config))
  assert dropped > 5
  np.testing.assert_array_equal(np.argmax(logits, axis=-1), texts)
