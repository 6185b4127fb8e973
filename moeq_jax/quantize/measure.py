"""The sweeps before encoding: forward, backward and errors, each layer a product of its own.

They go through the layers one by one, with the weights of one expert in memory. What a sweep measured of a layer is
saved before the layer's states, so a killed run finds either both or begins that layer again.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from moeq_jax import artifacts, codecs, progress, steps, user_text
from moeq_jax.calibrate import channels as channel_statistics
from moeq_jax.calibrate import layerwise
from moeq_jax.encode import stream
from moeq_jax.models import names
from moeq_jax.quantize import states as states_lib
from moeq_jax.quantize.subject import Arrays, Subject

ERRORS = ("weight", "output", "fisher", "norm")


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How experts are encoded where errors are measured.

  Attributes:
    codec: the codec.
    widths: candidate bits.
    neurons: whether errors are those of every neuron of every projection, not of whole projections.
  """

  codec: codecs.Codec
  widths: tuple[int, ...]
  neurons: bool = False

  @property
  def spec(self) -> dict[str, Any]:
    """What a product's key says of it."""
    return {"codec": str(self.codec), "widths": list(self.widths)} | ({"neurons": True} if self.neurons else {})

  def expert(self, number: int, weights: Mapping[str, np.ndarray], rows: Any, mids: Any,
             **gradients: Any) -> dict[str, Any]:
    """The errors of one expert, see `encode.stream`; of neurons with what `ChannelStats` says of its inputs.

    Raises:
      layerwise.NotFiniteError: sums of squares over its inputs are not finite; names them and the expert.
    """
    seen = channel_statistics.of_rows(rows, mids, number) if self.neurons and rows is not None else {}
    ask = functools.partial(stream.channel_errors if self.neurons else stream.expert_errors, weights, rows, mids)
    return ask(codec=self.codec, widths=self.widths, **gradients) | seen


def text_states(subject: Subject, text: user_text.Text, name: str, *, keep: bool) -> states_lib.States:
  """The states of the full-precision model on `text`, kept in `states/NAME`."""

  def first() -> list[Any]:
    top = subject.source.top(subject.dtype)
    return [steps.embed(subject.functions, top, batch) for batch in text.batches]

  def advance(layer: int, states: Sequence[Any]) -> list[Any]:
    return forward_layer(subject, layer, states)[0]

  key = subject.text_key("states", {"model": "full precision"}, text)
  return states_lib.States(subject.run.path / "states" / name, key, first, advance, keep=keep)


def forward_layer(subject: Subject, layer: int, states: Sequence[Any],
                  visit: Callable[..., None] | None = None) -> tuple[list[Any], Any]:
  """One block in full precision, expert by expert: the next states, and who chose which expert.

  Raises:
    ValueError: something is not finite; names block and expert.
  """
  with _in_block(layer):
    return layerwise.forward_layer(subject.functions, subject.block(layer), subject.experts(layer), states, visit)


