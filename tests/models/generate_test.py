"""Generation: against forward passes without a cache, sampling by its frequencies, stopping, and packed experts.

Parity with transformers is in golden_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import qtensor
from moeq_jax.assemble import apply
from moeq_jax.models import generate, layers
from tests import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [300, 2], [17, 18, 19, 20, 21]]
NEW = 6


def run(prompts=PROMPTS, blocks=None, **options) -> list[list[int]]:
  options = {"max_new_tokens": NEW} | options
  return generate.generate(tiny.CONFIG, tiny.functions(), tiny.model().top, blocks or list(tiny.model().blocks),
                           prompts, **options)


@functools.cache
def greedy() -> list[list[int]]:
  return run()


@jax.jit
def logits(blocks, tokens):
  h = tiny.functions().embed(tiny.model().top, tokens)
  for block in blocks:
    h, _ = tiny.functions().block(block, h)
  return tiny.functions().head(tiny.model().top, h)


def is_greedy(blocks, new: list[list[int]]) -> bool:
  """Whether each new token is the most probable one after those before it, by a forward pass without a cache."""
  longest = max(map(len, PROMPTS)) + NEW
  tokens = np.zeros((len(PROMPTS), longest), np.int32)
  for row, prompt, more in zip(tokens, PROMPTS, new, strict=True):
    row[: len(prompt) + NEW] = prompt + more
  best = np.asarray(logits(blocks, tokens)).argmax(-1)
  return all((best[row, len(prompt) - 1 : len(prompt) + NEW - 1] == new[row]).all()
             for row, prompt in enumerate(PROMPTS))


# ---------------------------------------------------------------------------------------------------------------------
# Greedy
# ---------------------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_a_forward_pass():
  assert [len(row) for row in greedy()] == [NEW] * 3
  assert is_greedy(list(tiny.model().blocks), greedy())
  assert not is_greedy(list(tiny.model().blocks), [greedy()[1], greedy()[0], greedy()[2]])


def test_rows_do_not_depend_on_their_neighbours():
  assert run(PROMPTS[::-1]) == greedy()[::-1]
  assert run([PROMPTS[1], PROMPTS[1], PROMPTS[0]]) == [greedy()[1], greedy()[1], greedy()[0]]


def test_packed_experts_generate_what_their_values_generate():
  packed = tiny.packed()
  values = [{name: qtensor.dequantize(jax.tree.map(jnp.asarray, q)) for name, q in layer.items()} for layer in packed]
  new, dense = (run(blocks=apply.quantized_blocks(tiny.functions(), tiny.model().blocks, experts))
                for experts in (packed, values))
  assert new == dense != greedy()  # the plan goes down to one bit


def test_a_prompt_may_end_where_the_cache_gets_larger():
  """31 tokens and one more fill a cache of 32, with two more it has 64 slots; the tokens are the same."""
  assert [layers.size_class(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
  prompts = [list(range(10, 41)), list(range(50, 60)), [3]]
  first, more = run(prompts, max_new_tokens=1), run(prompts, max_new_tokens=3)
  assert [row[:1] for row in more] == first


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_draws_follow_from_the_seed_the_row_and_nothing_else():
  drawn = run(temperature=1.5, seed=3)
  assert drawn == run(temperature=1.5, seed=3)
  assert drawn != run(temperature=1.5, seed=4) and drawn != greedy()
  assert run([PROMPTS[0], PROMPTS[0], PROMPTS[2]], temperature=1.5, seed=3)[0] == drawn[0]
  twins = run([PROMPTS[0]] * 3, temperature=1.5, seed=3)
  assert twins[0] == drawn[0] and twins[0] != twins[1]
  assert run(temperature=1.5, seed=3, max_new_tokens=2) == [row[:2] for row in drawn]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-300])
def test_a_low_temperature_takes_the_most_probable_token(temperature: float):
  assert run(temperature=temperature, seed=1) == greedy()


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_any_seed_of_64_bits_will_do(seed: int):
  assert run(temperature=1.5, seed=seed) == run(temperature=1.5, seed=seed) != greedy()


def test_tokens_are_drawn_with_their_probabilities():
  rng = np.random.default_rng(0)
  row, rows, temperature = rng.normal(0, 2, 12).astype(np.float32), 20_000, 0.7
  options = {"key": jax.random.key(0), "temperature": jnp.float32(temperature), "greedy": False}
  choose = functools.partial(generate._choose, **options)
  drawn = np.asarray(choose(jnp.tile(row, (rows, 1)), step=jnp.int32(0)))
  probability = tiny.softmax(np.float64(row) / temperature)
  error = np.bincount(drawn, minlength=12) / rows - probability
  assert (np.abs(error) < 4.5 * np.sqrt(probability / rows) + 1e-4).all()
  again = np.asarray(choose(jnp.tile(row, (rows, 1)), step=jnp.int32(1)))
  np.testing.assert_allclose(np.mean(drawn == again), (probability**2).sum(), atol=0.02)  # steps are independent


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, and what cannot be
# ---------------------------------------------------------------------------------------------------------------------


def until(row: list[int], stop: set[int]) -> list[int]:
  ends = [i for i, token in enumerate(row) if token in stop]
  return row[: ends[0] + 1] if ends else row


def test_an_end_token_ends_its_row_alone():
  stop = greedy()[0][2]
  found = run(eos=stop)
  assert found == [until(row, {stop}) for row in greedy()]
  assert len(found[0]) <= 3 < max(map(len, found))


def test_generation_stops_when_all_rows_have_ended():
  stop, steps = [row[1] for row in greedy()], []
  found = run(eos=stop, watch=steps.append)
  assert found == [until(row, set(stop)) for row in greedy()]
  assert max(map(len, found)) == len(steps) == 2


def test_who_watches_sees_every_step_and_may_end_rows():
  seen = []

  def watch(tokens: np.ndarray) -> np.ndarray | None:
    seen.append(tokens.tolist())
    return np.array([True, len(seen) > 1, len(seen) > 3]) if len(seen) != 3 else None

  found = run(watch=watch)
  assert found == np.transpose(seen).tolist() == [row[:4] for row in greedy()]


def test_no_prompts_give_no_rows():
  assert run([]) == []


@pytest.mark.parametrize(("prompts", "options", "said"), [
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1, 320]], {}, "prompt 0: token 320 is not in the vocabulary of 320"),
    ([[-1]], {}, "prompt 0: token -1 is not in the vocabulary"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
    ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ([[1]], {"seed": 2**63}, "seed=9223372036854775808: a whole number of 64 bits"),
])
def test_arguments_that_make_no_sense_are_named(prompts: list[list[int]], options: dict, said: str):
  with pytest.raises(generate.GenerationError, match=said):
    run(prompts, **options)


def test_a_step_with_packed_experts_never_makes_them_dense():
  packed = apply.quantized_blocks(tiny.functions(), list(tiny.model().blocks), tiny.packed())
  h, first = jnp.zeros((2, 1, 64)), jnp.zeros(2, jnp.int32)
  cache = packed[0].attention.empty(2, 16, jnp.float32)
  step = generate._block.lower(packed[0], h, cache, first).compile()
  experts = 6 * 64 * 96 * 4  # bytes of one projection in float32
  assert step.memory_analysis().temp_size_in_bytes < experts
  assert step.memory_analysis().argument_size_in_bytes < experts  # of three projections, packed
