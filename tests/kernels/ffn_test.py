"""The feed-forward block: against float64, against its parts, and its gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import kernels
from moeq_jax.kernels import cpu, ffn
from tests import conformance


@pytest.fixture(autouse=True)
def one_sweep_wherever_it_can(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(ffn, "LEAST_ROWS", 1)
  monkeypatch.setattr(ffn, "LEAST_WEIGHTS", 0)
  monkeypatch.setattr(cpu, "LEAST_WEIGHTS_AFTER", 0)


class Routing(NamedTuple):
  experts: np.ndarray
  weights: np.ndarray
  group_sizes: np.ndarray


def routing(rows: int, experts: int, top_k: int, only: int | None = None) -> Routing:
  """Random; with `only`, all rows choose among the first `only` experts."""
  rng = np.random.default_rng(4)
  chosen = np.stack([rng.permutation(only or experts)[:top_k] for _ in range(rows)]).astype(np.int32)
  return Routing(chosen, rng.uniform(0.1, 1, chosen.shape).astype(np.float32),
                 np.bincount(chosen.ravel(), minlength=experts).astype(np.int32))


def expected(x: np.ndarray, routed: Routing, gate: np.ndarray | None, up: np.ndarray, down: np.ndarray) -> np.ndarray:
  """Row by row, float64."""
  y = np.zeros((len(x), down.shape[2]))
  for t, (experts, weights) in enumerate(zip(routed.experts, routed.weights, strict=True)):
    for e, weight in zip(experts, weights, strict=True):
      row = x[t].astype(np.float64)
      inner = row @ up[e]
      mid = np.maximum(inner, 0) if gate is None else (g := row @ gate[e]) / (1 + np.exp(-g)) * inner
      y[t] += weight * (mid @ down[e])
  return y


def packed(experts: int, D: int, F: int, bits: Any = None) -> dict[str, conformance.Packed]:
  """Gate, up and down, of mixed widths unless `bits` says otherwise."""
  shape = {"gate": (experts, D, F), "up": (experts, D, F), "down": (experts, F, D)}
  return {name: conformance.packed(conformance.mixed(experts, seed) if bits is None else bits, s, group=32, seed=seed)
          for seed, (name, s) in enumerate(shape.items())}


def run(x: Any, routed: Routing, values: dict[str, Any], gated: bool = True, **options: Any) -> jax.Array:
  call = jax.jit(lambda x, routed, gate, up, down: kernels.moe_ffn(x, routed, gate, up, down, **options))
  return call(x, routed, values["gate"] if gated else None, values["up"], values["down"])


def small_rows(count: int, columns: int, dtype: Any = np.float32) -> np.ndarray:
  """Rows whose gates do not saturate."""
  return (conformance.rows(count, columns) / 64).astype(dtype)


@pytest.mark.parametrize(("gated", "top_k", "rows", "only"), [
    (True, 2, 1, None), (True, 2, 40, 2), (True, 2, 300, None), (False, 1, 1, None), (False, 1, 40, None)])
def test_the_block_equals_float64(gated: bool, top_k: int, rows: int, only: int | None):
  made, routed = packed(6, 96, 64), routing(rows, 6, top_k, only)
  x, values = small_rows(rows, 96), {name: p.values for name, p in made.items()}
  wanted = expected(x, routed, values["gate"] if gated else None, values["up"], values["down"])
  assert conformance.difference(run(x, routed, {n: p.q for n, p in made.items()}, gated), wanted) < 1e-5
  dense = {n: v.astype(np.float32) for n, v in values.items()}
  assert rows != 40 or conformance.difference(run(x, routed, dense, gated), wanted) < 1e-5


def test_bfloat16_rows():
  made, routed = packed(6, 96, 64), routing(40, 6, 2)
  x, q = small_rows(40, 96, ml_dtypes.bfloat16), {n: p.q for n, p in made.items()}
  y = run(x, routed, q)
  assert y.dtype == jnp.bfloat16
  assert conformance.difference(y, expected(x, routed, *(made[n].values for n in ("gate", "up", "down")))) < 1e-2


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("rows", [20, 200])
def test_one_sweep_equals_the_composition(monkeypatch, activations: str, rows: int):
  made, x, routed = packed(6, 96, 64), small_rows(rows, 96), routing(rows, 6, 2)
  values = {name: p.q for name, p in made.items()}
  fused = run(x, routed, values, activations=activations)
  monkeypatch.setattr(ffn.cpu_loop, "alike", lambda *_: False)
  composed = np.asarray(run(x, routed, values, activations=activations), np.float64)
  assert conformance.difference(fused, composed) < 1e-6


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_blocks_of_neurons_with_widths_of_their_own(activations: str):
  """Stripes of gate and up, K-blocks of down, and in one sweep: gate and up are alike but for their widths."""
  rng, (experts, D, F) = np.random.default_rng(7), (4, 96, 128)
  values = {name: conformance.packed(rng.choice((1, 2, 3, 4), (experts, *blocks)), shape, group=32, seed=seed)
            for seed, (name, shape, blocks) in enumerate((("gate", (experts, D, F), (1, 8)),
                                                          ("up", (experts, D, F), (1, 8)),
                                                          ("down", (experts, F, D), (4, 1))))}
  x, routed = small_rows(20, D), routing(20, experts, 2)
  wanted = expected(x, routed, *(values[name].values for name in ("gate", "up", "down")))
  y = run(x, routed, {name: p.q for name, p in values.items()}, activations=activations)
  assert conformance.difference(y, wanted) < {"exact": 1e-5, "int8": 3e-2}[activations]


def test_one_sweep_is_for_enough_rows_and_weights(monkeypatch):
  made, rows = packed(4, 64, 32), np.zeros((20, 64), np.float32)
  gate, up = made["gate"].q, made["up"].q
  assert ffn.one_sweep_pays(rows, gate, up)
  assert not ffn.one_sweep_pays(rows, gate, np.zeros((4, 64, 32), np.float32))
  assert not ffn.one_sweep_pays(rows, gate, conformance.packed(np.full((4, 1, 2), 3), (4, 64, 32), group=32).q)
  monkeypatch.setattr(ffn, "LEAST_ROWS", 21)
  assert not ffn.one_sweep_pays(rows, gate, up)
  monkeypatch.setattr(ffn, "LEAST_ROWS", 20)
  monkeypatch.setattr(ffn, "LEAST_WEIGHTS", 64 * 32 + 1)
  assert not ffn.one_sweep_pays(rows, gate, up)


def test_gate_and_up_of_other_layouts_are_two_products():
  made, x, routed = packed(6, 96, 64), small_rows(20, 96), routing(20, 6, 2)
  other = conformance.packed(np.full((6, 1, 2), 3), (6, 96, 64), group=32)
  values = {name: p.values for name, p in made.items()} | {"gate": other.values}
  mixed = {name: p.q for name, p in made.items()} | {"gate": other.q}
  wanted = expected(x, routed, values["gate"], values["up"], values["down"])
  assert conformance.difference(run(x, routed, mixed), wanted) < 1e-5
  mixed["up"] = values["up"].astype(np.float32)
  assert conformance.difference(run(x, routed, mixed), wanted) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_packed_and_dense_weights_agree(gated: bool):
  made, x, routed = packed(4, 64, 32), small_rows(12, 64), routing(12, 4, 2)
  dense = {name: p.values.astype(np.float32) for name, p in made.items()}

  def gradients(values: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
      return jnp.sum(run(x, routed._replace(weights=weights), values, gated) ** 2)

    return jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(routed.weights))

  for actual, wanted in zip(gradients({n: p.q for n, p in made.items()}), gradients(dense), strict=True):
    assert conformance.difference(actual, np.asarray(wanted, np.float64)) < 1e-5


def test_every_backend_gives_the_same():
  made, x, routed = packed(4, 64, 32), small_rows(12, 64), routing(12, 4, 2)
  values = {name: p.q for name, p in made.items()}
  wanted = np.asarray(run(x, routed, values, backend="reference"), np.float64)
  assert conformance.difference(run(x, routed, values, backend="cpu"), wanted) < 1e-5
  assert conformance.difference(run(x, routed, values, activations="int8"), wanted) < 3e-2


def test_vmap_over_rows_is_a_loop_and_over_weights_is_refused():
  made, routed = packed(4, 64, 32), routing(12, 4, 2)
  x = np.stack([small_rows(12, 64), 2 * small_rows(12, 64)])
  q = {name: p.q for name, p in made.items()}
  many = jax.vmap(lambda x: run(x, routed, q))(x)
  for index in range(2):
    assert conformance.difference(many[index], np.asarray(run(x[index], routed, q), np.float64)) < 1e-6
  with pytest.raises(ValueError, match="vmap over w"):
    jax.vmap(lambda q: run(x[0], routed, q))(jax.tree.map(lambda leaf: np.stack([leaf, leaf]), q))


def test_no_rows_give_no_rows():
  q = {name: p.q for name, p in packed(4, 64, 32).items()}
  none = Routing(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32), np.zeros(4, np.int32))
  assert run(np.zeros((0, 64), np.float32), none, q).shape == (0, 64)


@pytest.mark.parametrize(("change", "said"), [
    ({"x": np.zeros((12, 32), np.float32)}, r"x has shape \(12, 32\), not \[T, D\] = \(12, 64\)"),
    ({"down": np.zeros((4, 64, 32), np.float32)}, r"down has shape \(4, 64, 32\), not \[E, F, D\] = \(4, 32, 64\)"),
    ({"gate": np.zeros((4, 64, 16), np.float32)}, "gate has shape"),
    ({"up": np.zeros((64, 32), np.float32)}, "up has shape"),
    ({"experts": np.zeros((11, 2), np.int32)}, "experts has shape"),
    ({"weights": np.zeros((12, 1), np.float32)}, "weights has shape"),
    ({"group_sizes": np.array([24, 0, 0], np.int32)}, "group_sizes has shape"),
    ({"group_sizes": np.array([20, 0, 0, 0], np.int32)}, "sum to 20, but x has 24 rows"),
])
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str):
  routed, shape = routing(12, 4, 2), (4, 64, 32)
  values = {"x": small_rows(12, 64), "gate": np.zeros(shape, np.float32), "up": np.zeros(shape, np.float32),
            "down": np.zeros((4, 32, 64), np.float32), **routed._asdict()} | change
  with pytest.raises(ValueError, match=said):
    ffn.moe_ffn(values["x"], Routing(*(values[name] for name in Routing._fields)),
                *(values[name] for name in ("gate", "up", "down")))