@contextlib.contextmanager
def _in_block(layer: int) -> Iterator[None]:
  """Says in which block something was not finite."""
  try:
    yield
  except layerwise.NotFiniteError as error:
    raise ValueError(f"block {layer}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------------


def forward(subject: Subject, text: user_text.Text, states: states_lib.States,
            encoding: Encoding | None) -> dict[int, dict[str, np.ndarray]]:
  """Sends the calibration text through the model; with `encoding`, measures errors on the way.

  Returns:
    By block, for those with experts: `tokens` and `gate_weight` `[E]`, and errors as `errors` gives them.
  """
  spec = {"encoding": encoding.spec if encoding else None}
  key, found = subject.text_key("forward", spec, text), {}
  with progress.bar("forward", len(subject.layers)) as advance:
    for layer in subject.layers:
      if layer in subject.sparse:
        fresh: list[Any] = []
        make = functools.partial(_forward_layer, subject, states, layer, encoding, fresh)
        found[layer] = subject.run.product(f"forward/layer-{layer:05d}.npz", key, Arrays.load, make).values
        if fresh:
          states.put(layer + 1, fresh.pop())
      advance()
  return found


def _forward_layer(subject: Subject, states: states_lib.States, layer: int, encoding: Encoding | None,
                   fresh: list[Any]) -> Arrays:
  """What the forward sweep measures of one block; the states after it are appended to `fresh`."""
  table: dict[int, dict[str, np.ndarray]] = {}

  def visit(expert: int, weights: Mapping[str, np.ndarray], rows: Any, mids: Any) -> None:
    table[expert] = encoding.expert(expert, weights, rows, mids)

  after, stats = forward_layer(subject, layer, states.at(layer), visit if encoding else None)
  fresh.append(after)
  return Arrays({"tokens": np.asarray(stats.tokens), "gate_weight": np.asarray(stats.gate_weight)} | _stack(table))


def backward(subject: Subject, text: user_text.Text, states: states_lib.States) -> dict[int, dict[str, np.ndarray]]:
  """Sends derivatives of the loss back from the last block to the first with experts.

  Returns:
    By block: `router_grad_sq` `[E]`, the sum over batches of the squared norm of d loss / d router row; and
    `grad_sq_PROJECTION` `[E, N]`.
  """
  layers, batches = list(reversed(subject.layers)), text.batches
  predicted = [predictions(batch) for batch in batches]

  def first() -> list[Any]:
    top = subject.source.top(subject.dtype)
    last = states.at(len(layers))
    return [layerwise.head_gradients(subject.functions, top, s, b)[1] for s, b in zip(last, batches, strict=True)]

  def step(place: int, gradients: Sequence[Any]) -> tuple[list[Any], Any]:
    layer = layers[place]
    with _in_block(layer):
      return layerwise.backward_layer(subject.functions, subject.block(layer), subject.experts(layer), states.at(layer),
                                      gradients, [1 / count for count in predicted])

  key, found = subject.text_key("backward", {}, text), {}
  gradients = states_lib.States(states.folder.parent / "gradients", key, first, lambda *a: step(*a)[0], keep=False)
  with progress.bar("backward", len(layers)) as advance:
    for place, layer in enumerate(layers):
      if layer in subject.sparse:
        fresh: list[Any] = []

        def make() -> Arrays:
          before, sums = step(place, gradients.at(place))
          fresh.append(before)
          squares = {f"grad_sq_{name}": np.asarray(value) for name, value in sums.grad_sq.items()}
          return Arrays({"router_grad_sq": np.asarray(sums.router_grad_sq)} | squares)

        found[layer] = subject.run.product(f"backward/layer-{layer:05d}.npz", key, Arrays.load, make).values
        if fresh and layer != subject.sparse[0]:
          gradients.put(place + 1, fresh.pop())
      advance()
  gradients.remove()
  return found


def predictions(batch: Any) -> int:
  """Tokens that are predicted in a batch: all but the first of a sequence, or the targets that are no padding."""
  if isinstance(batch, Mapping):
    return int(np.count_nonzero(batch["targets"] >= 0))
  return batch.shape[0] * (batch.shape[1] - 1)


def errors(subject: Subject, text: user_text.Text | None, states: states_lib.States | None,
           gradients: Mapping[int, Mapping[str, np.ndarray]] | None,
           encoding: Encoding) -> dict[int, dict[str, np.ndarray]]:
  """Encodes every expert at every width and measures what that costs, in a sweep of its own.

  Args:
    subject: the checkpoint.
    text, states, gradients: calibration text, its states and what `backward` gave, for the Fisher errors; else None.
    encoding: codec and widths.

  Returns:
    By block, the errors (see `artifacts.ErrorTable`; of neurons `channels.ChannelErrors` and `ChannelStats`).
  """
  spec = encoding.spec | {"fisher": gradients is not None}
  key = subject.text_key("errors", spec, text) if text else subject.key("errors", spec)
  found = {}
  with progress.bar("errors", len(subject.sparse)) as advance:
    for layer in subject.sparse:
      own = gradients[layer] if gradients else None
      make = functools.partial(_errors_layer, subject, states, layer, encoding, own, text.tokens if text else 1)
      found[layer] = subject.run.product(f"errors/layer-{layer:05d}.npz", key, Arrays.load, make).values
      advance()
  return found


def _errors_layer(subject: Subject, states: states_lib.States | None, layer: int, encoding: Encoding,
                  gradients: Mapping[str, np.ndarray] | None, tokens: int) -> Arrays:
  table: dict[int, dict[str, np.ndarray]] = {}

  def visit(expert: int, weights: Mapping[str, np.ndarray], rows: Any, mids: Any) -> None:
    squares = {name: gradients[f"grad_sq_{name}"][expert] for name in weights} if gradients else None
    table[expert] = encoding.expert(expert, weights, rows, mids, grad_sq=squares, total_tokens=tokens)

  if states is None:
    for expert in range(subject.source.experts):
      visit(expert, subject.source.expert(layer, expert), None, None)
  else:
    forward_layer(subject, layer, states.at(layer), visit)
  return Arrays(_stack(table))


def _stack(table: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """What was measured of a block's experts as arrays `[E, ...]`; what was not measured is left out."""
  if not table:
    return {}
  return {name: np.stack([table[expert][name] for expert in sorted(table)])
          for name, first in table[0].items() if first is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Evidence
# ---------------------------------------------------------------------------------------------------------------------


def stats(subject: Subject, text: user_text.Text | None, seen: Mapping[int, Mapping[str, np.ndarray]],
          gradients: Mapping[int, Mapping[str, np.ndarray]] | None, routers: np.ndarray) -> artifacts.Stats:
  """The statistics that scores read; what no sweep measured is None."""
  fields: dict[str, Any] = {}
  for name, source in (("tokens", seen), ("gate_weight", seen), ("router_grad_sq", gradients),
                       *((f"grad_sq_{p}", gradients) for p in artifacts.PROJECTIONS)):
    have = bool(source) and name in source[subject.sparse[0]]
    fields[name] = np.stack([source[layer][name] for layer in subject.sparse]) if have else None
  squares, batches = fields.pop("router_grad_sq"), len(text.batches) if text else 0
  return artifacts.Stats(
      router_norm=np.linalg.norm(routers.astype(np.float64), axis=-1),
      router_grad=None if squares is None else np.sqrt(squares.astype(np.float64) / batches),
      moment_in=None, moment_mid=None, total_tokens=text.tokens if text else 0, batches=batches, **fields)


def error_table(subject: Subject, found: Mapping[int, Mapping[str, np.ndarray]],
                encoding: Encoding) -> artifacts.ErrorTable:
  """The errors of all layers; what no sweep measured is None."""
  shapes = projection_shapes(subject)
  first = found[subject.sparse[0]] if found else {}
  fields = {name: np.stack([found[layer][name] for layer in subject.sparse]) if name in first else None
            for name in ERRORS}
  return artifacts.ErrorTable(
      **fields, widths=encoding.widths, codec=str(encoding.codec), group=encoding.codec.group,
      projections=tuple(shapes), sizes=tuple(int(np.prod(shape)) for shape in shapes.values()))


def projection_shapes(subject: Subject) -> dict[str, tuple[int, int]]:
  """`{projection: (K, N)}` of an expert."""
  layer, all_shapes = subject.sparse[0], names.block_shapes(subject.source.config, subject.sparse[0])
  return {name: all_shapes[f"blocks/{layer}/moe/{name}"][1:] for name in subject.source.projections}


class Experts(Sequence):
  """The experts of every layer as scores see them, `[E, K, N]` a projection, read from disk when asked for."""

  def __init__(self, subject: Subject):
    self._subject = subject

  def __len__(self) -> int:
    return len(self._subject.sparse)

  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
    return _Layer(self._subject, self._subject.sparse[range(len(self))[index]])


class _Layer(Mapping):
  """One layer's experts by projection; nothing is read before it is asked for, and nothing is kept."""

  def __init__(self, subject: Subject, layer: int):
    self._subject, self._layer = subject, layer

  def __getitem__(self, name: str) -> "_Stack":
    if name not in self._subject.source.projections:
      raise KeyError(name)
    return _Stack(self._subject, self._layer, name)

  def __iter__(self):
    return iter(self._subject.source.projections)

  def __len__(self) -> int:
    return len(self._subject.source.projections)


class _Stack(Sequence):
  """One projection of a layer's experts, `[E, K, N]`: as an array all of them, item by item one at a time."""

  def __init__(self, subject: Subject, layer: int, name: str):
    self._source, self._layer, self._name = subject.source, layer, name

  def __len__(self) -> int:
    return self._source.experts

  def __getitem__(self, expert: int) -> np.ndarray:
    return self._source.projection(self._layer, range(len(self))[expert], self._name)

  def __iter__(self) -> Iterator[np.ndarray]:
    """The experts one after the other; the next is read while one is in use."""
    with futures.ThreadPoolExecutor(1) as reader:
      following = reader.submit(self.__getitem__, 0)
      for expert in range(len(self)):
        weights = following.result()
        if expert + 1 < len(self):
          following = reader.submit(self.__getitem__, expert + 1)
        yield weights

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.stack([np.asarray(w, dtype) for w in self])
