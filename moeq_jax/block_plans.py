"""Plans by blocks of neurons in the task `compare`: methods like `knapsack(fisher_error, block=64)`.

They stand in one table with plans of whole experts: the same calibration text, codec, budgets and evaluation. What they
need beside that is made only where a method asks for it: statistics and errors neuron by neuron (one more calibration
pass, and every expert once more at every width), and the codes of each plan, which are its own, since neurons stand in
another order and widths change inside a matrix.
"""

import dataclasses
import functools
from collections.abc import Sequence

import ml_collections

from moeq_jax import artifacts, channels, codecs, progress, qtensor, workspace
from moeq_jax.allocate import methods
from moeq_jax.calibrate import channels as statistics
from moeq_jax.encode import candidates, neurons
from moeq_jax.encode import channels as encode_channels
from moeq_jax.quantize import blocks
from moeq_jax.quantize.subject import Arrays
from moeq_jax.scores import channels as scores

# Raised when a stage computes something else from the same inputs; older products are then made again.
VERSIONS = {"stats": 1, "errors": 1}


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What plans by blocks are made from.

  Attributes:
    subject: the model.
    codec: the codec.
    widths: candidate bits.
    evidence: of every neuron.
    stats: calibration with moments (after `candidates.shrink_unrouted`).
  """

  subject: workspace.Subject
  codec: codecs.Codec
  widths: tuple[int, ...]
  evidence: scores.Evidence
  stats: artifacts.Stats

  def cost(self, spec: str, block: int) -> channels.BlockCosts:
    """The costs of blocks of `block` neurons in order."""
    return blocks.costs(self.evidence, spec, block)

  def packed(self, plan: channels.BlockPlan) -> list[dict[str, qtensor.QTensor]]:
    """The experts of every MoE layer, encoded at the widths of a plan, in buffers that fit every plan."""
    ready, layers = neurons.sort_stats(self.stats, plan.order), []
    for layer, block in enumerate(self.subject.sparse_blocks()):
      experts = neurons.sort_experts(self.subject.functions.experts(block), plan.order[layer])
      bits = {name: own[layer] for name, own in plan.by_projection().items()}
      moments = {name: getattr(ready, candidates.MOMENT[name])[layer] for name in experts}
      encoded = neurons.encode_layer(experts, bits, moments, codec=self.codec)
      layers.append(neurons.pack_layer(encoded, self.codec.group, most=max(self.widths)))
    return layers


def asked(config: ml_collections.ConfigDict) -> list[str]:
  """The methods of a config that have blocks."""
  return [spec for spec in config.methods if methods.block_of(spec)]


def check(config: ml_collections.ConfigDict) -> None:
  """Looks for mistakes before any work.

  Raises:
    ValueError: a score or a block that does not exist, a codec without scale groups, `config.sequential`, or a plan by
      blocks in `config.export`.
  """
  codec = codecs.get(config.codec)
  for spec in asked(config):
    blocks.check(spec, codec, set())
    scores.check(methods.score_of(spec))
    if config.get("sequential", False):
      raise ValueError(f"config.sequential: {spec} is encoded from the full-precision model's inputs here; leave one of"
                       " them out, or take configs/quantize.py, which has both")
  if wrong := [method for method, _ in config.export if methods.block_of(method)]:
    raise ValueError(f"config.export: {wrong[0]} has blocks; configs/quantize.py --config.block=N writes such models")


def prepare(run: workspace.Workdir, subject: workspace.Subject, text: workspace.Text, stats: artifacts.Stats,
            codec: codecs.Codec, config: ml_collections.ConfigDict) -> Blocks | None:
  """What the plans by blocks of a run need, kept in `stats/channels.npz` and `channels/`; None if there are none.

  Raises:
    ValueError: blocks that do not divide the neurons of an expert.
  """
  wanted, widths = asked(config), tuple(config.widths)
  if not wanted:
    return None
  experts = [subject.functions.experts(block) for block in subject.sparse_blocks()]
  shapes = {name: tuple(w.shape[1:]) for name, w in experts[0].items()}
  for spec in wanted:
    blocks.check_source(spec, codec, shapes)
  seen = _statistics(run, subject, text)
  ready, layers = candidates.shrink_unrouted(stats), []
  inputs = {"model": subject.digest, "stats": artifacts.digest_of(stats), "channels": artifacts.digest_of(seen)}
  key = artifacts.key("channel errors", VERSIONS["errors"], {"codec": str(codec), "widths": list(widths)}, inputs)
  with progress.bar("encode neurons", len(experts)) as advance:
    for layer, own in enumerate(experts):
      make = functools.partial(_errors, own, seen, layer, codec, widths, ready)
      layers.append(run.product(f"channels/layer-{layer:03d}.npz", key, Arrays.load, make).values)
      advance()
  table = encode_channels.error_table(layers, shapes, widths=widths, codec=codec)
  return Blocks(subject, codec, widths, scores.Evidence(table, experts, seen), ready)


def _statistics(run: workspace.Workdir, subject: workspace.Subject, text: workspace.Text) -> channels.ChannelStats:
  def make() -> channels.ChannelStats:
    with progress.bar("calibrate neurons", len(text.calibration)) as advance:
      return statistics.collect(subject.functions, subject.top, subject.blocks, text.calibration, advance=advance)

  inputs = {"model": subject.digest, "text": text.digest}
  key = artifacts.key("channel stats", VERSIONS["stats"], {"dtype": subject.dtype}, inputs)
  return run.product("stats/channels.npz", key, channels.ChannelStats.load, make)


def _errors(experts: dict, seen: channels.ChannelStats, layer: int, codec: codecs.Codec, widths: Sequence[int],
            ready: artifacts.Stats) -> Arrays:
  return Arrays(encode_channels.encode_layer(experts, seen, layer, codec=codec, widths=widths, moments=ready))
