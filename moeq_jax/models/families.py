"""The families of models that can be read: one table from the name in a config to the module that computes it.

Each module gives a model of a config as `build(config, dtype)` and its functions as `functions(dtype, **modes)`.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from moeq_jax.models import decoder, switch

MODULES: dict[str, ModuleType] = {
    "mixtral": decoder,
    "qwen2_moe": decoder,
    "qwen3_moe": decoder,
    "olmoe": decoder,
    "llama": decoder,
    "switch_transformers": switch,
}


def functions(config: Any, dtype: Any, **modes: Any) -> decoder.Functions:
  """The functions of a model of this config, computing in `dtype`; the same object for the same arguments.

  Args:
    config: of the model.
    dtype: of the activations.
    modes: of Switch Transformers, `capacity`.
  """
  return MODULES[config.family].functions(jnp.dtype(dtype), **modes)


def abstract(config: Any, dtype: Any = jnp.float32) -> Any:
  """The model as a pytree of `jax.ShapeDtypeStruct`: what parameters it has, without memory for them."""
  return jax.eval_shape(lambda: MODULES[config.family].build(config, jnp.dtype(dtype)))
