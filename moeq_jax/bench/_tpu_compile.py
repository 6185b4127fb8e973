"""Compiling for a TPU without one: libtpu describes the chip and compiles for it on any Linux machine.

Needs the package libtpu of the version that jax pins (requirements-aot.txt) and these environment variables, set before
libtpu is loaded: see `ENVIRONMENT`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from moeq_jax import planar
from moeq_jax.qtensor import QTensor

CHIPS = ("v5e", "v6e")
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so no lock on this machine is needed
}


def missing() -> str | None:
  """What is missing to compile for TPUs here, or None."""
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed: `./launch.sh aot` makes an environment that has it (requirements-aot.txt)"
  return None


def abstract(shape: tuple[int, int, int], bits: Any, group: int = 128) -> QTensor:
  """A QTensor `(E, K, N)` of shapes and dtypes only, as `qtensor.pack` would make it; `bits` an int or `[E]`."""
  experts, K, N = shape
  size = planar.layout(K, N, group)
  rows = int(np.broadcast_to(bits, experts).sum()) * size.k_block // 8
  entries = experts, -(-K // size.group), N

  def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  blocks = leaf((experts, 1, 1), jnp.int32)
  scale = leaf(entries, jnp.bfloat16)
  return QTensor(leaf((1, rows, size.stripe), jnp.uint8), blocks, blocks, scale, scale, K, N, size.group, size.k_tile,
                 size.k_block)


def compiled(chip: str, run: Callable[..., Any], *args: Any) -> Any:
  """`run(*args)`, compiled for one chip of `CHIPS`; the arguments may be abstract.

  Raises:
    RuntimeError: libtpu is missing. Whatever the compiler raises: an operation that it lacks, or too little memory.
  """
  if missing():
    raise RuntimeError(missing())
  device = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  described = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(f"TPU {chip}", 1, "tpu"))
  with jax.sharding.use_abstract_mesh(described):
    traced = jax.jit(run, in_shardings=sharding, out_shardings=sharding).trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()
