"""Parity with Hugging Face: what transformers computed for small random decoders (tests/golden/make_decoders.py)."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from moeq_jax.models import convert, decoder, families, generate
from tests.golden import decoders

TOLERANCE = 2e-4
REAL = np.arange(max(decoders.LENGTHS))[None] < np.array(decoders.LENGTHS)[:, None]  # [B, S], not padding


class Case(NamedTuple):
  """A golden model, opened, and what is expected of it."""

  config: decoder.DecoderConfig
  model: decoder.Decoder
  expected: dict[str, np.ndarray]

  def functions(self) -> decoder.Functions:
    return families.functions(self.config, "float32")

  def prompts(self) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(self.expected["tokens"], decoders.LENGTHS, strict=True)]

  def generate(self, prompts: list[list[int]]) -> list[list[int]]:
    return generate.generate(self.config, self.functions(), self.model.top, list(self.model.blocks), prompts,
                             max_new_tokens=decoders.NEW)


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
  """Sixty programs run a few times each: most of the compiler's optimizations are left out, which halves the time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory):
  """`name -> Case`, each loaded once from a checkpoint as transformers saves it."""

  @functools.cache
  def load(name: str) -> Case:
    model, config = convert.load(decoders.checkpoint(name, tmp_path_factory.mktemp(name)))
    return Case(config, model, decoders.expected(name))

  return load


@functools.partial(jax.jit, static_argnums=0)
def _embed(functions: decoder.Functions, top: decoder.Top, tokens: jax.Array) -> jax.Array:
  return functions.embed(top, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _block(functions: decoder.Functions, block: decoder.Block, h: jax.Array):
  return functions.block(block, h)


@functools.partial(jax.jit, static_argnums=0)
def _head(functions: decoder.Functions, top: decoder.Top, h: jax.Array) -> jax.Array:
  return functions.head(top, h)


def forward(case: Case, model: decoder.Decoder | None = None, tokens: np.ndarray | None = None):
  """Logits `[sum(LENGTHS), V]` at the places that are not padding, and the routing of each layer."""
  functions, model, routings = case.functions(), model or case.model, []
  h = _embed(functions, model.top, case.expected["tokens"] if tokens is None else tokens)
  for block in model.blocks:
    h, routing = _block(functions, block, h)
    routings.append(routing)
  return np.asarray(_head(functions, model.top, h))[REAL], routings


def error(case: Case, model: decoder.Decoder | None = None) -> float:
  return np.abs(forward(case, model)[0] - case.expected["logits"]).max()


@pytest.mark.parametrize("name", decoders.MODELS)
def test_logits_and_routing_are_those_of_transformers(opened, name: str):
  case = opened(name)
  logits, routings = forward(case)
  assert case.expected["logits"].std() > 0.5  # not a comparison of zeros
  np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=TOLERANCE)
  for layer, routing in enumerate(routings):
    assert (routing is None) == (f"experts.{layer}" not in case.expected) == (not case.config.sparse(layer))
    if routing is not None:
      np.testing.assert_array_equal(np.asarray(routing.experts)[REAL.ravel()], case.expected[f"experts.{layer}"])
      np.testing.assert_allclose(np.asarray(routing.weights)[REAL.ravel()], case.expected[f"weights.{layer}"],
                                 atol=1e-5)


@pytest.mark.parametrize("name", decoders.MODELS)
def test_what_stands_in_the_padding_does_not_matter(opened, name: str):
  case = opened(name)
  other = np.where(REAL, case.expected["tokens"], np.random.default_rng(0).integers(0, 64, REAL.shape, np.int32))
  assert (other != case.expected["tokens"]).any()
  np.testing.assert_allclose(forward(case, tokens=other)[0], forward(case)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", decoders.MODELS)
def test_greedy_tokens_are_those_of_transformers(opened, name: str):
  """The rows stand in one padded batch here; transformers continued each alone."""
  case = opened(name)
  assert np.unique(case.expected["generated"]).size > 10
  np.testing.assert_array_equal(case.generate(case.prompts()), case.expected["generated"])


def test_a_row_alone_gives_what_it_gives_in_a_batch(opened):
  case = opened("olmoe_clip")
  for row in (0, 2):
    assert case.generate(case.prompts()[row : row + 1])[0] == case.expected["generated"][row].tolist()


def _swap_projections(block: decoder.Block) -> None:
  block.moe.gate, block.moe.up = block.moe.up, block.moe.gate


def _set(part: str, name: str, value: Any):
  return lambda block: setattr(getattr(block, part), name, value)


def _rescale(**changes: Any):
  def change(block: decoder.Block) -> None:
    rope = block.attention.rope
    block.attention.rope = dataclasses.replace(rope, scaling=tuple((dict(rope.scaling) | changes).items()))

  return change


@pytest.mark.parametrize(("name", "change"), [
    ("mixtral_tied", _swap_projections),
    ("mixtral_window", _set("attention", "window", 7)),
    ("qwen2_moe", _set("moe", "normalize", True)),
    ("olmoe_clip", _set("attention", "clip", None)),
    ("llama_tied", _rescale(rope_type="default")),
    ("llama_bias", _rescale(truncate=True)),
])
def test_the_files_tell_a_wrong_model_apart(opened, name: str, change):
  case = opened(name)
  copy = jax.tree.map(lambda leaf: leaf, case.model)
  change(copy.blocks[1])
  assert error(case, copy) > 100 * TOLERANCE
