"""Rotary positions: the rotation as complex numbers, and the kinds of frequencies by what defines them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_jax.models import rope

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def made(head_dim: int = 8, theta: float = 100.0, positions: int = 512, **scaling) -> rope.Rope:
  return rope.Rope(head_dim, theta, positions, tuple(scaling.items()))


def turns(frequencies: np.ndarray, context: int) -> np.ndarray:
  """Full turns over the context."""
  return frequencies * context / (2 * np.pi)


# ---------------------------------------------------------------------------------------------------------------------
# The rotation
# ---------------------------------------------------------------------------------------------------------------------


def test_rotation_is_that_of_complex_numbers():
  rng = np.random.default_rng(0)
  x, positions = rng.normal(size=(3, 7, 2, 8)).astype(np.float32), rng.integers(0, 50, (3, 7))
  angle = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(rope.rotate(jnp.asarray(x), jnp.asarray(positions), made()), expected, atol=3e-5)


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = (np.broadcast_to(rng.normal(size=10).astype(np.float32), (1, 12, 1, 10)) for _ in range(2))
  turned = made(10, 50.0)
  turn = lambda a: np.asarray(rope.rotate(jnp.asarray(a), jnp.arange(12)[None], turned), np.float64)[0, :, 0]
  scores = turn(q) @ turn(k).T
  np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4)
  assert np.std(scores[0]) > 0.1
  np.testing.assert_allclose(turn(q)[0], q[0, 0, 0], atol=1e-7)


def test_rotation_keeps_the_dtype():
  x = jnp.ones((1, 300, 1, 4), jnp.bfloat16)
  turned = rope.rotate(x, jnp.arange(300)[None], made(4, 1e4))
  assert turned.dtype == jnp.bfloat16
  angle = np.arange(300)  # angles in bfloat16 would be wrong from 256 on
  np.testing.assert_allclose(np.float32(turned[0, :, 0, 0]), np.cos(angle) - np.sin(angle), atol=1e-2)


def test_yarn_makes_queries_and_keys_longer():
  x = np.random.default_rng(0).normal(size=(1, 5, 1, 8)).astype(np.float32)
  turned = rope.rotate(jnp.asarray(x), jnp.arange(5)[None], made(**YARN))
  np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), (0.1 * np.log(4) + 1) * np.linalg.norm(x, axis=-1),
                             rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Frequencies
# ---------------------------------------------------------------------------------------------------------------------


def test_linear_frequencies_put_positions_closer():
  scaled = made(rope_type="linear", factor=2.5)
  np.testing.assert_allclose(scaled.frequencies, made().frequencies / 2.5)
  assert scaled.amplitude == made().amplitude == 1


def test_llama3_slows_what_turns_too_rarely_and_keeps_what_turns_often():
  plain, scaled = made(64, 1e4).frequencies, made(64, 1e4, **LLAMA3).frequencies
  often, rarely = turns(plain, 64) > 4, turns(plain, 64) < 1
  assert often.any() and rarely.any() and not (often | rarely).all()
  np.testing.assert_array_equal(scaled[often], plain[often])
  np.testing.assert_allclose(scaled[rarely], plain[rarely] / 8)
  between = ~(often | rarely)
  assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_llama3_at_a_point_between():
  """A pair that makes 2.5 turns of 1 to 4 is half kept and half slowed."""
  frequency = 2 * np.pi * 2.5 / 64
  scaled = made(4, float(frequency**-2), **LLAMA3).frequencies  # theta ** -(1 / 2)
  np.testing.assert_allclose(scaled[1], 0.5 * frequency + 0.5 * frequency / 8)


def test_yarn_slows_what_turns_too_rarely_and_keeps_what_turns_often():
  plain, scaled = made(64, 1e4).frequencies, made(64, 1e4, **YARN, beta_fast=6, beta_slow=0.5).frequencies
  often, rarely = turns(plain, 64) > 6 * 1.4, turns(plain, 64) < 0.5 / 1.4  # the edges are rounded to whole pairs
  assert often.any() and rarely.any() and not (often | rarely).all()
  np.testing.assert_allclose(scaled[often], plain[often])
  np.testing.assert_allclose(scaled[rarely], plain[rarely] / 4)
  ratio = scaled / plain
  blended = ratio[(ratio < 1 - 1e-9) & (ratio > 0.25 + 1e-9)]
  assert len(blended) > 4
  np.testing.assert_allclose(np.diff(blended), blended[1] - blended[0])  # linear in the index of the pair


def test_yarn_with_edges_that_are_not_rounded():
  exact, rounded = (made(64, 1e4, **YARN, truncate=truncate).frequencies for truncate in (False, True))
  assert np.abs(exact / rounded - 1).max() > 0.01


@given(st.sampled_from(["llama3", "yarn"]), st.integers(2, 40), st.floats(10, 1e6), st.floats(1, 64),
       st.integers(8, 4096))
def test_scaled_frequencies_stay_between_kept_and_slowed(kind: str, half: int, theta: float, factor: float,
                                                         context: int):
  options = {**(LLAMA3 if kind == "llama3" else YARN), "factor": factor, "original_max_position_embeddings": context}
  plain, scaled = made(2 * half, theta).frequencies, made(2 * half, theta, **options).frequencies
  assert (scaled <= plain * (1 + 1e-9)).all() and (scaled >= plain / factor * (1 - 1e-9)).all()
  assert (np.diff(scaled) <= 0).all()


@pytest.mark.parametrize(("options", "amplitude"), [
    ({}, 0.1 * np.log(4) + 1),
    ({"factor": 0.5}, 1),
    ({"attention_factor": 1.25}, 1.25),
    ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)),
    ({"mscale": 0.7}, 0.1 * np.log(4) + 1),
])
def test_the_amplitude_of_yarn(options: dict, amplitude: float):
  np.testing.assert_allclose(made(**{**YARN, **options}).amplitude, amplitude)


def test_the_context_before_scaling_is_by_default_that_of_the_config():
  options = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
  np.testing.assert_array_equal(made(64, 1e4, 64, **options).frequencies, made(64, 1e4, 512, **LLAMA3).frequencies)


@pytest.mark.parametrize(("options", "said"), [
    ({"rope_type": "longrope"}, "rope_type 'longrope' is not supported; expected one of default, linear, llama3, yarn"),
    ({"rope_type": "linear"}, "rope_type 'linear' needs factor"),
    ({**YARN, "factor": None}, "rope_type 'yarn' needs factor"),
    ({**LLAMA3, "low_freq_factor": None}, "rope_type 'llama3' needs low_freq_factor"),
])
def test_kinds_that_cannot_be_computed_are_named(options: dict, said: str):
  with pytest.raises(ValueError, match=said):
    made(**options).frequencies  # noqa: B018
