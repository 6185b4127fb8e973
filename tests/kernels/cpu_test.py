"""The CPU back-end: the shared suite, its tiles, and what it refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import qtensor, unpacking
from moeq_jax.kernels import api, cpu, cpu_loop, shapes, varying
from tests import conformance


@pytest.fixture(autouse=True)
def both_orders(monkeypatch: pytest.MonkeyPatch):
  """The small problems of this file, too, take their scales after the product where rows are few."""
  monkeypatch.setattr(cpu, "LEAST_WEIGHTS_AFTER", 0)
  monkeypatch.setattr(cpu, "MOST_ROWS_AFTER", {"bfloat16": 12, "float32": 12})
  monkeypatch.setattr(cpu, "_fast_bfloat16", lambda: True)
  monkeypatch.setattr(varying, "zeros", lambda shape, dtype, like: jnp.full(shape, jnp.nan, dtype))  # all is written


class TestCpu(conformance.Conformance):
  backend = "cpu"


@pytest.mark.parametrize("scales", ["before", "after"])
@pytest.mark.parametrize(("shape", "columns"), [((3, 64, 192), 64), ((2, 100, 1155), 231)])
def test_more_than_one_column_tile_and_row_tile(monkeypatch, shape: tuple[int, int, int], columns: int, scales: str):
  monkeypatch.setattr(cpu, "heuristic", lambda *_, **__: cpu.Config(rows=16, columns=columns, scales=scales))
  made = conformance.packed((2, 16, 3)[: shape[0]], shape, group=32)
  x, sizes = conformance.rows(100, shape[1]), shapes.group_sizes("zipf", 100, shape[0])
  dy = conformance.rows(100, shape[2], seed=2)
  y, pull = jax.vjp(jax.jit(lambda x: api.grouped_matmul(x, made.q, sizes, backend="cpu")), x)
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-5
  wanted = conformance.expected(dy, made.values.swapaxes(1, 2), sizes)
  assert conformance.difference(pull(jnp.asarray(dy))[0], wanted) < 1e-5


@pytest.mark.parametrize(("rows", "dtype"), [(9, np.float32), (60, ml_dtypes.bfloat16)])
@pytest.mark.parametrize(("shape", "group", "blocks"), [
    ((3, 64, 250), 64, (1, 4)), ((3, 128, 256), 128, (1, 2)), ((3, 128, 48), 32, (4, 1)), ((2, 384, 64), 128, (3, 1)),
    ((3, 256, 64), 64, (2, 4))])
def test_blocks_of_neurons(monkeypatch, shape: tuple[int, int, int], group: int, blocks: tuple[int, int], rows: int,
                           dtype: type):
  """Stripes and K-blocks of 16 to 128 neurons, several stripes to a tile and several tiles."""
  monkeypatch.setattr(cpu_loop, "MOST_STRIPES", 2)
  bits = np.random.default_rng(5).choice(qtensor.WIDTHS, (shape[0], *blocks))
  made = conformance.packed(bits, shape, group)
  x, sizes = conformance.rows(rows, shape[1], dtype), shapes.group_sizes("zipf", rows, shape[0])
  dy = conformance.rows(rows, shape[2], seed=2)
  y = conformance.jitted("cpu")(x, made.q, sizes)
  dx = conformance.jitted_gradients("cpu", (0,))(x, made.q, sizes, dy)[0]
  limit = 1e-5 if dtype == np.float32 else 1e-2
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < limit
  assert conformance.difference(dx, conformance.expected(dy, made.values.swapaxes(1, 2), sizes)) < limit


def test_one_program_serves_every_arrangement_of_blocks():
  run = jax.jit(lambda x, w, sizes: api.grouped_matmul(x, w, sizes, backend="cpu"))
  x, shape, rng = conformance.rows(40, 128), (4, 128, 64), np.random.default_rng(6)
  for seed in range(3):
    bits = np.full((4, 2, 4), 16) if seed == 0 else rng.choice(qtensor.WIDTHS, (4, 2, 4))
    made = conformance.packed(bits, shape, seed=seed, capacity=qtensor.packed_rows(np.full((4, 2, 4), 16), shape, 64))
    sizes = shapes.group_sizes("zipf", 40, 4, seed)
    assert conformance.difference(run(x, made.q, sizes), conformance.expected(x, made.values, sizes)) < 1e-5
  assert run._cache_size() == 1


NAMED = [(name, projection) for name, layer in shapes.LAYERS.items() for projection in layer.matmuls()
         if projection != "gate"]


@pytest.mark.parametrize(("name", "projection"), NAMED)
def test_named_shapes_under_every_routing(name: str, projection: str):
  shape = shapes.LAYERS[name].scaled(1 / 16).matmuls()[projection]
  made = conformance.packed(conformance.mixed(shape[0]), shape, group=32)
  for routing in shapes.ROUTINGS:
    for dtype, limit in ((np.float32, 1e-5), (ml_dtypes.bfloat16, 1e-2)):
      x, sizes = conformance.rows(40, shape[1], dtype), shapes.group_sizes(routing, 40, shape[0])
      y = conformance.jitted("cpu")(x, made.q, sizes)
      assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < limit


@pytest.mark.parametrize("rows", [1, 7, 100, 16384])
@pytest.mark.parametrize("stripe", [1, 36, 576, 768, 1408, 14336, 997])
def test_tiles_fit(rows: int, stripe: int):
  config = cpu.heuristic((rows, 16, 256, stripe), np.float32)
  assert 1 <= config.rows <= min(rows, 256)
  assert stripe % config.columns == 0
  assert config.columns <= max(cpu.MOST_COLUMNS.values()) or stripe % 64 != 0


@pytest.mark.parametrize(("rows", "size", "dtype", "fast", "scales"), [
    (32, 1024, "bfloat16", False, "after"), (32, 1024, "float32", False, "before"),
    (32, 1024, "float32", True, "after"),
    (32, 256, "float32", True, "before"), (4096, 1024, "bfloat16", True, "before"),
    (4096, 1024, "float32", True, "before")])
def test_scales_come_after_the_product_where_rows_are_few(
    monkeypatch, rows: int, size: int, dtype: str, fast: bool, scales: str):
  monkeypatch.undo()
  assert cpu.heuristic((rows, 16, size, size), jnp.dtype(dtype), fast).scales == scales


def test_whether_the_cpu_multiplies_bfloat16_is_read_from_its_flags(monkeypatch, tmp_path: Path):
  monkeypatch.undo()
  for flags, wanted in (("fpu avx512_bf16 amx_tile", True), ("fpu avx512_bf16_not avx2", False)):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(cpu, "CPU_FLAGS", tmp_path / "cpuinfo")
    assert cpu._fast_bfloat16.__wrapped__() == wanted
  monkeypatch.setattr(cpu, "CPU_FLAGS", tmp_path / "none")
  assert not cpu._fast_bfloat16.__wrapped__()


def test_a_column_tile_keeps_its_limits():
  for (K, stripe, stripes, columns, weights), wanted in {
      (1024, 3584, 1, 4096, 1 << 22): 3584, (4096, 14336, 1, 4096, 1 << 22): 1024, (14336, 4096, 1, 4096, 1 << 22): 256,
      (1 << 20, 4096, 1, 4096, 1 << 22): 64, (64, 997, 1, 64, 64): 997, (64, 14336, 1, 4096, 1 << 22): 3584,
      (1024, 128, 28, 4096, 1 << 22): 3584, (1024, 64, 56, 4096, 1 << 22): 1792, (4096, 128, 112, 4096, 1 << 22): 1024,
      (1024, 64, 53, 2048, 1 << 22): 64, (64, 16, 5, 4096, 1 << 22): 80, (4096, 7168, 2, 4096, 1 << 22): 1024}.items():
    assert cpu_loop.column_tile(K, stripe, stripes, columns, weights) == wanted


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_expert_without_rows_is_not_unpacked(monkeypatch, dtype: type):
  """One column tile: XLA would move the unpacking of every expert out of a loop over its row tiles."""
  made = conformance.packed(2, (3, 64, 128))
  seen = []
  for name in ("columns", "codes"):
    def counted(q, index, *args, original=getattr(unpacking, name)):
      jax.debug.callback(lambda e: seen.append(int(e)), index)
      return original(q, index, *args)

    monkeypatch.setattr(unpacking, name, counted)
  x = conformance.rows(9, 64, dtype)
  jax.block_until_ready(jax.jit(lambda x: api.grouped_matmul(x, made.q, np.array([4, 0, 5]), backend="cpu"))(x))
  jax.effects_barrier()
  assert sorted(seen) == [0, 2]


def test_the_whole_weight_is_never_dense():
  shape = (16, 256, 512)
  q = conformance.packed(2, shape).q
  x, sizes = conformance.rows(64, 256), shapes.group_sizes("uniform", 64, 16)
  compiled = jax.jit(lambda x: api.grouped_matmul(x, q, sizes, backend="cpu")).lower(x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * np.prod(shape) / 4


def test_packed_weights_on_another_device_are_refused():
  dtypes = jnp.dtype("float32"), None
  assert "made for CPUs" in cpu.supports((8, 2, 64, 64), dtypes, "gpu")
  assert cpu.supports((8, 2, 64, 64), (dtypes[0], dtypes[0]), "gpu") is None
  assert cpu.supports((8, 2, 64, 64), dtypes, "cpu") is None
