"""Under which conditions plans are measured beside the usual ones, two that arXiv 2604.06515's code has:

  config.router_bits=4      routers are quantized, too (after scores and plans were made from them)
  config.sequential=True    each layer is calibrated on the quantized layers before it; the codes then belong to one
                            plan, so every plan is encoded anew, where the pipeline otherwise encodes once for all

A config without these fields has neither.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from moeq_jax import artifacts, codecs, steps, workspace
from moeq_jax.assemble import apply
from moeq_jax.calibrate import statistics
from moeq_jax.encode import candidates


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes in the two fields.

  Raises:
    ValueError: a width that no codec has, or `sequential` with a codec that looks at no inputs.
  """
  codec, bits = codecs.get(config.codec), config.get("router_bits", 16)
  if config.get("sequential", False) and not codec.needs_moment:
    raise ValueError(f"config.sequential: {codec.name} does not look at inputs, so it makes no difference; leave it"
                     " out")
  if bits not in (*codecs.WIDTHS, 16):
    raise ValueError(f"config.router_bits={bits}: one of {codecs.WIDTHS}, or 16 for routers as they are stored")


def served(subject: workspace.Subject, config: ml_collections.ConfigDict) -> workspace.Subject:
  """What plans are put into: the model, its routers quantized if the config says so.

  File sizes in rows stay those with routers as stored.
  """
  bits = config.get("router_bits", 16)
  if bits == 16:
    return subject
  blocks = apply.quantized_routers(subject.functions, subject.blocks, bits, codecs.get(config.codec).group)
  return dataclasses.replace(subject, blocks=blocks)


def codes(subject: workspace.Subject, batches: Sequence[np.ndarray], codec: codecs.Codec, bits: np.ndarray,
          layers: Sequence[artifacts.LayerCodes], config: ml_collections.ConfigDict) -> tuple[Sequence[Any], tuple]:
  """The codes that a plan's experts are taken from, and their widths: `layers`, or its own."""
  if not config.get("sequential", False):
    return layers, tuple(config.widths)
  return sequential(subject, batches, codec, bits), tuple(int(width) for width in np.unique(bits))


def sequential(subject: workspace.Subject, batches: Sequence[np.ndarray], codec: codecs.Codec,
               bits: np.ndarray) -> list[artifacts.LayerCodes]:
  """The codes of every MoE layer at the widths of one plan.

  Args:
    subject: the full-precision model (its routers may be quantized).
    batches: calibration tokens `[B, S]` int32.
    codec: the codec.
    bits: `[L, E]` or `[L, E, P]`, the plan.

  Returns:
    Codes of each MoE layer, at the widths that occur in the plan, ascending.
  """
  functions, widths = subject.functions, tuple(int(width) for width in np.unique(bits))
  top, blocks, layers = subject.top, subject.blocks, []
  states = [steps.embed(functions, top, jnp.asarray(tokens)) for tokens in batches]
  for block in blocks:
    if functions.sparse(block):
      sums = statistics.init(functions, block)
      for state in states:
        sums = statistics.observe(functions, block, sums, state)
      total = sum(tokens.size for tokens in batches)
      stats = candidates.shrink_unrouted(statistics.finish(functions, [block], [sums], len(batches), total))
      layers.append(candidates.encode_layer(functions.experts(block), stats, 0, codec=codec, widths=widths))
      packed = apply.pack_layer(layers[-1], bits[len(layers) - 1], widths=widths, group=codec.group, sized=True)
      block, = apply.quantized_blocks(functions, [block], [packed])
    states = [steps.block(functions, block, state)[0] for state in states]
  return layers
