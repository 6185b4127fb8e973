"""Statistics of channels against per-example gradients, and against the moments and sums of the full calibration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moeq_jax import channels
from moeq_jax.calibrate import channels as collecting
from moeq_jax.calibrate import spectrum, taps
from moeq_jax.models import moe
from tests import tiny

T, D, F, E, TOP_K = 20, 8, 12, 4, 2
WIDTHS = {"gate": F, "up": F, "down": D}


# ---------------------------------------------------------------------------------------------------------------------
# One layer, example by example
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def layer() -> moe.MoE:
  return jax.tree.map(lambda a: a * 25, moe.MoE(D, F, E, TOP_K, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def rows() -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)


def losses(module: moe.MoE, x: jax.Array, tap=moe.no_tap) -> jax.Array:
  """`[T]`, one loss a token, with its curvature: tokens do not see each other."""
  out = module.experts(x, module.route(x), tap)
  return jnp.sum(jnp.sin(out) + jnp.square(out) * 0.1, axis=-1)


@functools.cache
def by_example() -> dict[str, np.ndarray]:
  """`{field: [E, N]}`: every token alone through `jax.grad`, squared and summed in float64."""
  x, module = rows(), layer()
  total = {f"grad_sq_{name}": np.zeros((E, width)) for name, width in WIDTHS.items()}
  total |= {"input_sq": np.zeros((E, D)), "mid_sq": np.zeros((E, F)), "moment_input": np.zeros((E, D, D)),
            "moment_mid": np.zeros((E, F, F))}

  def loss(added: dict[str, jax.Array], token: jax.Array) -> tuple[jax.Array, tuple]:
    seen = {}

    def tap(name, values, sizes):
      if name in added:
        owner = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=TOP_K)
        return values + added[name][owner]
      seen[name] = values
      return values

    return losses(module, token, tap)[0], (seen, module.route(token).experts)

  zeros = {name: jnp.zeros((E, width)) for name, width in WIDTHS.items()}
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  for token in x:
    found, (seen, experts) = gradient(zeros, token[None])
    for name in WIDTHS:
      total[f"grad_sq_{name}"] += np.asarray(found[name], np.float64) ** 2
    for place, expert in enumerate(sorted(np.asarray(experts)[0])):
      for name in ("input", "mid"):
        row = np.asarray(seen[name], np.float64)[place]
        total[f"{name}_sq"][expert] += row**2
        total[f"moment_{name}"][expert] += np.outer(row, row)
  return total


def zeros(rank: int = 64) -> dict[str, jax.Array]:
  sizes = {"input_sq": (D,), "mid_sq": (F,), "sketch_input": (D, min(D, rank)), "sketch_mid": (F, min(F, rank))}
  sizes |= {f"grad_sq_{name}": (width,) for name, width in WIDTHS.items()}
  return {name: jnp.zeros((E, *size)) for name, size in sizes.items()}


def plain(x: jax.Array, totals: dict[str, jax.Array]) -> jax.Array:
  return jnp.sum(losses(layer(), x, functools.partial(collecting.tap, totals)))


def scanned(x: jax.Array, totals: dict[str, jax.Array]) -> jax.Array:
  step = jax.checkpoint(lambda total, part: (total + plain(part, totals), None))
  return jax.lax.scan(step, jnp.zeros(()), x.reshape(4, -1, D))[0]


WAYS = {"as it is": jax.grad(plain, 1), "jit": jax.jit(jax.grad(plain, 1)),
        "remat": jax.jit(jax.grad(jax.checkpoint(plain), 1)), "scan of remat": jax.jit(jax.grad(scanned, 1))}


@pytest.mark.parametrize("way", WAYS)
def test_taps_equal_per_example_gradients(way: str):
  by_example()  # makes the layer, outside of any transformation
  check(WAYS[way](rows(), zeros()))


def check(found: dict[str, jax.Array]) -> None:
  """Raises unless the sums are those of the examples one by one."""
  expected = by_example()
  assert all(expected[name].any(axis=-1).all() for name in ("input_sq", "grad_sq_down"))
  for name in ("input_sq", "mid_sq", *(f"grad_sq_{name}" for name in WIDTHS)):
    np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6 * expected[name].max(), err_msg=name)
  for name in ("input", "mid"):  # so few channels that the sketch is the moment
    moment = expected[f"moment_{name}"]
    np.testing.assert_allclose(found[f"sketch_{name}"], moment, rtol=2e-5, atol=2e-6 * np.abs(moment).max())


def test_a_true_sketch_is_the_moment_times_the_test_vectors():
  expected, found = by_example(), jax.jit(jax.grad(plain, 1))(rows(), zeros(rank=5))
  for name, width in (("input", D), ("mid", F)):
    product = expected[f"moment_{name}"] @ spectrum.test_vectors(width, 5)
    np.testing.assert_allclose(found[f"sketch_{name}"], product, rtol=1e-4, atol=1e-5 * np.abs(product).max())


def test_taps_change_neither_the_loss_nor_its_other_gradients():
  module = layer()
  plainly = jax.jit(jax.value_and_grad(lambda x: jnp.sum(losses(module, x))))(rows())
  tapped = jax.jit(jax.value_and_grad(lambda x: plain(x, zeros())))(rows())
  for ours, theirs in zip(tapped, plainly, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# A model
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def stats(rank: int = 64) -> channels.ChannelStats:
  return collecting.collect(tiny.functions(), tiny.model().top, list(tiny.model().blocks), tiny.tokens(3), rank=rank)


def test_a_pass_equals_the_full_calibration():
  ours, full = stats(), tiny.stats()
  for name in ("tokens", "gate_weight", "router_norm", "router_grad", "grad_sq_gate", "grad_sq_up", "grad_sq_down"):
    theirs = getattr(full, name)
    np.testing.assert_allclose(getattr(ours, name), theirs, rtol=1e-4, atol=1e-6 * theirs.max(), err_msg=name)
  for name, moment in (("input_sq", full.moment_in), ("mid_sq", full.moment_mid)):
    diagonal = np.diagonal(moment, axis1=2, axis2=3)
    np.testing.assert_allclose(getattr(ours, name), diagonal, rtol=1e-4, atol=1e-6 * diagonal.max())
  assert ours.total_tokens == full.total_tokens and ours.batches == 3
  assert ours.inputs("up") is ours.input_sq and ours.inputs("down") is ours.mid_sq


@pytest.mark.parametrize("rank", [64, 16])
def test_the_spectrum_is_that_of_the_moments(rank: int):
  """The 64 inputs of an expert exactly with 64 test vectors, its 96 mids between bounds."""
  ours, full = stats(rank), tiny.stats()
  for side, moments in enumerate((full.moment_in, full.moment_mid)):
    for place in np.ndindex(full.tokens.shape):
      if place == tiny.UNROUTED:
        np.testing.assert_array_equal(ours.log_am_gm[*place, side], 0)
        np.testing.assert_array_equal(ours.condition[*place, side], 1)
        continue
      values = np.maximum(np.linalg.eigvalsh(moments[place].astype(np.float64)), 0)
      damped = values + 0.01 * values.mean()
      for found, exact in ((ours.condition[*place, side], damped.max() / damped.min()),
                           (ours.log_am_gm[*place, side], np.log(damped.mean()) - np.log(damped).mean())):
        assert found[0] * 0.999 <= exact <= found[2] * 1.001 and found[0] <= found[1] <= found[2]
        if rank == 64 and side == 0:
          np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_nothing_of_the_size_of_a_moment_is_made():
  """The largest array of the program is a weight, a batch of rows, or logits: no sum over tokens is square."""
  sums = collecting.init(tiny.functions(), tiny.model().blocks[0], rank=8)
  assert {name: value.shape[1:] for name, value in sums.items() if value.ndim == 3} == {
      "sketch_input": (64, 8), "sketch_mid": (96, 8)}
  block, state = tiny.model().blocks[0], jnp.zeros((4, tiny.LENGTH, 64))
  program = jax.make_jaxpr(lambda sums, state: collecting.update.__wrapped__(
      tiny.functions(), block, sums, state, state, jnp.float32(1)))(sums, state)
  text = str(program)
  experts = tiny.CONFIG.num_local_experts
  assert f"f32[{experts},64,8]" in text
  assert f"f32[{experts},64,64]" not in text and f"f32[{experts},96,96]" not in text
  made = [line for line in text.splitlines() if f":f32[{experts},64,96] =" in line and "dot_general" in line]
  assert not made  # no gradient of a weight


def test_a_pass_without_taps_sums_the_routers_only():
  functions, model = tiny.functions(), tiny.model()
  sums = {place: collecting.init(functions, block, tapped=False) for place, block in enumerate(model.blocks)}
  for batch in tiny.tokens(3):
    sums, loss = collecting.sweep(functions, model.top, list(model.blocks), sums, batch)
  assert set(sums[0]) == {"tokens", "gate_weight", "router_grad_sq"} and 0 < loss < 10
  found = np.sqrt(np.stack([sums[place]["router_grad_sq"] for place in sums]) / 3)
  np.testing.assert_allclose(found, stats().router_grad, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_bfloat16_rows_are_summed_in_float32():
  """A sum in bfloat16 would stop growing at 256."""
  total = taps.group_squares(jnp.ones((3000, 2), jnp.bfloat16), jnp.array([2900, 100], jnp.int32))
  np.testing.assert_array_equal(total, [[2900, 2900], [100, 100]])


@pytest.mark.parametrize("value", [1e20, np.inf, np.nan, 1.5e19])
def test_an_overflow_stays_in_its_own_expert(value: float):
  """1e20 squared, or twenty times 1.5e19 squared, is above float32's range."""
  x = jnp.ones((60, 3), jnp.bfloat16).at[30:50, 1].set(value)
  total = np.array(jax.jit(lambda x: taps.group_squares(x, jnp.array([30, 20, 10], jnp.int32)))(x))
  assert not np.isfinite(total[1, 1])
  total[1, 1] = 0
  np.testing.assert_array_equal(total, [[30, 30, 30], [20, 0, 20], [10, 10, 10]])


