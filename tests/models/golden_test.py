"""Parity with Hugging Face: what transformers and torch computed (tests/golden/make_mixtral.py), computed here."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moeq_jax.models import convert, decoder

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("mixtral_tied", "mixtral_untied")
TOLERANCE = 1e-4


@functools.cache
def run() -> decoder.Functions:
  return decoder.functions(jnp.float32)


@jax.jit
def block_fn(block, h):
  return run().block(block, h)


def forward(model: decoder.Decoder, tokens: np.ndarray):
  """`(logits [B, S, V], the routing of each layer)`."""
  h, routings = run().embed(model.top, jnp.asarray(tokens)), []
  for block in model.blocks:
    h, routing = block_fn(block, h)
    routings.append(routing)
  return np.asarray(run().head(model.top, h)), routings


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest):
  directory = GOLDEN / request.param
  model, _ = convert.load(directory)
  expected = safetensors.numpy.load_file(directory / "expected.safetensors")
  return model, expected, *forward(model, expected["tokens"])


def test_the_logits_are_those_of_transformers(case):
  _, expected, logits, _ = case
  assert expected["logits"].std() > 0.5  # not a comparison of zeros
  np.testing.assert_allclose(logits, expected["logits"], rtol=TOLERANCE, atol=TOLERANCE)


def test_every_layer_chooses_the_experts_of_transformers(case):
  _, expected, _, routings = case
  for index, routing in enumerate(routings):
    np.testing.assert_array_equal(routing.experts, expected[f"experts.{index}"])
    np.testing.assert_allclose(routing.weights, expected[f"weights.{index}"], atol=1e-5)
    used = np.bincount(expected[f"experts.{index}"].ravel(), minlength=4)
    np.testing.assert_array_equal(routing.group_sizes, used)
    assert used.min() > 0


def test_the_losses_follow_from_the_logits_of_transformers(case):
  _, expected, _, _ = case
  wide, tokens = expected["logits"].astype(np.float64), expected["tokens"]
  log_p = wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
  losses = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  ours = decoder.token_losses(jnp.asarray(expected["logits"]), jnp.asarray(tokens))
  np.testing.assert_allclose(ours, losses, rtol=1e-5)


def test_the_files_tell_wrong_positions_and_swapped_projections_apart():
  model, _ = convert.load(GOLDEN / "mixtral_tied")
  expected = safetensors.numpy.load_file(GOLDEN / "mixtral_tied" / "expected.safetensors")
  error = lambda: np.abs(forward(model, expected["tokens"])[0] - expected["logits"]).max()
  moe = model.blocks[1].moe
  moe.gate, moe.up = moe.up, moe.gate
  assert error() > 100 * TOLERANCE
  moe.gate, moe.up = moe.up, moe.gate
  assert error() <= TOLERANCE
  model.blocks[1].attention.theta *= 2
  assert error() > 100 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_saving_gives_back_the_tensors_of_transformers(name: str, tmp_path: Path):
  model, config = convert.load(GOLDEN / name)
  convert.save(tmp_path, model, config)
  original = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
  ours = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert ours.keys() == original.keys()
  for tensor, value in original.items():
    assert ours[tensor].dtype == value.dtype
    assert ours[tensor].tobytes() == value.tobytes(), tensor


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_config_says_what_that_of_transformers_says(name: str, tmp_path: Path):
  model, config = convert.load(GOLDEN / name)
  convert.save(tmp_path, model, config)
  theirs = json.loads((GOLDEN / name / "config.json").read_text())
  ours = json.loads((tmp_path / "config.json").read_text())
  unread = {"transformers_version", "initializer_range", "output_router_logits", "pad_token_id", "router_aux_loss_coef",
            "router_jitter_noise"}
  assert {k: v for k, v in theirs.items() if k not in unread} == {**ours, "head_dim": theirs["head_dim"]}
  assert ours["head_dim"] == (theirs["head_dim"] or theirs["hidden_size"] // theirs["num_attention_heads"])
