"""A tiny Switch Transformer for tests, random but of a size at which positions, routing and capacity matter.

Blocks 0 and 1 are the encoder's (dense, sparse), 2 and 3 the decoder's (sparse, dense). Experts overflow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moeq_jax import codecs, qtensor
from moeq_jax.models import convert, families, switch

CONFIG = switch.SwitchConfig(
    vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=3,
    expert_capacity=2, encoder_sparse=(1,), decoder_sparse=(0,), relative_attention_num_buckets=8,
    relative_attention_max_distance=12)


@functools.cache
def model(seed: int = 0) -> switch.Switch:
  """A model with float32 parameters, all of them random."""
  abstract, rng = families.abstract(CONFIG), np.random.default_rng(seed)

  def value(name: str, shape: tuple[int, ...]) -> jax.Array:
    centre, deviation = (1.0, 0.2) if "norm" in name else (0.0, 1.0 if "router" in name else 0.4)
    return jnp.asarray(rng.normal(centre, deviation, shape), jnp.float32)

  leaves = [value(name, leaf.shape) for name, leaf in convert.named_leaves(abstract).items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


@functools.cache
def packed(layer: int) -> dict[str, qtensor.QTensor]:
  """The experts of block `layer` of `model()` in 2, 3 and 4 bits."""
  codec, bits, found = codecs.get("rtn(group=0)"), [2, 3, 4], {}
  for name, weights in switch.functions(jnp.float32).experts(model().blocks[layer]).items():
    codes, scale, zero = (np.stack(parts) for parts in zip(
        *([np.asarray(part) for part in codec.encode(w, b)] for w, b in zip(weights, bits, strict=True)), strict=True))
    found[name] = jax.tree.map(jnp.asarray, qtensor.pack(codes, bits, scale, zero, group=0))
  return found
