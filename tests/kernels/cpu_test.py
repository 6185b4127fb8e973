"""The CPU back-end: the shared suite, its tiles, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moeq_jax.kernels import api, cpu, shapes
from tests import conformance


class TestCpu(conformance.Conformance):
  backend = "cpu"


@pytest.mark.parametrize(("shape", "columns"), [((3, 64, 192), 64), ((2, 100, 1155), 231)])
def test_more_than_one_column_tile_and_row_tile(monkeypatch, shape: tuple[int, int, int], columns: int):
  monkeypatch.setattr(cpu, "heuristic", lambda *_: cpu.Config(rows=16, columns=columns))
  made = conformance.packed((2, 16, 3)[: shape[0]], shape, group=32)
  x, sizes = conformance.rows(100, shape[1]), shapes.group_sizes("zipf", 100, shape[0])
  dy = conformance.rows(100, shape[2], seed=2)
  y, pull = jax.vjp(jax.jit(lambda x: api.grouped_matmul(x, made.q, sizes, backend="cpu")), x)
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-5
  wanted = conformance.expected(dy, made.values.swapaxes(1, 2), sizes)
  assert conformance.difference(pull(jnp.asarray(dy))[0], wanted) < 1e-5


@pytest.mark.parametrize("rows", [1, 7, 100, 16384])
@pytest.mark.parametrize("stripe", [1, 36, 576, 768, 1408, 14336, 997])
def test_tiles_fit(rows: int, stripe: int):
  config = cpu.heuristic(rows, 16, stripe)
  assert 1 <= config.rows <= min(rows, 256)
  assert stripe % config.columns == 0
  assert config.columns <= 1024 or stripe % 64 != 0


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
