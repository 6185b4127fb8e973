"""One expert at a time against whole blocks: `functions.block` forward, `statistics` backward."""

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax import steps
from moeq_jax.calibrate import layerwise, statistics
from moeq_jax.kernels import chunks
from moeq_jax.models import switch
from tests import tiny

BATCHES = 3
SCALE = 1 / (4 * (tiny.LENGTH - 1))
SWITCH = switch.SwitchConfig(
    vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, num_experts=3,
    expert_capacity=3, encoder_sparse=(0,), decoder_sparse=(), relative_attention_num_buckets=8)


def loader(functions: Any, block: Any, dtype: Any = np.float32) -> Callable[[int], dict[str, np.ndarray]]:
  """Loads one expert of a block that is in memory."""
  weights = functions.experts(block)
  return lambda expert: {name: np.array(weight[expert], dtype) for name, weight in weights.items()}


def hollow(functions: Any, block: Any) -> Any:
  """The block as a checkpoint gives it without experts."""
  shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in functions.experts(block).items()}
  return functions.with_experts(block, shapes)


class Passed(NamedTuple):
  """What went through all blocks of a model: inputs of each, derivatives before each, statistics of the sparse ones."""

  inputs: list[list[Any]]
  derivatives: list[list[Any]]
  seen: dict[int, layerwise.LayerStats]
  gradients: dict[int, layerwise.LayerGradients]


def stream(functions: Any, model: Any, batches: list[Any], scale: Any) -> Passed:
  """Both passes, by `layerwise`."""
  inputs, seen, gradients = [[steps.embed(functions, model.top, batch) for batch in batches]], {}, {}
  blocks = [(hollow(functions, b), loader(functions, b)) if functions.sparse(b) else (b, None) for b in model.blocks]
  for place, (block, experts) in enumerate(blocks):
    states, seen[place] = layerwise.forward_layer(functions, block, experts, inputs[-1])
    inputs.append(states)
  last = [layerwise.head_gradients(functions, model.top, s, b)[1] for s, b in zip(inputs[-1], batches, strict=True)]
  derivatives = [last]
  for place, (block, experts) in reversed(list(enumerate(blocks))):
    before, gradients[place] = layerwise.backward_layer(functions, block, experts, inputs[place], derivatives[0], scale)
    derivatives.insert(0, before)
  return Passed(inputs, derivatives, seen, gradients)


@functools.cache
def passed() -> Passed:
  """The tiny Mixtral."""
  return stream(tiny.functions(), tiny.model(), tiny.tokens(BATCHES), SCALE)


@functools.cache
def switch_case() -> tuple[Any, Any, list[dict[str, np.ndarray]]]:
  """A small Switch Transformer with dropped tokens and padding: its functions, the model, and two batches."""
  rng = np.random.default_rng(0)
  text = lambda *lengths: [rng.integers(2, SWITCH.vocab_size, n).tolist() for n in lengths]
  batches = [switch.batch(text(12, 7, 10), text(9, 8, 4), SWITCH) for _ in range(2)]
  shapes = jax.eval_shape(lambda: switch.build(SWITCH, jnp.float32))
  model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.3, leaf.shape), jnp.float32), shapes)
  return switch.functions(jnp.dtype("float32"), "sequence"), model, batches


@functools.cache
def switch_passed() -> Passed:
  functions, model, batches = switch_case()
  return stream(functions, model, batches, [0.05, 0.04])


