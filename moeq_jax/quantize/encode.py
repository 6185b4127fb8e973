"""The encoding sweep: every layer at the plan's widths, each a file of its own that is written when it is finished."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from moeq_jax import artifacts, channels, codecs, container, progress, qtensor, steps, user_text
from moeq_jax.encode import neurons, stream
from moeq_jax.export import native
from moeq_jax.models import convert
from moeq_jax.quantize import measure, packing, room
from moeq_jax.quantize import states as states_lib
from moeq_jax.quantize.subject import Subject

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
  """What is encoded how.

  Attributes:
    codec: the codec.
    bits: `{projection: [L, E, blocks]}`, widths of blocks of neurons; one block where a projection has one width.
    sequential: whether a layer's rows come from the quantized layers before it.
    order: `[L, E, F]`, which neuron stands at each place, or None for the source's own order.
  """

  codec: codecs.Codec
  bits: Mapping[str, np.ndarray]
  sequential: bool
  order: np.ndarray | None = None

  @classmethod
  def of(cls, codec: codecs.Codec, plan: artifacts.Plan | channels.BlockPlan, projections: Sequence[str],
         sequential: bool) -> Self:
    """What encodes a plan."""
    if isinstance(plan, channels.BlockPlan):
      return cls(codec, plan.by_projection(), sequential, plan.order)
    bits = np.moveaxis(plan.by_projection(len(projections)), 2, 0)[..., None]
    return cls(codec, dict(zip(projections, bits, strict=True)), sequential)

  def spec(self, place: int) -> dict[str, Any]:
    """What the key of MoE layer number `place` says of it."""
    decides = slice(0 if self.sequential else place, place + 1)
    said = {"codec": str(self.codec), "bits": {name: bits[decides].tolist() for name, bits in self.bits.items()},
            "sequential": self.sequential}
    return said if self.order is None else said | {"order": artifacts.digest(self.order[decides])}

  @property
  def layers(self) -> int:
    """MoE layers."""
    return len(next(iter(self.bits.values())))


def most_rows(subject: Subject, job: Job) -> dict[str, int]:
  """Buffer rows of each projection in the layer where it takes the most."""
  group, shapes = job.codec.group, measure.projection_shapes(subject)
  return {name: max(qtensor.packed_rows(channels.grid(name, bits), (len(bits), *shapes[name]), group) for bits in own)
          for name, own in job.bits.items()}


def directory(subject: Subject) -> Path:
  """Where the quantized model goes."""
  return subject.run.path / "quantized"


def quantized_states(subject: Subject, job: Job, text: user_text.Text, name: str, key: str) -> states_lib.States:
  """The states of the quantized model on `text`, as far as its layers are written."""

  def first() -> list[Any]:
    top = subject.source.top(subject.dtype)
    return [steps.embed(subject.functions, top, batch) for batch in text.batches]

  def advance(layer: int, states: Sequence[Any]) -> list[Any]:
    packed, others = native.read_layer(directory(subject) / native.layer_file(layer), layer)
    return through(subject, job, layer, packed, others, states)

  return states_lib.States(subject.run.path / "states" / name, key, first, advance, keep=False)


def through(subject: Subject, job: Job, layer: int, packed: Mapping[str, qtensor.QTensor],
            others: Mapping[str, np.ndarray], states: Sequence[Any]) -> list[Any]:
  """Sends states through one quantized block."""
  experts = packing.widened(packed, most_rows(subject, job)) if packed else None
  block = convert.build_block(subject.source.config, layer, others, subject.dtype, experts)
  return [jax.tree.map(np.asarray, steps.block(subject.functions, block, state)[0]) for state in states]


def encode(subject: Subject, job: Job, text: user_text.Text | None,
           states: states_lib.States | None) -> dict[int, dict[str, Any]]:
  """Writes every layer's file that is not there yet.

  Args:
    subject: the checkpoint.
    job: codec and bits.
    text: calibration text, where the codec looks at rows.
    states: those of the full-precision model on it.

  Returns:
    By block, the metadata of its file: `key`, and `tokens` of each expert where rows were seen.
  """
  if not job.codec.needs_moment:
    states = None
  elif job.sequential:
    key = subject.text_key("states", {"model": "quantized", "job": job.spec(job.layers)}, text)
    states = quantized_states(subject, job, text, "sequential", key)
  metas = {}
  with progress.bar("encode", len(subject.layers)) as advance:
    for layer in subject.layers:
      key = _layer_key(subject, job, layer, text)
      metas[layer] = _saved(directory(subject), layer, key) or _make(subject, job, layer, key, states)
      advance()
  return metas


def _layer_key(subject: Subject, job: Job, layer: int, text: user_text.Text | None) -> str:
  if layer not in subject.sparse:
    return subject.key("encoded", {})
  spec = job.spec(subject.sparse.index(layer))
  return subject.text_key("encoded", spec, text) if job.codec.needs_moment else subject.key("encoded", spec)


def _saved(folder: Path, layer: int, key: str) -> dict[str, Any] | None:
  """The metadata of a layer's file, if it is there, whole, and made from what this run reads."""
  name = native.layer_file(layer)
  meta = native.read_meta(folder, layer)
  if meta is None:
    return None
  if meta.get("key") != key:
    log.warning("%s was made from something else: making it again", name)
    return None
  return meta if _whole(folder / name) else None


