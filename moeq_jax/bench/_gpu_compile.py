"""Compiling for a Hopper GPU without one: XLA's CUDA plugin compiles for a chip that is only described.

A process of its own for one launch: the plugin prints the PTX and what ptxas says of it, and reads from the environment
whether to. It needs the package jax-cuda13-plugin of the version of jax (requirements-aot.txt), and no CUDA.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from moeq_jax import qtensor
from moeq_jax.bench import _tpu_compile
from moeq_jax.kernels import gpu_view, pallas_gpu, shapes

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 85520809984
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 24 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}


def missing() -> str | None:
  """What is missing to compile for Hopper GPUs here, or None."""
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    return "jax-cuda13-plugin is not installed: `./launch.sh aot` makes an environment with it (requirements-aot.txt)"
  return None


def launch(layer: str, projection: str, rows: int, dtype: str = "bfloat16") -> dict[str, Any]:
  """Compiles one launch at true size, experts of all widths mixed, in a process of its own.

  Args:
    layer: of `shapes.LAYERS`.
    projection: of the layer.
    rows: T.
    dtype: of the rows.

  Returns:
    The arguments, `registers` per thread, bytes of `spill_stores` and `spill_loads`, numbers of `wgmma` and of
    `shuffle` instructions in the PTX, `config`; or `error`.
  """
  job = {"layer": layer, "projection": projection, "rows": rows, "dtype": dtype}
  command = [sys.executable, "-m", "moeq_jax.bench._gpu_compile", json.dumps(job)]
  child = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
  if child.returncode:
    return {**job, "error": child.stderr[-2000:]}
  return {**job, "config": json.loads(child.stdout.splitlines()[-1]), **read(child.stdout + child.stderr)}


def read(said: str) -> dict[str, Any]:
  """What the PTX and the messages of ptxas in `said` hold; sums over kernels, the largest number of registers."""
  spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
  registers = re.findall(r"Used (\d+) registers", said)
  if len(registers) != 1:
    return {"error": f"{len(registers)} kernels in what ptxas said: {said[-500:]}"}
  return {"registers": int(registers[0]), "spill_stores": int(spills[0][0]), "spill_loads": int(spills[0][1]),
          "wgmma": said.count("wgmma.mma_async"), "shuffle": said.count("shfl.sync")}


def main() -> None:
  """Compiles what the first argument says; prints the sizes of the launch last."""
  job = json.loads(sys.argv[1])
  shape = shapes.LAYERS[job["layer"]].matmuls()[job["projection"]]
  group = 128 if shape[1] % 128 == 0 else 64
  q = _tpu_compile.abstract(shape, np.resize(qtensor.WIDTHS, shape[0]), group)
  view = jax.eval_shape(gpu_view.prepare, q)
  x = jax.ShapeDtypeStruct((job["rows"], shape[1]), job["dtype"])
  sizes = jax.ShapeDtypeStruct((shape[0],), jnp.int32)
  described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x1")
  sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    run = jax.jit(lambda *args: pallas_gpu.forward(*args, jnp.dtype(jnp.bfloat16)), in_shardings=sharding,
                  out_shardings=sharding)
    run.trace(x, view, sizes).lower(lowering_platforms=("cuda",)).compile()
  exact = x.dtype == jnp.float32
  config = pallas_gpu.heuristic((3 if exact else 1) * job["rows"], view, exact)
  print("\n" + json.dumps(vars(config)), flush=True)


if __name__ == "__main__":
  main()
