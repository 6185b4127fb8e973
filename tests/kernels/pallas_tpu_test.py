"""The TPU back-end in the interpreter of Pallas, which simulates copies and memories and detects races between them.

Uninitialized memory is NaN there, so rows that no visit wrote, or bytes that no copy brought, would show. That the
kernel also compiles for TPUs is tested in `tests/aot`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from moeq_jax import kernels, qtensor
from moeq_jax.bench import _tpu_compile
from moeq_jax.kernels import api, pallas_tpu, shapes, tpu_unpack, tpu_view
from tests import conformance

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time
EVERY = np.array(qtensor.WIDTHS)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Iterator[list[Any]]:
  """The races of every launch of an interpreted kernel; there must be none."""
  monkeypatch.setattr(pallas_tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True))
  launches = conformance.made_by(monkeypatch, interpreter, "RaceDetectionState")
  yield launches
  assert not any(races.races_found for races in launches)


@functools.cache
def _door(out_dtype: Any = None) -> Any:
  run = functools.partial(api.grouped_matmul, backend="pallas_tpu", out_dtype=out_dtype)
  return jax.jit(run, compiler_options=QUICK)


@pytest.mark.thorough
class TestPallasTpu(conformance.Conformance):
  backend = "pallas_tpu"

  def matmul(self, x: Any, w: Any, sizes: Any, out_dtype: Any = None) -> jax.Array:
    return _door(out_dtype)(x, w, sizes)


def _config(**changes: Any) -> pallas_tpu.Config:
  base = pallas_tpu.Config(
    rows=16, row_tiles=1, columns=128, depth=256, unroll=1, in_order=False, scale_after=True)
  return dataclasses.replace(base, **changes)


@functools.cache
def _jitted(config: pallas_tpu.Config, device: jax.sharding.AbstractDevice) -> Any:
  del device  # the compiled program is another on another device
  run = lambda x, view, sizes: pallas_tpu.matmul(x, view, sizes, jnp.float32, config)  # noqa: E731
  return jax.jit(run, compiler_options=QUICK)


def _run(
  x: np.ndarray, q: Any, sizes: np.ndarray, config: pallas_tpu.Config, paired: bool = True
) -> jax.Array:
  run = _jitted(config, pallas_tpu.INTERPRETED_DEVICE)
  return run(x, tpu_view.prepare(q, paired), jnp.asarray(sizes, jnp.int32))


CONFIGS = {
  "in_order": _config(rows=48, in_order=True),
  "in_order_before": _config(rows=48, in_order=True, scale_after=False),
  "aligned": _config(),
  "unrolled": _config(depth=1280, unroll=5),
  "looped": _config(depth=1280),
  "reused": _config(row_tiles=2, scale_after=False),
  "reused_looped": _config(row_tiles=3, scale_after=False, columns=256, depth=1280),
}
ROUTED = (0, 43, 0, 0, 1, 0, 0), (1, 1, 1, 1, 1, 1, 38), (3, 17, 0, 1, 16, 2, 5)


QUICK_WAYS = ("in_order", True), ("reused", False)


@pytest.mark.parametrize(("name", "paired"), [
  pytest.param(name, paired, marks=[] if (name, paired) in QUICK_WAYS else pytest.mark.thorough)
  for name in CONFIGS for paired in (True, False)])
def test_every_way_takes_every_width(launches: list[Any], name: str, paired: bool):
  _check_routings(CONFIGS[name], np.float32, 1e-5, paired)
  assert len(launches) == len(ROUTED)


@pytest.mark.thorough
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("name", "bound"), [("in_order", 1e-5), ("unrolled", 1e-5), ("reused_looped", 1e-2)])
def test_bfloat16_rows(name: str, bound: float, paired: bool):
  _check_routings(CONFIGS[name], ml_dtypes.bfloat16, bound, paired)


def _check_routings(config: pallas_tpu.Config, dtype: Any, bound: float, paired: bool) -> None:
  made = conformance.packed((*EVERY, 3), (7, 1280, 256), group=128)
  x = conformance.rows(44, 1280, dtype)
  for sizes in ROUTED:
    y = _run(x, made.q, np.array(sizes, np.int32), config, paired)
    assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < bound


@pytest.mark.thorough
@pytest.mark.parametrize("bits", qtensor.WIDTHS)
def test_one_width_alone(bits: int):
  made = conformance.packed(bits, (2, 768, 128), group=128)
  x, sizes = conformance.rows(20, 768), np.array([4, 16], np.int32)
  y = _run(x, made.q, sizes, _config(depth=768))
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize(
  ("group", "after"), [(32, False), (64, False), (128, False), (128, True), (0, False), (0, True)])
def test_groups_and_widths_that_change_inside_an_expert(group: int, after: bool):
  bits = np.random.default_rng(5).permutation(np.resize(EVERY, 12)).reshape(2, 2, 3)
  made = conformance.packed(bits, (2, 512, 700), group=group)
  x, sizes = conformance.rows(30, 512), np.array([13, 17], np.int32)
  columns = 256 if made.q.buffer.shape[2] > 128 else 128
  y = _run(x, made.q, sizes, _config(columns=columns, scale_after=after))
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-5


def test_the_vector_unit_of_v6e_rounds_twice_and_stays_below_the_bound(monkeypatch):
  device = jax.sharding.AbstractDevice("TPU v6e", 1, "tpu")
  monkeypatch.setattr(pallas_tpu, "INTERPRETED_DEVICE", device)
  made = conformance.packed(EVERY, (6, 256, 128), group=128)
  sizes = np.array([1, 2, 3, 4, 5, 6], np.int32)
  x = conformance.rows(21, 256, ml_dtypes.bfloat16)
  ways = [_run(x, made.q, sizes, _config(depth=256, scale_after=after), paired=False) for after in (True, False)]
  wanted = conformance.expected(x, made.values, sizes)
  assert conformance.difference(ways[0], wanted) < 1e-5
  assert 1e-4 < conformance.difference(ways[1], wanted) < 1e-2


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
  ("shape", "group", "blocks"),
  [((6, 512, 256), 128, (1, 1)), ((6, 576, 96), 64, (1, 1)), ((3, 500, 50), 32, (2, 3)), ((6, 96, 33), 32, (1, 1)),
   ((4, 1408, 64), 128, (1, 1)), ((2, 96, 40), 32, (3, 2))])
def test_the_view_holds_the_same_codes(
    shape: tuple[int, int, int], group: int, blocks: tuple[int, int], paired: bool):
  bits = np.random.default_rng(7).choice(EVERY[:5], (shape[0], *blocks))
  made = conformance.packed(bits, shape, group=group, capacity=20_000)
  view = tpu_view.prepare(made.q, paired)
  assert view.k_tile % tpu_view.SMALLEST_TILE == 0
  np.testing.assert_array_equal(_codes(view), made.codes)


def _codes(view: tpu_view.View) -> np.ndarray:
  """The codes of a view, word by word, from the table in the documentation of `tpu_view`."""
  words = np.asarray(view.words)
  halves = np.stack([words >> 8 * byte & 0xFF for byte in range(4)], axis=2).astype(np.uint8)  # [R, 8, byte, stripe]
  raw = np.empty((len(words), 32, words.shape[2]), np.uint8)
  for byte, start in enumerate((0, 16, 1, 17)):
    if view.paired:
      raw[:, start : start + 16 : 2] = halves[:, :, byte]
    else:
      raw[:, byte::4] = halves[:, :, byte]
  raw = raw.reshape(-1, words.shape[2])
  (experts, k_blocks, stripes), out = view.blocks, []
  for e, k, n in np.ndindex(experts, k_blocks, stripes):
    first, bits = 32 * int(view.first[e, k, n]), int(view.bits[e, k, n])
    tiles = raw[first : first + view.k_block * bits // 8].reshape(-1, view.k_tile * bits // 8, words.shape[2])
    fields = [(tiles[:, : len(tiles[0]) * b // bits] if b == 2 else tiles[:, -len(tiles[0]) * b // bits :], b, at)
              for b, at in ({3: ((2, 0), (1, 2))}.get(bits, ((bits, 0),)))]
    codes = sum(
      np.concatenate([part >> shift & 2**b - 1 for shift in range(0, 8, b)], axis=1) << at for part, b, at in fields)
    out.append(codes.reshape(view.k_block, -1)[: view.k_rows, : view.columns])
  out = np.array(out).reshape(experts, k_blocks, stripes, view.k_rows, view.columns)
  return out.transpose(0, 1, 3, 2, 4).reshape(experts, k_blocks * view.k_rows, -1)[:, : view.K, : view.N]


def _bitcast(words: jax.Array, kind: Any) -> jax.Array:
  """`pltpu.bitcast` outside a kernel: the narrow rows that lie in rows of 32-bit words, low bits first."""
  words, size = np.asarray(words), np.dtype(kind).itemsize
  rows = np.stack([words >> 8 * size * part & 2 ** (8 * size) - 1 for part in range(4 // size)], axis=1)
  return jnp.asarray(rows.astype(f"u{size}").view(kind).reshape(-1, words.shape[1]))


@pytest.mark.parametrize("K", [256, 512, 768])
@pytest.mark.parametrize("paired", [True, False])
def test_words_become_codes(monkeypatch, paired: bool, K: int):
  monkeypatch.setattr(tpu_unpack.pltpu, "bitcast", _bitcast)
  for bits in qtensor.WIDTHS:
    made = conformance.packed(bits, (1, K, 128), group=0)
    view = tpu_view.prepare(made.q, paired)
    assert view.k_tile == view.k_block == K
    codes = np.asarray(tpu_unpack.unpack(view.words, bits, paired), np.float64) - tpu_unpack.bias(bits, paired)
    np.testing.assert_array_equal(codes, made.values[0] if bits == 16 else made.codes[0])


@pytest.mark.parametrize(("shape", "group", "blocks", "chip"), [
  ((6, 512, 256), 128, (1, 1), "TPU v5e"), ((3, 500, 50), 32, (2, 3), "TPU v6e"), ((2, 576, 96), 64, (1, 2), "TPU v6e"),
  ((2, 1408, 64), 128, (2, 1), "TPU v5e")])
def test_forward_and_backward_take_the_view_of_each_chip(
    monkeypatch, shape: tuple[int, int, int], group: int, blocks: tuple[int, int], chip: str):
  """With K-blocks, N-stripes, and sizes that the view pads; float32 rows, so that both chips are exact."""
  monkeypatch.setattr(pallas_tpu, "INTERPRETED_DEVICE", jax.sharding.AbstractDevice(chip, 1, "tpu"))
  bits = np.random.default_rng(9).choice(EVERY, (shape[0], *blocks))
  made = conformance.packed(bits, shape, group=group)
  view = jax.jit(pallas_tpu.prepare)(made.q)
  assert view.shape == shape
  assert view.paired == (chip == "TPU v5e")
  sizes = np.array([20, *[0] * (shape[0] - 2), 10], np.int32)
  x, dy = conformance.rows(30, shape[1]), conformance.rows(30, shape[2], seed=2)
  forward = jax.jit(lambda x, w: pallas_tpu.forward(x, w, sizes, jnp.float32), compiler_options=QUICK)
  assert conformance.difference(forward(x, view), conformance.expected(x, made.values, sizes)) < 1e-5
  dx, dw = jax.jit(pallas_tpu.backward)(x, view, jnp.asarray(sizes), dy)
  assert dw is None
  assert conformance.difference(dx, conformance.expected(dy, made.values.swapaxes(1, 2), sizes)) < 1e-5


def test_weights_prepared_at_load_go_through_the_door():
  made = conformance.packed(np.array([2, 4]), (2, 512, 128))
  sizes, x = np.array([3, 4], np.int32), conformance.rows(7, 512)
  w = kernels.prepare(made.q, "pallas_tpu")
  assert (w.backend, w.shape) == ("pallas_tpu", made.q.shape) and not isinstance(w.view, qtensor.QTensor)
  run = jax.jit(lambda x, w: kernels.grouped_matmul(x, w, sizes), compiler_options=QUICK)
  assert conformance.difference(run(x, w), conformance.expected(x, made.values, sizes)) < 1e-5
  with pytest.raises(ValueError, match="prepared for pallas_tpu, and cpu cannot read it"):
    kernels.grouped_matmul(x, w, sizes, backend="cpu")
  with pytest.raises(ValueError, match="are not .T, K., .E, K, N."):
    kernels.grouped_matmul(x[:, :100], w, sizes)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("bits", qtensor.WIDTHS)
def test_the_view_has_the_bytes_of_the_buffer(bits: int, paired: bool):
  for name in ("mixtral-8x7b", "switch-base-64", "qwen3-30b-a3b", "moeq-small"):
    for _, K, N in shapes.LAYERS[name].matmuls().values():
      q = _tpu_compile.abstract((2, K, N), bits)
      view = jax.eval_shape(functools.partial(tpu_view.prepare, paired=paired), q)
      assert view.words.size * 4 == q.buffer.size == 2 * K * N * bits // 8
      assert view.grid.size * 4 == 2 * (q.scale.size + q.zero.size)


@pytest.mark.parametrize("rows", [1, 16, 64, 65, 512, 8192])
@pytest.mark.parametrize("name", shapes.LAYERS)
def test_tiles_fit(name: str, rows: int):
  for shape in shapes.LAYERS[name].matmuls().values():
    view = jax.eval_shape(pallas_tpu.prepare, _tpu_compile.abstract(shape, 3))
    config = pallas_tpu.heuristic(rows, shape[0], view)
    assert view.words.shape[2] % config.columns == 0
    assert view.k_block % config.depth == 0 == config.depth % (view.k_tile * config.unroll)
    assert config.rows % 16 == 0
    assert not config.in_order or config.rows >= rows
    assert config.row_tiles == 1 or not (config.in_order or config.scale_after)


def test_a_visited_weight_is_copied_once_and_nothing_else(monkeypatch):
  """Bytes of all copies of 32-bit words (packed weights, scales and zeros) that the interpreter really made."""
  copied, read = [], interpreter.DMA.execute_read

  def counted(self: Any) -> None:
    fresh = self.state == interpreter.DmaState.STARTED
    read(self)
    if fresh and self.data.dtype == np.uint32:
      copied.append(self.data_size)

  monkeypatch.setattr(interpreter.DMA, "execute_read", counted)
  made = conformance.packed((*EVERY, 2, 2), (8, 512, 512), group=128)
  sizes = np.array([2, 0, 1, 3, 0, 1, 0, 1], np.int32)
  view = tpu_view.prepare(made.q, paired=True)
  config = dataclasses.replace(pallas_tpu.heuristic(8, 8, view), columns=128, depth=512)
  x = conformance.rows(8, 512)
  y = _run(x, made.q, sizes, config)
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-5
  active = sizes > 0
  codes = 512 * 512 * np.array([*EVERY, 2, 2])[active].sum() // 8
  assert sum(copied) == codes + active.sum() * 4 * 512 * 512 // 128


def test_what_is_refused_is_refused_with_a_reason(monkeypatch):
  packed, dense = (jnp.dtype("bfloat16"), None), (jnp.dtype("bfloat16"),) * 2
  assert "no rows" in pallas_tpu.supports((0, 2, 64, 64), packed, "tpu")
  assert "vector memory" in pallas_tpu.supports((8, 2, 2**20, 64), packed, "tpu")
  assert pallas_tpu.supports((8, 2, 64, 64), packed, "cpu") is None
  monkeypatch.setattr(pallas_tpu, "INTERPRET", None)
  for dtypes in (packed, dense):
    assert "made for TPUs" in pallas_tpu.supports((8, 2, 64, 64), dtypes, "cpu")
    assert "made for TPUs" in pallas_tpu.supports((8, 2, 64, 64), dtypes, "gpu")
    assert pallas_tpu.supports((8, 2, 64, 64), dtypes, "tpu") is None


@pytest.mark.parametrize("changes", [
  {"rows": 8}, {"columns": 100}, {"columns": 512}, {"depth": 128}, {"depth": 1024}, {"unroll": 2}, {"row_tiles": 2},
  {"in_order": True, "rows": 16}])
def test_tiles_that_do_not_fit_are_refused(changes: dict[str, Any]):
  view = pallas_tpu.prepare(conformance.packed(2, (2, 512, 256), group=128).q)
  with pytest.raises(ValueError, match="K-tile 512"):
    pallas_tpu.matmul(jnp.ones((20, 512)), view, jnp.array([9, 11]), jnp.float32, _config(**changes))


def test_several_shards_have_no_view():
  q = conformance.packed(2, (2, 256, 128)).q
  with pytest.raises(ValueError, match="holds 2"):
    pallas_tpu.prepare(dataclasses.replace(q, buffer=np.concatenate([q.buffer, q.buffer]), axis="n"))
