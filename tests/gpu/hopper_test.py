"""The Hopper kernel on a Hopper GPU, against float64; the suite that all back-ends run.

Run by `./launch.sh test tests/gpu` on a machine with such a GPU and jax's CUDA packages of the same version.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moeq_jax import qtensor
from moeq_jax.kernels import api, pallas_gpu, shapes
from tests import conformance

REFUSAL = pallas_gpu.supports((8, 8, 64, 64), (jnp.dtype(jnp.bfloat16), None), jax.default_backend())
LIMITS = {ml_dtypes.bfloat16: 5e-3, np.float32: 1e-6}
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


class TestHopper(conformance.Conformance):
  backend = "pallas_gpu"


@pytest.mark.parametrize("count", [1, 16, 64, 120, 200, 1100])
def test_every_width_at_a_width_of_mixtral(count: int):
  """4096 rows of weights, rows of x whose tasks have 8 to 128 rows, scales after and before the product."""
  bits = np.array(qtensor.WIDTHS)
  made = conformance.packed(bits, (6, 4096, 256), group=128)
  view = api.prepare(made.q, "pallas_gpu")
  run = {dtype: jax.jit(functools.partial(api.grouped_matmul, out_dtype=jnp.float32)) for dtype in LIMITS}
  for routing in shapes.ROUTINGS:
    sizes = shapes.group_sizes(routing, count, 6)
    for dtype, limit in LIMITS.items():
      x = conformance.rows(count, 4096, dtype)
      assert conformance.difference(run[dtype](x, view, sizes), conformance.expected(x, made.values, sizes)) < limit


def test_results_that_leave_the_registers_as_bfloat16():
  """Scales before the product and one part of K: the store that a prefill takes."""
  made = conformance.packed(np.array(qtensor.WIDTHS), (6, 4096, 256), group=128)
  view = api.prepare(made.q, "pallas_gpu")
  config = pallas_gpu.heuristic(1100, view.view)
  assert (config.scale, config.splits) == ("before", 1)
  x, sizes = conformance.rows(1100, 4096, ml_dtypes.bfloat16), shapes.group_sizes("zipf", 1100, 6)
  y = jax.jit(api.grouped_matmul)(x, view, sizes)
  assert y.dtype == jnp.bfloat16
  assert conformance.difference(y, conformance.expected(x, made.values, sizes)) < 1e-2


def test_two_runs_are_equal_to_the_last_bit():
  made = conformance.packed(conformance.mixed(8), (8, 1024, 384), group=128)
  x, sizes = conformance.rows(64, 1024, ml_dtypes.bfloat16), shapes.group_sizes("zipf", 64, 8)
  first, second = (np.asarray(conformance.jitted("pallas_gpu")(x, made.q, sizes)) for _ in range(2))
  np.testing.assert_array_equal(first, second)