def assert_close(ours: Any, theirs: Any, rtol: float = 2e-4) -> None:
  """Equal to within `rtol` of the largest entry of each leaf."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    b = np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=rtol * max(np.abs(b).max(), 1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# Mixtral
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_forward_equals_the_block(layer: int):
  run = passed()
  for ours, state in zip(run.inputs[layer + 1], run.inputs[layer], strict=True):
    expected, _ = steps.block(tiny.functions(), tiny.model().blocks[layer], state)
    assert_close(ours, expected, 1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_equal_those_of_a_pass_in_memory(layer: int):
  stats, run = tiny.stats(), passed()
  np.testing.assert_array_equal(run.seen[layer].tokens, stats.tokens[layer])
  np.testing.assert_allclose(run.seen[layer].gate_weight, stats.gate_weight[layer], rtol=1e-5)
  ours = run.gradients[layer]
  assert_close(np.sqrt(ours.router_grad_sq / BATCHES), stats.router_grad[layer])
  assert list(ours.grad_sq) == ["gate", "up", "down"]
  for name, squares in ours.grad_sq.items():
    assert_close(squares, getattr(stats, f"grad_sq_{name}")[layer])
  assert not any(squares[tiny.UNROUTED[1]].any() == (layer == tiny.UNROUTED[0]) for squares in ours.grad_sq.values())


def test_every_expert_is_visited_with_its_rows():
  layer, stats, visited = tiny.UNROUTED[0], tiny.stats(), []

  def visit(expert: int, weights: Any, rows: np.ndarray, mids: np.ndarray) -> None:
    visited.append(expert)
    np.testing.assert_array_equal(weights["up"], tiny.functions().experts(tiny.model().blocks[layer])["up"][expert])
    assert len(rows) == len(mids) == stats.tokens[layer, expert]
    assert_close(rows.T @ rows, stats.moment_in[layer, expert], 1e-5)
    assert_close(mids.T @ mids, stats.moment_mid[layer, expert], 1e-5)

  functions, block = tiny.functions(), tiny.model().blocks[layer]
  states, _ = layerwise.forward_layer(functions, block, loader(functions, block), passed().inputs[layer], visit)
  assert visited == list(range(tiny.CONFIG.num_local_experts))
  for ours, plain in zip(states, passed().inputs[layer + 1], strict=True):
    np.testing.assert_array_equal(ours, plain)


def test_one_expert_is_in_memory_at_a_time_and_one_without_rows_is_not_loaded():
  layer, loaded = tiny.UNROUTED[0], []
  functions, block = tiny.functions(), tiny.model().blocks[layer]
  load = loader(functions, block)

  def experts(expert: int) -> dict[str, np.ndarray]:
    gc.collect()
    assert not [name for _, alive in loaded for name, weight in alive.items() if weight() is not None]
    weights = load(expert)
    loaded.append((expert, {name: weakref.ref(weight) for name, weight in weights.items()}))
    return weights

  run = passed()
  layerwise.forward_layer(functions, hollow(functions, block), experts, run.inputs[layer])
  routed = [e for e in range(tiny.CONFIG.num_local_experts) if e != tiny.UNROUTED[1]]
  assert [expert for expert, _ in loaded] == routed
  layerwise.backward_layer(functions, hollow(functions, block), experts, run.inputs[layer], run.derivatives[layer + 1],
                           SCALE)
  assert [expert for expert, _ in loaded] == 2 * routed  # `after` only adds, so that no third round is needed


def test_the_size_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch):
  layer, run = 0, passed()
  monkeypatch.setattr(chunks, "LARGEST", 64)
  monkeypatch.setattr(chunks, "SMALLEST", 32)
  assert run.seen[layer].tokens.max() > 64
  functions, block = tiny.functions(), tiny.model().blocks[layer]
  states, _ = layerwise.forward_layer(functions, block, loader(functions, block), run.inputs[layer])
  assert_close(states, run.inputs[layer + 1], 1e-6)
  before, gradients = layerwise.backward_layer(functions, block, loader(functions, block), run.inputs[layer],
                                               run.derivatives[layer + 1], SCALE)
  assert_close(before, run.derivatives[layer], 1e-5)
  assert_close(gradients.grad_sq, run.gradients[layer].grad_sq, 1e-5)
  assert_close(gradients.router_grad_sq, run.gradients[layer].router_grad_sq, 1e-5)


def test_few_programs_serve_all_layers_experts_and_batches():
  before = layerwise._expert._cache_size(), layerwise._expert_backward._cache_size()
  layer, functions = 1, tiny.functions()
  block = tiny.model().blocks[layer]
  run = passed()
  layerwise.forward_layer(functions, block, loader(functions, block), run.inputs[layer][:1])
  layerwise.backward_layer(functions, block, loader(functions, block), run.inputs[layer][:1],
                           run.derivatives[layer + 1][:1], SCALE)
  assert layerwise._expert._cache_size() - before[0] <= 1  # smaller groups of rows, one size class more
  assert layerwise._expert_backward._cache_size() - before[1] <= 1


def test_bfloat16_stays_near_the_block():
  functions, layer = tiny.functions("bfloat16"), 0
  block = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.model().blocks[layer])
  state = jnp.asarray(passed().inputs[layer][0], jnp.bfloat16)
  states, _ = layerwise.forward_layer(functions, block, loader(functions, block, jnp.bfloat16), [state])
  assert states[0].dtype == jnp.bfloat16
  assert_close(states[0], steps.block(functions, block, state)[0], 0.02)
  d_state = jnp.asarray(passed().derivatives[layer + 1][0], jnp.bfloat16)
  (before,), gradients = layerwise.backward_layer(functions, block, loader(functions, block, jnp.bfloat16), [state],
                                                  [d_state], SCALE)
  assert before.dtype == jnp.bfloat16
  assert_close(before, passed().derivatives[layer][0], 0.05)
  assert gradients.grad_sq["down"].dtype == np.float32


def test_outputs_that_overflow_are_refused_by_name():
  functions, block = tiny.functions(), tiny.model().blocks[0]
  load = loader(functions, block)

  def experts(expert: int) -> dict[str, np.ndarray]:
    return load(expert) | ({"down": np.full((96, 64), 3e38, np.float32)} if expert == 2 else {})

  with pytest.raises(ValueError, match="output of expert 2 is not finite"):
    layerwise.forward_layer(functions, block, experts, passed().inputs[0])


def test_a_state_that_is_not_finite_is_refused_and_its_rows_are_not_dropped():
  functions, block = tiny.functions(), tiny.model().blocks[0]
  state = np.array(passed().inputs[0][0])
  state[1, 2] = np.inf
  for sweep in (lambda: layerwise.forward_layer(functions, block, loader(functions, block), [state]),
                lambda: layerwise.backward_layer(functions, block, loader(functions, block), [state], [state], 1.0)):
    with pytest.raises(layerwise.NotFiniteError, match="a routing weight is not finite"):
      sweep()


def test_the_head_sees_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch):
  functions, top, batch = tiny.functions(), tiny.model().top, tiny.tokens(1)[0]
  state = jnp.asarray(passed().inputs[-1][0])
  loss, expected = statistics.head(functions, top, state, batch)[:2]
  head, seen = statistics.head, []
  monkeypatch.setattr(statistics, "head", lambda *a: seen.append(a[3].shape) or head(*a))
  ours = layerwise.head_gradients(functions, top, state, batch)
  assert seen == [(1, tiny.LENGTH)] * len(batch)
  assert_close(ours[1], expected, 1e-5)
  assert float(ours[0]) == pytest.approx(float(loss), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Switch Transformer: a state of several streams, tokens dropped, blocks without experts, a norm after the experts
# ---------------------------------------------------------------------------------------------------------------------


def test_switch_forward_equals_the_blocks():
  functions, model, _ = switch_case()
  run = switch_passed()
  for place, block in enumerate(model.blocks):
    for ours, state in zip(run.inputs[place + 1], run.inputs[place], strict=True):
      assert_close(ours, steps.block(functions, block, state)[0], 1e-5)


def test_dropped_tokens_are_no_calibration_rows():
  functions, model, _ = switch_case()
  run, dropped = switch_passed(), 0
  for place, block in enumerate(model.blocks):
    if not functions.sparse(block):
      assert run.seen[place] is None and run.gradients[place] is None
      continue
    tokens, weights = np.zeros(SWITCH.num_experts), np.zeros(SWITCH.num_experts)
    for state in run.inputs[place]:
      routing = jax.tree.map(np.asarray, steps.block(functions, block, state)[1])
      np.add.at(tokens, routing.experts[routing.weights > 0], 1)
      np.add.at(weights, routing.experts[:, 0], routing.weights[:, 0])
      dropped += np.sum(routing.weights == 0)
    np.testing.assert_array_equal(run.seen[place].tokens, tokens)
    np.testing.assert_allclose(run.seen[place].gate_weight, weights, rtol=1e-5)
  assert dropped > 0


def test_switch_backward_equals_statistics():
  functions, model, _ = switch_case()
  run, checked = switch_passed(), []
  for place, block in enumerate(model.blocks):
    if not functions.sparse(block):
      expected = [statistics.through(functions, block, state, d_state)
                  for state, d_state in zip(run.inputs[place], run.derivatives[place + 1], strict=True)]
    else:
      sums, expected = statistics.init(functions, block), []
      for state, d_state, scale in zip(run.inputs[place], run.derivatives[place + 1], (0.05, 0.04), strict=True):
        sums, before = statistics.update(functions, block, sums, state, d_state, jnp.float32(scale))
        expected.append(before)
      ours = run.gradients[place]
      assert_close(ours.router_grad_sq, sums["router_grad_sq"])
      assert_close(ours.grad_sq, {name: sums[f"grad_sq_{name}"] for name in ("up", "down")})
      checked.append((place, bool(ours.router_grad_sq.all()), hasattr(block, "final_norm")))
    assert_close(run.derivatives[place], expected)
  assert checked == [(0, True, True)]
