"""Mixed-precision quantization of Mixture-of-Experts models in JAX.

The public names; modules are loaded on first use.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Codec": "moeq_jax.codecs",
    "CostTable": "moeq_jax.artifacts",
    "ErrorTable": "moeq_jax.artifacts",
    "Evidence": "moeq_jax.scores",
    "Plan": "moeq_jax.artifacts",
    "QTensor": "moeq_jax.qtensor",
    "SCORES": "moeq_jax.scores",
    "Score": "moeq_jax.scores",
    "Stats": "moeq_jax.artifacts",
    "grouped_matmul": "moeq_jax.kernels.api",
    "load": "moeq_jax.language_model",
    "solve": "moeq_jax.allocate.knapsack",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module 'moeq_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return __all__