@pytest.mark.parametrize("name", ["grad_sq_down", "sketch_mid"])
def test_a_sum_that_overflowed_is_an_error_that_names_it(name: str):
  functions, model = tiny.functions(), tiny.model()
  sums = [{name: np.array(value) for name, value in collecting.init(functions, b).items()} for b in model.blocks]
  sums[1][name][3, 5] = np.inf
  with pytest.raises(ValueError, match=f"{name} of layer 1, expert 3 is not finite; the model overflows"):
    collecting.finish(functions, list(model.blocks), sums, 1, 96)


def test_calibration_needs_a_batch():
  functions, model = tiny.functions(), tiny.model()
  with pytest.raises(ValueError, match="at least one batch"):
    collecting.collect(functions, model.top, list(model.blocks), [])


def test_fewer_tokens_than_channels_give_finite_summaries():
  """72 tokens choose 2 of 6 experts: some see fewer than their 96 mid channels, whose Gram matrix is singular."""
  few = collecting.collect(tiny.functions(), tiny.model().top, list(tiny.model().blocks), tiny.tokens(1, size=3))
  assert (few.tokens < 96).any()
  assert np.isfinite(few.condition).all() and (few.condition >= 1).all()
  assert (few.condition[..., 2] <= 96 / few.damping + 1.001).all()
