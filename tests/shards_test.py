"""Sharded QTensors hold the same weights, and a `shard_map` over them computes the same outputs and gradients."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeq_jax import qtensor, shards
from tests import conformance

WORKER = '''
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from moeq_jax import shards
from moeq_jax.kernels import api
from tests import conformance

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
made = conformance.packed((1, 3, 16, 4), (4, 512, 64))
x, sizes, dy = conformance.rows(23, 512), np.array([5, 0, 11, 7], np.int32), conformance.rows(23, 64, seed=2)
plain, pull = jax.vjp(lambda x: api.grouped_matmul(x, made.q, sizes), x)
wanted_y, wanted_dx = np.asarray(plain, np.float64), np.asarray(pull(jnp.asarray(dy))[0], np.float64)
for axis, x_spec, y_spec in (("n", jax.P(), jax.P(None, "model")), ("k", jax.P(None, "model"), jax.P())):
  q = shards.shard(made.q, 4, axis)
  specs = shards.specs(q, "model")
  placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), q, specs)
  assert {shard.data.shape[0] for shard in placed.buffer.addressable_shards} == {1}
  for backend in ("cpu", "reference"):
    def body(x, q, sizes):
      y = api.grouped_matmul(x, q, sizes, backend=backend)
      return jax.lax.psum(y, "model") if axis == "k" else y

    run = jax.shard_map(body, mesh=mesh, in_specs=(x_spec, specs, jax.P()), out_specs=y_spec)
    y, pull = jax.vjp(jax.jit(lambda x: run(x, placed, sizes)), x)
    assert conformance.difference(y, wanted_y) < 1e-5, (axis, backend)
    assert conformance.difference(pull(jnp.asarray(dy))[0], wanted_dx) < 1e-5, (axis, backend)
  try:
    api.grouped_matmul(x, placed, sizes)
  except ValueError as error:
    assert "inside shard_map" in str(error)
  else:
    raise AssertionError("four shards on one device were taken")
print("all equal")
'''


def test_sharded_matmuls_on_four_devices_equal_the_unsharded():
  root = Path(__file__).resolve().parents[1]
  environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "all equal\n"


@pytest.mark.parametrize(("axis", "shape", "group", "bits"), [
  ("n", (3, 100, 36), 32, (1, 3, 16)),
  ("k", (3, 512, 9), 64, (2, 3, 16)),
  ("k", (3, 300, 9), 0, (8, 3, 1)),
  ("expert", (8, 100, 9), 32, (1, 2, 3, 4, 8, 16, 1, 16)),
  ("n", (2, 128, 32), 64, np.arange(16).reshape(2, 1, 8) % 4 + 1),
  ("k", (2, 1024, 5), 128, np.arange(16).reshape(2, 8, 1) % 4 + 1),
])
def test_shards_hold_the_same_weights(axis: str, shape: tuple[int, int, int], group: int, bits):
  made = conformance.packed(bits, shape, group)
  q = shards.shard(made.q, 4, axis)
  q.validate()
  assert (q.shards, q.shape) == (4, shape)
  np.testing.assert_array_equal(qtensor.unpack(q), made.codes)
  cut = qtensor.CUT[axis]
  for index, values in enumerate(np.split(made.values, 4, cut)):
    part = qtensor.local(q, index)
    part.validate()
    assert conformance.difference(qtensor.dequantize(part), values) < 1e-6


@pytest.mark.parametrize("axis", ["n", "k", "expert"])
def test_dequantizing_joins_the_shards(axis: str):
  made = conformance.packed((2, 16), (2, 128, 8))
  assert conformance.difference(qtensor.dequantize(shards.shard(made.q, 2, axis)), made.values) < 1e-6


@pytest.mark.parametrize("axis", ["n", "k", "expert"])
def test_counts_do_not_change_with_sharding(axis: str):
  plain = conformance.packed((2, 3, 4, 8), (4, 512, 64)).q
  q = shards.shard(plain, 4, axis)
  assert math.isclose(qtensor.nominal_bits(q), qtensor.nominal_bits(plain))
  assert math.isclose(qtensor.effective_bits(q), qtensor.effective_bits(plain))
  parts = [qtensor.local(q, index) for index in range(4)]
  assert math.isclose(qtensor.nominal_bits(*parts), qtensor.nominal_bits(plain))
  assert qtensor.stored_bytes(*parts) <= qtensor.stored_bytes(q)


@pytest.mark.parametrize(("axis", "shape", "group", "bits", "said"), [
  ("n", (2, 64, 30), 0, 2, "cannot be cut into 4 equal shards"),
  ("k", (2, 102, 8), 0, 2, "cannot be cut into 4 equal shards"),
  ("expert", (3, 64, 8), 0, 2, "cannot be cut into 4 equal shards"),
  ("k", (2, 256, 8), 128, 2, "cut a group of 128"),
  ("n", (1, 64, 24), 0, np.array([[[1, 2, 3]]]), "cannot be cut"),
  ("rows", (2, 64, 8), 0, 2, "an axis of"),
])
def test_parts_that_are_not_equal_are_refused(axis, shape, group, bits, said):
  with pytest.raises(ValueError, match=said):
    shards.shard(conformance.packed(bits, shape, group).q, 4, axis)


def test_a_sharded_tensor_is_not_sharded_again():
  q = shards.shard(conformance.packed(2, (2, 64, 8), 0).q, 2, "n")
  with pytest.raises(ValueError, match="unsharded"):
    shards.shard(q, 2, "n")
