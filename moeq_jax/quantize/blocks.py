"""Plans by blocks of neurons: `config.block`, or `knapsack(SCORE, block=64)`.

Errors are measured neuron by neuron in the sweeps of `measure`, a score of `scores.channels` makes costs of them, the
neurons of every expert are put in order from the dearest to the cheapest, and blocks of them in every projection are
the units of the knapsack. Experts are encoded with their neurons in that order, which changes nothing in what they
compute, so that no order is stored: it would only be needed to compare tensors with the source's. `effective_bits`
counts it all the same (`BlockPlan.permutation_bits`), `stored_bits` does not.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from moeq_jax import artifacts, channels, codecs, registry
from moeq_jax.allocate import blocks, methods
from moeq_jax.calibrate import spectrum
from moeq_jax.encode import channels as encode_channels
from moeq_jax.encode import neurons
from moeq_jax.quantize import measure
from moeq_jax.quantize.subject import Subject
from moeq_jax.scores import channels as scores

log = logging.getLogger(__name__)
_STORED, _LISTED = 8, 16  # bytes of a block's width and offset in the file, and of a number in the manifest


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with `config.block` as an option of its method; warns where its score does not tell neurons apart.

  Raises:
    ValueError: a block that storage does not know, a method that has no blocks, or two different blocks.
  """
  block, spec = config.get("block", 0) or 0, registry.parse(config.method)
  if not block:
    return config
  neurons.down_block(block, 128)
  if spec.name != "knapsack":
    raise ValueError(f"config.block={block}: {spec.name} gives one width to an expert; only the knapsack has blocks,"
                     " for example --config.method='knapsack(fisher_error)'")
  if spec.kwargs.get("block", block) != block:
    raise ValueError(f"config.block={block}, and config.method={config.method}: name one block")
  if "block" not in spec.kwargs and methods.score_of(config.method) == "router_grad_error":
    log.warning("config.block=%d: router_grad_error weighs all neurons of an expert alike, and blocks by it were worse"
                " than whole experts (docs/channelwise.md); --config=configs/quantize.py:blocks or"
                " --config.method='knapsack(fisher_error)' is the score for blocks", block)
  changed = ml_collections.ConfigDict(config.to_dict(), convert_dict=True)
  changed.method = str(registry.Spec(spec.name, spec.args, spec.kwargs | {"block": block}))
  return changed


def check(method: str, codec: codecs.Codec, exports: set[str]) -> None:
  """Looks for mistakes before any work.

  Args:
    method: spec of the method, which may have no blocks.
    codec: the codec.
    exports: formats that are asked for.

  Raises:
    ValueError: a codec without scale groups, or a format that has one width for a projection.
  """
  block = methods.block_of(method)
  if not block:
    return
  neurons.down_block(block, codec.group)
  if "compressed_tensors" in exports:
    raise ValueError(f"config.export: compressed-tensors has one width for a projection of an expert, and block={block}"
                     " gives several; export hf (dequantized), or leave the block out and take a constraint of whole"
                     " experts")


def check_source(method: str, codec: codecs.Codec, shapes: Mapping[str, tuple[int, int]]) -> None:
  """Looks whether blocks fit the experts, whose `shapes` are `{projection: (K, N)}`.

  Raises:
    ValueError: they do not divide the neurons; names those that do.
  """
  block = methods.block_of(method)
  if not block:
    return
  ffn, fits = shapes["down"][0], lambda block: shapes["down"][0] % neurons.down_block(block, codec.group) == 0
  if not fits(block):
    others = [str(other) for other in channels.BLOCKS if fits(other)]
    whole = neurons.down_block(block, codec.group)
    instead = f"take block={' or '.join(others)}" if others else "take a codec with a smaller group"
    raise ValueError(f"block={block}: blocks of {whole} rows of down (whole scale groups of {codec.group}) do not"
                     f" divide the {ffn} neurons of an expert; {instead}, or leave the block out")


def extra_bytes(method: str, group: int, shapes: Mapping[str, tuple[int, int]], experts: int) -> int:
  """Bytes that a method's blocks take beside codes and scales: width and offset of every block after the first of its
  projection, and its places in the manifest.

  Args:
    method: spec of the method; without blocks it takes none.
    group: rows that share a scale.
    shapes: `{projection: (K, N)}` of an expert.
    experts: of all layers.
  """
  block = methods.block_of(method)
  if not block:
    return 0
  more = [shapes["down"][0] // (neurons.down_block(block, group) if name == "down" else block) - 1 for name in shapes]
  return sum(more) * (experts * (_STORED + _LISTED) + 2 * _LISTED)


def evidence(subject: Subject, stats: artifacts.Stats, errors: Mapping[int, Mapping[str, np.ndarray]],
             encoding: measure.Encoding) -> scores.Evidence:
  """What scores of neurons look at.

  Args:
    subject: the checkpoint.
    stats: as `measure.stats` gives them.
    errors: by block, of the sweep that encoded every expert.
    encoding: codec and widths.
  """
  layers = [errors[layer] for layer in subject.sparse]
  kinds = [kind for kind in ("weight", "fisher") if kind in layers[0]]
  table = encode_channels.error_table([{kind: layer[kind] for kind in kinds} for layer in layers],
                                      measure.projection_shapes(subject), widths=encoding.widths, codec=encoding.codec)
  seen = None
  if "input_sq" in layers[0]:
    own = ("input_sq", "mid_sq", "condition", "log_am_gm")
    same = {field.name for field in dataclasses.fields(channels.ChannelStats)} - {*own, "damping"}
    seen = channels.ChannelStats(**{name: getattr(stats, name) for name in same}, damping=spectrum.DAMPING,
                                 **{name: np.stack([layer[name] for layer in layers]) for name in own})
  return scores.Evidence(table, measure.Experts(subject), seen)


def costs(found: scores.Evidence, spec: str, block: int) -> channels.BlockCosts:
  """The costs of blocks of `block` neurons in order."""
  rows = scores.as_cost(spec, found)
  return blocks.merged(blocks.ordered(rows, blocks.order(rows)), block,
                       neurons.down_block(block, found.errors.group))


def constraint_costs(table: channels.BlockCosts, chosen: channels.BlockPlan) -> list[dict[str, Any]]:
  """The least cost under every constraint of blocks at the plan's budget, as `planning.constraint_costs`."""
  rows = []
  for name in blocks.CONSTRAINTS:
    best = blocks.plan(table, chosen.budget, name)
    rows.append({"constraint": name, "predicted": best.predicted, "bits": best.average_bits(),
                 "ratio": best.predicted / chosen.predicted if chosen.predicted else None})
  return rows