def _whole(path: Path) -> bool:
  """Whether the tensors in a file are those that were written; looks at their checksums."""
  try:
    container.load(path)
  except container.ContainerError as error:
    log.warning("%s: making it again", error)
    return False
  return True


def _make(subject: Subject, job: Job, layer: int, key: str, states: states_lib.States | None) -> dict[str, Any]:
  """Encodes one layer and writes its file; puts the states after it on disk where the next layer needs them."""
  parts: dict[int, dict[str, qtensor.QTensor]] = {}
  after, tokens = None, None
  if layer in subject.sparse:
    visit = _visitor(subject, job, layer, parts)
    if states is None:
      for expert in range(subject.source.experts):
        visit(expert, subject.source.expert(layer, expert), None, None)
    else:
      after, seen = measure.forward_layer(subject, layer, states.at(layer), visit)
      tokens = np.asarray(seen.tokens).tolist()
      if job.sequential:
        after = None  # the next layer reads what the quantized one gives
  packed = packing.join_layer([parts.pop(expert) for expert in sorted(parts)]) if parts else {}
  others = subject.source.others(layer)
  meta = {"key": key, "tokens": tokens}
  order_bits = 0
  if packed and job.order is not None:
    order_bits = channels.order_bits(job.order[subject.sparse.index(layer)])
  native.save_layer(directory(subject), layer, packed, others, meta, order_bits=order_bits)
  if states is not None and layer in subject.sparse and layer + 1 < len(subject.layers):
    if job.sequential:
      states.put(layer + 1, through(subject, job, layer, packed, others, states.at(layer)))
    elif not states.has(layer + 1):
      states.put(layer + 1, after)
  return meta


def _visitor(subject: Subject, job: Job, layer: int,
             parts: dict[int, dict[str, qtensor.QTensor]]) -> Callable[..., None]:
  """What encodes and packs each expert of a block into `parts`."""
  place, group = subject.sparse.index(layer), job.codec.group

  def visit(expert: int, weights: Mapping[str, np.ndarray], rows: Any, mids: Any) -> None:
    own = {name: bits[place, expert] for name, bits in job.bits.items()}
    if job.order is None:
      widths = {name: int(bits[0]) for name, bits in own.items()}
    else:
      order = job.order[place, expert]
      weights, mids = neurons.sort_expert(weights, order), None if mids is None else mids[:, order]
      widths = {name: neurons.group_widths(name, bits, weights[name].shape, group) for name, bits in own.items()}
    encoded = stream.encode_expert(weights, rows, mids, widths, codec=job.codec)
    parts[expert] = packing.pack_expert(encoded, own, group)

  return visit


def finish(subject: Subject, metas: Mapping[int, Mapping[str, Any]], manifest: Mapping[str, Any]) -> native.Quantized:
  """Writes what is beside the layers, the manifest last; an earlier call's that says the same is left as it is.

  Args:
    subject: the checkpoint.
    metas: what `encode` gave.
    manifest: JSON-able: codec, plan, source.
  """
  folder, key = directory(subject), subject.key("encoded", {"tensors": "top"})
  if (native.read_meta(folder, None) or {}).get("key") != key or not _whole(folder / native.TOP):
    native.save_top(folder, subject.source.others(None), {"key": key})
  made = artifacts.digest([*(metas[layer]["key"] for layer in subject.layers), key, dict(manifest)])
  files = {path.name: path.read_bytes() for path in room.carried_files(subject.source.directory)}
  try:
    before = native.open(folder)
    if before.manifest.get("made") == made and before.files() == files:
      return before
  except native.QuantizedError:  # not finished yet, or a file beside the layers is damaged
    pass
  native.finish(folder, files, dict(manifest) | {"layers": len(subject.layers), "made": made})
  return native.open(folder)
