"""Parity of Switch Transformer with Hugging Face: what transformers computed (tests/golden/make_switch.py)."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moeq_jax.models import convert, families, generate, moe, switch, switch_generate
from tests.golden import switches

TOLERANCE = 2e-4
OVERFLOWING = ("untied", "crowded")
MODES = [("roomy", "call"), ("untied", "call"), ("untied", "sequence"), ("crowded", "call"), ("crowded", "sequence")]


class Case(NamedTuple):
  """A golden model, opened, and what is expected of it."""

  config: switch.SwitchConfig
  model: switch.Switch
  expected: dict[str, np.ndarray]

  @property
  def batch(self) -> dict[str, np.ndarray]:
    return {name: self.expected[name] for name in ("inputs", "targets")}

  @property
  def real(self) -> np.ndarray:
    return self.expected["targets"] >= 0

  def functions(self, capacity: str) -> switch.Functions:
    return families.functions(self.config, "float32", capacity=capacity)

  def prompts(self) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(self.expected["inputs"], switches.INPUTS, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
  """Programs that run once or twice are compiled without optimizations, which take longer than they save."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory):
  """`name -> Case`, each loaded once from a checkpoint as transformers saves it."""

  @functools.cache
  def load(name: str) -> Case:
    model, config = convert.load(switches.checkpoint(name, tmp_path_factory.mktemp(name)))
    return Case(config, model, switches.expected(name))

  return load


embed_fn, block_fn, head_fn = (
    jax.jit(lambda functions, *args, name=name: getattr(functions, name)(*args), static_argnums=0)
    for name in ("embed", "block", "head"))


def forward(functions: switch.Functions, model: switch.Switch,
            batch: dict[str, np.ndarray]) -> tuple[np.ndarray, list[moe.Routing]]:
  """Logits `[B, T, V]`, and the routing of each sparse block."""
  state, routings = embed_fn(functions, model.top, batch), []
  for block in model.blocks:
    state, routing = block_fn(functions, block, state)
    routings += [] if routing is None else [routing]
  return np.asarray(head_fn(functions, model.top, state)), routings


def error(case: Case, logits: np.ndarray, name: str) -> float:
  """The largest difference from the expected logits at what is not padding."""
  return np.abs(np.asarray(logits) - case.expected[name])[case.real].max()


@pytest.mark.parametrize("name", switches.MODELS)
def test_logits_and_routing_are_those_of_one_pass(opened, name: str):
  case = opened(name)
  logits, routings = forward(case.functions("sequence"), case.model, case.batch)
  assert case.expected["logits_sequence"].std() > 0.5  # not a comparison of zeros
  assert error(case, logits, "logits_sequence") <= TOLERANCE
  dropped = 0
  for index, routing in enumerate(routings):
    experts, kept = case.expected[f"experts.{index}"], case.expected[f"kept.{index}"]
    real = case.expected["inputs"] != 0 if kept.shape == case.expected["inputs"].shape else case.real
    np.testing.assert_array_equal(np.asarray(routing.experts).reshape(real.shape)[real], experts[real])
    np.testing.assert_array_equal(np.asarray(routing.weights > 0).reshape(real.shape), kept & real)
    dropped += np.sum(real & ~kept)
  assert len(routings) == len([key for key in case.expected if key.startswith("kept")])
  assert (dropped > 20) == (name in OVERFLOWING)


def test_logits_of_a_call_for_each_token(opened):
  case = opened("untied")
  logits, _ = forward(case.functions("call"), case.model, case.batch)
  assert error(case, logits, "logits_call") <= TOLERANCE
  assert error(case, logits, "logits_sequence") > 1


@pytest.mark.parametrize(("name", "capacity"), MODES)
def test_logits_with_a_cache(opened, name: str, capacity: str):
  """The same tokens one at a time: counting goes on from call to call, or begins anew."""
  case, decoding = opened(name), switch_generate.CachedSwitch()
  run = case.functions(capacity), case.model.top, list(case.model.blocks)
  first, state = decoding.prefill(*run, case.prompts(), switches.NEW)
  logits = [first]
  for tokens in np.maximum(case.batch["targets"], 0).T[:-1]:
    following, state = decoding.step(*run, tokens, state)
    logits.append(following)
  assert error(case, np.stack(logits, axis=1), f"logits_{capacity}") <= TOLERANCE


@pytest.mark.parametrize("name", OVERFLOWING)
def test_padding_on_the_left_displaces_tokens_in_transformers_but_not_here(opened, name: str):
  case = opened(name)
  left = [np.roll(row, len(row) - length) for row, length in zip(case.batch["inputs"], switches.INPUTS, strict=True)]
  logits, _ = forward(case.functions("sequence"), case.model, case.batch | {"inputs": np.stack(left)})
  assert error(case, case.expected["logits_left"], "logits_sequence") > 0.1
  assert error(case, logits, "logits_sequence") <= TOLERANCE


@pytest.mark.parametrize(("name", "capacity"), MODES)
def test_greedy_texts_are_the_same(opened, name: str, capacity: str):
  case = opened(name)
  texts = generate.generate(case.config, case.functions(capacity), case.model.top, list(case.model.blocks),
                            case.prompts(), max_new_tokens=switches.NEW)
  np.testing.assert_array_equal(texts, case.expected[f"greedy_{capacity}"])


def test_the_greedy_texts_tell_the_modes_apart(opened):
  for name in switches.MODELS:
    both = [opened(name).expected[f"greedy_{capacity}"] for capacity in ("sequence", "call")]
    assert (np.mean(both[0] != both[1]) > 0.2) == (name in OVERFLOWING)
    assert max(len(set(row.tolist())) for row in both[1]) > 5


def test_the_files_tell_wrong_programs_apart(opened):
  case = opened("untied")
  functions = case.functions("sequence")

  def wrong(change) -> float:
    model = jax.tree.map(lambda leaf: leaf, case.model)
    change(model)
    return error(case, forward(functions, model, case.batch)[0], "logits_sequence")

  def swap(model):
    top = model.top
    top.encoder_embedding, top.decoder_embedding = top.decoder_embedding, top.encoder_embedding

  def bias(model):
    top = model.top
    top.encoder_bias, top.decoder_bias = top.decoder_bias, top.encoder_bias

  def norm(model):
    model.blocks[1].final_norm = model.blocks[1].ffn_norm

  def cross(model):
    model.blocks[3].cross = model.blocks[3].attention

  assert wrong(lambda model: None) <= TOLERANCE
  for change in (swap, bias, norm, cross):
    assert wrong(change) > 100 * TOLERANCE, change.__name__
