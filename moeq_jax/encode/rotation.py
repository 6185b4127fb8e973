"""The hidden dimension in another basis, so that no single channel of it is an outlier.

With an orthogonal R, an expert computes the same from rotated inputs, and its rotated output turned back is its output:

  x W = (x R)(R^T W)  for gate and up          y = (h W_down R) R^T  for down

What is quantized are `R^T W` and `W_down R`, whose entries are sums of many weights, nearly normal whatever the weights
were (Chee et al., "QuIP", 2023; Ashkboos et al., "QuaRot", 2024). The F neurons of an expert stay as they are: SiLU
does not let them be rotated.

R is a randomized Hadamard matrix: random signs times the normalised Sylvester matrix of the largest power of two that
divides the hidden size, Kronecker product with a random orthogonal matrix of what is left (1 for 256, 3 for 192, 9 for
576). The rotation stands behind the norm's weight, on the rows that experts see; a model that runs so rotates them once
a token and layer, and their weighted sum once. To measure what it does to a model it is enough to rotate the decoded
weights back (`restore`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def matrix(size: int, seed: int) -> np.ndarray:
  """The rotation `[size, size]` float32; equal for equal arguments.

  Raises:
    ValueError: a size below 1.
  """
  if size < 1:
    raise ValueError(f"a rotation of {size} dimensions: at least one is needed")
  rng = np.random.default_rng([seed, size])
  power = size & -size
  hadamard = np.ones((1, 1))
  while len(hadamard) < power:
    hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2)
  rest, triangle = np.linalg.qr(rng.normal(size=(size // power, size // power)))
  rest *= np.sign(np.diag(triangle))
  return (rng.choice([-1.0, 1.0], size)[:, None] * np.kron(hadamard, rest)).astype(np.float32)


def rotate(experts: Mapping[str, Any], rotation: Any) -> dict[str, jax.Array]:
  """The experts of a layer in the rotated basis, `{projection: [E, K, N]}` float32: `R^T W`, and `W R` for down."""
  return _turn(experts, jnp.asarray(rotation))


def restore(experts: Mapping[str, Any], rotation: Any) -> dict[str, jax.Array]:
  """Undoes `rotate`, for decoded weights to stand in the model as it is."""
  return _turn(experts, jnp.asarray(rotation).T)


def moment(moments: Any, rotation: Any) -> jax.Array:
  """Second moments `[..., D, D]` of the inputs of gate and up as the rotated basis sees them, `R^T A R`."""
  return jnp.einsum("ki,...kl,lj->...ij", rotation, moments, rotation, precision="highest")


def watched(functions: Any, rotation: np.ndarray) -> Any:
  """A model's functions, whose taps see the experts' inputs and outputs in the rotated basis.

  Calibration through them has the moments and gradients that belong to the rotated weights; what the model computes is
  the same up to rounding.

  Args:
    functions: see `models.decoder.Functions`.
    rotation: `[D, D]`.
  """

  def block(block: Any, state: Any, *taps: Any) -> Any:
    if not taps:
      return functions.block(block, state)

    def turned(name: str, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
      if name not in ("input", "down"):
        return taps[0](name, rows, group_sizes)
      matmul = lambda x, r: jnp.matmul(x, r.astype(x.dtype), precision="highest")
      return matmul(taps[0](name, matmul(rows, rotation), group_sizes), rotation.T)

    return functions.block(block, state, turned)

  return dataclasses.replace(functions, block=block)


def _turn(experts: Mapping[str, Any], rotation: jax.Array) -> dict[str, jax.Array]:
  turned = {}
  for name, w in experts.items():
    w = jnp.asarray(w, jnp.float32)
    subscripts = "efk,kn->efn" if name == "down" else "ki,ekf->eif"
    turned[name] = jnp.einsum(subscripts, *((w, rotation) if name == "down" else (rotation, w)), precision="highest")
  return turned
