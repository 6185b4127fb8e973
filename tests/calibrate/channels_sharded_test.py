"""Taps inside `shard_map`, tokens over four devices: the sums are those of the examples one by one."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = '''
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.calibrate import channels_test as one

assert jax.device_count() == 4
one.by_example()
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
over = lambda body: jax.shard_map(body, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
around = over(lambda x, totals: jax.lax.psum(one.plain(x, totals), "data"))
ways = {
    "gradient of a shard_map": jax.grad(around, 1),
    "gradient inside a shard_map": over(lambda x, totals: jax.grad(one.plain, 1)(x, totals)),
    "gradient of a rematerialised shard_map": jax.grad(jax.checkpoint(around), 1),
    "gradient of remat in a shard_map": jax.grad(
        over(lambda x, totals: jax.lax.psum(jax.checkpoint(one.plain)(x, totals), "data")), 1),
}
for name, way in ways.items():
  one.check(jax.jit(way)(one.rows(), one.zeros()))
print("all equal")
'''


def test_taps_on_four_devices():
  root = Path(__file__).resolve().parents[2]
  environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "all equal\n"
