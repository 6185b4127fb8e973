"""Calibration against float64 numpy, `jax.grad`, and gradients of added perturbations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.calibrate import statistics
from moeq_jax.models import convert, decoder
from tests import tiny

LAYERS, EXPERTS = tiny.CONFIG.num_hidden_layers, tiny.CONFIG.num_local_experts
CHANNELS = {"gate": tiny.CONFIG.intermediate_size, "up": tiny.CONFIG.intermediate_size, "down": tiny.CONFIG.hidden_size}


@functools.cache
def oracle() -> dict[str, np.ndarray]:
  """What numpy sees in the calibration batches: `{field of Stats: value}`."""
  batches = [tiny.forward(batch)[1] for batch in tiny.tokens(3)]
  out = {"tokens": np.zeros((LAYERS, EXPERTS)), "gate_weight": np.zeros((LAYERS, EXPERTS)),
         "moment_in": np.zeros((LAYERS, EXPERTS, 64, 64)), "moment_mid": np.zeros((LAYERS, EXPERTS, 96, 96))}
  for seen in batches:
    for l, layer in enumerate(seen):
      for token, slot in np.ndindex(layer.chosen.shape):
        place = l, layer.chosen[token, slot]
        out["tokens"][place] += 1
        out["gate_weight"][place] += layer.weights[token, slot]
        out["moment_in"][place] += np.outer(layer.rows[token], layer.rows[token])
        out["moment_mid"][place] += np.outer(layer.mids[token, slot], layer.mids[token, slot])
  return out


@pytest.mark.parametrize("field", ["tokens", "gate_weight", "moment_in", "moment_mid"])
def test_sums_of_the_forward_pass_equal_numpy(field: str):
  ours, theirs = getattr(tiny.stats(), field), oracle()[field]
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
  assert np.ptp(theirs[0] if theirs.ndim == 2 else theirs.trace(axis1=2, axis2=3)[0]) > 0


def test_totals():
  stats = tiny.stats()
  assert stats.batches == 3 and stats.total_tokens == 3 * 4 * tiny.LENGTH
  assert stats.tokens.dtype == np.int64
  np.testing.assert_array_equal(stats.tokens.sum(1), [2 * stats.total_tokens] * LAYERS)
  np.testing.assert_allclose(stats.gate_weight.sum(1), [stats.total_tokens] * LAYERS, rtol=1e-5)
  np.testing.assert_allclose(stats.router_norm, np.linalg.norm(convert.routers(tiny.model()), axis=-1), rtol=1e-5)


def test_router_gradients_equal_those_of_the_whole_model():
  model = tiny.model()

  @jax.jit
  def norms(batch: jax.Array) -> jax.Array:
    gradient = jax.grad(lambda m: jnp.mean(decoder.sequence_losses(m, batch, jnp.float32)))(model)
    return jnp.stack([jnp.sum(jnp.square(block.moe.router.get_value()), -1) for block in gradient.blocks])

  expected = np.sqrt(np.mean([norms(jnp.asarray(batch)) for batch in tiny.tokens(3)], axis=0))
  np.testing.assert_allclose(tiny.stats().router_grad, expected, rtol=1e-3, atol=1e-6)


@functools.cache
def squared_gradients() -> dict[str, np.ndarray]:
  """`{projection: [L, E, N]}`: squares of the derivatives in a perturbation of every row, summed by expert."""
  model, functions = tiny.model(), tiny.functions()
  rows = 2 * 4 * tiny.LENGTH

  @jax.jit
  def gradients(batch: jax.Array) -> tuple[dict, list]:

    def loss(perturbations):
      h, sizes = functions.embed(model.top, batch), []
      for layer, block in enumerate(model.blocks):
        tap = lambda name, x, group_sizes: x + perturbations[name][layer] if name in perturbations else x
        h, routing = functions.block(block, h, tap)
        sizes.append(routing.group_sizes)
      return jnp.sum(functions.losses(functions.head(model.top, h), batch)), sizes

    zeros = {name: jnp.zeros((LAYERS, rows, channels)) for name, channels in CHANNELS.items()}
    return jax.grad(loss, has_aux=True)(zeros)

  total = {name: np.zeros((LAYERS, EXPERTS, channels)) for name, channels in CHANNELS.items()}
  for batch in tiny.tokens(3):
    found, sizes = gradients(jnp.asarray(batch))
    for layer in range(LAYERS):
      owner = np.repeat(np.arange(EXPERTS), sizes[layer])
      for name in total:
        np.add.at(total[name][layer], owner, np.asarray(found[name][layer], np.float64) ** 2)
  return total


@pytest.mark.parametrize("name", CHANNELS)
def test_squared_gradients_equal_those_of_a_perturbation(name: str):
  ours, theirs = getattr(tiny.stats(), f"grad_sq_{name}"), squared_gradients()[name]
  assert ours.shape == theirs.shape
  np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4 * theirs.max())


def test_an_expert_without_tokens_has_nothing_and_is_named():
  stats = tiny.stats()
  assert stats.unrouted() == [tiny.UNROUTED]
  for name in ("tokens", "gate_weight", "router_grad", "moment_in", "moment_mid", "grad_sq_gate", "grad_sq_up",
               "grad_sq_down"):
    assert not getattr(stats, name)[tiny.UNROUTED].any(), name


def test_batches_add_up():
  functions, model = tiny.functions(), tiny.model()
  parts = [statistics.collect(functions, model.top, list(model.blocks), [batch]) for batch in tiny.tokens(3)]
  whole = tiny.stats()
  for name in ("tokens", "gate_weight", "moment_in", "grad_sq_down"):
    np.testing.assert_allclose(sum(getattr(part, name) for part in parts), getattr(whole, name), rtol=1e-4, atol=1e-6)
  mean_square = np.mean([part.router_grad**2 for part in parts], axis=0)
  np.testing.assert_allclose(np.sqrt(mean_square), whole.router_grad, rtol=1e-5)


def test_no_batches_and_sums_that_overflow_are_refused():
  functions, model = tiny.functions(), tiny.model()
  with pytest.raises(ValueError, match="at least one batch"):
    statistics.collect(functions, model.top, list(model.blocks), [])
  sums = [{name: np.array(value) for name, value in statistics.init(functions, b).items()} for b in model.blocks]
  sums[1]["moment_in"][3, 5, 5] = np.inf
  with pytest.raises(ValueError, match="moment_in of layer 1, expert 3"):
    statistics.finish(functions, list(model.blocks), sums, 1, 96)
